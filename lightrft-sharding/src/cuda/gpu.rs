//! A GPU as the memory of units: the operations as kernels and NCCL calls, enqueued
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use lightrft_collectives::nccl::{DeviceMemory, Stream};
use lightrft_collectives::{
    Call, Communicator, CommunicatorExt as _, Device, DeviceMut, Dtype, Element, Error as CollectiveError,
    Operation, Queue, ReduceOp, Result as GroupResult,
};

use super::kernels::{Kernels, Run};
use super::lanes::{Lanes, Loan};
use super::values::{GpuValues, dtype};
use crate::error::{Error, Result};
use crate::memory::{AdamWork, Among, GatherCall, Memory, Operations};
use crate::optim::{Decay, Scalars};
use crate::precision::{Combine, Precision};

/// A GPU whose memory holds units, the stream on which they are computed with, and another for communication beside it.
///
/// Clones are the same GPU with the same streams; units, optimizer and model that work together share one.
#[derive(Clone, Debug)]
pub struct Gpu {
    shared: Arc<Shared>,
    timeout: Duration,
}

#[derive(Debug)]
struct Shared {
    lanes: Arc<Lanes<Stream>>,
    kernels: Arc<Kernels>,
}

impl Memory for Gpu {}

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
        let place = |(ordinal, stream)| format!("on stream {stream:?} of GPU {ordinal}");
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
    fn wait(&self, doing: &'static str) -> GroupResult<()> {
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
        let failed = Error::collective("a call on device memory", "no elements");
        let mut none = GpuValues::unset(self.compute(), Precision::F32, 1).map_err(&failed)?;
        comm.run(Operation::AllReduce { data: none.device_mut(0..0).into(), op: ReduceOp::Sum })
            .map_err(failed)
    }

    /// Elements for a call on `stream`, to read.
    fn to_read(&self, run: Run, stream: &Stream) -> Device<'static> {
        let dtype = dtype(run.precision);
        // SAFETY: memory of this GPU that is freed or used by others only after this call: by the rule of `lanes`.
        unsafe { Device::from_raw(dtype, self.ordinal(), run.address, run.elems, stream.handle()) }
    }

    /// Elements for a call on `stream`, to overwrite.
    fn to_write(&self, run: Run, stream: &Stream) -> DeviceMut<'static> {
        let dtype = dtype(run.precision);
        // SAFETY: as above.
        unsafe { DeviceMut::from_raw(dtype, self.ordinal(), run.address, run.elems, stream.handle()) }
    }

    /// This rank's even part of a buffer as reduced.
    fn reduce_scatter_on(
        &self,
        stream: &Stream,
        values: &GpuValues,
        comm: &dyn Communicator,
    ) -> GroupResult<()> {
        let data = self.to_write(values.run(0..values.len())?, stream).into();
        comm.run(Operation::ReduceScatterInPlace { data, op: ReduceOp::Sum })
    }
}

pub(super) fn misplaced(what: &str, got: String, expected: String) -> Error {
    Error::Misplaced { what: what.to_owned(), got, expected }
}

/// A call beside computing with its buffer.
pub(super) type GpuPending = Loan<Stream, GpuValues>;

impl Operations for Gpu {
    type Values = GpuValues;
    type Pending = GpuPending;
    /// Ends of intervals, then as many rules; and how many.
    type Runs = (DeviceMemory, usize);
    /// One f64.
    type Squares = DeviceMemory;

    const THREADS: bool = false;

    fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    fn unset(&self, precision: Precision, elems: usize) -> Result<GpuValues> {
        GpuValues::unset(self.compute(), precision, elems)
            .map_err(Error::device("allocate a buffer on a GPU"))
    }

    fn zeros(&self, precision: Precision, elems: usize) -> Result<GpuValues> {
        let mut values = self.unset(precision, elems)?;
        self.zero(&mut values, 0..elems)?;
        Ok(values)
    }

