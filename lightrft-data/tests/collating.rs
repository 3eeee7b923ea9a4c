//! A collate function: each pass by itself, in the sampler's order, in the workers, with the loader's other promises kept.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use lightrft_data::{
    CollatedBatch, DataLoader, Dataset, DistributedSampler, Error, GroupPlacement, Groups, InMemory,
    LoaderConfig, MicroBatch, PadConfig, Resume, SamplerConfig, Shuffle, Tail, TokenBatch, TokenSequence,
    pad,
};
use proptest::prelude::*;

fn sampler(len: usize, rank: usize, world: usize) -> DistributedSampler {
    let (shuffle, tail) = (Shuffle::Seekable, Tail::Pad);
    DistributedSampler::new(SamplerConfig { len, rank, world, seed: 3, shuffle, tail }).unwrap()
}

fn config(batch_size: usize, workers: usize) -> LoaderConfig {
    LoaderConfig { workers, prefetch_batches: 3, ..LoaderConfig::new(batch_size) }
}

/// Sample `i` is `i` tokens `i`, and one more.
fn rows(len: usize) -> InMemory<TokenSequence> {
    (0..len).map(|i| TokenSequence::from_prompt(&vec![i as u32; i + 1])).collect()
}

fn padded(rows: Vec<TokenSequence>) -> Result<TokenBatch, Error> {
    pad(&rows, &PadConfig::left(0))
}

fn all<D: Dataset + 'static, B: Send + 'static>(loader: &mut DataLoader<D, B>) -> Vec<B> {
    loader.batches().collect::<Result<_, _>>().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn each_pass_is_collated_by_itself_and_in_order_whatever_the_threads(
        len in 1usize..40, world in 1usize..3, batch_size in 1usize..9, most in 1usize..5, workers in 0usize..4,
        size in 1usize..3,
    ) {
        let groups = Groups { size, placement: GroupPlacement::OneRank };
        let config = LoaderConfig { micro_batch: MicroBatch::Samples(most * size), ..config(batch_size * size, workers) };
        let sampler = || sampler(len, 0, world).in_groups(groups).unwrap();
        let plain = all(&mut DataLoader::new(rows(len), sampler(), LoaderConfig { workers: 0, ..config.clone() }).unwrap());
        let mut loader = DataLoader::new(rows(len), sampler(), config).unwrap().collating(padded);
        let collated = all(&mut loader);
        prop_assert_eq!(collated.len(), plain.len());
        for (collated, plain) in collated.iter().zip(&plain) {
            prop_assert_eq!(collated.epoch, plain.epoch);
            let expected: Vec<_> = plain.passes().map(|rows| padded(rows.to_vec()).unwrap()).collect();
            let found: Vec<_> = collated.passes.iter().map(|pass| pass.data.clone()).collect();
            prop_assert_eq!(found, expected);
            prop_assert_eq!(collated.passes.iter().flat_map(|p| p.indices.clone()).collect::<Vec<_>>(), plain.indices.clone());
            prop_assert_eq!(collated.passes.iter().flat_map(|p| p.groups.clone()).collect::<Vec<_>>(), plain.groups.clone());
            prop_assert_eq!(collated.passes.iter().flat_map(|p| p.copies.clone()).collect::<Vec<_>>(), plain.copies.clone());
        }
    }

    #[test]
    fn stopping_after_any_batch_and_resuming_equals_the_unbroken_run(
        len in 1usize..40, world in 1usize..4, batch_size in 1usize..6, stop in 0usize..12, workers in 0usize..3,
    ) {
        let fresh = || {
            DataLoader::new(rows(len), sampler(len, 0, world), config(batch_size, workers)).unwrap().collating(padded)
        };
        let whole = all(&mut fresh());
        let mut first = fresh();
        let mut pieces: Vec<_> = first.batches().take(stop).collect::<Result<_, _>>().unwrap();
        let state = first.state();
        drop(first);
        let mut second = fresh();
        prop_assert_eq!(second.restore(&state).unwrap(), Resume::Exact);
        pieces.extend(all(&mut second));
        prop_assert_eq!(pieces, whole);
    }
}

#[test]
fn the_workers_collate_and_without_any_the_caller_does() {
    for (workers, expected) in [(2, "data-"), (0, thread::current().name().unwrap())] {
        let named = |_| Ok(thread::current().name().unwrap_or_default().to_owned());
        let loader = DataLoader::new(rows(20), sampler(20, 0, 1), config(4, workers)).unwrap();
        for batch in all(&mut loader.collating(named)) {
            assert!(batch.passes[0].data.starts_with(expected), "{:?}", batch.passes[0].data);
        }
    }
}

#[test]
fn a_loader_that_has_begun_is_given_a_collate_function_and_goes_on_where_it_was() {
    let mut plain = DataLoader::new(rows(20), sampler(20, 0, 1), config(4, 2)).unwrap();
    let whole: Vec<_> = sampler(20, 0, 1).indices().unwrap().collect();
    plain.next_batch().unwrap();
    let mut collated = plain.collating(padded);
    let second = collated.next_batch().unwrap().unwrap();
    assert_eq!(second.passes[0].indices, whole[4..8]);
}

