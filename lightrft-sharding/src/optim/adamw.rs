//! AdamW whose state is cut as the parameters are.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::decay::{Decay, decay_by_name};
use super::kernel::Scalars;
use super::narrow::CopyOut;
use super::norm::{GradNorm, grad_norm};
use crate::error::{Error, Result};
use crate::flat::FlatUnit;
use crate::host::{HostMemory, adamw_and_copy};
use crate::memory::{AdamWork, Memory, ShardRuns, Values as _};
use crate::plan::Plan;
use crate::precision::Precision;
use crate::unit::{Mode, ShardedUnits};

/// AdamW's settings; the learning rate is given to each step. The default is [`lightrft`](Self::lightrft).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamWConfig {
    /// Decay rates of the running means, each in `[0, 1)`.
    pub betas: (f64, f64),
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay, times the learning rate, on parameters that decay.
    pub weight_decay: f64,
    /// Gradients are scaled down to this global norm; 0 means that they never are.
    pub max_norm: f64,
}

impl AdamWConfig {
    /// LightRFT's: betas (0.9, 0.95), eps 1e-8, no weight decay (its `l2`), norm clipped to 1. Which parameters a weight
    /// decay acts on is [`decay_by_name`]'s to say, which [`AdamW::new`] takes.
    pub const fn lightrft() -> Self {
        Self { betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.0, max_norm: 1.0 }
    }

    /// torch's: betas (0.9, 0.999), eps 1e-8, weight decay 0.01, no clipping. torch decays every parameter; for that
    /// give [`AdamW::with_decay`] a rule that says so.
    pub const fn torch() -> Self {
        Self { betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.01, max_norm: 0.0 }
    }
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self::lightrft()
    }
}

/// Did a step change the parameters?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Update {
    /// Yes.
    Applied,
    /// No: the gradient norm was not finite. All ranks skip alike.
    Skipped,
}

/// What a step did; the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Whether parameters changed.
    pub update: Update,
    /// The global gradient norm before clipping.
    pub grad_norm: f32,
    /// What the gradients were multiplied by: 1 when they were not clipped.
    pub clip_factor: f32,
}

/// The numbers of an optimizer that a checkpoint holds beside its tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdamWCounters {
    /// Steps applied: the `t` of bias correction.
    pub steps: u64,
    /// Steps skipped because the gradient norm was not finite.
    pub skipped: u64,
}

/// Decoupled weight decay Adam (Loshchilov and Hutter 2019), as torch computes it, over this rank's shards.
///
/// Its state is 8 bytes for every element of the shard. Clipping and zeroing cost no pass of their own: the clip factor
/// is applied as gradients are read, and gradients are zero after every step.
///
/// It lies in the memory of the units it is made for, and steps them there. On a device the step waits once for all that
/// the device has been given: the host learns the norm, and with it whether the step is skipped.
#[derive(Debug)]
pub struct AdamW<Mem: Memory = HostMemory> {
    pub(crate) memory: Mem,
    config: AdamWConfig,
    plan: Arc<Plan>,
    rank: usize,
    states: Vec<UnitState<Mem>>,
    counters: AdamWCounters,
    pub(crate) offloaded: bool,
}

/// One unit's state.
#[derive(Debug)]
struct UnitState<Mem: Memory> {
    exp_avg: Mem::Values,
    exp_avg_sq: Mem::Values,
    /// Neighbouring parameters of one rule, as intervals of the shard; padding is in none.
    runs: Mem::Runs,
}

impl<Mem: Memory> AdamW<Mem> {
    /// Zeroed state for `units`, with [LightRFT's rule](decay_by_name) for what decays.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`]; [`Error::Frozen`] for units without gradients.
    pub fn new(config: AdamWConfig, units: &ShardedUnits<Mem>) -> Result<Self> {
        Self::with_decay(config, units, decay_by_name)
    }

