//! What units ask of the memory they lie in: one list of operations, for the host's memory and for a GPU's.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use lightrft_collectives::{Communicator, Queue, Result as GroupResult};

use crate::error::Result;
use crate::optim::{Decay, Scalars};
use crate::plan::Plan;
use crate::precision::{Combine, Precision};

/// Where units lie, and are computed with: [`HostMemory`](crate::HostMemory), or a GPU with the feature `cuda`.
///
/// What is cut, what is exchanged and when is decided once, whatever the memory; what differs is in the operations below
/// this trait, which is sealed.
pub trait Memory: Operations {}

/// A flat buffer of one precision.
pub trait Values: fmt::Debug + Send + Sync + 'static {
    /// The type of the elements.
    fn precision(&self) -> Precision;

    /// Number of elements.
    fn len(&self) -> usize;

    /// Bytes that it holds of the memory that is computed with.
    fn capacity_bytes(&self) -> usize;

    /// Makes it `elems` elements long, which fit into its capacity. Those that come anew have any value.
    fn resize(&mut self, elems: usize);
}

/// The operations. They happen in the order of the calls, as on the host; on a device they have then been enqueued.
/// What is called *beside* may run while later ones do, until it is [finished](Self::finish).
pub trait Operations: Clone + fmt::Debug + Send + Sync + 'static {
    /// A flat buffer.
    type Values: Values;
    /// A buffer in a call beside.
    type Pending: fmt::Debug + Send;
    /// Which intervals of a shard an optimizer updates, and how.
    type Runs: fmt::Debug + Send + Sync;
    /// A sum of squares.
    type Squares;

    /// Whether calls beside computing take a thread each, with a group of its own.
    const THREADS: bool;

    /// Whether two handles are of one memory, in one order of operations.
    fn is(&self, other: &Self) -> bool;

    /// `elems` elements of any value.
    fn unset(&self, precision: Precision, elems: usize) -> Result<Self::Values>;

    /// `elems` zeros.
    fn zeros(&self, precision: Precision, elems: usize) -> Result<Self::Values>;

    /// Overwrites `range` with zeros.
    fn zero(&self, values: &mut Self::Values, range: Range<usize>) -> Result<()>;

    /// Adds `from[part]` to `into[range]`, or puts it there: in f32, rounded once.
    fn combine(
        &self,
        into: &mut Self::Values,
        range: Range<usize>,
        from: &Self::Values,
        part: Range<usize>,
        how: Combine,
    ) -> Result<()>;

    /// The values alone, for a change of them: what a call beside still reads on the host stays as it was.
    fn to_change(values: &mut Arc<Self::Values>) -> Result<&mut Self::Values>;

    /// Gives f32 values to `write`, all of which it overwrites that are not zero.
    fn overwrite<R>(
        &self,
        values: &mut Self::Values,
        write: impl FnOnce(&mut [f32]) -> Result<R>,
    ) -> Result<R>;

    /// Shows f32 values, once all operations on them are done.
    fn read<R>(&self, values: &Self::Values, read: impl FnOnce(&[f32]) -> R) -> Result<R>;

    /// Makes a unit whole in `whole`, beside computing; in its turn on `queue`, where there is one.
    fn gather(
        &self,
        whole: Self::Values,
        call: GatherCall<Self::Values>,
        queue: Option<&Queue>,
    ) -> GroupResult<Self::Pending>;

    /// Sums over ranks, beside computing; in its turn on `queue`, where there is one. This rank's even part of the buffer
    /// then holds its part of the sum, the rest nothing of use.
    fn reduce_scatter(
        &self,
        values: Self::Values,
        comm: &Arc<dyn Communicator>,
        queue: Option<&Queue>,
    ) -> GroupResult<Self::Pending>;

    /// What comes after this call comes after `pending`.
    fn finish(&self, pending: Self::Pending) -> GroupResult<Self::Values>;

    /// As [`reduce_scatter`](Self::reduce_scatter), in place and not beside.
    fn reduce_scatter_now(&self, values: &mut Self::Values, comm: &dyn Communicator) -> GroupResult<()>;

    /// This rank's part of the sum of `full` over ranks.
    fn reduce_scatter_into(
        &self,
        full: &Self::Values,
        sum: &mut Self::Values,
        comm: &dyn Communicator,
    ) -> GroupResult<()>;

    /// Sums `values[range]` over ranks.
    fn all_reduce(
        &self,
        values: &mut Self::Values,
        range: Range<usize>,
        comm: &dyn Communicator,
    ) -> GroupResult<()>;

    /// As [`all_reduce`](Self::all_reduce), of all values and beside computing; in its turn on `queue`, where there is one.
    fn all_reduce_beside(
        &self,
        values: Self::Values,
        comm: &Arc<dyn Communicator>,
        queue: Option<&Queue>,
    ) -> GroupResult<Self::Pending>;

    /// The intervals of each shard, in a form that [`adamw`](Self::adamw) can use.
    fn runs(&self, shards: Vec<ShardRuns>) -> Result<Vec<Self::Runs>>;

    /// One step of AdamW.
    fn adamw(&self, work: Vec<AdamWork<'_, Self>>, scalars: Scalars) -> Result<()>;

    /// Moves f32 `average` by `weight` towards the first elements of `values`.
    fn blend(&self, average: &mut Self::Values, values: &Self::Values, weight: f32) -> Result<()>;

    /// Exchanges f32 `values` and the first elements of `others`.
    fn swap(&self, values: &mut Self::Values, others: &mut Self::Values) -> Result<()>;

    /// The squares of all `parts`, f32, added to `total`: in f64, in an order that depends on the lengths alone.
    fn squares(
        &self,
        total: Option<Self::Squares>,
        parts: &[(&Self::Values, Range<usize>)],
    ) -> Result<Self::Squares>;

    /// Whether what `comm` was given has come to nothing, as far as is known: for where the device has been waited for. Never on
    /// the host, where calls have said so themselves.
    fn outcome(&self, comm: &dyn Communicator) -> GroupResult<()>;

    /// The sum over ranks, for the host: waits for what the device has been given.
    fn total(&self, squares: Self::Squares, comm: &dyn Communicator) -> GroupResult<f64>;

    /// Moves all of them out of the memory that is computed with, or none; the bytes that left it.
    fn evict(&self, all: Vec<&mut Self::Values>) -> Result<usize>;

    /// Moves back what was [evicted](Self::evict), or nothing; the bytes that came.
    fn restore(&self, all: Vec<&mut Self::Values>) -> Result<usize>;

    /// Lets others have what was freed.
    fn trim(&self) -> Result<()>;
}

