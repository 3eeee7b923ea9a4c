//! A GPU that holds units: its two streams, its kernels, and what the caller may ask of it
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use lightrft_collectives::nccl::Stream;
use lightrft_collectives::{
    Communicator, CommunicatorExt as _, Device, DeviceMut, Element, Error as CollectiveError, Operation,
    ReduceOp, Result as GroupResult, StreamHandle,
};

use super::kernels::{Kernels, Run};
use super::lanes::Lanes;
use super::values::{GpuValues, dtype};
use crate::error::{Error, Result};
use crate::precision::{Combine, Precision};

/// A GPU whose memory holds units, the stream on which they are computed with, and another for communication beside it.
///
/// Clones are the same GPU with the same streams; units, optimizer and model that work together share one.
#[derive(Clone, Debug)]
pub struct Gpu {
    pub(super) shared: Arc<Shared>,
    pub(super) timeout: Duration,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) lanes: Arc<Lanes<Stream>>,
    pub(super) kernels: Arc<Kernels>,
}

impl Gpu {
    /// The GPU of `compute`, the stream that the caller's model computes on: units are used in its order. The kernels of this
    /// crate are compiled when the first one is made, which takes about a second.
    ///
    /// # Errors
    /// [`Error::Device`] where there is no CUDA driver or no NVRTC (`$NVRTC_LIB`, `libnvrtc.so.13`, `libnvrtc.so.12`,
    /// `libnvrtc.so`), or they refuse.
    pub fn new(compute: &Stream) -> Result<Self> {
        let failed = Error::device("prepare a GPU for units");
        let beside = Stream::new(compute.ordinal()).map_err(&failed)?;
        let kernels = Kernels::of(compute).map_err(&failed)?;
        let shared = Arc::new(Shared { lanes: Lanes::new(compute.clone(), beside), kernels });
        Ok(Self { shared, timeout: lightrft_collectives::DEFAULT_TIMEOUT })
    }

