//! AdamW whose state is cut as the parameters are.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::decay::{Decay, decay_by_name};
use super::kernel::{self, Arrays, Scalars, Work};
use super::narrow::CopyOut;
use super::norm::{GradNorm, grad_norm};
use crate::error::{Error, Result};
use crate::flat::FlatUnit;
use crate::offload::{Offload, OffloadReport};
use crate::plan::Plan;
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
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    plan: Arc<Plan>,
    rank: usize,
    states: Vec<UnitState>,
    counters: AdamWCounters,
    offloaded: bool,
}

/// One unit's state.
#[derive(Debug)]
struct UnitState {
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
    /// Neighbouring parameters of one rule, as intervals of the shard; padding is in none.
    runs: Vec<(Range<usize>, Decay)>,
}

impl AdamW {
    /// Zeroed state for `units`, with [LightRFT's rule](decay_by_name) for what decays.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`]; [`Error::Frozen`] for units without gradients.
    pub fn new(config: AdamWConfig, units: &ShardedUnits) -> Result<Self> {
        Self::with_decay(config, units, decay_by_name)
    }

    /// As [`new`](Self::new), with another rule, asked for each parameter's name.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_decay(
        config: AdamWConfig,
        units: &ShardedUnits,
        rule: impl Fn(&str) -> Decay,
    ) -> Result<Self> {
        check(&config)?;
        let plan = Arc::clone(units.plan());
        if let (Mode::Frozen, Some(unit)) = (units.mode(), plan.units().first()) {
            return Err(Error::Frozen { unit: unit.name().to_owned() });
        }
        let state = |unit: &FlatUnit| UnitState {
            exp_avg: vec![0.0; unit.trainable_shard_elems()],
            exp_avg_sq: vec![0.0; unit.trainable_shard_elems()],
            runs: runs(unit, units.rank(), &rule),
        };
        let states = plan.units().iter().map(state).collect();
        Ok(Self {
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
    pub fn step(&mut self, units: &mut ShardedUnits, lr: f64) -> Result<StepReport> {
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
        units: &mut ShardedUnits,
        lr: f64,
        norm: GradNorm,
    ) -> Result<StepReport> {
        self.step_and_copy(units, lr, norm, [])
    }

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
        // Nothing to do where the norm was of these gradients.
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
        self.counters.steps += 1;
        let clip_factor = norm.clip_factor(self.config.max_norm);
        let scalars = self.scalars(lr, clip_factor);
        let copies = copies.into_iter().chain(std::iter::repeat_with(CopyOut::default));
        let shards = self.states.iter_mut().zip(units.shards_mut()).zip(copies);
        let work = shards.map(|((UnitState { exp_avg, exp_avg_sq, runs }, (param, grad)), copy)| Work {
            arrays: Arrays { param, grad, exp_avg, exp_avg_sq },
            copy,
            runs,
            start: 0,
        });
        kernel::step_all(work.collect(), scalars);
        units.params_changed();
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

    /// This rank's shard of a unit's running mean of gradients, cut as the parameters are.
    pub fn exp_avg(&self, unit: usize) -> Option<&[f32]> {
        self.states.get(unit).map(|state| state.exp_avg.as_slice())
    }

    /// This rank's shard of a unit's running mean of squared gradients, cut as the parameters are.
    pub fn exp_avg_sq(&self, unit: usize) -> Option<&[f32]> {
        self.states.get(unit).map(|state| state.exp_avg_sq.as_slice())
    }

    /// Bytes held from one step to the next: 8 for each element of the shard.
    pub fn persistent_bytes(&self) -> usize {
        let elems = |state: &UnitState| state.exp_avg.capacity() + state.exp_avg_sq.capacity();
        self.states.iter().map(elems).sum::<usize>() * size_of::<f32>()
    }

    /// Both means of every unit, to be overwritten.
    pub(crate) fn state_mut(&mut self) -> impl Iterator<Item = (&mut [f32], &mut [f32])> + '_ {
        self.states.iter_mut().map(|state| (state.exp_avg.as_mut_slice(), state.exp_avg_sq.as_mut_slice()))
    }

    fn check_step(&self, units: &ShardedUnits, lr: f64) -> Result<()> {
        if !(lr.is_finite() && lr >= 0.0) {
            let expected = "a finite number, 0 or more";
            return Err(Error::InvalidSetting { setting: "lr", value: lr, expected });
        }
        self.check_plan(units)?;
        if self.offloaded { Err(Error::OptimizerOffloaded) } else { Ok(()) }
    }

    pub(crate) fn check_plan(&self, units: &ShardedUnits) -> Result<()> {
        let foreign = super::foreign(&self.plan, self.rank, units);
        foreign.map_or(Ok(()), |what| Err(Error::ForeignOptimizer { what }))
    }

    fn scalars(&self, lr: f64, clip_factor: f32) -> Scalars {
        let AdamWConfig { betas: (beta1, beta2), eps, weight_decay, .. } = self.config;
        let steps = self.counters.steps as f64;
        let correction = |beta: f64| 1.0 - beta.powf(steps);
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

/// This state is in host memory already, which is where offloading would put it: it stays, [`OffloadReport::bytes`] is 0,
/// and neither call costs anything. What differs is that between the two a step is refused, as it is for state that has
/// left a device, so that a program which forgets to reload fails on a laptop too. Checkpoints may be written meanwhile.
impl Offload for AdamW {
    fn offload(&mut self) -> Result<OffloadReport> {
        self.offloaded = true;
        Ok(OffloadReport { kept_bytes: self.persistent_bytes(), ..OffloadReport::default() })
    }

    fn reload(&mut self) -> Result<OffloadReport> {
        self.offloaded = false;
        Ok(OffloadReport { kept_bytes: self.persistent_bytes(), ..OffloadReport::default() })
    }

    fn is_offloaded(&self) -> bool {
        self.offloaded
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
