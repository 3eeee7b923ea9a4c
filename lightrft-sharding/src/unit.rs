//! Sharded storage: this rank's part of every unit, how a unit becomes whole, and how its gradient comes back.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lightrft_collectives::{Communicator, DeviceMesh};
use serde::{Deserialize, Serialize};

use crate::agree;
use crate::buffers::{Pool, TransientBytes};
use crate::compute::StageSpec;
use crate::copy::ShardCopy;
use crate::error::{BoxError, Error, Result};
use crate::exchange::Backlog;
use crate::flat::{FlatParam, FlatUnit};
use crate::gather::NearShard;
use crate::gradient::Gradient;
use crate::groups::{self, Groups};
use crate::host::HostMemory;
use crate::memory::{Memory, Values as _};
use crate::plan::{Plan, UnitSpec};
use crate::policy::{Overlap, Policy, ShardSize};
use crate::precision::{Precision, UnitValues};
use crate::state::StateKind;

/// What is kept of the units.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Parameters and gradients, each as an f32 shard: 8 P/N bytes, and 8 P/N more for AdamW.
    #[default]
    Train,
    /// Parameters alone: 4 P/N bytes. For a model that only predicts, such as the frozen reference of a KL penalty.
    Frozen,
}

/// One unit as this rank holds it.
#[derive(Debug)]
pub(crate) struct Store<Mem: Memory> {
    /// The shard of the master parameters, f32: trainable ones, then frozen ones. On the host a gather that runs ahead reads
    /// it too; whoever changes it meanwhile (as after a pass that failed) gets a copy.
    pub(crate) param: Arc<Mem::Values>,
    /// `None` in a model that does not train.
    pub(crate) grad: Option<Gradient<Mem>>,
    /// What gathers read where the policy keeps a copy for them.
    pub(crate) copy: Option<ShardCopy<Mem>>,
    /// What hpZ keeps.
    pub(crate) near: Option<NearShard<Mem>>,
}

/// The parameters and gradients of a model, cut over the ranks of a group as a [`Policy`] says.
///
/// Methods named *collective* must be called by every rank of the world, in the same order.
///
/// They lie in host memory, or in that of a GPU (with the feature `cuda`): see [`Memory`].
#[derive(Debug)]
pub struct ShardedUnits<Mem: Memory = HostMemory> {
    pub(crate) memory: Mem,
    pub(crate) plan: Arc<Plan>,
    pub(crate) policy: Policy,
    pub(crate) groups: Groups,
    /// In the shard group.
    pub(crate) rank: usize,
    pub(crate) stores: Vec<Store<Mem>>,
    pub(crate) pool: Pool<Mem>,
    pub(crate) backlog: Backlog<Mem>,
    pub(crate) version: u64,
    pub(crate) offloaded: bool,
    backward_incomplete: bool,
}

/// Every change of parameters anywhere in the process gets its own number, so that a number names one state of one
/// model.
fn next_version() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    LAST.fetch_add(1, Ordering::Relaxed)
}

impl ShardedUnits {
    /// All-zero shards for `plan` over the ranks of `comm`: stage 3, all f32, nothing overlapped. *Collective*: compares
    /// the ranks' plans.
    ///
    /// # Errors
    /// - [`Error::WorldMismatch`] when the plan is for another number of ranks;
    /// - [`Error::PlanMismatch`] on every rank when any two have different parameters, with the first difference.
    pub fn new(plan: Arc<Plan>, comm: Arc<dyn Communicator>, mode: Mode) -> Result<Self> {
        let world = comm.world_size();
        let prepared = if plan.world_size() == world {
            Ok(plan)
        } else {
            let group = comm.name().to_owned();
            Err(Error::WorldMismatch { plan: plan.world_size(), group, world })
        };
        let plan = agree::on_model(
            prepared,
            |plan| [vec![format!("mode = {mode:?}")], agree::plan_lines(plan)].concat(),
            &*comm,
        )?;
        let policy = Policy { mode, alignment: plan.alignment(), prefetch: 0, ..Policy::default() };
        Self::of_groups(HostMemory, plan, policy, Groups::flat(comm)?)
    }

    /// All-zero shards of `units`, cut over the ranks of `world` as `policy` says: neighbours in a shard group, replicas
    /// across. *Collective*: compares the ranks' plans and policies, and makes the groups.
    ///
    /// # Errors
    /// [`Error::Contradiction`] and [`Error::InvalidSetting`] for the policy; those of [`Plan::with_policy`];
    /// [`Error::PlanMismatch`] on every rank when any two differ; [`Error::Collective`].
    pub fn with_policy(units: Vec<UnitSpec>, world: Arc<dyn Communicator>, policy: &Policy) -> Result<Self> {
        Self::of_model(HostMemory, units, Ok(&[]), (world, None), policy)
    }

