//! Two threads and two buckets: one is gathered while the other is pushed.

use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use super::WeightSource;
use super::memory::{Home, Memory};
use super::plan::{Bucket, Item, Plan};
use super::staging::{Filled, Staging};
use crate::{Engine, Error, NamedTensor, Result, Update, Version};

/// Buckets in memory: one that is gathered, one that is pushed.
const BUCKETS: usize = 2;

/// What an update sent, and which side was the slower one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UpdateReport {
    /// Tensors sent.
    pub tensors: usize,
    /// Bytes of their elements.
    pub bytes: u64,
    /// Buckets that they travelled in.
    pub buckets: usize,
    /// Time that the source took, without its waits for the engine.
    pub gathering: Duration,
    /// Time that the engine took to begin, to take every bucket and to commit.
    pub pushing: Duration,
    /// Time from start to end. Less than the sum of the former two as far as they overlapped.
    pub elapsed: Duration,
}

pub(crate) fn run<E: Engine + ?Sized>(
    engine: &mut E,
    to: Version,
    source: &mut dyn WeightSource,
    plan: &Plan,
    bucket_bytes: usize,
) -> Result<UpdateReport> {
    let started = Instant::now();
    let buckets = plan.buckets(bucket_bytes);
    // A filled bucket waits nowhere: there is room for one, and the other is being gathered or pushed.
    let (fill, filled) = sync_channel::<Filled>(1);
    let (give_back, empty) = sync_channel::<Memory>(BUCKETS);
    for _ in 0..BUCKETS {
        // Memory is taken when the first bucket needs it, and then goes to and fro.
        give_back.try_send(Memory::none()).map_err(|_| Error::Source("no room for a bucket".into()))?;
    }
    let home = Home::of(engine);
    let (gathered, gathering, pushed) = thread::scope(|scope| {
        let sender = Sender { plan, buckets: &buckets, filled, give_back };
        let sending = scope.spawn(move || sender.send(engine, to));
        let mut staging = Staging::new(plan, &buckets, home, fill, empty);
        let gave = source.give(&mut staging);
        let gave_for = started.elapsed();
        let (gathered, waited, _memory) = staging.finish(gave);
        (gathered, gave_for.saturating_sub(waited), sending.join())
    });
    let pushing = match pushed {
        Ok(Ok(pushing)) => pushing,
        Ok(Err(Unsent::Refused(error))) => {
            if let Err(also) = gathered {
                tracing::debug!(%also, "the source of an update that the engine refused");
            }
            return Err(error);
        }
        // The sender heard no word that all was there, and gave up: the reason is the source's.
        Ok(Err(Unsent::Incomplete)) => {
            return Err(gathered
                .err()
                .unwrap_or_else(|| Error::Source("the update was not completed".into())));
        }
        Err(panic) => std::panic::resume_unwind(panic),
    };
    let report = UpdateReport {
        tensors: plan.items().len(),
        bytes: plan.items().iter().map(|item| item.bytes as u64).sum(),
        buckets: buckets.len(),
        gathering,
        pushing,
        elapsed: started.elapsed(),
    };
    tracing::debug!(version = to.0, ?report, "weights sent");
    Ok(report)
}

/// Why the sender did not commit.
enum Unsent {
    /// The source gave up, or was not content with what it gave.
    Incomplete,
    /// The engine's own error.
    Refused(Error),
}

/// The side of an update that owns the engine.
struct Sender<'a> {
    plan: &'a Plan,
    buckets: &'a [Bucket],
    filled: Receiver<Filled>,
    give_back: SyncSender<Memory>,
}

impl Sender<'_> {
    /// Sends every bucket and commits. Time spent on the engine; an update that ends otherwise is dropped here, which
    /// makes the engine stale.
    fn send<E: Engine + ?Sized>(self, engine: &mut E, to: Version) -> Result<Duration, Unsent> {
        let before = Instant::now();
        let mut update = engine.begin_update(to).map_err(Unsent::Refused)?;
        let mut busy = before.elapsed();
        for filled in &self.filled {
            let before = Instant::now();
            let Filled::Bucket { index, memory } = filled else {
                update.commit().map_err(Unsent::Refused)?;
                return Ok(busy + before.elapsed());
            };
            let memory = self.push(update.as_mut(), index, memory).map_err(Unsent::Refused)?;
            busy += before.elapsed();
            self.give_back.send(memory).ok();
        }
        Err(Unsent::Incomplete)
    }

    /// Pushes a bucket; returns its memory.
    fn push(&self, update: &mut dyn Update, index: usize, memory: Memory) -> Result<Memory> {
        match memory {
            Memory::Host(bytes) => {
                update.push(&self.tensors(index, &bytes)?)?;
                Ok(Memory::Host(bytes))
            }
            #[cfg(feature = "vllm")]
            Memory::Shared(bytes) => {
                update.push(&self.tensors(index, &bytes)?)?;
                Ok(Memory::Shared(bytes))
            }
            #[cfg(feature = "cuda")]
            Memory::Gpu(memory) => {
                let bucket = self.buckets.get(index).ok_or_else(lost)?;
                let items = self.plan.items().iter().skip(bucket.first).take(bucket.places.len());
                let info = |item: &Item| crate::TensorInfo {
                    name: item.engine_name.clone(),
                    dtype: item.dtype,
                    shape: item.shape.clone(),
                };
                let bucket =
                    crate::cuda::GpuBucket::new(items.map(info).collect(), bucket.places.clone(), memory);
                Ok(Memory::Gpu(update.push_gpu(bucket)?.into_memory()))
            }
        }
    }

    fn tensors<'b>(&'b self, bucket: usize, bytes: &'b [u8]) -> Result<Vec<NamedTensor<'b>>> {
        let bucket = self.buckets.get(bucket).ok_or_else(lost)?;
        let items = self.plan.items().get(bucket.first..).ok_or_else(lost)?;
        let tensor = |(item, place): (&'b Item, &Range<usize>)| {
            let bytes = bytes.get(place.clone()).ok_or_else(lost)?;
            NamedTensor::new(&item.engine_name, item.dtype, &item.shape, bytes)
        };
        items.iter().zip(&bucket.places).map(tensor).collect()
    }
}

fn lost() -> Error {
    Error::Source("a bucket that is not in the plan".into())
}
