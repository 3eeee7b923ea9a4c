//! The loader: order whatever the threads do, position, bounded reading ahead, errors, clean end.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use lightrft_data::{
    Batch, DataLoader, Dataset, DistributedSampler, Error, InMemory, LastBatch, LoaderConfig, Resume,
    SamplerConfig, Shuffle, Tail,
};
use proptest::prelude::*;

fn sampler(len: usize, rank: usize, world: usize) -> DistributedSampler {
    let (shuffle, tail) = (Shuffle::TorchExact, Tail::Pad);
    DistributedSampler::new(SamplerConfig { len, rank, world, seed: 3, shuffle, tail }).unwrap()
}

fn config(batch_size: usize, workers: usize) -> LoaderConfig {
    LoaderConfig { workers, prefetch_batches: 3, ..LoaderConfig::new(batch_size) }
}

fn numbers(len: usize) -> InMemory<usize> {
    (0..len).map(|i| i * 10).collect()
}

fn all<D: Dataset + 'static>(loader: &mut DataLoader<D>) -> Vec<Batch<D::Item>> {
    loader.batches().collect::<Result<_, _>>().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn the_order_is_the_samplers_whatever_the_threads(
        len in 1usize..60, world in 1usize..4, batch_size in 1usize..9, workers in 0usize..4, prefetch in 1usize..5,
        drop_last: bool,
    ) {
        for rank in 0..world {
            let config = LoaderConfig {
                last_batch: if drop_last { LastBatch::Drop } else { LastBatch::Keep },
                prefetch_batches: prefetch,
                ..config(batch_size, workers)
            };
            let mut loader = DataLoader::new(numbers(len), sampler(len, rank, world), config).unwrap();
            let announced = loader.remaining_batches();
            let batches = all(&mut loader);
            prop_assert_eq!(batches.len() as u64, announced);
            let expected: Vec<_> = sampler(len, rank, world).indices().unwrap().collect();
            let whole = if drop_last { expected.len() / batch_size * batch_size } else { expected.len() };
            let indices: Vec<_> = batches.iter().flat_map(|b| b.indices.clone()).collect();
            prop_assert_eq!(&indices[..], &expected[..whole]);
            let samples: Vec<_> = batches.iter().flat_map(|b| b.samples.clone()).collect();
            prop_assert_eq!(samples, indices.iter().map(|i| i * 10).collect::<Vec<_>>());
            prop_assert!(loader.next_batch().unwrap().is_none(), "the end is the end");
        }
    }

    #[test]
    fn stopping_after_any_batch_and_resuming_equals_the_unbroken_run(
        len in 1usize..60, world in 1usize..4, batch_size in 1usize..6, stop in 0usize..12, workers in 0usize..3,
    ) {
        let fresh = || DataLoader::new(numbers(len), sampler(len, 0, world), config(batch_size, workers)).unwrap();
        let mut unbroken = fresh();
        unbroken.set_epoch(4, 0).unwrap();
        let whole = all(&mut unbroken);

        let mut first = fresh();
        first.set_epoch(4, 0).unwrap();
        let mut pieces: Vec<_> = first.batches().take(stop).collect::<Result<_, _>>().unwrap();
        // What was read ahead must not count: the state is taken while the workers run.
        let state = first.state();
        drop(first);
        let mut second = fresh();
        prop_assert_eq!(second.restore(&state).unwrap(), Resume::Exact);
        pieces.extend(all(&mut second));
        prop_assert_eq!(pieces, whole);
    }
}

#[test]
fn an_epoch_after_the_other_reads_each_in_its_own_order() {
    let mut loader = DataLoader::new(numbers(20), sampler(20, 0, 2), config(3, 2)).unwrap();
    for epoch in 0..4 {
        loader.set_epoch(epoch, 0).unwrap();
        let batches = all(&mut loader);
        assert!(batches.iter().all(|batch| batch.epoch == epoch));
        let mut expected = sampler(20, 0, 2);
        expected.set_epoch(epoch, 0).unwrap();
        let indices: Vec<_> = batches.into_iter().flat_map(|batch| batch.indices).collect();
        assert_eq!(indices, expected.indices().unwrap().collect::<Vec<_>>());
        assert_eq!((loader.state().epoch, loader.state().consumed), (epoch, 20));
    }
}

