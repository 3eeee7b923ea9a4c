//! Staging buffers go round: no more of them than agreed, none lost, and nobody waits for ever.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use lightrft_data::{
    CollatedBatch, DataLoader, Dataset, DistributedSampler, Error, InMemory, LoaderConfig, SamplerConfig,
    Shuffle, StagingBuffer, StagingPool, Tail,
};

const PATIENCE: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_millis(30);

/// What was allocated so far, what there is now, and the most there was at once.
#[derive(Default)]
struct Counts {
    made: AtomicUsize,
    live: AtomicUsize,
    peak: AtomicUsize,
}

/// Memory that is counted, as page-locked memory would be by its driver.
struct Counted {
    bytes: Vec<u8>,
    counts: Arc<Counts>,
}

impl Counted {
    fn new(bytes: usize, counts: &Arc<Counts>) -> Self {
        counts.made.fetch_add(1, Ordering::SeqCst);
        let live = counts.live.fetch_add(1, Ordering::SeqCst) + 1;
        counts.peak.fetch_max(live, Ordering::SeqCst);
        Self { bytes: vec![0; bytes], counts: Arc::clone(counts) }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.counts.live.fetch_sub(1, Ordering::SeqCst);
    }
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl AsMut<[u8]> for Counted {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

fn pool(buffers: usize, deadline: Duration) -> (StagingPool<Counted>, Arc<Counts>) {
    let counts = Arc::new(Counts::default());
    let count = Arc::clone(&counts);
    let pool = StagingPool::new(buffers, deadline, move |bytes| Ok(Counted::new(bytes, &count)));
    (pool.unwrap(), counts)
}

const LEN: usize = 400;

/// A loader of batches of four numbers of one byte.
fn loader(
    workers: usize,
    pool: StagingPool<Counted>,
) -> DataLoader<impl Dataset, CollatedBatch<StagingBuffer<Counted>>> {
    let numbers: InMemory<u8> = (0..LEN).map(|number| number as u8).collect();
    let (shuffle, tail) = (Shuffle::InOrder, Tail::Pad);
    let sampler =
        DistributedSampler::new(SamplerConfig { len: LEN, rank: 0, world: 1, seed: 0, shuffle, tail });
    let config = LoaderConfig { workers, prefetch_batches: 3, ..LoaderConfig::new(4) };
    DataLoader::new(numbers, sampler.unwrap(), config).unwrap().collating(move |numbers: Vec<u8>| {
        let mut buffer = pool.take(numbers.len())?;
        buffer.copy_from_slice(&numbers);
        Ok(buffer)
    })
}

#[test]
fn one_buffer_more_than_is_read_ahead_is_enough_for_an_epoch() {
    for workers in [0, 1, 3] {
        let (pool, counts) = pool(4, PATIENCE);
        let mut loader = loader(workers, pool);
        let mut next = 0;
        while let Some(batch) = loader.next_batch().unwrap() {
            let expected: Vec<u8> = (next..next + 4).map(|number| number as u8).collect();
            assert_eq!(*batch.passes[0].data, *expected, "a buffer was filled while it was read");
            next += 4;
        }
        assert_eq!(next, LEN);
        drop(loader);
        let made = counts.made.load(Ordering::SeqCst);
        assert!((1..=4).contains(&made), "{made} buffers for {} batches", LEN / 4);
        assert_eq!(counts.live.load(Ordering::SeqCst), 0, "what the pool held is let go with it");
    }
}

#[test]
fn a_consumer_that_keeps_its_batches_is_told_so_after_the_deadline_and_may_go_on() {
    let (pool, counts) = pool(4, SOON);
    let mut loader = loader(2, pool);
    let mut kept = Vec::new();
    let error = loop {
        match loader.next_batch() {
            Ok(batch) => kept.push(batch.unwrap()),
            Err(error) => break error,
        }
    };
    match error {
        Error::Collate { source, .. } => {
            assert!(matches!(*source, Error::StagingExhausted { buffers: 4, .. }), "{source}")
        }
        other => panic!("{other:?}"),
    }
    let before = kept.len();
    assert!((1..=4).contains(&before));
    kept.clear();
    let next = loader.next_batch().unwrap().unwrap();
    assert_eq!(next.passes[0].indices[0], before * 4, "the batch that failed comes next");
    assert!(counts.peak.load(Ordering::SeqCst) <= 4);
}

#[test]
fn a_buffer_that_is_too_small_makes_room_for_a_larger_one() {
    let (pool, counts) = pool(2, SOON);
    let (small, other) = (pool.take(5).unwrap(), pool.take(8).unwrap());
    assert_eq!((small.len(), other.len()), (5, 8));
    drop(small);
    assert_eq!(pool.take(8).unwrap().len(), 8, "room for eight was made for five");
    assert_eq!(counts.made.load(Ordering::SeqCst), 2);
    let large = pool.take(100).unwrap();
    assert!(matches!(pool.take(1), Err(Error::StagingExhausted { buffers: 2, waited: SOON })));
    drop((large, other));
    let both = [pool.take(1).unwrap(), pool.take(1).unwrap()];
    assert_eq!(counts.made.load(Ordering::SeqCst), 3);
    assert_eq!(counts.peak.load(Ordering::SeqCst), 2);
    drop((both, pool));
    assert_eq!(counts.live.load(Ordering::SeqCst), 0);
}

#[test]
fn an_allocation_that_fails_does_not_use_up_the_pool() {
    let calls = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&calls);
    let pool = StagingPool::new(1, SOON, move |bytes| match count.fetch_add(1, Ordering::SeqCst) {
        0 => Err(Error::other("no page-locked memory is left")),
        1 => Ok(vec![0; bytes / 2]),
        2 => panic!("the driver is gone"),
        _ => Ok(vec![0; bytes]),
    })
    .unwrap();
    assert!(matches!(pool.take(8), Err(Error::Other(_))));
    assert!(matches!(pool.take(8), Err(Error::Setting { setting: "bytes of staging memory", value: 4, .. })));
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pool.take(8).map(drop)));
    assert!(panicked.is_err());
    assert_eq!(pool.take(8).unwrap().len(), 8);
    assert!(matches!(
        StagingPool::new(0, SOON, |bytes| Ok(vec![0; bytes])),
        Err(Error::Setting { setting: "staging buffers", .. })
    ));
}

#[test]
fn whoever_waits_is_given_the_buffer_that_comes_back() {
    let (pool, _) = pool(1, PATIENCE);
    let first = pool.take(4).unwrap();
    let waiting = std::thread::spawn({
        let pool = pool.clone();
        move || pool.take(4).unwrap().as_ptr() as usize
    });
    let address = first.as_ptr() as usize;
    drop(first);
    let seen = HashSet::from([waiting.join().unwrap(), address]);
    assert_eq!(seen.len(), 1, "another buffer was made");
}
