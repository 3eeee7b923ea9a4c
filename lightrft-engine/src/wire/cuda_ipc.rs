//! GPU memory that another process may open: which GPU, which handle, which part.

use std::fmt;

use super::pickle::Value;
use super::torch::CudaMemory;

/// A GPU's own number, the same in every process whatever `CUDA_VISIBLE_DEVICES` says: `cuDeviceGetUuid`'s bytes.
///
/// It is written as torch writes it, in lower case and without the `GPU-` of `nvidia-smi`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GpuUuid(pub [u8; 16]);

impl fmt::Display for GpuUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            if [4, 6, 8, 10].contains(&at) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// A buffer in GPU memory that this process has allocated and lets an engine on the same GPU read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaIpcBuffer {
    /// The GPU that both processes see.
    pub gpu: GpuUuid,
    /// `cuIpcGetMemHandle`'s bytes as they are. Memory of a stream-ordered pool has none: allocate with `cuMemAlloc`.
    pub handle: [u8; 64],
    /// Bytes of the buffer.
    pub bytes: usize,
    /// Where the buffer begins in its allocation, which is what the handle names.
    pub offset_in_allocation: usize,
}

impl CudaIpcBuffer {
    pub(super) fn memory<'a>(&'a self, device: Value<'a>) -> CudaMemory<'a> {
        let &Self { bytes, offset_in_allocation, .. } = self;
        CudaMemory { device, handle: &self.handle, storage_bytes: bytes, offset_in_allocation }
    }
}