    /// GPU `ordinal` of this process, with a compute stream of its own.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_ordinal(ordinal: usize) -> Result<Self> {
        Self::new(&Stream::new(ordinal).map_err(Error::device("prepare a GPU for units"))?)
    }

    /// Sets how long the host waits for the GPU where it has to: for the norm of a step, and when values are copied to the
    /// host. 60 minutes by default.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// The GPU's ordinal in this process.
    pub fn ordinal(&self) -> usize {
        self.compute().ordinal()
    }

    /// The stream on which units are used.
    pub fn compute(&self) -> &Stream {
        &self.shared.lanes.compute
    }

    /// Bytes of the GPU's memory that nobody has.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn free_bytes(&self) -> Result<usize> {
        self.compute().gpu().free_bytes().map_err(Error::device("ask a GPU for its memory"))
    }

    /// Copies elements to the host, once the compute stream has come here.
    ///
    /// # Errors
    /// [`Error::Misplaced`] for elements of another type, GPU or stream; [`Error::Device`].
    pub fn to_host<T: Element>(&self, values: Device<'_>) -> Result<Vec<T>> {
        self.check_place("the buffer", &values)?;
        if values.dtype() != T::DTYPE {
            return Err(misplaced("the buffer", format!("{:?}", values.dtype()), format!("{:?}", T::DTYPE)));
        }
        let mut out = vec![<T as bytemuck::Zeroable>::zeroed(); values.len()];
        self.download(bytemuck::cast_slice_mut(&mut out), values.pointer())?;
        Ok(out)
    }

    /// Refuses a buffer that is used on another GPU or stream.
    pub(super) fn check_place(&self, what: &str, values: &Device<'_>) -> Result<()> {
        let here = (self.ordinal(), self.compute().handle());
        let place = |(ordinal, StreamHandle(stream))| format!("on stream {stream:#x} of GPU {ordinal}");
        let there = (values.ordinal(), values.stream());
        if there == here { Ok(()) } else { Err(misplaced(what, place(there), place(here))) }
    }

    /// Adds `from`, checked before, to `into[range]`, or puts it there.
    pub(super) fn take_in(
        &self,
        into: &mut GpuValues,
        range: Range<usize>,
        from: Run,
        how: Combine,
    ) -> GroupResult<()> {
        let into = into.run(range)?;
        if into.elems != from.elems {
            let message = format!("{} elements for {}", from.elems, into.elems);
            let (doing, ordinal) = ("combine buffers", self.ordinal());
            return Err(CollectiveError::Cuda { doing, ordinal, code: 1, message });
        }
        // SAFETY: memory of this GPU on the compute stream: `into` by its type, `from` as the caller has checked.
        unsafe { self.shared.kernels.combine(self.compute(), into, from, how) }
    }

    fn download(&self, into: &mut [u8], address: u64) -> Result<()> {
        let failed = Error::device("copy from a GPU");
        self.wait("copy from the GPU").map_err(&failed)?;
        if into.is_empty() {
            return Ok(());
        }
        let (gpu, stream) = (self.compute().gpu(), self.compute().handle().0);
        // SAFETY: as many bytes, in use on this stream alone.
        unsafe { gpu.download(into, address, stream) }.map_err(failed)
    }

    /// Waits for all that the compute stream has been given.
    pub(super) fn wait(&self, doing: &'static str) -> GroupResult<()> {
        if self.compute().wait(self.timeout)? {
            return Ok(());
        }
        /// `CUDA_ERROR_TIMEOUT`.
        const TIMEOUT: i32 = 909;
        let message = format!("the compute stream was busy for {:?}", self.timeout);
        Err(CollectiveError::Cuda { doing, ordinal: self.ordinal(), code: TIMEOUT, message })
    }

    /// Whether `comm` takes buffers on this GPU. Asks nothing of other ranks that take part in it.
    pub(super) fn check_group(&self, comm: &dyn Communicator) -> Result<()> {
        if comm.world_size() == 1 {
            return Ok(());
        }
        let failed = Error::collective("a first call", "buffers on this GPU");
        let mut none = GpuValues::unset(self.compute(), Precision::F32, 1).map_err(&failed)?;
        comm.run(Operation::AllReduce { data: none.device_mut(0..0).into(), op: ReduceOp::Sum })
            .map_err(failed)
    }

    /// Elements for a call on `stream`, to read.
    pub(super) fn to_read(&self, run: Run, stream: &Stream) -> Device<'static> {
        let dtype = dtype(run.precision);
        // SAFETY: memory of this GPU that is freed or used by others only after this call: by the rule of `lanes`.
        unsafe { Device::from_raw(dtype, self.ordinal(), run.address, run.elems, stream.handle()) }
    }

    /// Elements for a call on `stream`, to overwrite.
    pub(super) fn to_write(&self, run: Run, stream: &Stream) -> DeviceMut<'static> {
        let dtype = dtype(run.precision);
        // SAFETY: as above.
        unsafe { DeviceMut::from_raw(dtype, self.ordinal(), run.address, run.elems, stream.handle()) }
    }

    /// This rank's even part of a buffer as reduced.
    pub(super) fn reduce_scatter_on(
        &self,
        stream: &Stream,
        values: &GpuValues,
        comm: &dyn Communicator,
    ) -> GroupResult<()> {
        let data = self.to_write(values.run(0..values.len())?, stream).into();
        comm.run(Operation::ReduceScatterInPlace { data, op: ReduceOp::Sum })
    }

    /// What was begun, once its copies are done.
    pub(super) fn settle<T>(
        &self,
        doing: &'static str,
        begun: GroupResult<T>,
        all: &mut [&mut GpuValues],
    ) -> Result<T> {
        let waited = self.wait(doing);
        if waited.is_err() {
            all.iter_mut().for_each(|values| values.keep_pinned_for_ever());
        }
        waited.and(begun).map_err(Error::device(doing))
    }
}

pub(super) fn misplaced(what: &str, got: String, expected: String) -> Error {
    Error::Misplaced { what: what.to_owned(), got, expected }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_driver_or_a_gpu_there_is_an_error_that_says_so() {
        let Err(Error::Device { source, .. }) = Gpu::with_ordinal(4096) else {
            panic!("a GPU with ordinal 4096");
        };
        let said =
            matches!(*source, CollectiveError::Library { .. } | CollectiveError::Cuda { ordinal: 4096, .. });
        assert!(said, "{source}");
    }
}
