//! Units in host memory: the operations on slices; calls beside computing run on threads.

use std::ops::Range;
use std::sync::Arc;

use lightrft_collectives::{
    Communicator, CommunicatorExt as _, Pending, Queue, ReduceOp, Result as GroupResult,
};

use crate::error::Result;
use crate::memory::{AdamWork, Among, GatherCall, Memory, Operations, Segment, ShardRuns, Values};
use crate::optim::{self, CopyOut, Decay, Scalars};
use crate::precision::{Combine, Precision, UnitValues};

/// The memory of the process. Everything is done when a call returns.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostMemory;

impl Memory for HostMemory {}

/// A call that was made, or that a queue has.
#[derive(Debug)]
pub enum HostPending {
    /// It is over.
    Done(UnitValues),
    /// It runs, or waits for its turn.
    Queued(Pending<UnitValues>),
}

impl Values for UnitValues {
    fn precision(&self) -> Precision {
        self.precision()
    }

    fn len(&self) -> usize {
        self.len()
    }

    fn capacity_bytes(&self) -> usize {
        self.capacity_bytes()
    }

    fn resize(&mut self, elems: usize) {
        self.resize(elems);
    }
}

impl Operations for HostMemory {
    type Values = UnitValues;
    type Pending = HostPending;
    type Runs = Vec<(Range<usize>, Decay)>;
    type Squares = f64;

    const THREADS: bool = true;

    fn is(&self, _: &Self) -> bool {
        true
    }

    /// Zeros: the allocator has them for nothing until they are touched.
    fn unset(&self, precision: Precision, elems: usize) -> Result<UnitValues> {
        self.zeros(precision, elems)
    }

    fn zeros(&self, precision: Precision, elems: usize) -> Result<UnitValues> {
        Ok(UnitValues::zeros(precision, elems))
    }

    fn zero(&self, values: &mut UnitValues, range: Range<usize>) -> Result<()> {
        values.zero(range);
        Ok(())
    }

    fn combine(
        &self,
        into: &mut UnitValues,
        range: Range<usize>,
        from: &UnitValues,
        part: Range<usize>,
        how: Combine,
    ) -> Result<()> {
        into.take_in(range, from, part, how);
        Ok(())
    }

    fn to_change(values: &mut Arc<UnitValues>) -> Result<&mut UnitValues> {
        Ok(Arc::make_mut(values))
    }

    fn overwrite<R>(
        &self,
        values: &mut UnitValues,
        write: impl FnOnce(&mut [f32]) -> Result<R>,
    ) -> Result<R> {
        write(values.f32_mut())
    }

    fn read<R>(&self, values: &UnitValues, read: impl FnOnce(&[f32]) -> R) -> Result<R> {
        Ok(read(values.f32()))
    }

    fn gather(
        &self,
        mut whole: UnitValues,
        call: GatherCall<UnitValues>,
        queue: Option<&Queue>,
    ) -> GroupResult<HostPending> {
        match (queue, call.among.clone()) {
            (_, Among::Alone) => place_own(&mut whole, &call),
            // The queue fills in this rank's part: that is time which computing can hide, too.
            (Some(queue), among) => {
                return Ok(HostPending::Queued(queue.enqueue(move |comm| {
                    let comm = if let Among::Neighbours(near) = &among { &**near } else { comm };
                    place_own(&mut whole, &call);
                    gather_in_place(&mut whole, &call, comm)?;
                    Ok(whole)
                })));
            }
            (None, Among::Shards(comm) | Among::Neighbours(comm)) => {
                match (&mut whole, call.shard.as_deref()) {
                    (UnitValues::F32(values), Some(UnitValues::F32(shard))) => {
                        gather_from_shard(values, shard, call.segments(), &*comm)?;
                    }
                    _ => {
                        place_own(&mut whole, &call);
                        gather_in_place(&mut whole, &call, &*comm)?;
                    }
                }
            }
        }
        Ok(HostPending::Done(whole))
    }

    fn reduce_scatter(
        &self,
        mut values: UnitValues,
        comm: &Arc<dyn Communicator>,
        queue: Option<&Queue>,
    ) -> GroupResult<HostPending> {
        match queue {
            Some(queue) => Ok(HostPending::Queued(
                queue.enqueue(move |comm| values.reduce_scatter(comm).map(|()| values)),
            )),
            None => values.reduce_scatter(&**comm).map(|()| HostPending::Done(values)),
        }
    }

    fn finish(&self, pending: HostPending) -> GroupResult<UnitValues> {
        match pending {
            HostPending::Done(values) => Ok(values),
            HostPending::Queued(pending) => pending.wait(),
        }
    }

    fn reduce_scatter_now(&self, values: &mut UnitValues, comm: &dyn Communicator) -> GroupResult<()> {
        values.reduce_scatter(comm)
    }