    /// As [`new`](Self::new), with another rule, asked for each parameter's name.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_decay(
        config: AdamWConfig,
        units: &ShardedUnits<Mem>,
        rule: impl Fn(&str) -> Decay,
    ) -> Result<Self> {
        check(&config)?;
        let plan = Arc::clone(units.plan());
        if let (Mode::Frozen, Some(unit)) = (units.mode(), plan.units().first()) {
            return Err(Error::Frozen { unit: unit.name().to_owned() });
        }
        let memory = units.memory.clone();
        let shards = plan.units().iter();
        let runs_of = |unit: &FlatUnit| ShardRuns {
            runs: runs(unit, units.rank(), &rule),
            elems: unit.trainable_shard_elems(),
        };
        let runs = memory.runs(shards.clone().map(runs_of).collect())?;
        let state = |(unit, runs): (&FlatUnit, _)| -> Result<_> {
            let zeros = || memory.zeros(Precision::F32, unit.trainable_shard_elems());
            Ok(UnitState { exp_avg: zeros()?, exp_avg_sq: zeros()?, runs })
        };
        let states = shards.zip(runs).map(state).collect::<Result<_>>()?;
        Ok(Self {
            memory,
            config,
            plan,
            rank: units.rank(),
            states,
            counters: AdamWCounters::default(),
            offloaded: false,
        })
    }

    /// One step with learning rate `lr`, after which the gradients are zero. *Collective*: one all-reduce of eight
    /// bytes, or none in a group of one rank.
    ///
    /// When any gradient of any rank is NaN or infinite, no rank changes anything, and the step is counted as
    /// [skipped](AdamWCounters::skipped).
    ///
    /// # Errors
    /// Before anything is sent: [`Error::InvalidSetting`] for a learning rate that is negative or not finite,
    /// [`Error::ForeignOptimizer`], [`Error::OptimizerOffloaded`]; and those of [`grad_norm`].
    pub fn step(&mut self, units: &mut ShardedUnits<Mem>, lr: f64) -> Result<StepReport> {
        self.check_step(units, lr)?;
        let norm = grad_norm([&mut *units])?;
        self.step_with_norm(units, lr, norm)
    }

    /// As [`step`](Self::step), with a norm that was taken before: of several models together, say, each of which is then
    /// clipped by the norm of all, and skipped when any of them is not finite. *Collective* unless [`grad_norm`] was given
    /// these units, and has summed what there was to sum: then nothing is sent.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_with_norm(
        &mut self,
        units: &mut ShardedUnits<Mem>,
        lr: f64,
        norm: GradNorm,
    ) -> Result<StepReport> {
        self.check_step(units, lr)?;
        // Nothing to do where the norm was of these gradients.
        units.sync_gradients()?;
        self.update(units, lr, norm, Mem::adamw)
    }

    /// Skips the step, or has `pass` do it.
    fn update(
        &mut self,
        units: &mut ShardedUnits<Mem>,
        lr: f64,
        norm: GradNorm,
        pass: impl FnOnce(&Mem, Vec<AdamWork<'_, Mem>>, Scalars) -> Result<()>,
    ) -> Result<StepReport> {
        let grad_norm = norm.value();
        if !norm.is_finite() {
            self.counters.skipped += 1;
            units.zero_gradients();
            tracing::warn!(
                grad_norm,
                skipped = self.counters.skipped,
                "gradients are not finite: step skipped"
            );
            return Ok(StepReport { update: Update::Skipped, grad_norm, clip_factor: 1.0 });
        }
        let clip_factor = norm.clip_factor(self.config.max_norm);
        let scalars = self.scalars(self.counters.steps + 1, lr, clip_factor);
        let mut work = Vec::with_capacity(self.states.len());
        for (state, store) in self.states.iter_mut().zip(&mut units.stores) {
            let Some(gradient) = &mut store.grad else { continue };
            let UnitState { exp_avg, exp_avg_sq, runs } = state;
            let (grad, own) = gradient.sum_or_zeros(&units.memory)?;
            let param = Mem::to_change(&mut store.param)?;
            let copy = store.copy.as_mut().map_or(Ok(None), |copy| copy.out(units.version))?;
            work.push(AdamWork { param, copy, grad, own, exp_avg, exp_avg_sq, runs });
        }
        if let Err(error) = pass(&self.memory, work, scalars) {
            // Some units may have been stepped: what was made of the masters is old, and the step is not to be repeated.
            units.params_changed();
            units.begin_backward();
            return Err(error);
        }
        self.counters.steps += 1;
        units.params_stepped();
        units.zero_gradients();
        Ok(StepReport { update: Update::Applied, grad_norm, clip_factor })
    }

    /// The settings.
    pub fn config(&self) -> &AdamWConfig {
        &self.config
    }

    /// How many steps were applied and skipped.
    pub fn counters(&self) -> AdamWCounters {
        self.counters
    }

    /// Restores the counters of a checkpoint.
    pub fn set_counters(&mut self, counters: AdamWCounters) {
        self.counters = counters;
    }

    /// Bytes held from one step to the next: 8 for each element of the shard. None while it is offloaded from a device.
    pub fn persistent_bytes(&self) -> usize {
        let bytes =
            |state: &UnitState<Mem>| state.exp_avg.capacity_bytes() + state.exp_avg_sq.capacity_bytes();
        self.states.iter().map(bytes).sum()
    }

    /// Both means of a unit.
    pub(crate) fn state(&self, unit: usize) -> Option<(&Mem::Values, &Mem::Values)> {
        self.states.get(unit).map(|state| (&state.exp_avg, &state.exp_avg_sq))
    }

    /// What its state consists of, and in which memory.
    pub(crate) fn values_mut(&mut self) -> (&Mem, Vec<&mut Mem::Values>) {
        let states = self.states.iter_mut();
        (&self.memory, states.flat_map(|state| [&mut state.exp_avg, &mut state.exp_avg_sq]).collect())
    }

    /// Both means of every unit, to be overwritten.
    pub(crate) fn state_mut(&mut self) -> impl Iterator<Item = (&mut Mem::Values, &mut Mem::Values)> + '_ {
        self.states.iter_mut().map(|state| (&mut state.exp_avg, &mut state.exp_avg_sq))
    }

    fn check_step(&self, units: &ShardedUnits<Mem>, lr: f64) -> Result<()> {
        if !(lr.is_finite() && lr >= 0.0) {
            let expected = "a finite number, 0 or more";
            return Err(Error::InvalidSetting { setting: "lr", value: lr, expected });
        }
        self.check_plan(units)?;
        if self.offloaded { Err(Error::OptimizerOffloaded) } else { Ok(()) }
    }

    pub(crate) fn check_plan(&self, units: &ShardedUnits<Mem>) -> Result<()> {
        let foreign = super::foreign(&self.memory, &self.plan, self.rank, units);
        foreign.map_or(Ok(()), |what| Err(Error::ForeignOptimizer { what }))
    }

    fn scalars(&self, steps: u64, lr: f64, clip_factor: f32) -> Scalars {
        let AdamWConfig { betas: (beta1, beta2), eps, weight_decay, .. } = self.config;
        let correction = |beta: f64| 1.0 - beta.powf(steps as f64);
        Scalars {
            clip: clip_factor,
            keep: (1.0 - lr * weight_decay) as f32,
            weight1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            weight2: (1.0 - beta2) as f32,
            scale2: (1.0 / correction(beta2).sqrt()) as f32,
            eps: eps as f32,
            step_size: (lr / correction(beta1)) as f32,
        }
    }
}