    /// As [`with_policy`](Self::with_policy), on a mesh of the caller's over all ranks of `world`: its one axis, or the
    /// second of two, is that of the shard groups, the first of two that of replicas. The policy's
    /// [`shard_size`](Policy::shard_size) gives way to it.
    ///
    /// # Errors
    /// As there; [`Error::MeshMismatch`] for a mesh of other ranks or more axes, [`Error::Contradiction`] for one that
    /// cuts what the policy does not.
    pub fn on_mesh(
        units: Vec<UnitSpec>,
        world: Arc<dyn Communicator>,
        mesh: &DeviceMesh,
        policy: &Policy,
    ) -> Result<Self> {
        Self::of_model(HostMemory, units, Ok(&[]), (world, Some(mesh)), policy)
    }

    /// This rank's shard of a unit's parameters, padding at the end of the last rank's.
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`].
    pub fn param(&self, unit: usize) -> Result<&[f32]> {
        self.plan.unit(unit)?;
        Ok(self.stores.get(unit).map_or(&[], |store| store.param.f32()))
    }

    /// This rank's shard of a unit's accumulated gradient, as long as the trainable parameters' shard: the sum over all
    /// ranks. `None` when none has arrived since it was last zeroed, and where the ranks have yet to sum it (stages 0
    /// and 1, replicas, an accumulator that is not f32): see [`sync_gradients`](Self::sync_gradients).
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`], [`Error::Frozen`].
    pub fn grad(&self, unit: usize) -> Result<Option<&[f32]>> {
        Ok(self.gradient_sum(unit)?.map(|(values, part)| &values.f32()[part]))
    }

    /// Gives a full-size buffer back for reuse by a later gather or gradient. A few are kept, and counted as
    /// transient bytes; see [`release_buffers`](Self::release_buffers).
    pub fn recycle(&mut self, values: impl Into<UnitValues>) {
        self.pool.put(values.into());
    }
}

impl<Mem: Memory> ShardedUnits<Mem> {
    /// On the caller's mesh or one that the policy asks for; `stages` are compared with the other ranks' too.
    pub(crate) fn of_model(
        memory: Mem,
        units: Vec<UnitSpec>,
        stages: Result<&[StageSpec]>,
        (world, mesh): (Arc<dyn Communicator>, Option<&DeviceMesh>),
        policy: &Policy,
    ) -> Result<Self> {
        let prepared = stages.and_then(|stages| {
            let (mesh, policy) = on_two_axes(&units, &*world, mesh, policy)?;
            Ok((Plan::with_policy(units, mesh.sizes()[1], &policy)?, mesh, policy, stages))
        });
        let (plan, mesh, policy, _) = agree::on_model(
            prepared,
            |(plan, mesh, policy, stages)| {
                let mut lines = policy.lines();
                lines.push(format!("mesh of {:?}, ranks {:?}", mesh.sizes(), mesh.ranks()));
                lines.extend(agree::plan_lines(plan));
                lines.extend(agree::stage_lines(stages));
                lines
            },
            &*world,
        )?;
        let groups = Groups::new::<Mem>(world, &mesh, &policy)?;
        Self::of_groups(memory, Arc::new(plan), policy, groups)
    }

    fn of_groups(memory: Mem, plan: Arc<Plan>, policy: Policy, groups: Groups) -> Result<Self> {
        let (rank, ranks) = (groups.shard.rank(), groups.shard.world_size());
        let replicas = groups.replicate.world_size();
        let store = |unit: &FlatUnit| -> Result<_> {
            let learns = policy.mode == Mode::Train;
            let grad = learns.then(|| Gradient::new(&memory, unit, &policy, rank, (ranks, replicas)));
            let param = Arc::new(memory.zeros(Precision::F32, unit.shard_elems())?);
            Ok(Store { param, grad: grad.transpose()?, copy: None, near: None })
        };
        let stores = plan.units().iter().map(store).collect::<Result<_>>()?;
        // A unit that is used, those that are gathered ahead, its gradient, and one that is exchanged beside.
        let buffers = policy.prefetch.saturating_add(2 + usize::from(policy.overlap == Overlap::On));
        Ok(Self {
            plan,
            groups,
            rank,
            stores,
            pool: Pool::new(memory.clone(), buffers),
            backlog: Backlog::default(),
            version: next_version(),
            offloaded: false,
            backward_incomplete: false,
            policy,
            memory,
        })
    }

    /// Where everything lies.
    pub fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    /// How they are cut and exchanged.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The group the units are cut over: a group of one rank in stage 0.
    pub fn communicator(&self) -> &Arc<dyn Communicator> {
        &self.groups.shard
    }

    /// This rank's place in that group.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The group of those that hold the same shards: this rank alone, but with stage 0 and HSDP.
    pub fn replicas(&self) -> &Arc<dyn Communicator> {
        &self.groups.replicate
    }