/// How a unit becomes whole.
#[derive(Debug)]
pub struct GatherCall<V> {
    /// What holds this rank's part; `None` where the part lies in its place already.
    pub shard: Option<Arc<V>>,
    /// Whom the other parts come from.
    pub among: Among,
    /// Of which the unit is one.
    pub plan: Arc<Plan>,
    /// Its index.
    pub unit: usize,
    /// This rank's place in the shard group.
    pub rank: usize,
}

impl<V> GatherCall<V> {
    /// The unit's segments that have elements.
    pub fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        let unit = &self.plan.units()[self.unit];
        unit.parts().map(|part| Segment {
            whole: unit.segment(part),
            own: unit.interval(part, self.rank),
            shard: unit.shard_part(part),
        })
    }
}

/// One evenly cut run of a unit.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Where it lies in the whole.
    pub whole: Range<usize>,
    /// This rank's part of it there.
    pub own: Range<usize>,
    /// That part in the rank's shard.
    pub shard: Range<usize>,
}

/// Ranks that have the parts of a unit.
#[derive(Clone, Debug)]
pub enum Among {
    /// This one has all of it: nothing is sent.
    Alone,
    /// Those of the shard group.
    Shards(Arc<dyn Communicator>),
    /// Those that keep gathered units among them.
    Neighbours(Arc<dyn Communicator>),
}

/// What is updated of a shard, in intervals of it, ascending. What lies between them is padding.
#[derive(Clone, Debug)]
pub struct ShardRuns {
    /// Each with whether it decays.
    pub runs: Vec<(Range<usize>, Decay)>,
    /// Elements of the shard.
    pub elems: usize,
}

/// What AdamW updates of one unit: arrays of one length, f32.
#[derive(Debug)]
pub struct AdamWork<'a, Mem: Operations> {
    /// Of which the first elements learn.
    pub param: &'a mut Mem::Values,
    /// Where these are rounded to, as gathers read them.
    pub copy: Option<&'a mut Mem::Values>,
    /// The gradient.
    pub grad: &'a Mem::Values,
    /// Which elements of that are the shard's.
    pub own: Range<usize>,
    /// The running mean of gradients.
    pub exp_avg: &'a mut Mem::Values,
    /// The running mean of squared gradients.
    pub exp_avg_sq: &'a mut Mem::Values,
    /// What is updated, and what of it decays.
    pub runs: &'a Mem::Runs,
}