impl AdamW {
    /// As [`step_with_norm`](Self::step_with_norm), and in the same pass over memory rounds the new parameters into
    /// `copies`: one for each unit in their order, as long as the part of the shard that learns; units beyond the last
    /// of them are not copied. A skipped step leaves the copies as they are.
    ///
    /// # Errors
    /// As [`step_with_norm`](Self::step_with_norm), and [`Error::Length`], before anything is changed.
    pub fn step_and_copy<'c>(
        &mut self,
        units: &mut ShardedUnits,
        lr: f64,
        norm: GradNorm,
        copies: impl IntoIterator<Item = CopyOut<'c>>,
    ) -> Result<StepReport> {
        self.check_step(units, lr)?;
        units.sync_gradients()?;
        let copies: Vec<CopyOut<'c>> = copies.into_iter().collect();
        if copies.len() > self.states.len() {
            let (name, expected) = ("all units".to_owned(), self.states.len());
            return Err(Error::Length { what: "the list of copies", name, got: copies.len(), expected });
        }
        for (state, (unit, copy)) in self.states.iter().zip(self.plan.units().iter().zip(&copies)) {
            let expected = state.exp_avg.len();
            if let Some(got) = copy.len().filter(|&got| got != expected) {
                let name = unit.name().to_owned();
                return Err(Error::Length { what: "the half-precision copy", name, got, expected });
            }
        }
        // One copy is written in the pass: the caller's, or else the one that the next gathers read.
        for (unit, _) in
            copies.iter().enumerate().filter(|(_, copy)| norm.is_finite() && copy.len().is_some())
        {
            units.forget_copy(unit);
        }
        let copies = copies.into_iter().chain(std::iter::repeat_with(CopyOut::default));
        self.update(units, lr, norm, |_, work, scalars| {
            adamw_and_copy(work, copies, scalars);
            Ok(())
        })
    }

    /// This rank's shard of a unit's running mean of gradients, cut as the parameters are.
    pub fn exp_avg(&self, unit: usize) -> Option<&[f32]> {
        self.states.get(unit).map(|state| state.exp_avg.f32())
    }

    /// This rank's shard of a unit's running mean of squared gradients, cut as the parameters are.
    pub fn exp_avg_sq(&self, unit: usize) -> Option<&[f32]> {
        self.states.get(unit).map(|state| state.exp_avg_sq.f32())
    }
}

/// The rank's parts of a unit, neighbours of one rule joined.
fn runs(unit: &FlatUnit, rank: usize, rule: impl Fn(&str) -> Decay) -> Vec<(Range<usize>, Decay)> {
    let mut runs: Vec<(Range<usize>, Decay)> = Vec::new();
    for (param, owned) in unit.trainable_parts(rank) {
        let decay = rule(unit.params()[param].name());
        match runs.last_mut() {
            Some((last, same)) if *same == decay && last.end == owned.shard.start => {
                last.end = owned.shard.end
            }
            _ => runs.push((owned.shard, decay)),
        }
    }
    runs
}

fn check(config: &AdamWConfig) -> Result<()> {
    let AdamWConfig { betas: (beta1, beta2), eps, weight_decay, max_norm } = *config;
    for (setting, value) in [("betas.0", beta1), ("betas.1", beta2)] {
        if !(0.0..1.0).contains(&value) {
            return Err(Error::InvalidSetting { setting, value, expected: "at least 0 and less than 1" });
        }
    }
    for (setting, value) in [("eps", eps), ("weight_decay", weight_decay), ("max_norm", max_norm)] {
        if !(value.is_finite() && value >= 0.0) {
            return Err(Error::InvalidSetting { setting, value, expected: "a finite number, 0 or more" });
        }
    }
    Ok(())
}
