//! Runs a staged model over its sharded units: gather, compute, free; and in backward also reduce.

use std::fmt;
use std::sync::Arc;

use lightrft_collectives::{Communicator, DeviceMesh};

use crate::buffers::{Lease, Whole};
use crate::compute::{StageGrads, StageSpec, StagedModel, UnitGrads};
use crate::error::{Error, Result};
use crate::flat::FlatUnit;
use crate::gather::Gathering;
use crate::groups::effective_reshard;
use crate::host::HostMemory;
use crate::memory::Memory;
use crate::policy::{Activations, Policy, ReshardAfterForward, Stage};
use crate::replicas::Pass;
use crate::schedule::{Hold, Op, Schedule, UnitPlan};
use crate::unit::{Mode, ShardedUnits};

/// A model whose parameters and gradients are cut over the ranks of a group.
///
/// Every method that runs stages is *collective*: each rank calls it, with its own part of the batch, in the same
/// order. Parameters start as zeros; [`units_mut`](Self::units_mut) loads them.
///
/// A pass that fails leaves no unit gathered. One that fails in backward leaves gradients that are partly summed,
/// and the optimizer refuses them until they are [zeroed](ShardedUnits::zero_gradients).
#[derive(Debug)]
pub struct ShardedModel<M: StagedModel<Mem>, Mem: Memory = HostMemory> {
    model: M,
    stages: Arc<[StageSpec]>,
    schedule: Arc<Schedule>,
    units: ShardedUnits<Mem>,
    live: Vec<Option<(M::Params, Lease)>>,
    /// Gathers that were begun ahead of their use.
    ahead: Vec<Option<Gathering<Mem>>>,
    /// The parameters' version that `live` was gathered from.
    live_version: u64,
    without_gradient: Vec<(usize, usize)>,
}

/// What a forward pass remembers for its backward: the batch and, of each stage, its input and what it saved.
pub struct Tape<'b, M: StagedModel<Mem>, Mem: Memory = HostMemory> {
    batch: &'b M::Batch,
    /// One entry for each stage; `None` for one that was skipped.
    stages: Records<M::Activation, M::Saved>,
    version: u64,
}

/// One entry for each stage.
type Records<A, S> = Vec<Option<Record<A, S>>>;

/// Of a stage that ran: its input, `None` for the first that did, and what it saved.
struct Record<A, S> {
    input: Option<A>,
    saved: Option<S>,
}

impl<M: StagedModel<Mem>, Mem: Memory> fmt::Debug for Tape<'_, M, Mem> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ran = self.stages.iter().filter(|record| record.is_some()).count();
        f.debug_struct("Tape").field("stages_run", &ran).finish_non_exhaustive()
    }
}

impl<M: StagedModel> ShardedModel<M> {
    /// Cuts `model` over the ranks of `world` as `policy` says. *Collective.*
    ///
    /// # Errors
    /// [`Error::InvalidStage`] for stages that cannot be run, and all of [`ShardedUnits::with_policy`].
    pub fn new(model: M, world: Arc<dyn Communicator>, policy: Policy) -> Result<Self> {
        Self::cut(HostMemory, model, Ok(()), (world, None), &policy)
    }

    /// As [`new`](Self::new), on a mesh of the caller's: see [`ShardedUnits::on_mesh`]. *Collective.*
    ///
    /// # Errors
    /// As there.
    pub fn on_mesh(
        model: M,
        world: Arc<dyn Communicator>,
        mesh: &DeviceMesh,
        policy: Policy,
    ) -> Result<Self> {
        Self::cut(HostMemory, model, Ok(()), (world, Some(mesh)), &policy)
    }
}

impl<M: StagedModel<Mem>, Mem: Memory> ShardedModel<M, Mem> {
    /// `memory_checked` says whether the memory goes with the group, which the ranks tell each other.
    pub(crate) fn cut(
        memory: Mem,
        model: M,
        memory_checked: Result<()>,
        (world, mesh): (Arc<dyn Communicator>, Option<&DeviceMesh>),
        policy: &Policy,
    ) -> Result<Self> {
        let specs = model.units();
        let stages: Arc<[StageSpec]> = model.stages().into();
        let names = specs.iter().map(|unit| UnitPlan { name: unit.name.clone(), hold: Hold::Use, ahead: 0 });
        let checked = Schedule::new(&stages, &names.collect::<Vec<_>>());
        let checked = memory_checked.and(checked).map(|_| &*stages);
        let units = ShardedUnits::of_model(memory, specs, checked, (world, mesh), policy)?;
        let plans: Vec<UnitPlan> = units.plan().units().iter().map(|unit| unit_plan(unit, &units)).collect();
        let schedule = Arc::new(Schedule::new(&stages, &plans)?);
        let live = plans.iter().map(|_| None).collect();
        let ahead = plans.iter().map(|_| None).collect();
        let live_version = units.version();
        Ok(Self { model, stages, schedule, units, live, ahead, live_version, without_gradient: Vec::new() })
    }