/// Fails, or panics, on one sample for as long as it is told to.
struct Faulty {
    bad: usize,
    panics: bool,
    failures_left: AtomicUsize,
}

impl Dataset for Faulty {
    type Item = usize;

    fn len(&self) -> usize {
        30
    }

    fn get(&self, index: usize) -> Result<usize, Error> {
        let fails = index == self.bad
            && self
                .failures_left
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1))
                .is_ok();
        match (fails, self.panics) {
            (true, true) => panic!("no such image"),
            (true, false) => Err(Error::other("no such image")),
            _ => Ok(index),
        }
    }

    fn locate(&self, index: usize) -> String {
        format!("shelf:{index}")
    }
}

#[test]
fn an_error_names_the_sample_keeps_the_position_and_may_be_tried_again() {
    let order: Vec<_> = sampler(30, 0, 1).indices().unwrap().collect();
    for (workers, panics) in [(0, false), (1, false), (3, false), (2, true)] {
        let data = Faulty { bad: order[13], panics, failures_left: AtomicUsize::new(2) };
        let mut loader = DataLoader::new(data, sampler(30, 0, 1), config(4, workers)).unwrap();
        let mut seen = Vec::new();
        let mut errors = 0;
        while seen.len() < 30 {
            let before = loader.state();
            match loader.next_batch() {
                Ok(batch) => seen.extend(batch.expect("not at the end").samples),
                Err(error) => {
                    errors += 1;
                    assert_eq!(loader.state(), before, "an error must not move the loader");
                    match error {
                        Error::Sample { index, at, source } => {
                            assert!(!panics && index == order[13] && at == format!("shelf:{index}"));
                            assert!(source.to_string().contains("no such image"));
                        }
                        Error::SamplePanicked { index, message } => {
                            assert!(panics && index == order[13] && message.contains("no such image"));
                        }
                        other => panic!("{other:?}"),
                    }
                }
            }
        }
        assert_eq!((errors, seen), (2, order.clone()));
        let failing = Faulty { bad: order[0], panics: false, failures_left: AtomicUsize::new(usize::MAX) };
        let mut loader = DataLoader::new(failing, sampler(30, 0, 1), config(4, workers)).unwrap();
        assert_eq!(loader.batches().take(100).count(), 1, "a loop over batches ends at the first error");
    }
}

/// How many samples may still pass.
type Passes = Arc<(Mutex<usize>, Condvar)>;

/// Tells which samples were begun, and holds each until it is let through.
struct Gate {
    begun: Mutex<Sender<usize>>,
    open: Passes,
}

impl Gate {
    fn new(open: usize) -> (Self, Receiver<usize>, Passes) {
        let (begun, heard) = channel();
        let open = Arc::new((Mutex::new(open), Condvar::new()));
        (Self { begun: Mutex::new(begun), open: Arc::clone(&open) }, heard, open)
    }
}

impl Dataset for Gate {
    type Item = usize;

    fn len(&self) -> usize {
        100
    }

    fn get(&self, index: usize) -> Result<usize, Error> {
        let _ = self.begun.lock().unwrap().send(index);
        let (count, changed) = &*self.open;
        let (mut left, waited) = changed
            .wait_timeout_while(count.lock().unwrap(), Duration::from_secs(20), |left| *left == 0)
            .unwrap();
        assert!(!waited.timed_out(), "nobody opened the gate");
        *left -= 1;
        Ok(index)
    }
}

#[test]
fn no_more_than_the_agreed_batches_are_read_ahead_however_slow_the_consumer() {
    let (gate, heard, _open) = Gate::new(usize::MAX);
    let config = LoaderConfig { prefetch_batches: 4, ..config(2, 3) };
    let mut loader = DataLoader::new(gate, sampler(100, 0, 1), config).unwrap();
    for batches_out in 1..=10 {
        loader.next_batch().unwrap().unwrap();
        // After so many batches went out the workers may hold four more, eight samples, and never begin a ninth.
        let most = (batches_out + 4) * 2;
        let order: Vec<_> = sampler(100, 0, 1).indices().unwrap().take(most).collect();
        // Those they will all begin: waiting for them shows that reading ahead happens at all.
        let mut begun: HashSet<usize> = HashSet::new();
        let new = if batches_out == 1 { most } else { 2 };
        for _ in 0..new {
            begun.insert(heard.recv_timeout(Duration::from_secs(20)).unwrap());
        }
        assert!(begun.iter().all(|index| order.contains(index)));
        assert!(heard.try_recv().is_err(), "a sample beyond the bound was begun");
    }
}

