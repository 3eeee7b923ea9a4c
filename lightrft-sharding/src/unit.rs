//! Sharded storage: this rank's part of every unit, how a unit becomes whole, and how its gradient comes back.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lightrft_collectives::{Communicator, CommunicatorExt as _, ReduceOp};

use crate::agree;
use crate::buffers::{FullUnit, Meter, Pool, TransientBytes};
use crate::error::{BoxError, Error, Result};
use crate::flat::{FlatParam, FlatUnit};
use crate::plan::Plan;
use crate::state::StateKind;

/// What is kept of the units.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Parameters and gradients, each as an f32 shard: 8 P/N bytes, and 8 P/N more for AdamW.
    #[default]
    Train,
    /// Parameters alone: 4 P/N bytes. For a model that only predicts, such as the frozen reference of a KL penalty.
    Frozen,
}

/// One unit as this rank holds it.
#[derive(Debug)]
struct Shard {
    param: Vec<f32>,
    /// Empty when frozen.
    grad: Vec<f32>,
    grad_state: GradState,
}

/// Whether the gradient shard's contents mean anything. Zeroing is a change of this word; the first gradient that
/// arrives then overwrites what lies there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GradState {
    Zero,
    Accumulated,
}

/// The parameters and gradients of a model, cut over the ranks of a group.
///
/// Methods named *collective* must be called by every rank of the group, in the same order.
#[derive(Debug)]
pub struct ShardedUnits {
    plan: Arc<Plan>,
    comm: Arc<dyn Communicator>,
    rank: usize,
    mode: Mode,
    shards: Vec<Shard>,
    meter: Arc<Meter>,
    pool: Pool,
    version: u64,
    backward_incomplete: bool,
}

/// Every change of parameters anywhere in the process gets its own number, so that a number names one state of one
/// model.
fn next_version() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    LAST.fetch_add(1, Ordering::Relaxed)
}

impl ShardedUnits {
    /// All-zero shards for `plan` over the ranks of `comm`. *Collective*: compares the ranks' plans.
    ///
    /// # Errors
    /// - [`Error::WorldMismatch`] when the plan is for another number of ranks;
    /// - [`Error::PlanMismatch`] on every rank when any two have different parameters, with the first difference.
    pub fn new(plan: Arc<Plan>, comm: Arc<dyn Communicator>, mode: Mode) -> Result<Self> {
        let world = comm.world_size();
        if plan.world_size() != world {
            let group = comm.name().to_owned();
            return Err(Error::WorldMismatch { plan: plan.world_size(), group, world });
        }
        agree::on_plan(&plan, &*comm)?;
        let rank = comm.rank();
        let shards = plan
            .units()
            .iter()
            .map(|unit| Shard {
                param: vec![0.0; unit.shard_elems()],
                grad: match mode {
                    Mode::Train => vec![0.0; unit.shard_elems()],
                    Mode::Frozen => Vec::new(),
                },
                grad_state: GradState::Zero,
            })
            .collect();
        let meter = Arc::new(Meter::default());
        let pool = Pool::new(Arc::clone(&meter));
        let version = next_version();
        Ok(Self { plan, comm, rank, mode, shards, meter, pool, version, backward_incomplete: false })
    }

    /// Where everything lies.
    pub fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    /// The group the units are cut over.
    pub fn communicator(&self) -> &Arc<dyn Communicator> {
        &self.comm
    }