    /// The model itself.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// The sharded parameters and gradients.
    pub fn units(&self) -> &ShardedUnits<Mem> {
        &self.units
    }

    /// The sharded parameters and gradients, to load, step, export or zero them.
    pub fn units_mut(&mut self) -> &mut ShardedUnits<Mem> {
        &mut self.units
    }

    /// The output of the last stage, and the tape to run [`backward`](Self::backward) from. *Collective.*
    ///
    /// Several passes may be open at once, each with its tape.
    ///
    /// # Errors
    /// [`Error::Compute`] with the model's error, [`Error::Collective`]; [`Error::Frozen`] for a model in
    /// [`Mode::Frozen`], for which [`evaluate`](Self::evaluate) is meant.
    pub fn forward<'b>(&mut self, batch: &'b M::Batch) -> Result<(M::Activation, Tape<'b, M, Mem>)> {
        if let (Mode::Frozen, Some(unit)) = (self.units.mode(), self.units.plan().units().first()) {
            return Err(Error::Frozen { unit: unit.name().to_owned() });
        }
        let mut stages: Records<M::Activation, M::Saved> = self.stages.iter().map(|_| None).collect();
        let output = self.guarded(|this| {
            this.forget_old_units();
            let schedule = Arc::clone(&this.schedule);
            this.run_forward(&schedule.forward, batch, Some(&mut stages))
        })?;
        Ok((output, Tape { batch, stages, version: self.units.version() }))
    }

    /// The output of the last stage, without anything kept. *Collective.*
    ///
    /// # Errors
    /// [`Error::Compute`] with the model's error, [`Error::Collective`].
    pub fn evaluate(&mut self, batch: &M::Batch) -> Result<M::Activation> {
        self.guarded(|this| {
            this.forget_old_units();
            let schedule = Arc::clone(&this.schedule);
            this.run_forward(&schedule.evaluate, batch, None)
        })
    }

    /// Runs the stages backward from the gradient of the loss with respect to the output of
    /// [`forward`](Self::forward), and adds the sum over ranks of every parameter's gradient to the gradient shards.
    /// *Collective.*
    ///
    /// # Errors
    /// [`Error::StaleTape`] when the parameters have changed since, or the tape is another model's;
    /// [`Error::IncompleteBackward`] when an earlier pass failed half-way and its gradients have not been zeroed;
    /// [`Error::AlreadySummed`] between [`sync_gradients`](ShardedUnits::sync_gradients) and the step;
    /// [`Error::Compute`] with the model's error, [`Error::Collective`], [`Error::Length`].
    pub fn backward(&mut self, tape: Tape<'_, M, Mem>, grad_output: M::Activation) -> Result<()> {
        self.backward_pass(tape, grad_output, Pass::Any)
    }

    /// As [`backward`](Self::backward), for the last pass before a step: what the ranks would still have to sum at the step is
    /// summed in it. No other pass is to come before the gradients are stepped or zeroed; one that would be counted twice is
    /// refused. *Collective*: all ranks do it in
    /// the same pass.
    ///
    /// Nothing else differs, in bits either. With [`Overlap::On`](crate::Overlap::On) it is what lets these sums run beside
    /// computing: all-reduces over replicas (HSDP), each behind the reduce-scatter that it continues; all-reduces (stage 0) and
    /// reduce-scatters (stage 1) of buckets of [`reduce_bucket_elems`](Policy::reduce_bucket_elems), each as soon as its
    /// gradients are there. Without it, this is `backward` and then [`sync_gradients`](ShardedUnits::sync_gradients). (FSDP2's
    /// `set_requires_all_reduce` and DDP's `no_sync`, said of the pass instead of set before it.)
    ///
    /// # Errors
    /// Those of [`backward`](Self::backward) and of [`sync_gradients`](ShardedUnits::sync_gradients).
    pub fn backward_last(&mut self, tape: Tape<'_, M, Mem>, grad_output: M::Activation) -> Result<()> {
        self.backward_pass(tape, grad_output, Pass::Last)
    }

    fn backward_pass(
        &mut self,
        tape: Tape<'_, M, Mem>,
        grad_output: M::Activation,
        pass: Pass,
    ) -> Result<()> {
        self.guarded(|this| {
            if tape.version != this.units.version() || tape.stages.len() != this.stages.len() {
                return Err(Error::StaleTape);
            }
            if this.units.backward_incomplete() {
                return Err(Error::IncompleteBackward);
            }
            this.units.check_open()?;
            this.without_gradient.clear();
            // Another pass may have ended, and freed what is never resharded; then this one gathers again.
            this.forget_old_units();
            this.units.begin_backward();
            this.units.begin_exchange(pass);
            this.run_backward(tape, grad_output)?;
            this.units.end_backward();
            match pass {
                Pass::Any => Ok(()),
                // What has not been summed beside the pass.
                Pass::Last => this.units.sync_gradients(),
            }
        })
    }

    /// Names of the parameters that the last backward pass gave no gradient on this rank; it counts as zero. A model
    /// library that silently drops gradients shows here.
    pub fn params_without_gradient(&self) -> impl Iterator<Item = &str> + '_ {
        let units = self.units.plan().units();
        self.without_gradient
            .iter()
            .filter_map(move |&(unit, param)| Some(units.get(unit)?.params().get(param)?.name()))
    }

    /// Frees every unit that is gathered: those of a forward pass that has not been followed by its backward, and what
    /// stages 1 and 2 keep whole. All ranks do it alike.
    pub fn reshard(&mut self) {
        (0..self.live.len()).for_each(|unit| self.free(unit));
        self.ahead.iter_mut().for_each(|gathering| *gathering = None);
    }

    /// Runs a pass; one that fails leaves no unit gathered.
    fn guarded<T>(&mut self, pass: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let result = pass(self);
        if result.is_err() {
            self.reshard();
            self.units.abandon_exchange();
        }
        result
    }

    /// Frees units that were gathered before the parameters changed.
    fn forget_old_units(&mut self) {
        if self.live_version != self.units.version() {
            self.reshard();
            self.live_version = self.units.version();
        }
    }

    /// Runs the stages forward; `tape` is what backward will have, in a pass that has one.
    fn run_forward(
        &mut self,
        ops: &[Op],
        batch: &M::Batch,
        mut tape: Option<&mut Records<M::Activation, M::Saved>>,
    ) -> Result<M::Activation> {
        let mut input: Option<M::Activation> = None;
        for &op in ops {
            match op {
                Op::Start(unit) => self.start(unit)?,
                Op::Gather(unit) => self.gather(unit)?,
                Op::Free(unit) => self.free(unit),
                Op::Run(stage) if self.model.skips(stage, batch) => {}
                Op::Run(stage) => {
                    let params = self.params(stage)?;
                    let keeps = tape.is_some() && self.units.policy().activations == Activations::Keep;
                    let ran = if keeps {
                        self.model.forward_saving(stage, &params, batch, input.as_ref())
                    } else {
                        self.model.forward(stage, &params, batch, input.as_ref()).map(|output| (output, None))
                    };
                    let (output, saved) = ran.map_err(|source| self.failed("forward", stage, source))?;
                    let input = input.replace(output);
                    if let Some(record) = tape.as_mut().and_then(|tape| tape.get_mut(stage)) {
                        *record = Some(Record { input, saved });
                    }
                }
                Op::Reduce(_) => {}
            }
        }
        input.ok_or_else(no_stages)
    }

    fn run_backward(&mut self, tape: Tape<'_, M, Mem>, grad_output: M::Activation) -> Result<()> {
        let Tape { batch, stages: mut records, .. } = tape;
        let plan = Arc::clone(self.units.plan());
        let mut grads: Vec<Option<UnitGrads<Mem>>> = plan.units().iter().map(|_| None).collect();
        let mut grad = Some(grad_output);
        let mut ran_last = String::new();
        let (stages, schedule) = (Arc::clone(&self.stages), Arc::clone(&self.schedule));
        let bucket = self.units.stage_bucket();
        for &op in &schedule.backward {
            match op {
                Op::Start(unit) => self.start(unit)?,
                Op::Gather(unit) => self.gather(unit)?,
                Op::Free(unit) => self.free(unit),
                Op::Run(stage) => {
                    for &unit in &stages[stage].units {
                        // A pass that was open beside this one may have freed it.
                        self.gather(unit)?;
                    }
                    let Some(Record { input, saved }) = records[stage].take() else {
                        continue;
                    };
                    for &unit in &stages[stage].units {
                        if grads[unit].is_none() {
                            grads[unit] = Some(self.unit_grads(unit)?);
                        }
                    }
                    let params = self.params(stage)?;
                    let Some(grad_output) = grad.take() else {
                        let what =
                            "backward returned no gradient of its input to the stage before".to_owned();
                        return Err(Error::InvalidStage { stage: ran_last, what });
                    };
                    ran_last.clone_from(&stages[stage].name);
                    let memory = &self.units.memory;
                    let mut sink = StageGrads::new(memory, &stages[stage].units, plan.units(), &mut grads);
                    let (sink, input) = (&mut sink, input.as_ref());
                    let ran = match saved {
                        Some(saved) => {
                            self.model.backward_saved(stage, &params, batch, input, saved, grad_output, sink)
                        }
                        None => self.model.backward(stage, &params, batch, input, grad_output, sink),
                    };
                    grad = ran.map_err(|source| self.failed("backward", stage, source))?;
                }
                Op::Reduce(unit) => {
                    // Where every stage that uses it was skipped, other ranks still wait for this one's part.
                    let unit_grads = match grads[unit].take() {
                        Some(grads) => grads,
                        None => self.unit_grads(unit)?,
                    };
                    let UnitGrads { values, lease, given } = unit_grads;
                    let params = plan.units()[unit].params().iter().zip(&given).enumerate();
                    let missing = params.filter(|(_, (param, given))| param.is_trainable() && !**given);
                    self.without_gradient.extend(missing.map(|(param, _)| (unit, param)));
                    let whole = Whole { values, lease };
                    self.units.push_gradient(unit, whole, bucket)?;
                }
            }
        }
        self.units.finish_exchange()
    }

    /// Zeros for the whole gradient of a unit.
    fn unit_grads(&mut self, unit: usize) -> Result<UnitGrads<Mem>> {
        let Whole { values, lease } = self.units.gradient_whole(unit)?;
        let given = vec![false; self.units.plan().unit(unit)?.params().len()];
        Ok(UnitGrads { values, lease, given })
    }

    /// Begins to make a unit whole, unless it is.
    fn start(&mut self, unit: usize) -> Result<()> {
        if self.live[unit].is_none() && self.ahead[unit].is_none() {
            self.ahead[unit] = Some(self.units.begin_gather(unit)?);
        }
        Ok(())
    }

    /// Makes a unit whole and binds it, unless it is.
    fn gather(&mut self, unit: usize) -> Result<()> {
        if self.live[unit].is_some() {
            return Ok(());
        }
        let gathering = match self.ahead[unit].take() {
            Some(gathering) => gathering,
            None => self.units.begin_gather(unit)?,
        };
        let whole = self.units.finish_gather(unit, gathering)?;
        self.units.keep_near(unit, &whole)?;
        let Whole { values, lease } = whole;
        let layout = &self.units.plan().units()[unit];
        let params = self.model.bind(layout, values).map_err(|source| Error::Compute {
            phase: "bind",
            what: layout.name().to_owned(),
            source: source.into(),
        })?;
        self.live[unit] = Some((params, lease));
        Ok(())
    }

    fn free(&mut self, unit: usize) {
        if let Some((params, lease)) = self.live.get_mut(unit).and_then(Option::take) {
            let values = self.model.unbind(params);
            drop(lease);
            if let Some(values) = values {
                self.units.pool.put(values);
            }
        }
    }

    /// The bound units of a stage, in its order.
    fn params(&self, stage: usize) -> Result<Vec<&M::Params>> {
        let StageSpec { name, units } = &self.stages[stage];
        let bound = |&unit: &usize| self.live.get(unit)?.as_ref().map(|(params, _)| params);
        units.iter().map(bound).collect::<Option<Vec<_>>>().ok_or_else(|| Error::InvalidStage {
            stage: name.clone(),
            what: "a unit that it uses is not gathered".to_owned(),
        })
    }

    fn failed(&self, phase: &'static str, stage: usize, source: M::Error) -> Error {
        let what = self.stages[stage].name.clone();
        Error::Compute { phase, what, source: source.into() }
    }
}

fn no_stages() -> Error {
    Error::InvalidStage { stage: "any".to_owned(), what: "every stage skips this batch".to_owned() }
}

/// How long a gathered unit stays, and how far ahead of its use it is gathered.
fn unit_plan<Mem: Memory>(unit: &FlatUnit, units: &ShardedUnits<Mem>) -> UnitPlan {
    let policy = units.policy();
    let remote = units.is_remote(unit);
    let size = units.communicator().world_size();
    let hold = match (policy.stage, effective_reshard(policy, size)) {
        // What asks nothing of other ranks is copied from the masters when it is used.
        (Stage::Zero0 | Stage::Zero1 | Stage::Zero2, _) if remote => Hold::Step,
        (Stage::Zero3, ReshardAfterForward::Never) => Hold::Pass,
        _ => Hold::Use,
    };
    let ahead = if remote { policy.prefetch } else { 0 };
    UnitPlan { name: unit.name().to_owned(), hold, ahead }
}
