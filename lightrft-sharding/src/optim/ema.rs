//! The exponential moving average of parameters, cut as they are.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{BoxError, Error, Result};
use crate::flat::FlatParam;
use crate::host::HostMemory;
use crate::memory::{Memory, Values as _};
use crate::plan::Plan;
use crate::precision::{Combine, Precision};
use crate::state::{StateKind, StatePart, parts};
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
///
/// It lies in the memory of the units it is made for, and follows them there.
#[derive(Debug)]
pub struct Ema<Mem: Memory = HostMemory> {
    memory: Mem,
    config: EmaConfig,
    plan: Arc<Plan>,
    rank: usize,
    averages: Vec<Mem::Values>,
    /// Whether this rank saves a unit's: of ranks that hold the same, one does.
    saves: Vec<bool>,
    counters: EmaCounters,
    pub(crate) offloaded: bool,
}

impl<Mem: Memory> Ema<Mem> {
    /// An average that begins at the units' parameters as they are now.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`], [`Error::Offloaded`].
    pub fn new(config: EmaConfig, units: &ShardedUnits<Mem>) -> Result<Self> {
        let EmaConfig { beta, every } = config;
        if !(0.0..=1.0).contains(&beta) {
            let expected = "at least 0 and at most 1";
            return Err(Error::InvalidSetting { setting: "beta", value: beta, expected });
        }
        if every == 0 {
            return Err(Error::InvalidSetting { setting: "every", value: 0.0, expected: "at least 1" });
        }
        let plan = Arc::clone(units.plan());
        let memory = units.memory.clone();
        let elems = plan.units().iter().map(|unit| unit.trainable_shard_elems());
        let averages = elems.map(|elems| memory.unset(Precision::F32, elems)).collect::<Result<_>>()?;
        let saves = (0..plan.units().len()).map(|unit| units.speaks_for(unit)).collect::<Result<_>>()?;
        let (rank, counters) = (units.rank(), EmaCounters::default());
        let mut average = Self { memory, config, plan, rank, averages, saves, counters, offloaded: false };
        average.copy_from(units)?;
        Ok(average)
    }

    /// Counts the call and, when it is the turn, moves the average towards the parameters. Call it after an optimizer
    /// step. Not collective.
    ///
    /// # Errors
    /// [`Error::ForeignAverage`] for units of another plan, rank or memory; [`Error::AverageOffloaded`], and
    /// [`Error::Offloaded`] for parameters that have left their device.
    pub fn update(&mut self, units: &ShardedUnits<Mem>) -> Result<EmaUpdate> {
        self.check_plan(units)?;
        self.counters.calls += 1;
        if !self.counters.calls.is_multiple_of(self.config.every) {
            return Ok(EmaUpdate::NotDue);
        }
        // As average + (1 - beta)(parameter - average), which leaves an average that equals its parameter as it is.
        let weight = (1.0 - self.config.beta) as f32;
        for (average, store) in self.averages.iter_mut().zip(&units.stores) {
            self.memory.blend(average, &store.param, weight)?;
        }
        self.counters.updates += 1;
        Ok(EmaUpdate::Applied)
    }

    /// Begins anew at the units' parameters. The counters stay. Not collective.
    ///
    /// # Errors
    /// As [`update`](Self::update).
    pub fn copy_from(&mut self, units: &ShardedUnits<Mem>) -> Result<()> {
        self.check_plan(units)?;
        for (average, store) in self.averages.iter_mut().zip(&units.stores) {
            let all = 0..average.len();
            self.memory.combine(average, all.clone(), &store.param, all, Combine::Set)?;
        }
        Ok(())
    }

    /// Overwrites the parameters of `units` with the average: those of another model of the same plan, such as one that
    /// is evaluated or exported. What the plan says is frozen stays as it is there. Not collective, but every rank must do it.
    ///
    /// # Errors
    /// As [`update`](Self::update).
    pub fn copy_to(&self, units: &mut ShardedUnits<Mem>) -> Result<()> {
        self.check_plan(units)?;
        units.params_changed();
        for (average, store) in self.averages.iter().zip(&mut units.stores) {
            let all = 0..average.len();
            let param = Mem::to_change(&mut store.param)?;
            self.memory.combine(param, all.clone(), average, all, Combine::Set)?;
        }
        Ok(())
    }

