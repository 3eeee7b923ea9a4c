//! The exponential moving average of parameters, cut as they are.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::kernel;
use crate::error::{BoxError, Error, Result};
use crate::flat::FlatParam;
use crate::plan::Plan;
use crate::state::{StateKind, StatePart};
use crate::unit::{ShardedUnits, read_parts};

/// How an average follows its parameters.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EmaConfig {
    /// The weight of the past, in `[0, 1]`: `average <- beta average + (1 - beta) parameter`.
    pub beta: f64,
    /// It moves at every so many calls of [`Ema::update`]: the accumulation steps, where that is called once a pass.
    pub every: u64,
}

impl EmaConfig {
    /// LightRFT's: beta 0.992, at every `accumulated_gradient` calls.
    pub const fn lightrft(accumulated_gradient: u64) -> Self {
        Self { beta: 0.992, every: accumulated_gradient }
    }
}

/// Did a call move the average?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmaUpdate {
    /// Yes.
    Applied,
    /// No: it is not yet the turn.
    NotDue,
}

/// The numbers of an average that a checkpoint holds beside its tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EmaCounters {
    /// Calls of [`Ema::update`].
    pub calls: u64,
    /// Of these, the ones that moved the average.
    pub updates: u64,
}

/// An exponential moving average of a model's master parameters that learn: an f32 shard beside theirs, 4 bytes for each
/// element of it. What is frozen is its own average, and not kept twice.
///
/// Nothing is gathered and nothing is sent: an average of shards is the shard of the average, bit for bit, whatever is
/// cut. (Where DeepSpeed cuts parameters, an average that is written through gathered parameters is lost.)
#[derive(Debug)]
pub struct Ema {
    config: EmaConfig,
    plan: Arc<Plan>,
    rank: usize,
    averages: Vec<Vec<f32>>,
    /// Whether this rank saves a unit's: of ranks that hold the same, one does.
    saves: Vec<bool>,
    counters: EmaCounters,
}

impl Ema {
    /// An average that begins at the units' parameters as they are now.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`].
    pub fn new(config: EmaConfig, units: &ShardedUnits) -> Result<Self> {
        let EmaConfig { beta, every } = config;
        if !(0.0..=1.0).contains(&beta) {
            let expected = "at least 0 and at most 1";
            return Err(Error::InvalidSetting { setting: "beta", value: beta, expected });
        }
        if every == 0 {
            return Err(Error::InvalidSetting { setting: "every", value: 0.0, expected: "at least 1" });
        }
        let plan = Arc::clone(units.plan());
        let all = 0..plan.units().len();
        let averages = all.clone().map(|unit| Ok(learning(units, unit)?.to_vec())).collect::<Result<_>>()?;
        let saves = all.map(|unit| units.speaks_for(unit)).collect::<Result<_>>()?;
        Ok(Self { config, plan, rank: units.rank(), averages, saves, counters: EmaCounters::default() })
    }

    /// Counts the call and, when it is the turn, moves the average towards the parameters. Call it after an optimizer
    /// step. Not collective.
    ///
    /// # Errors
    /// [`Error::ForeignAverage`] for units of another plan or rank.
    pub fn update(&mut self, units: &ShardedUnits) -> Result<EmaUpdate> {
        self.check_plan(units)?;
        self.counters.calls += 1;
        if !self.counters.calls.is_multiple_of(self.config.every) {
            return Ok(EmaUpdate::NotDue);
        }
        // As average + (1 - beta)(parameter - average), which leaves an average that equals its parameter as it is.
        let weight = (1.0 - self.config.beta) as f32;
        for (unit, average) in self.averages.iter_mut().enumerate() {
            kernel::blend(average, learning(units, unit)?, weight);
        }
        self.counters.updates += 1;
        Ok(EmaUpdate::Applied)
    }

    /// Begins anew at the units' parameters. The counters stay. Not collective.
    ///
    /// # Errors
    /// [`Error::ForeignAverage`].
    pub fn copy_from(&mut self, units: &ShardedUnits) -> Result<()> {
        self.check_plan(units)?;
        for (unit, average) in self.averages.iter_mut().enumerate() {
            average.copy_from_slice(learning(units, unit)?);
        }
        Ok(())
    }

