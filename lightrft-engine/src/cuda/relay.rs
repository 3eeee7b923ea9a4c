//! Buckets on their way to a server on the same GPU: two buffers in turns, each kept for as long as the server may read it.

use std::ops::Range;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use super::{GpuBucket, GpuBuckets, GpuMemory};
use crate::{Error, NamedTensor, Result, ServerError, TensorInfo};

/// The memory of a server's updates, and the bucket that it is taking.
#[derive(Debug)]
pub(crate) struct Relay {
    engine: &'static str,
    buckets: GpuBuckets,
    /// Memory that nobody reads.
    free: Vec<Box<dyn GpuMemory>>,
    /// Memory that was too small for a later bucket. The server keeps what it has read open until the update ends.
    outgrown: Vec<Box<dyn GpuMemory>>,
    /// A bucket that the server is taking.
    flight: Option<Receiver<Landed>>,
    /// Memory of calls that failed: the server may still read it, until it has answered a later one.
    kept: Vec<GpuBucket>,
}

type Landed = (GpuBucket, Result<(), ServerError>);

/// Every tensor begins at a multiple of this in a buffer, as those of a [`GpuBucket`] do.
const ALIGNMENT: usize = 16;

impl Relay {
    /// To a server of this `engine`, by memory of the GPU of `buckets`.
    pub(crate) fn new(engine: &'static str, buckets: GpuBuckets) -> Self {
        let (free, outgrown, kept) = (Vec::new(), Vec::new(), Vec::new());
        Self { engine, buckets, free, outgrown, flight: None, kept }
    }

    pub(crate) fn buckets(&self) -> &GpuBuckets {
        &self.buckets
    }

    fn failed(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        Error::Backend { engine: self.engine, operation: "send weights", source: source.into() }
    }

    /// Waits until the server has taken the bucket before, if there is one; its error is returned here.
    pub(crate) fn land(&mut self, within: Duration) -> Result<()> {
        let Some(flight) = &self.flight else { return Ok(()) };
        let landed = match flight.recv_timeout(within) {
            Ok(landed) => landed,
            Err(RecvTimeoutError::Timeout) => {
                return Err(self.failed("the server has not answered to a bucket yet"));
            }
            Err(RecvTimeoutError::Disconnected) => {
                self.flight = None;
                return Err(self.failed("the thread that sent a bucket is gone"));
            }
        };
        self.flight = None;
        let (bucket, result) = landed;
        match result {
            Ok(()) => self.free.push(bucket.into_memory()),
            Err(_) => self.kept.push(bucket),
        }
        Ok(result?)
    }

    /// Whether the server has not answered to a bucket.
    pub(crate) fn is_in_flight(&self) -> bool {
        self.flight.is_some()
    }

    /// Memory of at least `bytes` bytes that nobody reads.
    fn memory(&mut self, bytes: usize) -> Result<Box<dyn GpuMemory>> {
        let fits = self.free.iter().position(|memory| memory.bytes() >= bytes);
        if let Some(at) = fits {
            return Ok(self.free.swap_remove(at));
        }
        // What is there is too small for this one, and so for those that are like it.
        self.outgrown.append(&mut self.free);
        // Buckets are of about one size, and the next may be a little larger.
        let step = (bytes.checked_next_power_of_two().unwrap_or(bytes) / 4).max(1);
        self.buckets.allocate(bytes.checked_next_multiple_of(step).unwrap_or(bytes))
    }

    /// Copies a bucket of the host's into memory of its own.
    pub(crate) fn fill(&mut self, bucket: &[NamedTensor<'_>]) -> Result<GpuBucket> {
        let (places, bytes) = layout(bucket.iter().map(|tensor| tensor.bytes().len()));
        let mut memory = self.memory(bytes)?;
        let mut uploads = bucket.iter().zip(&places);
        let uploaded = uploads.try_for_each(|(tensor, place)| memory.upload(place.start, tensor.bytes()));
        if let Err(error) = uploaded.and_then(|()| memory.settle()) {
            // The server may have it open, from the bucket that was in it before.
            self.outgrown.push(memory);
            return Err(error);
        }
        let infos: Vec<TensorInfo> = bucket.iter().map(NamedTensor::info).collect();
        Ok(GpuBucket::new(infos, places, memory))
    }

    /// Has `post` tell the server of a bucket of [`fill`](Self::fill), and goes on: the caller gathers the next meanwhile.
    /// It waits for the bucket before, and what becomes of this one is told when it [lands](Self::land).
    pub(crate) fn launch(
        &mut self,
        bucket: GpuBucket,
        within: Duration,
        post: impl FnOnce() -> Result<(), ServerError> + Send + 'static,
    ) -> Result<()> {
        if let Err(error) = self.land(within) {
            self.kept.push(bucket);
            return Err(error);
        }
        let (land, flight) = sync_channel(1);
        let fly = move || {
            let result = post();
            // Where nobody waits any more, the memory goes now that there is a reply, or never will be.
            let _ = land.send((bucket, result));
        };
        let started = thread::Builder::new().name("lightrft-weights".to_owned()).spawn(fly);
        started.map_err(|error| self.failed(error))?;
        self.flight = Some(flight);
        Ok(())
    }

    /// Has `post` tell the server of a bucket of the caller's own, and gives it back once the server has it.
    pub(crate) fn send(
        &mut self,
        bucket: GpuBucket,
        within: Duration,
        post: impl FnOnce() -> Result<(), ServerError>,
    ) -> Result<GpuBucket> {
        match self.land(within).and_then(|()| Ok(post()?)) {
            Ok(()) => Ok(bucket),
            Err(error) => {
                self.kept.push(bucket);
                Err(error)
            }
        }
    }

    /// The server has answered to what came after the buckets that failed: it has done with them.
    pub(crate) fn answered(&mut self) {
        self.kept.clear();
        self.outgrown.clear();
    }

    /// The update has ended, and with it the need for memory.
    pub(crate) fn ended(&mut self) {
        self.free.clear();
        self.outgrown.clear();
    }
}

/// Where tensors of these many bytes lie in a buffer, and its length.
fn layout(sizes: impl Iterator<Item = usize>) -> (Vec<Range<usize>>, usize) {
    let mut end = 0_usize;
    let place = |bytes: usize| {
        let begin = end.next_multiple_of(ALIGNMENT);
        end = begin + bytes;
        begin..end
    };
    let places = sizes.map(place).collect();
    (places, end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_lie_at_places_that_suit_any_element() {
        let (places, bytes) = layout([6, 8, 16, 32, 3].into_iter());
        assert_eq!((places.as_slice(), bytes), (&[0..6, 16..24, 32..48, 48..80, 80..83][..], 83));
        assert_eq!(layout(std::iter::empty()), (vec![], 0));
    }
}