#[test]
fn an_error_names_the_samples_keeps_the_position_and_may_be_tried_again() {
    let order: Vec<_> = sampler(30, 0, 1).indices().unwrap().collect();
    for (workers, panics) in [(0, false), (0, true), (1, false), (3, false), (2, true)] {
        let failures = AtomicUsize::new(2);
        let bad = order[13];
        let collate = move |rows: Vec<TokenSequence>| {
            let hit = rows.iter().any(|row| row.ids.len() == bad + 1);
            let fails = || failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
            match hit && fails().is_ok() {
                true if panics => panic!("no such shape"),
                true => Err(Error::other("no such shape")),
                false => Ok(rows.len()),
            }
        };
        let config = LoaderConfig { micro_batch: MicroBatch::Samples(3), ..config(6, workers) };
        let mut loader = DataLoader::new(rows(30), sampler(30, 0, 1), config).unwrap().collating(collate);
        loader.set_epoch(0, 0).unwrap();
        let (mut seen, mut errors) = (Vec::new(), 0);
        while seen.len() < 30 {
            let before = loader.state();
            match loader.next_batch() {
                Ok(batch) => seen.extend(batch.unwrap().passes.into_iter().flat_map(|pass| pass.indices)),
                Err(error) => {
                    errors += 1;
                    assert_eq!(loader.state(), before, "an error must not move the loader");
                    let shown = error.to_string();
                    match error {
                        Error::Collate { epoch: 0, pass: 0, indices, source } => {
                            assert!(!panics && indices == order[12..15], "{indices:?}");
                            assert!(source.to_string().contains("no such shape"));
                        }
                        Error::CollatePanicked { epoch: 0, pass: 0, indices, message } => {
                            assert!(panics && indices == order[12..15] && message == "no such shape");
                        }
                        other => panic!("{other:?}"),
                    }
                    assert!(shown.contains(&bad.to_string()), "{shown}");
                }
            }
        }
        assert_eq!((errors, seen), (2, order.clone()), "{workers} workers");
    }
}

/// Passes that may still be collated; each tells its first sample before it waits to be let through.
struct Gate {
    begun: Mutex<Sender<usize>>,
    open: Arc<(Mutex<usize>, Condvar)>,
}

impl Gate {
    fn new(open: usize) -> (Self, Receiver<usize>) {
        let (begun, heard) = channel();
        (Self { begun: Mutex::new(begun), open: Arc::new((Mutex::new(open), Condvar::new())) }, heard)
    }

    fn pass(&self, rows: &[TokenSequence]) {
        let _ = self.begun.lock().unwrap().send(rows[0].ids.len() - 1);
        let (count, changed) = &*self.open;
        let (mut left, waited) = changed
            .wait_timeout_while(count.lock().unwrap(), Duration::from_secs(20), |left| *left == 0)
            .unwrap();
        assert!(!waited.timed_out(), "nobody opened the gate");
        *left -= 1;
    }
}

#[test]
fn no_more_than_the_agreed_batches_are_collated_ahead_however_slow_the_consumer() {
    let (gate, heard) = Gate::new(usize::MAX);
    let config = LoaderConfig { prefetch_batches: 4, ..config(2, 3) };
    let loader = DataLoader::new(rows(60), sampler(60, 0, 1), config).unwrap();
    let mut loader = loader.collating(move |rows: Vec<TokenSequence>| {
        gate.pass(&rows);
        Ok(rows.len())
    });
    let order: Vec<_> = sampler(60, 0, 1).indices().unwrap().step_by(2).collect();
    for batches_out in 1..=10 {
        loader.next_batch().unwrap().unwrap();
        // Waiting for all that the bound allows shows that collating ahead happens at all.
        let new = if batches_out == 1 { 5 } else { 1 };
        let begun: HashSet<usize> =
            (0..new).map(|_| heard.recv_timeout(Duration::from_secs(20)).unwrap()).collect();
        assert!(begun.iter().all(|first| order[..batches_out + 4].contains(first)));
        assert!(heard.try_recv().is_err(), "a batch beyond the bound was begun");
    }
}

#[test]
fn a_stalled_collate_function_is_an_error_after_the_deadline_and_does_not_hold_up_the_end() {
    let (gate, _heard) = Gate::new(0);
    let open = Arc::clone(&gate.open);
    let config = LoaderConfig { deadline: Duration::from_millis(50), ..config(2, 1) };
    let loader = DataLoader::new(rows(60), sampler(60, 0, 1), config).unwrap();
    let mut loader = loader.collating(move |rows: Vec<TokenSequence>| {
        gate.pass(&rows);
        Ok(())
    });
    let began = Instant::now();
    assert!(matches!(loader.next_batch(), Err(Error::Stalled { .. })));
    drop(loader);
    assert!(began.elapsed() < Duration::from_secs(15), "dropping waited for the stalled worker");
    *open.0.lock().unwrap() = 1000;
    open.1.notify_all();
}

#[test]
fn dropping_the_loader_ends_its_workers_and_lets_go_of_what_was_collated_ahead() {
    let alive = Arc::new(());
    let held = Arc::clone(&alive);
    let loader = DataLoader::new(rows(60), sampler(60, 0, 1), config(2, 4)).unwrap();
    let mut loader = loader.collating(move |_| Ok(Arc::clone(&held)));
    let batch: CollatedBatch<Arc<()>> = loader.next_batch().unwrap().unwrap();
    assert!(Arc::ptr_eq(&batch.passes[0].data, &alive));
    drop((batch, loader));
    assert_eq!(Arc::strong_count(&alive), 1, "a worker still holds the function, or a batch lies about");
}
