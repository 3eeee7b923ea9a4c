//! The bytes of a bucket: on the host, in memory that the engine's workers share, or on the GPU where the engine wants them.

use std::ops::Range;

use crate::{Engine, Error, Result};

#[cfg(feature = "cuda")]
use crate::cuda::{GpuBuckets, GpuMemory, download};
#[cfg(feature = "vllm")]
use crate::shared::{SharedBucket, SharedBuckets};
#[cfg(feature = "cuda")]
use lightrft_collectives::Device;

/// Where an engine wants its buckets.
#[derive(Clone, Debug)]
pub(super) enum Home {
    Host,
    #[cfg(feature = "vllm")]
    Shared(SharedBuckets),
    #[cfg(feature = "cuda")]
    Gpu(GpuBuckets),
}

impl Home {
    pub(super) fn of<E: Engine + ?Sized>(engine: &E) -> Self {
        #[cfg(feature = "cuda")]
        if let Some(buckets) = engine.gpu_buckets() {
            return Home::Gpu(buckets);
        }
        #[cfg(feature = "vllm")]
        if let Some(buckets) = engine.shared_buckets() {
            return Home::Shared(buckets);
        }
        let _ = engine;
        Home::Host
    }

    /// Memory of at least `bytes` bytes, `most` of which will be needed later: what is there already, or other.
    pub(super) fn memory(&self, there: Memory, bytes: usize, most: usize) -> Result<Memory> {
        match (self, there) {
            #[cfg(feature = "cuda")]
            (Home::Gpu(_), Memory::Gpu(memory)) if memory.bytes() >= bytes => Ok(Memory::Gpu(memory)),
            #[cfg(feature = "cuda")]
            (Home::Gpu(buckets), there) => {
                // What is there is worth nothing: give it back before asking for more.
                drop(there);
                Ok(Memory::Gpu(buckets.allocate(most.max(bytes))?))
            }
            #[cfg(feature = "vllm")]
            (Home::Shared(_), Memory::Shared(memory)) if memory.len() >= bytes => Ok(Memory::Shared(memory)),
            #[cfg(feature = "vllm")]
            (Home::Shared(buckets), there) => {
                drop(there);
                Ok(Memory::Shared(buckets.take(bytes).map_err(|error| Error::Source(error.into()))?))
            }
            (Home::Host, Memory::Host(memory)) if memory.len() >= bytes => Ok(Memory::Host(memory)),
            (Home::Host, there) => {
                drop(there);
                let _ = most;
                Ok(Memory::Host(on_host(bytes)?))
            }
        }
    }
}

/// The memory of one bucket.
#[derive(Debug)]
pub(super) enum Memory {
    Host(Vec<u8>),
    #[cfg(feature = "vllm")]
    Shared(SharedBucket),
    #[cfg(feature = "cuda")]
    Gpu(Box<dyn GpuMemory>),
}

impl Memory {
    /// None yet.
    pub(super) fn none() -> Self {
        Memory::Host(Vec::new())
    }

    /// Has `write` write what belongs at `place`.
    pub(super) fn fill(
        &mut self,
        place: Range<usize>,
        write: impl FnOnce(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        match self {
            Memory::Host(bytes) => write(bytes.get_mut(place).ok_or_else(outside)?),
            #[cfg(feature = "vllm")]
            Memory::Shared(bytes) => write(bytes.get_mut(place).ok_or_else(outside)?),
            #[cfg(feature = "cuda")]
            Memory::Gpu(memory) => {
                let mut bytes = on_host(place.len())?;
                write(&mut bytes)?;
                memory.upload(place.start, &bytes)
            }
        }
    }

    /// Copies what belongs at `place` from the host.
    pub(super) fn copy(&mut self, place: Range<usize>, from: &[u8]) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Memory::Gpu(memory) = self {
            return memory.upload(place.start, from);
        }
        self.fill(place, |bytes| {
            bytes.copy_from_slice(from);
            Ok(())
        })
    }

    /// Copies what belongs at `place` from a GPU.
    #[cfg(feature = "cuda")]
    pub(super) fn copy_from_gpu(&mut self, place: Range<usize>, from: &Device<'_>) -> Result<()> {
        match self {
            Memory::Host(bytes) => download(from, bytes.get_mut(place).ok_or_else(outside)?),
            #[cfg(feature = "vllm")]
            Memory::Shared(bytes) => download(from, bytes.get_mut(place).ok_or_else(outside)?),
            Memory::Gpu(memory) => memory.copy(place.start, from),
        }
    }
}

fn on_host(bytes: usize) -> Result<Vec<u8>> {
    let mut memory = Vec::new();
    memory
        .try_reserve_exact(bytes)
        .map_err(|error| Error::Source(format!("a bucket of {bytes} bytes: {error}").into()))?;
    memory.resize(bytes, 0);
    Ok(memory)
}

fn outside() -> Error {
    Error::Source("a tensor lies outside of its bucket".into())
}
