//! Runs a staged model over its sharded units: gather, compute, free; and in backward also reduce.

use std::sync::Arc;

use lightrft_collectives::Communicator;

use crate::buffers::Lease;
use crate::compute::{StageGrads, StageSpec, StagedModel, UnitGrads};
use crate::error::{Error, Result};
use crate::plan::Plan;
use crate::schedule::{Op, ReshardAfterForward, Schedule};
use crate::unit::{Mode, ShardedUnits};

/// How a model is cut and run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardOptions {
    /// What is kept of its units.
    pub mode: Mode,
    /// When gathered units are freed.
    pub reshard_after_forward: ReshardAfterForward,
    /// Every shard is a multiple of so many elements; see [`Plan::with_alignment`].
    pub alignment: usize,
}

impl Default for ShardOptions {
    fn default() -> Self {
        Self { mode: Mode::Train, reshard_after_forward: ReshardAfterForward::Always, alignment: 1 }
    }
}

/// A model whose parameters and gradients are cut over the ranks of a group.
///
/// Every method that runs stages is *collective*: each rank calls it, with its own part of the batch, in the same
/// order. Parameters start as zeros; [`units_mut`](Self::units_mut) loads them.
///
/// A pass that fails leaves no unit gathered. One that fails in backward leaves gradients that are partly summed,
/// and the optimizer refuses them until they are [zeroed](ShardedUnits::zero_gradients).
#[derive(Debug)]
pub struct ShardedModel<M: StagedModel> {
    model: M,
    stages: Arc<[StageSpec]>,
    schedule: Arc<Schedule>,
    units: ShardedUnits,
    live: Vec<Option<(M::Params, Lease)>>,
    /// The parameters' version that `live` was gathered from.
    live_version: u64,
    without_gradient: Vec<(usize, usize)>,
}

/// What a forward pass remembers for its backward: the batch and the inputs of the stages.
#[derive(Debug)]
pub struct Tape<'b, M: StagedModel> {
    batch: &'b M::Batch,
    /// Inputs of the second stage and those after it; the first has none.
    inputs: Vec<M::Activation>,
    version: u64,
}

impl<M: StagedModel> ShardedModel<M> {
    /// Cuts `model` over the ranks of `comm`. *Collective.*
    ///
    /// # Errors
    /// [`Error::InvalidStage`] for stages that cannot be run, and all of [`Plan::with_alignment`] and
    /// [`ShardedUnits::new`].
    pub fn new(model: M, comm: Arc<dyn Communicator>, options: ShardOptions) -> Result<Self> {
        let specs = model.units();
        let stages = model.stages();
        let names: Vec<String> = specs.iter().map(|unit| unit.name.clone()).collect();
        let schedule = Schedule::new(&stages, &names, options.reshard_after_forward)?;
        let plan = Arc::new(Plan::with_alignment(specs, comm.world_size(), options.alignment)?);
        let units = ShardedUnits::new(plan, comm, options.mode)?;
        let live = names.iter().map(|_| None).collect();
        let live_version = units.version();
        let (stages, schedule) = (stages.into(), Arc::new(schedule));
        Ok(Self { model, stages, schedule, units, live, live_version, without_gradient: Vec::new() })
    }

    /// The model itself.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// The sharded parameters and gradients.
    pub fn units(&self) -> &ShardedUnits {
        &self.units
    }

    /// The sharded parameters and gradients, to load, step, export or zero them.
    pub fn units_mut(&mut self) -> &mut ShardedUnits {
        &mut self.units
    }