    /// This rank's place in the group.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// What is kept of the units.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// This rank's shard of a unit's parameters, padding at the end of the last rank's.
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`].
    pub fn param(&self, unit: usize) -> Result<&[f32]> {
        self.plan.unit(unit)?;
        Ok(self.shards.get(unit).map_or(&[], |shard| &shard.param))
    }

    /// This rank's shard of a unit's accumulated gradient, or `None` when none has arrived since it was last zeroed.
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`], [`Error::Frozen`].
    pub fn grad(&self, unit: usize) -> Result<Option<&[f32]>> {
        let layout = self.plan.unit(unit)?;
        if self.mode == Mode::Frozen {
            return Err(Error::Frozen { unit: layout.name().to_owned() });
        }
        let shard = self.shards.get(unit).filter(|shard| shard.grad_state == GradState::Accumulated);
        Ok(shard.map(|shard| shard.grad.as_slice()))
    }

    /// Fills this rank's part of every parameter from `read`, which is given a parameter, a range of its flattened
    /// elements, and the slice to write them to. Each element that this rank owns is asked for exactly once, and
    /// nothing else is. Not collective.
    ///
    /// # Errors
    /// [`Error::Read`] with the reader's error. Parameters read before it keep their new values.
    pub fn load<E: Into<BoxError>>(
        &mut self,
        mut read: impl FnMut(&FlatParam, Range<usize>, &mut [f32]) -> Result<(), E>,
    ) -> Result<()> {
        self.params_changed();
        for (unit, shard) in self.plan.units().iter().zip(&mut self.shards) {
            read_parts(unit, self.rank, StateKind::Param, &mut shard.param, &mut read)?;
        }
        Ok(())
    }

    /// Takes this rank's part of a unit from its whole values (with or without padding). Not collective.
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`], [`Error::Length`].
    pub fn load_unit(&mut self, unit: usize, full: &[f32]) -> Result<()> {
        let layout = Arc::clone(&self.plan);
        let layout = layout.unit(unit)?;
        if full.len() != layout.elems() && full.len() != layout.padded_elems() {
            return Err(wrong_length("the full buffer", layout, full.len()));
        }
        self.params_changed();
        if let Some(shard) = self.shards.get_mut(unit) {
            for (index, owned) in layout.owned_parts(self.rank) {
                let start = layout.params()[index].range().start;
                let from = start + owned.param.start..start + owned.param.end;
                shard.param[owned.shard].copy_from_slice(&full[from]);
            }
        }
        Ok(())
    }

    /// The whole unit, all-gathered. *Collective*; one all-gather, or none in a group of one rank.
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`], [`Error::Collective`].
    pub fn gather(&mut self, unit: usize) -> Result<FullUnit> {
        let layout = self.plan.unit(unit)?;
        let mut full = self.pool.take(layout.padded_elems());
        full[layout.shard(self.rank)].copy_from_slice(self.param(unit)?);
        let mut full = FullUnit::new(full, &self.meter);
        if self.plan.world_size() > 1 {
            self.comm
                .all_gather_in_place(full.values_mut())
                .map_err(Error::collective("gather", layout.name()))?;
        }
        Ok(full)
    }

    /// Gives a full-size buffer back for reuse by a later gather or gradient. At most two are kept, and counted as
    /// transient bytes; see [`release_buffers`](Self::release_buffers).
    pub fn recycle(&mut self, values: Vec<f32>) {
        self.pool.put(values);
    }

    /// Frees the buffers kept for reuse, as before another program part needs the memory.
    pub fn release_buffers(&mut self) {
        self.pool.clear();
    }

    /// A zeroed buffer for the whole gradient of a unit, to be filled and handed to
    /// [`reduce_gradient`](Self::reduce_gradient).
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`], [`Error::Frozen`].
    pub fn gradient_buffer(&mut self, unit: usize) -> Result<FullUnit> {
        let layout = self.plan.unit(unit)?;
        if self.mode == Mode::Frozen {
            return Err(Error::Frozen { unit: layout.name().to_owned() });
        }
        let values = self.pool.take_zeroed(layout.padded_elems());
        Ok(FullUnit::new(values, &self.meter))
    }

    /// Sums the ranks' whole gradients of a unit, and adds this rank's part to its gradient shard. *Collective*; one
    /// reduce-scatter, or none in a group of one rank.
    ///
    /// The sum is a sum, not a mean: scale the loss by what the batch as a whole calls for (tokens, samples,
    /// accumulation steps times ranks). Ranks are added in rank order, and the result to what has accumulated.
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`], [`Error::Frozen`], [`Error::Collective`], and [`Error::Length`] when `full` has
    /// neither [`elems`](FlatUnit::elems) nor [`padded_elems`](FlatUnit::padded_elems) elements. A wrong length is
    /// found before anything is sent.
    pub fn reduce_gradient(&mut self, unit: usize, mut full: Vec<f32>) -> Result<()> {
        let plan = Arc::clone(&self.plan);
        let layout = plan.unit(unit)?;
        if self.mode == Mode::Frozen {
            return Err(Error::Frozen { unit: layout.name().to_owned() });
        }
        if full.len() != layout.elems() && full.len() != layout.padded_elems() {
            return Err(wrong_length("the full gradient", layout, full.len()));
        }
        full.resize(layout.padded_elems(), 0.0);
        // Whatever a caller left in the padding must not reach the norm.
        full[layout.elems()..].fill(0.0);
        let lease = self.meter.lease(size_of_val(full.as_slice()));
        let Some(shard) = self.shards.get_mut(unit) else {
            return Ok(());
        };
        let sum = |output: &mut [f32]| {
            if plan.world_size() == 1 {
                output.copy_from_slice(&full);
                return Ok(());
            }
            self.comm
                .reduce_scatter(&full, output, ReduceOp::Sum)
                .map_err(Error::collective("gradient reduce-scatter", layout.name()))
        };
        match shard.grad_state {
            GradState::Zero => sum(&mut shard.grad)?,
            GradState::Accumulated if plan.world_size() == 1 => add(&mut shard.grad, &full),
            GradState::Accumulated => {
                let mut part = self.pool.take(layout.shard_elems());
                let lease = self.meter.lease(part.capacity() * size_of::<f32>());
                sum(&mut part)?;
                add(&mut shard.grad, &part);
                drop(lease);
                // The pool keeps whole units' buffers; this may well have been one.
                if part.capacity() >= layout.padded_elems() {
                    self.pool.put(part);
                }
            }
        }
        shard.grad_state = GradState::Accumulated;
        drop(lease);
        self.pool.put(full);
        Ok(())
    }

    /// Forgets all gradients. Not collective, and touches no memory.
    pub fn zero_gradients(&mut self) {
        self.backward_incomplete = false;
        for shard in &mut self.shards {
            shard.grad_state = GradState::Zero;
        }
    }

    /// Makes every unit whole in turn, one at a time, and shows it to `visit` on every rank: for exports and weight
    /// updates. *Collective*: every rank goes through all units, also one whose visitor looks away.
    ///
    /// # Errors
    /// [`Error::Collective`]; [`Error::Visit`] with the visitor's error, once all units have been gathered, so that
    /// the other ranks are not left waiting. `visit` is not called again after its first error.
    pub fn for_each_full_unit<E: Into<BoxError>>(
        &mut self,
        mut visit: impl FnMut(&FlatUnit, &[f32]) -> Result<(), E>,
    ) -> Result<()> {
        let plan = Arc::clone(&self.plan);
        let mut failed = None;
        for (index, unit) in plan.units().iter().enumerate() {
            let full = self.gather(index)?;
            if failed.is_none()
                && let Err(source) = visit(unit, full.values())
            {
                failed = Some(Error::Visit { unit: unit.name().to_owned(), source: source.into() });
            }
            let (values, lease) = full.into_parts();
            drop(lease);
            self.recycle(values);
        }
        failed.map_or(Ok(()), Err)
    }

    /// Bytes held from one step to the next: 8 for each element of the shard when training, 4 when frozen.
    pub fn persistent_bytes(&self) -> usize {
        let elems = |shard: &Shard| shard.param.capacity() + shard.grad.capacity();
        self.shards.iter().map(elems).sum::<usize>() * size_of::<f32>()
    }

    /// Bytes of whole units and whole gradients, now and at most.
    pub fn transient_bytes(&self) -> TransientBytes {
        self.meter.read()
    }

    /// Begins the count of the peak anew.
    pub fn reset_peak(&mut self) {
        self.meter.reset_peak();
    }

    /// Names this state of the parameters; changed by every load and every optimizer step.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    pub(crate) fn params_changed(&mut self) {
        self.version = next_version();
    }

    pub(crate) fn begin_backward(&mut self) {
        self.backward_incomplete = true;
    }

    pub(crate) fn end_backward(&mut self) {
        self.backward_incomplete = false;
    }

    pub(crate) fn backward_incomplete(&self) -> bool {
        self.backward_incomplete
    }

    /// The parameter and gradient shards of every unit, for an optimizer. Gradients that never arrived are zeros.
    pub(crate) fn shards_mut(&mut self) -> impl Iterator<Item = (&mut [f32], &[f32])> + '_ {
        self.shards.iter_mut().map(|Shard { param, grad, grad_state }| {
            if *grad_state == GradState::Zero {
                grad.fill(0.0);
                *grad_state = GradState::Accumulated;
            }
            (param.as_mut_slice(), grad.as_slice())
        })
    }

    /// This rank's shard of a unit's parameters, to be overwritten.
    pub(crate) fn param_shards_mut(&mut self) -> impl Iterator<Item = &mut [f32]> + '_ {
        self.params_changed();
        self.shards.iter_mut().map(|shard| shard.param.as_mut_slice())
    }

    /// The gradient shards that are not zero.
    pub(crate) fn grads(&self) -> impl Iterator<Item = &[f32]> + '_ {
        let some = self.shards.iter().filter(|shard| shard.grad_state == GradState::Accumulated);
        some.map(|shard| shard.grad.as_slice())
    }
}

/// Reads this rank's parts of `unit` into `shard`, one call for each parameter.
pub(crate) fn read_parts<E: Into<BoxError>>(
    unit: &FlatUnit,
    rank: usize,
    kind: StateKind,
    shard: &mut [f32],
    read: &mut impl FnMut(&FlatParam, Range<usize>, &mut [f32]) -> Result<(), E>,
) -> Result<()> {
    for (index, owned) in unit.owned_parts(rank) {
        let param = &unit.params()[index];
        let Range { start, end } = owned.param;
        read(param, start..end, &mut shard[owned.shard]).map_err(|source| Error::Read {
            kind,
            name: param.name().to_owned(),
            start,
            end,
            source: source.into(),
        })?;
    }
    Ok(())
}

fn add(sum: &mut [f32], part: &[f32]) {
    for (sum, part) in sum.iter_mut().zip(part) {
        *sum += part;
    }
}

fn wrong_length(what: &'static str, layout: &FlatUnit, got: usize) -> Error {
    Error::Length { what, name: layout.name().to_owned(), got, expected: layout.padded_elems() }
}