    /// Exchanges average and parameters: once to evaluate or export the average with the model that trains, and once
    /// more to go on training. Needs no memory. Not collective, but every rank must do it.
    ///
    /// # Errors
    /// As [`update`](Self::update).
    pub fn swap(&mut self, units: &mut ShardedUnits<Mem>) -> Result<()> {
        self.check_plan(units)?;
        units.params_changed();
        for (average, store) in self.averages.iter_mut().zip(&mut units.stores) {
            self.memory.swap(average, Mem::to_change(&mut store.param)?)?;
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

    /// Bytes held: 4 for each element of the shard that learns. None while it is offloaded from a device.
    pub fn persistent_bytes(&self) -> usize {
        self.averages.iter().map(|average| average.capacity_bytes()).sum()
    }

    /// Shows every part that this rank must save to `visit`, wherever it lies, as [`visit_state`](crate::visit_state) shows
    /// those of the parameters. Beside them save [`counters`](Self::counters).
    ///
    /// # Errors
    /// As there.
    pub fn visit_state<E: Into<BoxError>>(
        &self,
        mut visit: impl FnMut(StatePart<'_>) -> Result<(), E>,
    ) -> Result<()> {
        for (unit, average) in self.saved() {
            self.memory
                .read(average, |average| {
                    let mut parts = parts(&self.plan, self.rank, (StateKind::Ema, unit), average);
                    parts.try_for_each(&mut visit)
                })?
                .map_err(|source| Error::Visit {
                    unit: self.plan.units()[unit].name().to_owned(),
                    source: source.into(),
                })?;
        }
        Ok(())
    }

    /// The averages that this rank saves, and of which unit each is.
    fn saved(&self) -> impl Iterator<Item = (usize, &Mem::Values)> {
        let units = self.averages.iter().enumerate().zip(&self.saves);
        units.filter_map(|(unit, saves)| saves.then_some(unit))
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
            let into = |shard: &mut [f32]| read_parts(unit, self.rank, StateKind::Ema, shard, &mut read);
            self.memory.overwrite(average, into)?;
        }
        Ok(())
    }

    fn check_plan(&self, units: &ShardedUnits<Mem>) -> Result<()> {
        let foreign = super::foreign(&self.memory, &self.plan, self.rank, units);
        foreign.map_or(Ok(()), |what| Err(Error::ForeignAverage { what }))?;
        if self.offloaded {
            return Err(Error::AverageOffloaded);
        }
        units.check_here()
    }

    /// What it consists of, and in which memory.
    pub(crate) fn values_mut(&mut self) -> (&Mem, Vec<&mut Mem::Values>) {
        (&self.memory, self.averages.iter_mut().collect())
    }
}

impl Ema {
    /// This rank's shard of a unit's average: the first of the shard of the parameters, of those that learn.
    pub fn average(&self, unit: usize) -> Option<&[f32]> {
        self.averages.get(unit).map(|average| average.f32())
    }

    /// Every part that this rank must save, as [`state_parts`](crate::state_parts) gives those of the parameters. Beside
    /// them save [`counters`](Self::counters).
    pub fn state_parts(&self) -> Vec<StatePart<'_>> {
        let of = |unit| (StateKind::Ema, unit);
        let saved = self.saved();
        saved.flat_map(|(unit, average)| parts(&self.plan, self.rank, of(unit), average.f32())).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use lightrft_collectives::Single;

    use super::*;
    use crate::{Mode, Offload as _, ParamSpec, UnitSpec};

    #[test]
    fn an_average_that_is_offloaded_is_saved_and_loaded_but_not_moved() {
        let unit = UnitSpec::new("u", [ParamSpec::new("w", [3])]);
        let plan = Arc::new(Plan::new(vec![unit], 1).unwrap());
        let mut units = ShardedUnits::new(plan, Single::world(), Mode::Train).unwrap();
        let mut average = Ema::new(EmaConfig::lightrft(1), &units).unwrap();
        let report = average.offload().unwrap();
        assert_eq!((report.bytes, report.kept_bytes, average.is_offloaded()), (0, 12, true));
        assert!(matches!(average.update(&units), Err(Error::AverageOffloaded)));
        assert!(matches!(average.swap(&mut units), Err(Error::AverageOffloaded)));
        assert_eq!(average.counters().calls, 0);
        let twos = |_: &FlatParam, _, out: &mut [f32]| {
            out.fill(2.0);
            Ok::<_, Infallible>(())
        };
        average.load_state(twos).unwrap();
        let mut seen = 0.0;
        let add = |part: StatePart<'_>| {
            seen += part.values.iter().sum::<f32>();
            Ok::<_, Infallible>(())
        };
        average.visit_state(add).unwrap();
        assert_eq!(seen, 6.0);
        average.reload().unwrap();
        average.copy_to(&mut units).unwrap();
        assert_eq!(units.param(0).unwrap(), [2.0; 3]);
    }
}