    fn reduce_scatter_into(
        &self,
        full: &UnitValues,
        sum: &mut UnitValues,
        comm: &dyn Communicator,
    ) -> GroupResult<()> {
        comm.reduce_scatter(full.f32(), sum.f32_mut(), ReduceOp::Sum)
    }

    fn all_reduce(
        &self,
        values: &mut UnitValues,
        range: Range<usize>,
        comm: &dyn Communicator,
    ) -> GroupResult<()> {
        values.all_reduce(range, comm)
    }

    fn all_reduce_beside(
        &self,
        mut values: UnitValues,
        comm: &Arc<dyn Communicator>,
        queue: Option<&Queue>,
    ) -> GroupResult<HostPending> {
        let all = 0..values.len();
        match queue {
            Some(queue) => Ok(HostPending::Queued(
                queue.enqueue(move |comm| values.all_reduce(all, comm).map(|()| values)),
            )),
            None => values.all_reduce(all, &**comm).map(|()| HostPending::Done(values)),
        }
    }

    fn runs(&self, shards: Vec<ShardRuns>) -> Result<Vec<Self::Runs>> {
        Ok(shards.into_iter().map(|shard| shard.runs).collect())
    }

    fn adamw(&self, work: Vec<AdamWork<'_, Self>>, scalars: Scalars) -> Result<()> {
        adamw_and_copy(work, std::iter::repeat_with(CopyOut::default), scalars);
        Ok(())
    }

    fn blend(&self, average: &mut UnitValues, values: &UnitValues, weight: f32) -> Result<()> {
        let average = average.f32_mut();
        let elems = average.len();
        optim::blend(average, &values.f32()[..elems], weight);
        Ok(())
    }

    fn swap(&self, values: &mut UnitValues, others: &mut UnitValues) -> Result<()> {
        let values = values.f32_mut();
        let elems = values.len();
        others.f32_mut()[..elems].swap_with_slice(values);
        Ok(())
    }

    fn squares(&self, total: Option<f64>, parts: &[(&UnitValues, Range<usize>)]) -> Result<f64> {
        let sums = parts.iter().map(|(values, part)| optim::sum_of_squares(&values.f32()[part.clone()]));
        Ok(total.unwrap_or(0.0) + sums.sum::<f64>())
    }

    fn outcome(&self, _: &dyn Communicator) -> GroupResult<()> {
        Ok(())
    }

    fn total(&self, squares: f64, comm: &dyn Communicator) -> GroupResult<f64> {
        let mut sum = [squares];
        if comm.world_size() > 1 {
            comm.all_reduce(&mut sum, ReduceOp::Sum)?;
        }
        Ok(sum[0])
    }

    /// They are where they would be moved to.
    fn evict(&self, _: Vec<&mut UnitValues>) -> Result<usize> {
        Ok(0)
    }

    fn restore(&self, _: Vec<&mut UnitValues>) -> Result<usize> {
        Ok(0)
    }

    fn trim(&self) -> Result<()> {
        Ok(())
    }
}

/// One step of AdamW that also rounds the parameters of each unit into a copy: one of `copies`, or else the one that gathers
/// read.
pub(crate) fn adamw_and_copy<'a>(
    work: Vec<AdamWork<'a, HostMemory>>,
    copies: impl IntoIterator<Item = CopyOut<'a>>,
    scalars: Scalars,
) {
    let with_copy = |(mut work, copy): (AdamWork<'a, HostMemory>, CopyOut<'a>)| {
        let (own, elems) = (work.copy.take(), work.own.len());
        (work, copy.or(own, elems))
    };
    optim::step_on_host(work.into_iter().zip(copies).map(with_copy).collect(), scalars);
}

/// Puts this rank's part into its place, where it does not lie there.
fn place_own(whole: &mut UnitValues, call: &GatherCall<UnitValues>) {
    for segment in call.segments() {
        if let Some(shard) = &call.shard {
            whole.take_in(segment.own, shard, segment.shard, Combine::Set);
        }
    }
}

fn gather_in_place(
    whole: &mut UnitValues,
    call: &GatherCall<UnitValues>,
    comm: &dyn Communicator,
) -> GroupResult<()> {
    call.segments().try_for_each(|segment| whole.all_gather(segment.whole, comm))
}

/// The group reads the shard where it lies: to put it into its place first would be one more pass over it, which takes some
/// 7% of the time of a gather between two ranks.
fn gather_from_shard(
    values: &mut [f32],
    shard: &[f32],
    mut segments: impl Iterator<Item = Segment>,
    comm: &dyn Communicator,
) -> GroupResult<()> {
    segments.try_for_each(|segment| comm.all_gather(&shard[segment.shard], &mut values[segment.whole]))
}