    /// Whether this rank is the one, of those that hold the same of a unit, that saves it and counts it.
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`].
    pub fn speaks_for(&self, unit: usize) -> Result<bool> {
        let layout = self.plan.unit(unit)?;
        Ok(self.groups.replicate.rank() == 0 && self.counts(layout))
    }

    /// Whether this rank's part of a unit is no other's in its shard group.
    fn counts(&self, layout: &FlatUnit) -> bool {
        !layout.is_whole() || self.rank == 0
    }

    /// What is kept of the units.
    pub fn mode(&self) -> Mode {
        self.policy.mode
    }

    /// Which elements of which buffer are this rank's part of the sum of a unit's gradient, if there is one.
    pub(crate) fn gradient_sum(&self, unit: usize) -> Result<Option<(&Mem::Values, Range<usize>)>> {
        let layout = self.plan.unit(unit)?;
        let frozen = || Error::Frozen { unit: layout.name().to_owned() };
        let grad = self.stores.get(unit).and_then(|store| store.grad.as_ref()).ok_or_else(frozen)?;
        Ok(grad.sum())
    }

    /// Fills this rank's part of every parameter from `read`, which is given a parameter, a range of its flattened
    /// elements, and the slice to write them to. Each element that this rank owns is asked for exactly once, and
    /// nothing else is. Sends nothing, but all ranks do it between the same passes.
    ///
    /// # Errors
    /// [`Error::Read`] with the reader's error. Parameters read before it keep their new values.
    pub fn load<E: Into<BoxError>>(
        &mut self,
        mut read: impl FnMut(&FlatParam, Range<usize>, &mut [f32]) -> Result<(), E>,
    ) -> Result<()> {
        self.params_changed();
        for (unit, store) in self.plan.units().iter().zip(&mut self.stores) {
            let param = Mem::to_change(&mut store.param)?;
            let into = |shard: &mut [f32]| read_parts(unit, self.rank, StateKind::Param, shard, &mut read);
            self.memory.overwrite(param, into)?;
        }
        Ok(())
    }

    /// Takes this rank's part of a unit from its whole values, padding included; it may be left out where the unit has one
    /// segment. Sends nothing, but all ranks do it between the same passes.
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`], [`Error::Length`].
    pub fn load_unit(&mut self, unit: usize, full: &[f32]) -> Result<()> {
        let layout = Arc::clone(&self.plan);
        let layout = layout.unit(unit)?;
        let unpadded = layout.parts().count() < 2 && full.len() == layout.elems();
        if !unpadded && full.len() != layout.padded_elems() {
            return Err(wrong_length("the full buffer", layout, full.len(), layout.padded_elems()));
        }
        self.params_changed();
        let param = Mem::to_change(&mut self.stores[unit].param)?;
        self.memory.overwrite(param, |shard| {
            for (index, owned) in layout.owned_parts(self.rank) {
                let start = layout.params()[index].range().start;
                let from = start + owned.param.start..start + owned.param.end;
                shard[owned.shard].copy_from_slice(&full[from]);
            }
            Ok(())
        })
    }

    /// Frees the buffers kept for reuse, as before another program part needs the memory.
    pub fn release_buffers(&mut self) {
        self.pool.clear();
    }

    /// Forgets all gradients. Not collective, and touches no memory.
    pub fn zero_gradients(&mut self) {
        self.backward_incomplete = false;
        self.abandon_exchange();
        for gradient in self.stores.iter_mut().filter_map(|store| store.grad.as_mut()) {
            gradient.clear();
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
            let full = self.gather(index)?.whole;
            if failed.is_none() {
                let (memory, group) = (&self.memory, &*self.groups.shard);
                let seen = memory.read(&full.values, |values| {
                    // A device has been waited for, and what it has may be what was left of a gather that failed.
                    memory.outcome(group).map_err(Error::collective("all-gather", unit.name()))?;
                    Ok::<_, Error>(visit(unit, values))
                })??;
                let named = |source: E| Error::Visit { unit: unit.name().to_owned(), source: source.into() };
                failed = seen.err().map(named);
            }
            self.pool.put_whole(full);
        }
        failed.map_or(Ok(()), Err)
    }

    /// As [`for_each_full_unit`](Self::for_each_full_unit), with the values that passes compute with, in the policy's
    /// [`param_dtype`](Policy::param_dtype): for whoever must agree with the passes, such as an engine that generates what
    /// they learn from. On a device they are there in the order of its operations, and whether the gathers have come to a good end
    /// is known once it has been waited for (`Nccl::health`). With [`prefetch`](Policy::prefetch) the
    /// next unit is gathered while one is shown, and hpZ keeps what it keeps of a pass. *Collective*.
    ///
    /// # Errors
    /// As there.
    pub fn for_each_computed_unit<E: Into<BoxError>>(
        &mut self,
        mut visit: impl FnMut(&FlatUnit, &Mem::Values) -> Result<(), E>,
    ) -> Result<()> {
        let plan = Arc::clone(&self.plan);
        let mut failed = None;
        let mut ahead = None;
        for (index, unit) in plan.units().iter().enumerate() {
            let gathering = match ahead.take() {
                Some(gathering) => gathering,
                None => self.begin_gather(index)?,
            };
            let whole = self.finish_gather(index, gathering)?;
            self.keep_near(index, &whole)?;
            if self.policy.prefetch > 0 && index + 1 < plan.units().len() {
                ahead = Some(self.begin_gather(index + 1)?);
            }
            if failed.is_none()
                && let Err(source) = visit(unit, &whole.values)
            {
                failed = Some(Error::Visit { unit: unit.name().to_owned(), source: source.into() });
            }
            self.pool.put_whole(whole);
        }
        failed.map_or(Ok(()), Err)
    }

    /// Bytes held from one step to the next: of stage 3 in f32, 8 for each element of the shard when training and 4 when
    /// frozen. What hpZ and [`GatherFrom::Copy`](crate::GatherFrom::Copy) keep is among them; what stages 1 and 2 keep whole is counted as
    /// [transient](Self::transient_bytes).
    pub fn persistent_bytes(&self) -> usize {
        let bytes = |store: &Store<Mem>| {
            let grad = store.grad.as_ref().map_or(0, Gradient::bytes);
            let copy = store.copy.as_ref().map_or(0, ShardCopy::bytes);
            let near = store.near.as_ref().map_or(0, NearShard::bytes);
            store.param.capacity_bytes() + grad + copy + near
        };
        self.stores.iter().map(bytes).sum()
    }

    /// Bytes of whole units and whole gradients, now and at most.
    pub fn transient_bytes(&self) -> TransientBytes {
        self.pool.meter().read()
    }

    /// Begins the count of the peak anew.
    pub fn reset_peak(&mut self) {
        self.pool.meter().reset_peak();
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

    /// The gradient shards that are not zero, and that no other rank of the shard group counts.
    pub(crate) fn grads(&self) -> Vec<(&Mem::Values, Range<usize>)> {
        let counted = self.plan.units().iter().zip(&self.stores).filter(|(unit, _)| self.counts(unit));
        counted.filter_map(|(_, store)| store.grad.as_ref()?.sum()).collect()
    }

    /// Refuses to use masters that have left the memory that is computed with.
    pub(crate) fn check_here(&self) -> Result<()> {
        let is_here = |param: &Mem::Values| param.len() == 0 || param.capacity_bytes() > 0;
        match self.stores.iter().all(|store| is_here(&store.param)) {
            true => Ok(()),
            false => self.plan.units().iter().try_for_each(|unit| self.check_loaded(unit)),
        }
    }

    /// Refuses to use what [`offload`](Self::offload) has freed.
    pub(crate) fn check_loaded(&self, layout: &FlatUnit) -> Result<()> {
        if self.offloaded { Err(Error::Offloaded { unit: layout.name().to_owned() }) } else { Ok(()) }
    }
}