    fn zero(&self, values: &mut GpuValues, range: Range<usize>) -> Result<()> {
        let failed = Error::device("fill a buffer on a GPU");
        let Run { precision, address, elems } = values.run(range).map_err(&failed)?;
        if elems == 0 {
            return Ok(());
        }
        let (gpu, stream) = (self.compute().gpu(), self.compute().handle().0);
        // SAFETY: memory of this GPU on the compute stream.
        unsafe { gpu.fill(address, 0, elems * precision.bytes(), stream) }.map_err(failed)
    }

    fn combine(
        &self,
        into: &mut GpuValues,
        range: Range<usize>,
        from: &GpuValues,
        part: Range<usize>,
        how: Combine,
    ) -> Result<()> {
        let made = from.run(part).and_then(|from| self.take_in(into, range, from, how));
        made.map_err(Error::device("combine buffers on a GPU"))
    }

    fn to_change(values: &mut Arc<GpuValues>) -> Result<&mut GpuValues> {
        // Calls that read them have been enqueued, and hold on to nothing.
        Arc::get_mut(values).ok_or_else(|| misplaced("a shard", "lent".to_owned(), "free".to_owned()))
    }

    fn overwrite<R>(&self, values: &mut GpuValues, write: impl FnOnce(&mut [f32]) -> Result<R>) -> Result<R> {
        if let Some(on_host) = values.on_host_mut() {
            return write(on_host);
        }
        let mut staged = vec![0f32; values.len()];
        let written = write(&mut staged)?;
        let failed = Error::device("copy to a GPU");
        let Run { address, elems, .. } = values.run(0..staged.len()).map_err(&failed)?;
        if elems > 0 {
            let (gpu, stream) = (self.compute().gpu(), self.compute().handle().0);
            // SAFETY: as many bytes, on the compute stream.
            unsafe { gpu.upload(address, bytemuck::cast_slice(&staged), stream) }.map_err(failed)?;
        }
        Ok(written)
    }

    fn read<R>(&self, values: &GpuValues, read: impl FnOnce(&[f32]) -> R) -> Result<R> {
        match values.on_host() {
            Some(on_host) => Ok(read(on_host)),
            None => Ok(read(&self.to_host::<f32>(values.as_device())?)),
        }
    }

    fn gather(
        &self,
        whole: GpuValues,
        call: GatherCall<GpuValues>,
        _: Option<&Queue>,
    ) -> GroupResult<GpuPending> {
        let comm = match &call.among {
            Among::Alone => None,
            Among::Shards(comm) | Among::Neighbours(comm) => Some(comm),
        };
        self.shared.lanes.begin(whole, |stream, whole| {
            for segment in call.segments() {
                let into = whole.run(segment.whole)?;
                let shard = call.shard.as_ref().map(|shard| shard.run(segment.shard.clone())).transpose()?;
                match (shard, comm) {
                    (Some(shard), Some(comm)) if into.precision == Precision::F32 => {
                        let input = self.to_read(shard, stream).into();
                        let output = self.to_write(into, stream).into();
                        comm.run(Operation::AllGather { input, output })?;
                        continue;
                    }
                    (Some(shard), _) => {
                        let own = whole.run(segment.own)?;
                        // SAFETY: both are memory of this GPU; the masters change on the compute stream, which waits
                        // for the end of this before it has the unit.
                        unsafe { self.shared.kernels.combine(stream, own, shard, Combine::Set)? };
                    }
                    (None, _) => {}
                }
                if let Some(comm) = comm {
                    comm.run(Operation::AllGatherInPlace { data: self.to_write(into, stream).into() })?;
                }
            }
            Ok(())
        })
    }

    fn reduce_scatter(
        &self,
        values: GpuValues,
        comm: &Arc<dyn Communicator>,
        _: Option<&Queue>,
    ) -> GroupResult<GpuPending> {
        self.shared.lanes.begin(values, |stream, values| self.reduce_scatter_on(stream, values, &**comm))
    }