    /// Overwrites the parameters of `units` with the average: those of another model of the same plan, such as one that
    /// is evaluated or exported. What the plan says is frozen stays as it is there. Not collective, but every rank must do it.
    ///
    /// # Errors
    /// [`Error::ForeignAverage`].
    pub fn copy_to(&self, units: &mut ShardedUnits) -> Result<()> {
        self.check_plan(units)?;
        for (average, param) in self.averages.iter().zip(units.param_shards_mut()) {
            param[..average.len()].copy_from_slice(average);
        }
        Ok(())
    }

    /// Exchanges average and parameters: once to evaluate or export the average with the model that trains, and once
    /// more to go on training. Needs no memory. Not collective, but every rank must do it.
    ///
    /// # Errors
    /// [`Error::ForeignAverage`].
    pub fn swap(&mut self, units: &mut ShardedUnits) -> Result<()> {
        self.check_plan(units)?;
        for (average, param) in self.averages.iter_mut().zip(units.param_shards_mut()) {
            param[..average.len()].swap_with_slice(average);
        }
        Ok(())
    }

    /// The settings.
    pub fn config(&self) -> &EmaConfig {
        &self.config
    }

    /// How often it was called, and moved.
    pub fn counters(&self) -> EmaCounters {
        self.counters
    }

    /// Restores the counters of a checkpoint.
    pub fn set_counters(&mut self, counters: EmaCounters) {
        self.counters = counters;
    }

    /// This rank's shard of a unit's average: the first of the shard of the parameters, of those that learn.
    pub fn average(&self, unit: usize) -> Option<&[f32]> {
        self.averages.get(unit).map(Vec::as_slice)
    }

    /// Bytes held: 4 for each element of the shard that learns.
    pub fn persistent_bytes(&self) -> usize {
        self.averages.iter().map(Vec::capacity).sum::<usize>() * size_of::<f32>()
    }

    /// Every part that this rank must save, as [`state_parts`](crate::state_parts) gives those of the parameters. Beside
    /// them save [`counters`](Self::counters).
    pub fn state_parts(&self) -> Vec<StatePart<'_>> {
        let units = self.plan.units().iter().zip(&self.averages).enumerate();
        let saved = units.zip(&self.saves).filter_map(|(unit, saves)| saves.then_some(unit));
        let parts = saved.flat_map(|(index, (unit, average))| {
            unit.trainable_parts(self.rank).filter_map(move |(param, owned)| {
                Some(StatePart {
                    kind: StateKind::Ema,
                    unit: index,
                    param: &unit.params()[param],
                    range: owned.param,
                    values: average.get(owned.shard)?,
                })
            })
        });
        parts.collect()
    }

    /// Fills this rank's part of the average from `read`, as [`load_state`](crate::load_state) fills the parameters.
    /// Restore [`set_counters`](Self::set_counters) beside it. Not collective.
    ///
    /// # Errors
    /// [`Error::Read`] with the reader's error, after which the average is partly old and partly new.
    pub fn load_state<E: Into<BoxError>>(
        &mut self,
        mut read: impl FnMut(&FlatParam, Range<usize>, &mut [f32]) -> Result<(), E>,
    ) -> Result<()> {
        for (unit, average) in self.plan.units().iter().zip(&mut self.averages) {
            read_parts(unit, self.rank, StateKind::Ema, average, &mut read)?;
        }
        Ok(())
    }

    fn check_plan(&self, units: &ShardedUnits) -> Result<()> {
        let foreign = super::foreign(&self.plan, self.rank, units);
        foreign.map_or(Ok(()), |what| Err(Error::ForeignAverage { what }))
    }
}

/// This rank's shard of a unit's parameters, those that learn.
fn learning(units: &ShardedUnits, unit: usize) -> Result<&[f32]> {
    let elems = units.plan().unit(unit)?.trainable_shard_elems();
    let shard = units.param(unit)?;
    Ok(shard.get(..elems).unwrap_or(shard))
}
