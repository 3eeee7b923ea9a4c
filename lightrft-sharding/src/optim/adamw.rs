//! AdamW whose state is cut as the parameters are.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::decay::{Decay, decay_by_name};
use super::kernel::{self, Arrays, Scalars};
use super::norm;
use crate::error::{Error, Result};
use crate::flat::FlatUnit;
use crate::plan::Plan;
use crate::unit::{Mode, ShardedUnits};

/// AdamW's settings; the learning rate is given to each step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamWConfig {
    /// Decay rates of the running means, each in `[0, 1)`. Default (0.9, 0.95).
    pub betas: (f64, f64),
    /// Added to the denominator. Default 1e-8.
    pub eps: f64,
    /// Decoupled weight decay, times the learning rate, on parameters that decay. Default 0.
    pub weight_decay: f64,
    /// Gradients are scaled down to this global norm; 0 means that they never are. Default 1.
    pub max_norm: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.0, max_norm: 1.0 }
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
        Ok(Self { config, plan, rank: units.rank(), states, counters: AdamWCounters::default() })
    }

    /// One step with learning rate `lr`, after which the gradients are zero. *Collective*: one all-reduce of eight
    /// bytes, or none in a group of one rank.
    ///
    /// When any gradient of any rank is NaN or infinite, no rank changes anything, and the step is counted as
    /// [skipped](AdamWCounters::skipped).
    ///
    /// # Errors
    /// Before anything is sent: [`Error::InvalidSetting`] for a learning rate that is negative or not finite,
    /// [`Error::IncompleteBackward`], [`Error::ForeignOptimizer`]. Else [`Error::Collective`].
    pub fn step(&mut self, units: &mut ShardedUnits, lr: f64) -> Result<StepReport> {
        if !(lr.is_finite() && lr >= 0.0) {
            return Err(Error::InvalidSetting {
                setting: "lr",
                value: lr,
                expected: "a finite number, 0 or more",
            });
        }
        self.check_plan(units)?;
        if units.backward_incomplete() {
            return Err(Error::IncompleteBackward);
        }
        units.sync_gradients()?;
        let grad_norm = norm::global(units)?;
        if !grad_norm.is_finite() {
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
        let clip_factor = norm::clip_factor(grad_norm, self.config.max_norm as f32);
        let scalars = self.scalars(lr, clip_factor);
        for (UnitState { exp_avg, exp_avg_sq, runs }, (param, grad)) in
            self.states.iter_mut().zip(units.shards_mut())
        {
            for (range, decay) in runs.iter() {
                let arrays = Arrays {
                    param: &mut param[range.clone()],
                    grad: &grad[range.clone()],
                    exp_avg: &mut exp_avg[range.clone()],
                    exp_avg_sq: &mut exp_avg_sq[range.clone()],
                };
                kernel::step(arrays, *decay, scalars);
            }
        }
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

    pub(crate) fn check_plan(&self, units: &ShardedUnits) -> Result<()> {
        let (mine, theirs) = (&self.plan, units.plan());
        if self.rank != units.rank() {
            let what = format!("it is of rank {}, the units are of rank {}", self.rank, units.rank());
            return Err(Error::ForeignOptimizer { what });
        }
        if Arc::ptr_eq(mine, theirs) || mine == theirs {
            return Ok(());
        }
        let describe = |plan: &Plan| {
            format!(
                "{} units of {} elements over {} ranks",
                plan.units().len(),
                plan.elems(),
                plan.world_size()
            )
        };
        Err(Error::ForeignOptimizer { what: format!("it has {}, not {}", describe(mine), describe(theirs)) })
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