    /// The output of the last stage, and the tape to run [`backward`](Self::backward) from. *Collective.*
    ///
    /// Several passes may be open at once, each with its tape.
    ///
    /// # Errors
    /// [`Error::Compute`] with the model's error, [`Error::Collective`]; [`Error::Frozen`] for a model in
    /// [`Mode::Frozen`], for which [`evaluate`](Self::evaluate) is meant.
    pub fn forward<'b>(&mut self, batch: &'b M::Batch) -> Result<(M::Activation, Tape<'b, M>)> {
        if let (Mode::Frozen, Some(unit)) = (self.units.mode(), self.units.plan().units().first()) {
            return Err(Error::Frozen { unit: unit.name().to_owned() });
        }
        let mut inputs = Vec::with_capacity(self.stages.len());
        let output = self.guarded(|this| {
            this.forget_old_units();
            let schedule = Arc::clone(&this.schedule);
            this.run_forward(&schedule.forward, batch, |input| inputs.push(input))
        })?;
        Ok((output, Tape { batch, inputs, version: self.units.version() }))
    }

    /// The output of the last stage, without anything kept. *Collective.*
    ///
    /// # Errors
    /// [`Error::Compute`] with the model's error, [`Error::Collective`].
    pub fn evaluate(&mut self, batch: &M::Batch) -> Result<M::Activation> {
        self.guarded(|this| {
            this.forget_old_units();
            let schedule = Arc::clone(&this.schedule);
            this.run_forward(&schedule.evaluate, batch, drop)
        })
    }

    /// Runs the stages backward from the gradient of the loss with respect to the output of
    /// [`forward`](Self::forward), and adds the sum over ranks of every parameter's gradient to the gradient shards.
    /// *Collective.*
    ///
    /// # Errors
    /// [`Error::StaleTape`] when the parameters have changed since, or the tape is another model's;
    /// [`Error::IncompleteBackward`] when an earlier pass failed half-way and its gradients have not been zeroed;
    /// [`Error::Compute`] with the model's error, [`Error::Collective`], [`Error::Length`].
    pub fn backward(&mut self, tape: Tape<'_, M>, grad_output: M::Activation) -> Result<()> {
        if tape.version != self.units.version() || tape.inputs.len() + 1 != self.stages.len() {
            return Err(Error::StaleTape);
        }
        if self.units.backward_incomplete() {
            return Err(Error::IncompleteBackward);
        }
        // Another pass may have ended, and freed what is never resharded; then this one gathers again.
        self.without_gradient.clear();
        self.guarded(|this| {
            this.forget_old_units();
            this.units.begin_backward();
            this.run_backward(tape, grad_output)?;
            this.units.end_backward();
            Ok(())
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

    /// Frees every unit that is gathered. Needed only where units are never resharded and a forward pass has not been
    /// followed by its backward.
    pub fn reshard(&mut self) {
        (0..self.live.len()).for_each(|unit| self.free(unit));
    }

    /// Runs a pass; one that fails leaves no unit gathered.
    fn guarded<T>(&mut self, pass: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let result = pass(self);
        if result.is_err() {
            self.reshard();
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

    fn run_forward(
        &mut self,
        ops: &[Op],
        batch: &M::Batch,
        mut done_with: impl FnMut(M::Activation),
    ) -> Result<M::Activation> {
        let mut input: Option<M::Activation> = None;
        for &op in ops {
            match op {
                Op::Gather(unit) => self.gather(unit)?,
                Op::Free(unit) => self.free(unit),
                Op::Run(stage) => {
                    let params = self.params(stage)?;
                    let output = self
                        .model
                        .forward(stage, &params, batch, input.as_ref())
                        .map_err(|source| self.failed("forward", stage, source))?;
                    if let Some(input) = input.replace(output) {
                        done_with(input);
                    }
                }
                Op::Reduce(_) => {}
            }
        }
        input.ok_or_else(no_stages)
    }

    fn run_backward(&mut self, tape: Tape<'_, M>, grad_output: M::Activation) -> Result<()> {
        let Tape { batch, mut inputs, .. } = tape;
        let plan = Arc::clone(self.units.plan());
        let mut grads: Vec<Option<UnitGrads>> = plan.units().iter().map(|_| None).collect();
        let mut leases: Vec<Option<Lease>> = plan.units().iter().map(|_| None).collect();
        let mut grad = Some(grad_output);
        let (stages, schedule) = (Arc::clone(&self.stages), Arc::clone(&self.schedule));
        for &op in &schedule.backward {
            match op {
                Op::Gather(unit) => self.gather(unit)?,
                Op::Free(unit) => self.free(unit),
                Op::Run(stage) => {
                    let input = inputs.pop();
                    for &unit in &stages[stage].units {
                        // A pass that was open beside this one may have freed it.
                        self.gather(unit)?;
                        if grads[unit].is_none() {
                            let (values, lease) = self.units.gradient_buffer(unit)?.into_parts();
                            let given = vec![false; plan.units()[unit].params().len()];
                            grads[unit] = Some(UnitGrads { values, given });
                            leases[unit] = Some(lease);
                        }
                    }
                    let params = self.params(stage)?;
                    let Some(grad_output) = grad.take() else {
                        let what =
                            "backward returned no gradient of its input to the stage before".to_owned();
                        let stage = stages.get(stage + 1).map_or_else(String::new, |next| next.name.clone());
                        return Err(Error::InvalidStage { stage, what });
                    };
                    let mut sink = StageGrads::new(&stages[stage].units, plan.units(), &mut grads);
                    grad = self
                        .model
                        .backward(stage, &params, batch, input.as_ref(), grad_output, &mut sink)
                        .map_err(|source| self.failed("backward", stage, source))?;
                }
                Op::Reduce(unit) => {
                    if let Some(UnitGrads { values, given }) = grads[unit].take() {
                        leases[unit] = None;
                        let missing = given.iter().enumerate().filter(|(_, given)| !**given);
                        self.without_gradient.extend(missing.map(|(param, _)| (unit, param)));
                        self.units.reduce_gradient(unit, values)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Makes a unit whole and binds it, unless it is.
    fn gather(&mut self, unit: usize) -> Result<()> {
        if self.live[unit].is_some() {
            return Ok(());
        }
        let (values, lease) = self.units.gather(unit)?.into_parts();
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
                self.units.recycle(values);
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
    Error::InvalidStage { stage: String::new(), what: "a model needs at least one stage".to_owned() }
}