    fn finish(&self, pending: GpuPending) -> GroupResult<GpuValues> {
        // A loan has its buffer until it is over.
        pending.finish()?.ok_or(CollectiveError::Taken)
    }

    fn reduce_scatter_now(&self, values: &mut GpuValues, comm: &dyn Communicator) -> GroupResult<()> {
        self.shared.lanes.in_turn(|stream| self.reduce_scatter_on(stream, values, comm))
    }

    fn reduce_scatter_into(
        &self,
        full: &GpuValues,
        sum: &mut GpuValues,
        comm: &dyn Communicator,
    ) -> GroupResult<()> {
        let (full, sum) = (full.run(0..full.len())?, sum.run(0..sum.len())?);
        self.shared.lanes.in_turn(|stream| {
            let (input, output) = (self.to_read(full, stream).into(), self.to_write(sum, stream).into());
            comm.run(Operation::ReduceScatter { input, output, op: ReduceOp::Sum })
        })
    }

    fn all_reduce(
        &self,
        values: &mut GpuValues,
        range: Range<usize>,
        comm: &dyn Communicator,
    ) -> GroupResult<()> {
        let run = values.run(range)?;
        self.shared.lanes.in_turn(|stream| {
            let data = self.to_write(run, stream).into();
            comm.run(Operation::AllReduce { data, op: ReduceOp::Sum })
        })
    }

    fn all_reduce_beside(
        &self,
        values: GpuValues,
        comm: &Arc<dyn Communicator>,
        _: Option<&Queue>,
    ) -> GroupResult<GpuPending> {
        self.shared.lanes.begin(values, |stream, values| {
            let data = self.to_write(values.run(0..values.len())?, stream).into();
            comm.run(Operation::AllReduce { data, op: ReduceOp::Sum })
        })
    }

    fn runs(&self, runs: Vec<(Range<usize>, Decay)>, elems: usize) -> Result<Self::Runs> {
        let table = table(runs, elems);
        let memory = DeviceMemory::upload(self.compute(), &table);
        Ok((memory.map_err(Error::device("copy to a GPU"))?, table.len() / 2))
    }

    fn adamw(&self, work: Vec<AdamWork<'_, Self>>, scalars: Scalars) -> Result<()> {
        let failed = Error::device("step an optimizer on a GPU");
        for AdamWork { param, copy, grad, own, exp_avg, exp_avg_sq, runs: (runs, count) } in work {
            let elems = own.len();
            let grad = grad.run(own).map_err(&failed)?;
            let of = |values: &GpuValues| values.run(0..elems).map(|run| run.address).map_err(&failed);
            let arrays = [of(param)?, grad.address, of(exp_avg)?, of(exp_avg_sq)?];
            let runs = (runs.pointer(), *count);
            // SAFETY: f32 of this GPU on the compute stream, as many of each; the table was made for as many.
            let made = unsafe { self.shared.kernels.adamw(self.compute(), arrays, elems, runs, scalars) };
            made.map_err(&failed)?;
            if let Some(copy) = copy {
                let stepped = param.run(0..elems).map_err(&failed)?;
                self.take_in(copy, 0..elems, stepped, Combine::Set).map_err(&failed)?;
            }
        }
        Ok(())
    }

    fn squares(
        &self,
        total: Option<DeviceMemory>,
        parts: &[(&GpuValues, Range<usize>)],
    ) -> Result<DeviceMemory> {
        let failed = Error::device("sum squares on a GPU");
        let (compute, kernels) = (self.compute(), &self.shared.kernels);
        let total = match total {
            Some(total) => total,
            None => DeviceMemory::zeroed::<f64>(compute, 1).map_err(&failed)?,
        };
        let count = parts.iter().map(|(_, part)| Kernels::partials(part.len())).sum();
        let partials = DeviceMemory::unset(compute, Dtype::F64, count).map_err(&failed)?;
        let mut at = 0;
        for (values, part) in parts {
            let run = values.run(part.clone()).map_err(&failed)?;
            let partial = partials.pointer() + (at * size_of::<f64>()) as u64;
            // SAFETY: f32 of this GPU on the compute stream; there are so many partial sums from there on.
            unsafe { kernels.squares(compute, run, partial) }.map_err(&failed)?;
            at += Kernels::partials(part.len());
        }
        if count > 0 {
            // SAFETY: as many partial sums as were written, and one f64.
            unsafe { kernels.add_partials(compute, (partials.pointer(), count), total.pointer()) }
                .map_err(&failed)?;
        }
        Ok(total)
    }

