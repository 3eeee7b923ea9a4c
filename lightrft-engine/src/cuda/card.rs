//! A GPU as far as buckets need it, and the memory of one bucket: small enough for tests to have one without a GPU.

use std::fmt;
use std::time::Duration;

use lightrft_collectives::Device;
use lightrft_collectives::nccl::Stream;
use lightrft_collectives::nccl::driver::ExportedMemory;

use crate::{Error, Result};

/// Copies into a bucket wait for what their streams were given before, which is the trainer's.
const COPIED_WITHIN: Duration = Duration::from_secs(600);

/// A GPU.
pub(crate) trait Card: fmt::Debug + Send + Sync {
    fn uuid(&self) -> [u8; 16];

    fn allocate(&self, bytes: usize) -> Result<Box<dyn GpuMemory>>;
}

/// Memory that is exported for as long as it lives.
pub(crate) trait GpuMemory: fmt::Debug + Send {
    fn uuid(&self) -> [u8; 16];

    fn handle(&self) -> [u8; 64];

    fn bytes(&self) -> usize;

    /// Copies from the host; `from` may be reused on return.
    fn upload(&mut self, at: usize, from: &[u8]) -> Result<()>;

    /// Copies within the GPU, in the order of the stream that uses `from`.
    fn copy(&mut self, at: usize, from: &Device<'_>) -> Result<()>;

    /// Waits until all copies are done.
    fn settle(&mut self) -> Result<()>;
}

/// A GPU of this machine.
#[derive(Debug)]
pub(super) struct RealCard {
    stream: Stream,
}

impl RealCard {
    pub(super) fn new(ordinal: usize) -> Result<Self> {
        let stream = Stream::new(ordinal).map_err(|source| Error::Gpu {
            doing: "take a GPU for weights",
            ordinal,
            advice: "run where the CUDA driver and this GPU are, or let weights reach the engine another way",
            source: Box::new(source),
        })?;
        Ok(Self { stream })
    }
}

impl Card for RealCard {
    fn uuid(&self) -> [u8; 16] {
        self.stream.gpu().uuid()
    }

    fn allocate(&self, bytes: usize) -> Result<Box<dyn GpuMemory>> {
        let memory = ExportedMemory::new(&self.stream, bytes).map_err(|source| Error::Gpu {
            doing: "allocate a bucket for weights",
            ordinal: self.stream.ordinal(),
            advice: "two buckets are held: make them smaller, or let the engine or the trainer give memory back",
            source: Box::new(source),
        })?;
        Ok(Box::new(RealMemory { memory, stream: self.stream.clone() }))
    }
}

#[derive(Debug)]
struct RealMemory {
    memory: ExportedMemory,
    stream: Stream,
}

impl RealMemory {
    fn failed(
        &self,
        doing: &'static str,
        advice: &'static str,
        source: lightrft_collectives::Error,
    ) -> Error {
        Error::Gpu { doing, ordinal: self.stream.ordinal(), advice, source: Box::new(source) }
    }
}

impl GpuMemory for RealMemory {
    fn uuid(&self) -> [u8; 16] {
        self.stream.gpu().uuid()
    }

    fn handle(&self) -> [u8; 64] {
        self.memory.handle()
    }

    fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    fn upload(&mut self, at: usize, from: &[u8]) -> Result<()> {
        let uploaded = self.memory.upload(at, from);
        uploaded.map_err(|source| self.failed("upload weights", "its stream may have failed before", source))
    }

    fn copy(&mut self, at: usize, from: &Device<'_>) -> Result<()> {
        if from.ordinal() != self.stream.ordinal() {
            let what = format!(
                "a tensor lies on GPU {}, and the engine takes weights on GPU {}",
                from.ordinal(),
                self.stream.ordinal()
            );
            return Err(Error::Source(what.into()));
        }
        let copied = self.memory.copy(at, from);
        copied.map_err(|source| self.failed("copy weights", "its stream may have failed before", source))
    }

    fn settle(&mut self) -> Result<()> {
        match self.memory.wait(COPIED_WITHIN) {
            Ok(true) => Ok(()),
            Ok(false) => {
                let what = format!("the streams of its tensors were busy for {COPIED_WITHIN:?}");
                Err(Error::Source(what.into()))
            }
            Err(source) => {
                Err(self.failed("wait for weights", "the work before them on their streams failed", source))
            }
        }
    }
}

/// Copies a tensor from a GPU to the host.
pub(crate) fn download(from: &Device<'_>, to: &mut [u8]) -> Result<()> {
    let copied = lightrft_collectives::nccl::driver::download(from, to, COPIED_WITHIN);
    copied.map_err(|source| Error::Gpu {
        doing: "copy weights to the host",
        ordinal: from.ordinal(),
        advice: "the work before them on their stream may have failed",
        source: Box::new(source),
    })
}
