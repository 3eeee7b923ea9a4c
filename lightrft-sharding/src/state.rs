//! The seam to checkpoints: everything that must survive, as named parts of tensors, onto any number of ranks.

use std::fmt;
use std::ops::Range;

use crate::error::{BoxError, Result};
use crate::flat::FlatParam;
use crate::optim::AdamW;
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
    let mut parts = Vec::new();
    for (index, unit) in units.plan().units().iter().enumerate() {
        // Of ranks that hold the same, one saves.
        if !units.speaks_for(index).unwrap_or(false) {
            continue;
        }
        let mut add = |kind, shard: Option<&'a [f32]>| {
            let owned = unit.owned_parts(units.rank());
            parts.extend(owned.filter_map(|(param, owned)| {
                let values = shard?.get(owned.shard)?;
                Some(StatePart {
                    kind,
                    unit: index,
                    param: &unit.params()[param],
                    range: owned.param,
                    values,
                })
            }));
        };
        add(StateKind::Param, units.param(index).ok());
        add(StateKind::ExpAvg, optimizer.and_then(|optimizer| optimizer.exp_avg(index)));
        add(StateKind::ExpAvgSq, optimizer.and_then(|optimizer| optimizer.exp_avg_sq(index)));
    }
    parts
}

/// Fills this rank's parameters, and the optimizer's state where one is given, from `read`, which is given a kind, a
/// parameter, a range of its flattened elements and the slice to write them to. Every element that this rank owns is
/// asked for exactly once, so a reader touches no other rank's bytes, whatever world size they were saved from.
///
/// Restore [`AdamW::set_counters`] beside it. Not collective.
///
/// # Errors
/// [`Error::Read`](crate::Error::Read) with the reader's error, after which parameters and state are partly old and
/// partly new; [`Error::ForeignOptimizer`](crate::Error::ForeignOptimizer) before anything is read.
pub fn load_state<E: Into<BoxError>>(
    units: &mut ShardedUnits,
    mut optimizer: Option<&mut AdamW>,
    mut read: impl FnMut(StateKind, &FlatParam, Range<usize>, &mut [f32]) -> Result<(), E>,
) -> Result<()> {
    if let Some(optimizer) = &optimizer {
        optimizer.check_plan(units)?;
    }
    let plan = units.plan().clone();
    let rank = units.rank();
    let mut states = optimizer.as_mut().map(|optimizer| optimizer.state_mut());
    for (unit, shard) in plan.units().iter().zip(units.param_shards_mut()) {
        let mut load = |kind, shard: &mut [f32]| {
            read_parts(unit, rank, kind, shard, &mut |param, range, out| read(kind, param, range, out))
        };
        load(StateKind::Param, shard)?;
        if let Some((exp_avg, exp_avg_sq)) = states.as_mut().and_then(Iterator::next) {
            load(StateKind::ExpAvg, exp_avg)?;
            load(StateKind::ExpAvgSq, exp_avg_sq)?;
        }
    }
    Ok(())
}