    /// The one place of a step where the host waits. What has failed on the way shows here, before the step has changed
    /// anything.
    fn total(&self, squares: DeviceMemory, comm: &dyn Communicator) -> GroupResult<f64> {
        if comm.world_size() > 1 {
            self.shared.lanes.in_turn(|stream| {
                let (ordinal, handle) = (self.ordinal(), stream.handle());
                // SAFETY: one f64 of this GPU, which is freed on the compute stream after this.
                let data = unsafe { DeviceMut::from_raw(Dtype::F64, ordinal, squares.pointer(), 1, handle) };
                comm.run(Operation::AllReduce { data: data.into(), op: ReduceOp::Sum })
            })?;
        }
        let total = squares.download::<f64>(self.timeout)?;
        comm.failure(Call::AllReduce).map_or(Ok(()), Err)?;
        total.first().copied().ok_or(CollectiveError::Taken)
    }

    fn evict(&self, all: Vec<&mut GpuValues>) -> Result<usize> {
        let begun = all.iter().map(|values| values.begin_eviction()).collect::<GroupResult<Vec<_>>>();
        let copies = self.settled(begun, "copy to pinned memory")?;
        let moves = all.into_iter().zip(copies);
        Ok(moves.map(|(values, copy)| copy.map_or(0, |pinned| values.move_to_host(pinned))).sum())
    }

    fn restore(&self, all: Vec<&mut GpuValues>) -> Result<usize> {
        let begun = all.iter().map(|values| values.begin_restoration()).collect::<GroupResult<Vec<_>>>();
        let copies = self.settled(begun, "copy from pinned memory")?;
        let moves = all.into_iter().zip(copies);
        Ok(moves.map(|(values, copy)| copy.map_or(0, |memory| values.move_to_gpu(memory))).sum())
    }
}

impl Gpu {
    /// The copies, once they are done.
    fn settled<T>(&self, copies: GroupResult<Vec<T>>, doing: &'static str) -> Result<Vec<T>> {
        match self.wait(doing) {
            Ok(()) => copies.map_err(Error::device(doing)),
            Err(error) => {
                // The GPU may still be at work on them.
                std::mem::forget(copies);
                Err(Error::device(doing)(error))
            }
        }
    }
}

/// Intervals that cover all `elems` elements, as the kernel wants them: where each ends, then what is done in each.
fn table(runs: Vec<(Range<usize>, Decay)>, elems: usize) -> Vec<i64> {
    const LEFT_ALONE: i64 = 0;
    let (mut ends, mut rules) = (Vec::new(), Vec::new());
    let mut at = 0;
    for (run, decay) in runs {
        if at < run.start {
            ends.push(run.start as i64);
            rules.push(LEFT_ALONE);
        }
        ends.push(run.end as i64);
        rules.push(if decay == Decay::Yes { 1 } else { 2 });
        at = run.end;
    }
    if at < elems {
        ends.push(elems as i64);
        rules.push(LEFT_ALONE);
    }
    ends.extend(rules);
    ends
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_intervals_covers_gaps_and_padding() {
        let runs = vec![(0..3, Decay::Yes), (3..4, Decay::No), (6..8, Decay::Yes)];
        assert_eq!(table(runs, 9), [3, 4, 6, 8, 9, 1, 2, 0, 1, 0]);
        assert_eq!(table(vec![], 2), [2, 0]);
        assert_eq!(table(vec![], 0), [0i64; 0]);
    }

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