/// The mesh of shard groups and replicas: the caller's, to which the policy's `shard_size` gives way, or the policy's.
fn on_two_axes(
    units: &[UnitSpec],
    world: &dyn Communicator,
    mesh: Option<&DeviceMesh>,
    policy: &Policy,
) -> Result<(DeviceMesh, Policy)> {
    if let Some(mesh) = mesh {
        let mesh = groups::two_axes(mesh, world)?;
        let policy = Policy { shard_size: ShardSize::Ranks(mesh.sizes()[1]), ..policy.clone() };
        policy.validate(world.world_size())?;
        return Ok((mesh, policy));
    }
    // A size that cannot be counted is refused when it is laid out.
    let size = |shape: &Vec<usize>| shape.iter().fold(1usize, |n, &dim| n.saturating_mul(dim));
    let sizes = units.iter().flat_map(|unit| &unit.params).map(|param| size(&param.shape));
    let elems = sizes.fold(0usize, usize::saturating_add);
    let ranks = policy.shard_ranks(world.world_size(), elems)?;
    Ok((groups::mesh(world.world_size(), ranks)?, policy.clone()))
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
        // Of a frozen parameter there is no optimizer state.
        let Some(into) = shard.get_mut(owned.shard) else {
            continue;
        };
        read(param, start..end, into).map_err(|source| Error::Read {
            kind,
            name: param.name().to_owned(),
            start,
            end,
            source: source.into(),
        })?;
    }
    Ok(())
}

pub(crate) fn wrong_length(what: &'static str, layout: &FlatUnit, got: usize, expected: usize) -> Error {
    Error::Length { what, name: layout.name().to_owned(), got, expected }
}