#[test]
fn a_stalled_data_set_is_an_error_after_the_deadline_and_does_not_hold_up_the_end() {
    let (gate, _heard, open) = Gate::new(0);
    let config = LoaderConfig { deadline: Duration::from_millis(50), ..config(2, 1) };
    let mut loader = DataLoader::new(gate, sampler(100, 0, 1), config).unwrap();
    let first = sampler(100, 0, 1).indices().unwrap().next().unwrap();
    let began = Instant::now();
    let error = loader.next_batch().unwrap_err();
    assert!(matches!(error, Error::Stalled { first_index, .. } if first_index == first), "{error:?}");
    drop(loader);
    assert!(began.elapsed() < Duration::from_secs(15), "dropping waited for the stalled worker");
    *open.0.lock().unwrap() = 1000;
    open.1.notify_all();
}

#[test]
fn a_stalled_batch_is_waited_for_again_and_read_by_no_second_worker() {
    let (gate, heard, open) = Gate::new(0);
    let config = LoaderConfig { deadline: Duration::from_millis(50), ..config(2, 1) };
    let mut loader = DataLoader::new(gate, sampler(100, 0, 1), config).unwrap();
    for _ in 0..3 {
        assert!(matches!(loader.next_batch(), Err(Error::Stalled { .. })));
    }
    *open.0.lock().unwrap() = 1000;
    open.1.notify_all();
    let batch = loop {
        match loader.next_batch() {
            Ok(batch) => break batch.unwrap(),
            Err(Error::Stalled { .. }) => {}
            Err(other) => panic!("{other:?}"),
        }
    };
    let order: Vec<_> = sampler(100, 0, 1).indices().unwrap().take(2).collect();
    assert_eq!(batch.indices, order);
    drop(loader);
    let begun: Vec<usize> = heard.try_iter().collect();
    assert_eq!(begun.iter().filter(|index| **index == order[0]).count(), 1, "{begun:?}");
}

/// Counts how many of its clones live, so that a test sees the workers let go of it.
struct Counted(Arc<()>);

impl Dataset for Counted {
    type Item = usize;

    fn len(&self) -> usize {
        100
    }

    fn get(&self, index: usize) -> Result<usize, Error> {
        Ok(index)
    }
}

#[test]
fn dropping_the_loader_ends_its_workers() {
    let alive = Arc::new(());
    let data = Counted(Arc::clone(&alive));
    let mut loader = DataLoader::new(data, sampler(100, 0, 1), config(2, 4)).unwrap();
    loader.next_batch().unwrap();
    assert_eq!(Arc::strong_count(&loader.dataset().0), 2);
    drop(loader);
    assert_eq!(Arc::strong_count(&alive), 1, "a worker still holds the data set");
}

/// More samples than a table can hold.
struct Endless;

impl Dataset for Endless {
    type Item = usize;

    fn len(&self) -> usize {
        usize::MAX
    }

    fn get(&self, index: usize) -> Result<usize, Error> {
        Ok(index)
    }
}

#[test]
fn an_order_that_cannot_be_made_is_an_error_whoever_reads() {
    for workers in [0, 2] {
        let mut loader = DataLoader::new(Endless, sampler(usize::MAX, 0, 1), config(4, workers)).unwrap();
        for _ in 0..3 {
            let error = loader.next_batch().unwrap_err();
            assert!(matches!(error, Error::TooLarge { .. }), "{workers} workers: {error:?}");
        }
    }
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let refused =
        |len, config| DataLoader::new(numbers(10), sampler(len, 0, 1), config).map(|_| ()).unwrap_err();
    assert!(matches!(refused(10, config(0, 0)), Error::Setting { setting: "batch_size", .. }));
    let without_room = LoaderConfig { prefetch_batches: 0, ..config(1, 1) };
    assert!(matches!(refused(10, without_room), Error::Setting { setting: "prefetch_batches", .. }));
    assert!(matches!(refused(11, config(1, 0)), Error::Setting { value: 11, .. }));
}
