//! The operations on units as kernels and NCCL calls, enqueued on a GPU's streams
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;

use lightrft_collectives::nccl::{DeviceMemory, Stream};
use lightrft_collectives::{
    Call, Communicator, CommunicatorExt as _, DeviceMut, Dtype, Error as CollectiveError, Operation, Queue,
    ReduceOp, Result as GroupResult,
};

use super::gpu::{Gpu, misplaced};
use super::kernels::{Kernels, Run};
use super::lanes::Loan;
use super::values::GpuValues;
use crate::error::{Error, Result};
use crate::memory::{AdamWork, Among, GatherCall, Memory, Operations, ShardRuns};
use crate::optim::{Decay, Scalars};
use crate::precision::{Combine, Precision};

impl Memory for Gpu {}

/// A call beside computing with its buffer.
pub(super) type GpuPending = Loan<Stream, GpuValues>;

/// The intervals of one shard: where each ends, then as many rules. One allocation has those of all shards: the driver keeps
/// memory in large blocks, and a small allocation beside a large one would hold on to its block.
#[derive(Debug)]
pub struct Table {
    all: Arc<DeviceMemory>,
    begin: usize,
    count: usize,
}

impl Operations for Gpu {
    type Values = GpuValues;
    type Pending = GpuPending;
    type Runs = Table;
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

    fn runs(&self, shards: Vec<ShardRuns>) -> Result<Vec<Table>> {
        let tables: Vec<Vec<i64>> = shards.into_iter().map(table).collect();
        let all = DeviceMemory::upload(self.compute(), &tables.concat());
        let all = Arc::new(all.map_err(Error::device("copy to a GPU"))?);
        let mut at = 0;
        let tables = tables.iter().map(|table| {
            let begin = at;
            at += table.len();
            Table { all: Arc::clone(&all), begin, count: table.len() / 2 }
        });
        Ok(tables.collect())
    }

    fn adamw(&self, work: Vec<AdamWork<'_, Self>>, scalars: Scalars) -> Result<()> {
        let failed = Error::device("step an optimizer on a GPU");
        for AdamWork { param, copy, grad, own, exp_avg, exp_avg_sq, runs } in work {
            let elems = own.len();
            let grad = grad.run(own).map_err(&failed)?;
            let of = |values: &GpuValues| values.run(0..elems).map(|run| run.address).map_err(&failed);
            let arrays = [of(param)?, grad.address, of(exp_avg)?, of(exp_avg_sq)?];
            let runs = (runs.all.pointer() + (runs.begin * size_of::<i64>()) as u64, runs.count);
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

    fn blend(&self, average: &mut GpuValues, values: &GpuValues, weight: f32) -> Result<()> {
        let failed = Error::device("average parameters on a GPU");
        let elems = 0..average.len();
        let (average, values) =
            (average.run(elems.clone()).map_err(&failed)?, values.run(elems).map_err(&failed)?);
        // SAFETY: f32 of this GPU on the compute stream.
        unsafe { self.shared.kernels.blend(self.compute(), average, values, weight) }.map_err(failed)
    }

    fn swap(&self, values: &mut GpuValues, others: &mut GpuValues) -> Result<()> {
        let failed = Error::device("exchange buffers on a GPU");
        let elems = 0..values.len();
        let (values, others) =
            (values.run(elems.clone()).map_err(&failed)?, others.run(elems).map_err(&failed)?);
        // SAFETY: f32 of this GPU on the compute stream.
        unsafe { self.shared.kernels.swap(self.compute(), values, others) }.map_err(failed)
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

    fn outcome(&self, comm: &dyn Communicator) -> GroupResult<()> {
        comm.failure(Call::Barrier).map_or(Ok(()), Err)
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

    fn evict(&self, mut all: Vec<&mut GpuValues>) -> Result<usize> {
        let doing = "copy to pinned memory";
        let begun = all.iter_mut().try_for_each(|values| values.begin_eviction());
        self.settle(doing, begun, &mut all)?;
        Ok(all.into_iter().map(GpuValues::leave).sum())
    }

    fn restore(&self, mut all: Vec<&mut GpuValues>) -> Result<usize> {
        let doing = "copy from pinned memory";
        let begun = all.iter().map(|values| values.begin_restoration()).collect::<GroupResult<Vec<_>>>();
        let copies = self.settle(doing, begun, &mut all)?;
        let moves = all.into_iter().zip(copies);
        Ok(moves.map(|(values, copy)| copy.map_or(0, |memory| values.come_back(memory))).sum())
    }

    fn trim(&self) -> Result<()> {
        let failed = Error::device("give memory of a GPU back");
        self.wait("give memory back").map_err(&failed)?;
        let (gpu, stream) = (self.compute().gpu(), self.compute().handle().0);
        // SAFETY: the compute stream is live.
        unsafe { gpu.trim(stream) }.map_err(failed)
    }
}

/// Intervals that cover all `elems` elements, as the kernel wants them: where each ends, then what is done in each.
fn table(ShardRuns { runs, elems }: ShardRuns) -> Vec<i64> {
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
        assert_eq!(table(ShardRuns { runs, elems: 9 }), [3, 4, 6, 8, 9, 1, 2, 0, 1, 0]);
        assert_eq!(table(ShardRuns { runs: vec![], elems: 2 }), [2, 0]);
        assert_eq!(table(ShardRuns { runs: vec![], elems: 0 }), [0i64; 0]);
    }
}
