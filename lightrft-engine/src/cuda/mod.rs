//! Buckets of weights in a GPU's memory, for an engine in another process on the same GPU (CUDA IPC).
//!
//! An engine that takes them says so by [`Engine::gpu_buckets`](crate::Engine::gpu_buckets). An update then gathers into
//! two buffers there, in turns: tensors of the host are uploaded, tensors that lie on that GPU are copied within it
//! ([`Staging::copy_from_gpu`](crate::Staging::copy_from_gpu)), and a full buffer goes to
//! [`Update::push_gpu`](crate::Update::push_gpu). The buffers are allocated when the first bucket needs them, exported
//! once, and freed when the update has ended.

mod card;
#[cfg(any(feature = "sglang", feature = "vllm"))]
mod relay;
#[cfg(test)]
#[cfg(any(feature = "sglang", feature = "vllm"))]
pub(crate) mod stand_in;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::{Result, TensorInfo};

pub(crate) use card::{Card, GpuMemory, download};
#[cfg(any(feature = "sglang", feature = "vllm"))]
pub(crate) use relay::Relay;

/// The GPU on which an engine wants the buckets of an update.
#[derive(Clone, Debug)]
pub struct GpuBuckets(Arc<dyn Card>);

impl GpuBuckets {
    /// On the GPU with this ordinal among those that this process sees.
    ///
    /// # Errors
    /// [`Error::Gpu`](crate::Error::Gpu) without a CUDA driver or without such a GPU.
    pub fn on(ordinal: usize) -> Result<Self> {
        Ok(Self(Arc::new(card::RealCard::new(ordinal)?)))
    }

    #[cfg(test)]
    #[cfg(any(feature = "sglang", feature = "vllm"))]
    pub(crate) fn of(card: Arc<dyn Card>) -> Self {
        Self(card)
    }

    /// The GPU's own number, the same in every process (`cuDeviceGetUuid`).
    pub fn uuid(&self) -> [u8; 16] {
        self.0.uuid()
    }

    /// At least `bytes` bytes, exported.
    pub(crate) fn allocate(&self, bytes: usize) -> Result<Box<dyn GpuMemory>> {
        self.0.allocate(bytes)
    }
}

/// Whole parameters in GPU memory that another process may open, each at a place that suits its elements.
pub struct GpuBucket {
    tensors: Vec<TensorInfo>,
    places: Vec<Range<usize>>,
    memory: Box<dyn GpuMemory>,
    uuid: [u8; 16],
}

impl fmt::Debug for GpuBucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GpuBucket({} tensors in {:?})", self.tensors.len(), self.memory)
    }
}

impl GpuBucket {
    pub(crate) fn new(
        tensors: Vec<TensorInfo>,
        places: Vec<Range<usize>>,
        memory: Box<dyn GpuMemory>,
    ) -> Self {
        let uuid = memory.uuid();
        Self { tensors, places, memory, uuid }
    }

    pub(crate) fn into_memory(self) -> Box<dyn GpuMemory> {
        self.memory
    }

    /// The parameters, under the engine's names.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The same, as drivers look at what they are given.
    #[cfg(any(feature = "sglang", feature = "vllm"))]
    pub(crate) fn described(&self) -> impl Iterator<Item = crate::server::Described<'_>> {
        self.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.dtype, tensor.shape.as_slice()))
    }

    /// Where each of them lies in the memory, in bytes: at a multiple of 16, one after the other.
    pub fn places(&self) -> &[Range<usize>] {
        &self.places
    }

    /// The GPU's own number.
    pub fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    /// `cuIpcGetMemHandle`'s bytes for the memory, which is one allocation.
    pub fn handle(&self) -> [u8; 64] {
        self.memory.handle()
    }

    /// Waits until all of the bucket is there, and other processes may read it. Ten minutes at most: what the streams of
    /// its tensors were given before is waited for too.
    ///
    /// # Errors
    /// [`Error::Gpu`](crate::Error::Gpu), also for what failed on those streams.
    pub fn settle(&mut self) -> Result<()> {
        self.memory.settle()
    }
}
