//! The seam to checkpoints: everything that must survive, as named parts of tensors, onto any number of ranks.

use std::fmt;
use std::ops::Range;

use crate::error::{BoxError, Error, Result};
use crate::flat::FlatParam;
use crate::memory::Memory;
use crate::optim::AdamW;
use crate::plan::Plan;
use crate::unit::{ShardedUnits, read_parts};

/// One of the tensors that are kept for a parameter, all of its shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StateKind {
    /// The parameter's f32 master values.
    Param,
    /// AdamW's running mean of gradients.
    ExpAvg,
    /// AdamW's running mean of squared gradients.
    ExpAvgSq,
    /// The moving average of the parameter's values, of an [`Ema`](crate::Ema).
    Ema,
}

impl StateKind {
    /// torch's word for it: `param`, `exp_avg`, `exp_avg_sq`; and `ema`.
    pub fn as_str(self) -> &'static str {
        match self {
            StateKind::Param => "param",
            StateKind::ExpAvg => "exp_avg",
            StateKind::ExpAvgSq => "exp_avg_sq",
            StateKind::Ema => "ema",
        }
    }
}

impl fmt::Display for StateKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What this rank holds of one tensor: elements `range` of it, flattened row-major.
///
/// Over all ranks, the parts of a tensor cover it without gap or overlap.
#[derive(Clone, Debug, PartialEq)]
pub struct StatePart<'a> {
    /// Which of the parameter's tensors.
    pub kind: StateKind,
    /// The unit's index in the plan.
    pub unit: usize,
    /// The parameter's name and whole shape.
    pub param: &'a FlatParam,
    /// The elements that this rank holds; never empty.
    pub range: Range<usize>,
    /// Their values.
    pub values: &'a [f32],
}

/// Every part that this rank must save: the parameters, and the optimizer's state where there is one. Beside them
/// save [`AdamW::counters`].
///
/// In the order of units, then kinds, then parameters. Not collective.
pub fn state_parts<'a>(units: &'a ShardedUnits, optimizer: Option<&'a AdamW>) -> Vec<StatePart<'a>> {
    let shards = saved_shards(units, optimizer).into_iter();
    shards
        .flat_map(|(kind, unit, shard)| parts(units.plan(), units.rank(), (kind, unit), shard.f32()))
        .collect()
}

/// Shows every part that this rank must save to `visit`, wherever it lies: as [`state_parts`], which is for units in host
/// memory, and in the same order. From a device a shard at a time is copied to the host. Not collective.
///
/// # Errors
/// [`Error::Visit`] with the visitor's error, which is its last call; [`Error::Device`].
pub fn visit_state<Mem: Memory, E: Into<BoxError>>(
    units: &ShardedUnits<Mem>,
    optimizer: Option<&AdamW<Mem>>,
    mut visit: impl FnMut(StatePart<'_>) -> Result<(), E>,
) -> Result<()> {
    for (kind, unit, shard) in saved_shards(units, optimizer) {
        let seen = units.memory.read(shard, |shard| {
            parts(units.plan(), units.rank(), (kind, unit), shard).try_for_each(&mut visit)
        })?;
        let named = |source: E| -> Result<_> {
            Ok(Error::Visit { unit: units.plan().unit(unit)?.name().to_owned(), source: source.into() })
        };
        seen.or_else(|source| Err(named(source)?))?;
    }
    Ok(())
}

/// The shards that this rank must save, and which unit's they are.
fn saved_shards<'a, Mem: Memory>(
    units: &'a ShardedUnits<Mem>,
    optimizer: Option<&'a AdamW<Mem>>,
) -> Vec<(StateKind, usize, &'a Mem::Values)> {
    let mut shards = Vec::new();
    for (unit, store) in units.stores.iter().enumerate() {
        // Of ranks that hold the same, one saves.
        if !units.speaks_for(unit).unwrap_or(false) {
            continue;
        }
        shards.push((StateKind::Param, unit, &*store.param));
        if let Some((exp_avg, exp_avg_sq)) = optimizer.and_then(|optimizer| optimizer.state(unit)) {
            shards.push((StateKind::ExpAvg, unit, exp_avg));
            shards.push((StateKind::ExpAvgSq, unit, exp_avg_sq));
        }
    }
    shards
}

/// The parameters' parts of a shard.
pub(crate) fn parts<'a>(
    plan: &'a Plan,
    rank: usize,
    (kind, index): (StateKind, usize),
    shard: &'a [f32],
) -> impl Iterator<Item = StatePart<'a>> + 'a {
    let unit = &plan.units()[index];
    unit.owned_parts(rank).filter_map(move |(param, owned)| {
        let values = shard.get(owned.shard)?;
        Some(StatePart { kind, unit: index, param: &unit.params()[param], range: owned.param, values })
    })
}

/// Fills this rank's parameters, and the optimizer's state where one is given, from `read`, which is given a kind, a
/// parameter, a range of its flattened elements and the slice to write them to. Every element that this rank owns is
/// asked for exactly once, so a reader touches no other rank's bytes, whatever world size they were saved from. The
/// slices of units in host memory hold their present values, so that a reader may leave some; on a device it fills them.
///
/// Restore [`AdamW::set_counters`] beside it. Not collective.
///
/// # Errors
/// [`Error::Read`](crate::Error::Read) with the reader's error, after which parameters and state are partly old and
/// partly new; [`Error::ForeignOptimizer`](crate::Error::ForeignOptimizer) before anything is read.
pub fn load_state<Mem: Memory, E: Into<BoxError>>(
    units: &mut ShardedUnits<Mem>,
    mut optimizer: Option<&mut AdamW<Mem>>,
    mut read: impl FnMut(StateKind, &FlatParam, Range<usize>, &mut [f32]) -> Result<(), E>,
) -> Result<()> {
    if let Some(optimizer) = &optimizer {
        optimizer.check_plan(units)?;
    }
    units.params_changed();
    let (plan, memory, rank) = (units.plan().clone(), units.memory.clone(), units.rank());
    let mut states = optimizer.as_mut().map(|optimizer| optimizer.state_mut());
    for (unit, store) in plan.units().iter().zip(&mut units.stores) {
        let mut load = |kind, values: &mut Mem::Values| {
            memory.overwrite(values, |shard| {
                read_parts(unit, rank, kind, shard, &mut |param, range, out| read(kind, param, range, out))
            })
        };
        load(StateKind::Param, Mem::to_change(&mut store.param)?)?;
        if let Some((exp_avg, exp_avg_sq)) = states.as_mut().and_then(Iterator::next) {
            load(StateKind::ExpAvg, exp_avg)?;
            load(StateKind::ExpAvgSq, exp_avg_sq)?;
        }
    }
    Ok(())
}
