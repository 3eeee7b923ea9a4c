//! The gathering side of an update: tensors are written into buckets, full buckets leave for the sender.

use std::fmt;
use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::{Duration, Instant};

use super::memory::{Home, Memory};
use super::plan::{Bucket, Plan};
use crate::{Error, NamedTensor, Result};

/// What the gathering side tells the sender.
pub(super) enum Filled {
    /// A bucket of the plan, with its bytes.
    Bucket { index: usize, memory: Memory },
    /// Every bucket was sent and the source is content: the update may be committed. Where the channel ends without
    /// it, the update must not.
    All,
}

/// Where a [`WeightSource`](crate::WeightSource) puts its tensors, in the order that it announced.
///
/// It holds the bucket that is being filled. A full one leaves for the engine, and if the engine has not yet taken the
/// one before, the source waits there.
pub struct Staging<'a> {
    plan: &'a Plan,
    buckets: &'a [Bucket],
    /// The tensor of the plan that comes next.
    next: usize,
    /// The bucket that is being filled, with its memory while there is one.
    bucket: usize,
    memory: Option<Memory>,
    /// Where buckets lie, and the bytes of the largest.
    home: Home,
    most: usize,
    filled: SyncSender<Filled>,
    empty: Receiver<Memory>,
    waited: Duration,
    /// Set by the first failure: a source that goes on must not bring the order into disorder.
    failed: bool,
}

impl fmt::Debug for Staging<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Staging({} of {} tensors)", self.next, self.plan.items().len())
    }
}

impl<'a> Staging<'a> {
    pub(super) fn new(
        plan: &'a Plan,
        buckets: &'a [Bucket],
        home: Home,
        filled: SyncSender<Filled>,
        empty: Receiver<Memory>,
    ) -> Self {
        let most = buckets.iter().map(|bucket| bucket.bytes).max().unwrap_or(0);
        Self {
            plan,
            buckets,
            next: 0,
            bucket: 0,
            memory: None,
            home,
            most,
            filled,
            empty,
            waited: Duration::ZERO,
            failed: false,
        }
    }

    /// Copies the next tensor.
    ///
    /// # Errors
    /// Those of [`fill`](Staging::fill); [`Error::Source`] as well if it has another type or shape than announced.
    pub fn copy(&mut self, tensor: &NamedTensor<'_>) -> Result<()> {
        if let Some(item) = self.plan.items().get(self.next)
            && (item.dtype, item.shape.as_slice()) != (tensor.dtype(), tensor.shape())
            && item.trainer_name == tensor.name()
        {
            let announced = format!("{:?}{:?}", item.dtype, item.shape);
            return self.fail(source(format!("{tensor:?} was announced as {announced}")));
        }
        self.put(tensor.name(), |memory, place| memory.copy(place, tensor.bytes()))
    }

    /// Copies the next tensor, called `name`, from GPU memory, as the stream that uses it comes to it: what the stream was
    /// given before is in it, and what it is given after may overwrite it. Where buckets lie on the same GPU nothing is
    /// waited for; else it is copied to the host.
    ///
    /// # Errors
    /// Those of [`fill`](Staging::fill); [`Error::Source`] as well if it has another type or number of elements than
    /// announced, or lies on another GPU than the buckets; [`Error::Gpu`].
    #[cfg(feature = "cuda")]
    pub fn copy_from_gpu(&mut self, name: &str, from: &lightrft_collectives::Device<'_>) -> Result<()> {
        if let Some(item) = self.plan.items().get(self.next)
            && (item.dtype, item.bytes) != (from.dtype(), from.bytes())
            && item.trainer_name == name
        {
            let (announced, got) = (format!("{:?}{:?}", item.dtype, item.shape), from.dtype());
            let what = format!("`{name}` was announced as {announced}, and is {} of {got:?}", from.len());
            return self.fail(source(what));
        }
        self.put(name, |memory, place| memory.copy_from_gpu(place, from))
    }

    /// Has `write` write the bytes of the next tensor, called `name`. They may hold anything before.
    ///
    /// # Errors
    /// [`Error::Source`] if another tensor was announced to come next, or the engine takes no more (its own error is
    /// what the update then reports); what `write` returns.
    pub fn fill(&mut self, name: &str, write: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<()> {
        self.put(name, |memory, place| memory.fill(place, write))
    }

    fn put(&mut self, name: &str, write: impl FnOnce(&mut Memory, Range<usize>) -> Result<()>) -> Result<()> {
        if self.failed {
            return Err(source("an earlier tensor was refused".to_owned()));
        }
        match self.plan.items().get(self.next) {
            Some(item) if item.trainer_name == name => {}
            Some(item) => {
                return self
                    .fail(source(format!("`{name}` came where `{}` was announced", item.trainer_name)));
            }
            None => return self.fail(source(format!("`{name}` came after the last tensor announced"))),
        }
        if let Err(error) = self.write_next(write) {
            return self.fail(error);
        }
        Ok(())
    }

    fn write_next(&mut self, write: impl FnOnce(&mut Memory, Range<usize>) -> Result<()>) -> Result<()> {
        let Some(bucket) = self.buckets.get(self.bucket) else {
            return Err(source("more tensors than the plan's buckets hold".to_owned()));
        };
        let mut memory = match self.memory.take() {
            Some(memory) => memory,
            None => self.memory_for(bucket.bytes)?,
        };
        let written = match bucket.places.get(self.next - bucket.first) {
            Some(place) => write(&mut memory, place.clone()),
            None => Err(source("a tensor lies outside of its bucket".to_owned())),
        };
        if let Err(error) = written {
            self.memory = Some(memory);
            return Err(error);
        }
        self.next += 1;
        if self.next - bucket.first < bucket.places.len() {
            self.memory = Some(memory);
            return Ok(());
        }
        let index = self.bucket;
        self.bucket += 1;
        self.send(Filled::Bucket { index, memory })
    }

    fn send(&mut self, filled: Filled) -> Result<()> {
        let before = Instant::now();
        let sent = self.filled.send(filled);
        self.waited += before.elapsed();
        sent.map_err(|_| engine_gone())
    }

    /// Memory that the sender has done with, in the size of the next bucket.
    fn memory_for(&mut self, bytes: usize) -> Result<Memory> {
        let before = Instant::now();
        let memory = self.empty.recv();
        self.waited += before.elapsed();
        self.home.memory(memory.map_err(|_| engine_gone())?, bytes, self.most)
    }

    fn fail(&mut self, error: Error) -> Result<()> {
        // The memory of its bucket stays: a server may still have it open, from the bucket that was in it before.
        self.failed = true;
        Err(error)
    }

    /// Ends the stream: with a word that all is there if the source says so and every announced tensor came, else
    /// without. Returns how long the source waited for the engine, and what holds the memory of buckets.
    pub(super) fn finish(mut self, gave: Result<()>) -> (Result<()>, Duration, Held) {
        let ended = gave.and_then(|()| match self.plan.items().get(self.next) {
            _ if self.failed => Err(source("its source went on after a tensor was refused".to_owned())),
            Some(item) => Err(source(format!("`{}` was announced and never came", item.trainer_name))),
            None => self.send(Filled::All),
        });
        (ended, self.waited, Held { _empty: self.empty, _unfinished: self.memory })
    }
}

/// The memory of buckets: what another process has open must not go before the update has ended.
pub(super) struct Held {
    _empty: Receiver<Memory>,
    _unfinished: Option<Memory>,
}

fn source(what: String) -> Error {
    Error::Source(what.into())
}

fn engine_gone() -> Error {
    source("the engine takes no more tensors".to_owned())
}
