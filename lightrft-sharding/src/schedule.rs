//! In which order units are gathered, used, freed and reduced: pure data, made once from the stages.

use crate::compute::StageSpec;
use crate::error::{Error, Result};

/// When a gathered unit is freed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReshardAfterForward {
    /// After the forward stages that use it, and gathered again for backward: two all-gathers a pass, and no more
    /// memory than the units of one stage. (ZeRO-3; FSDP2's `reshard_after_forward=True`.)
    #[default]
    Always,
    /// After backward: one all-gather a pass, and every unit whole between the passes.
    Never,
}

/// One thing to do. Numbers are indices of units and stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// Make a unit whole and bind it.
    Gather(usize),
    /// Run a stage (in a forward or in a backward schedule).
    Run(usize),
    /// Unbind a unit.
    Free(usize),
    /// Sum a unit's gradient over the ranks: no later stage adds to it.
    Reduce(usize),
}

/// What is done in each kind of pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Schedule {
    /// Forward of a pass that will be followed by backward.
    pub(crate) forward: Vec<Op>,
    /// Backward of such a pass.
    pub(crate) backward: Vec<Op>,
    /// Forward alone; nothing is left gathered.
    pub(crate) evaluate: Vec<Op>,
}

impl Schedule {
    /// # Errors
    /// [`Error::InvalidStage`] when there is no stage, when a stage names a unit that does not exist or names one
    /// twice, or when no stage uses some unit (its parameters would never learn).
    pub(crate) fn new(stages: &[StageSpec], units: &[String], reshard: ReshardAfterForward) -> Result<Self> {
        check(stages, units)?;
        let evaluate = pass(stages, units.len(), Direction::Forward, ReshardAfterForward::Always);
        let backward = pass(stages, units.len(), Direction::Backward, reshard);
        let forward = pass(stages, units.len(), Direction::Forward, reshard);
        Ok(Self { forward, backward, evaluate })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Forward,
    Backward,
}

/// One pass. A unit is gathered before a stage that needs it, and freed after one that is not followed by another
/// that does; a unit that is never resharded stays from its first use in forward to its last in backward. Its
/// gradient is reduced after the last stage that uses it.
fn pass(stages: &[StageSpec], units: usize, direction: Direction, reshard: ReshardAfterForward) -> Vec<Op> {
    let held = reshard == ReshardAfterForward::Never;
    let order: Vec<&StageSpec> = match direction {
        Direction::Forward => stages.iter().collect(),
        Direction::Backward => stages.iter().rev().collect(),
    };
    let index = |at: usize| match direction {
        Direction::Forward => at,
        Direction::Backward => stages.len() - 1 - at,
    };
    let mut live = vec![held && direction == Direction::Backward; units];
    let mut ops = Vec::new();
    for (at, stage) in order.iter().enumerate() {
        let (next, later) = (order.get(at + 1), &order[at + 1..]);
        for &unit in &stage.units {
            if !std::mem::replace(&mut live[unit], true) {
                ops.push(Op::Gather(unit));
            }
        }
        ops.push(Op::Run(index(at)));
        let used_later = |unit: usize| later.iter().any(|stage| stage.units.contains(&unit));
        for &unit in &stage.units {
            let stays = match (held, direction) {
                (false, _) => next.is_some_and(|next| next.units.contains(&unit)),
                (true, Direction::Forward) => true,
                (true, Direction::Backward) => used_later(unit),
            };
            if !stays {
                live[unit] = false;
                ops.push(Op::Free(unit));
            }
        }
        if direction == Direction::Backward {
            ops.extend(stage.units.iter().filter(|&&unit| !used_later(unit)).map(|&unit| Op::Reduce(unit)));
        }
    }
    ops
}

fn check(stages: &[StageSpec], units: &[String]) -> Result<()> {
    let invalid = |stage: &str, what: String| Err(Error::InvalidStage { stage: stage.to_owned(), what });
    if stages.is_empty() {
        return invalid("", "a model needs at least one stage".to_owned());
    }
    let mut used = vec![false; units.len()];
    for stage in stages {
        for (at, &unit) in stage.units.iter().enumerate() {
            if stage.units[..at].contains(&unit) {
                return invalid(&stage.name, format!("unit #{unit} is named twice"));
            }
            match used.get_mut(unit) {
                Some(used) => *used = true,
                None => {
                    return invalid(
                        &stage.name,
                        format!("unit #{unit} does not exist: there are {}", units.len()),
                    );
                }
            }
        }
    }
    match used.iter().position(|used| !used) {
        Some(unit) => invalid("", format!("no stage uses unit `{}`", units[unit])),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::Op::{Free, Gather, Reduce, Run};
    use super::*;

    /// Embedding (unit 0), a layer (unit 1), a head (unit 2) that is tied to the embedding.
    fn tied() -> (Vec<StageSpec>, Vec<String>) {
        let stages =
            vec![StageSpec::new("in", [0]), StageSpec::new("layer", [1]), StageSpec::new("out", [0, 2])];
        (stages, ["e", "l", "h"].map(str::to_owned).to_vec())
    }

    #[test]
    fn a_tied_unit_is_gathered_for_each_use_and_reduced_after_its_last() {
        let (stages, units) = tied();
        let schedule = Schedule::new(&stages, &units, ReshardAfterForward::Always).unwrap();
        let forward = [
            Gather(0),
            Run(0),
            Free(0),
            Gather(1),
            Run(1),
            Free(1),
            Gather(0),
            Gather(2),
            Run(2),
            Free(0),
            Free(2),
        ];
        assert_eq!(schedule.forward, forward);
        assert_eq!(schedule.evaluate, forward);
        #[rustfmt::skip]
        assert_eq!(schedule.backward, [
            Gather(0), Gather(2), Run(2), Free(0), Free(2), Reduce(2),
            Gather(1), Run(1), Free(1), Reduce(1),
            Gather(0), Run(0), Free(0), Reduce(0),
        ]);
    }

    #[test]
    fn units_that_are_never_resharded_are_gathered_once() {
        let (stages, units) = tied();
        let schedule = Schedule::new(&stages, &units, ReshardAfterForward::Never).unwrap();
        assert_eq!(schedule.forward, [Gather(0), Run(0), Gather(1), Run(1), Gather(2), Run(2)]);
        let backward = [Run(2), Free(2), Reduce(2), Run(1), Free(1), Reduce(1), Run(0), Free(0), Reduce(0)];
        assert_eq!(schedule.backward, backward);
        assert_eq!(schedule.evaluate.last(), Some(&Free(2)));
    }

    #[test]
    fn a_unit_that_two_neighbours_share_is_not_gathered_twice() {
        let stages = [StageSpec::new("a", [0]), StageSpec::new("b", [0])];
        let schedule = Schedule::new(&stages, &["u".to_owned()], ReshardAfterForward::Always).unwrap();
        assert_eq!(schedule.forward, [Gather(0), Run(0), Run(1), Free(0)]);
        assert_eq!(schedule.backward, [Gather(0), Run(1), Run(0), Free(0), Reduce(0)]);
    }

    #[test]
    fn stages_that_cannot_run_are_refused_by_name() {
        let units = ["u".to_owned(), "v".to_owned()];
        let refused = |stages: &[StageSpec]| {
            Schedule::new(stages, &units, ReshardAfterForward::Always).unwrap_err().to_string()
        };
        assert!(refused(&[StageSpec::new("far", [0, 1, 2])]).contains("far"));
        assert!(refused(&[StageSpec::new("twice", [0, 0, 1])]).contains("twice"));
        assert!(refused(&[StageSpec::new("idle", [0])]).contains('v'));
        refused(&[]);
    }
}
