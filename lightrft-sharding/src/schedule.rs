//! In which order units are gathered, used, freed and reduced: pure data, made once from the stages.

use crate::compute::StageSpec;
use crate::error::{Error, Result};

/// How long a gathered unit stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hold {
    /// From its first use by stages in a row to the last of them; from the last stage of forward on into backward, which
    /// begins with it.
    Use,
    /// From its first use in forward to its last in backward.
    Pass,
    /// Until the parameters change: it is freed by that, not by the schedule.
    Step,
}

/// One thing to do. Numbers are indices of units and stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// Begin to make a unit whole, ahead of its use.
    Start(usize),
    /// Have a unit whole, and bind it.
    Gather(usize),
    /// Run a stage (in a forward or in a backward schedule).
    Run(usize),
    /// Unbind a unit.
    Free(usize),
    /// Sum a unit's gradient over the ranks: no later stage adds to it.
    Reduce(usize),
}

/// What the schedule has to know of a unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UnitPlan {
    pub(crate) name: String,
    pub(crate) hold: Hold,
    /// Stages that its gather runs ahead of its use; 0 where it asks nothing of other ranks.
    pub(crate) ahead: usize,
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
    pub(crate) fn new(stages: &[StageSpec], units: &[UnitPlan]) -> Result<Self> {
        check(stages, units)?;
        let hold: Vec<Hold> = units.iter().map(|unit| unit.hold).collect();
        let evaluate = pass(stages, &hold, Direction::Alone);
        let backward = pass(stages, &hold, Direction::Backward);
        let forward = pass(stages, &hold, Direction::Forward);
        let ahead = |ops| start_ahead(ops, units);
        Ok(Self { forward: ahead(forward), backward: ahead(backward), evaluate: ahead(evaluate) })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    /// A forward that a backward follows.
    Forward,
    Backward,
    /// A forward that none follows.
    Alone,
}

/// One pass. A unit is gathered before a stage that needs it, and freed after one that is not followed by another
/// that does; one that is held for the pass stays from its first use in forward to its last in backward. Its
/// gradient is reduced after the last stage that uses it.
fn pass(stages: &[StageSpec], hold: &[Hold], direction: Direction) -> Vec<Op> {
    let order: Vec<&StageSpec> = match direction {
        Direction::Forward | Direction::Alone => stages.iter().collect(),
        Direction::Backward => stages.iter().rev().collect(),
    };
    let index = |at: usize| match direction {
        Direction::Forward | Direction::Alone => at,
        Direction::Backward => stages.len() - 1 - at,
    };
    let backward = direction == Direction::Backward;
    let in_last = |unit: &usize| stages.last().is_some_and(|last| last.units.contains(unit));
    let held = |(unit, hold): (usize, &Hold)| *hold != Hold::Use || in_last(&unit);
    let mut live: Vec<bool> = hold.iter().enumerate().map(|unit| backward && held(unit)).collect();
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
            let stays = match (hold[unit], direction) {
                (Hold::Use, Direction::Forward) if next.is_none() => true,
                (Hold::Use, _) | (Hold::Pass, Direction::Alone) => {
                    next.is_some_and(|next| next.units.contains(&unit))
                }
                (Hold::Pass, Direction::Backward) => used_later(unit),
                (Hold::Pass, Direction::Forward) | (Hold::Step, _) => true,
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

/// Lets gathers begin as many stages before their use as their units ask for: just before that stage runs, but not before
/// the unit's last use is over. At that point the earlier stage's own units are there, so that with one stage ahead two
/// stages' units are in memory at a time.
fn start_ahead(ops: Vec<Op>, units: &[UnitPlan]) -> Vec<Op> {
    // The places of the runs so far, and the last place where each unit was freed.
    let (mut runs, mut freed) = (Vec::new(), vec![0; units.len()]);
    let mut starts: Vec<(usize, usize)> = Vec::new();
    for (at, op) in ops.iter().enumerate() {
        match *op {
            Op::Run(_) => runs.push(at),
            Op::Free(unit) => freed[unit] = at + 1,
            Op::Gather(unit) if units[unit].ahead > 0 => {
                // The first stage's own gathers come first; nothing is computed beside them.
                let earlier = runs.len().saturating_sub(units[unit].ahead);
                if let Some(&run) = runs.get(earlier) {
                    starts.push((run.max(freed[unit]), unit));
                }
            }
            _ => {}
        }
    }
    // Among those of one place the order of use stays.
    starts.sort_by_key(|(place, _)| *place);
    let mut starts = starts.into_iter().peekable();
    let mut result = Vec::with_capacity(ops.len() + starts.len());
    for (at, op) in ops.into_iter().enumerate() {
        while let Some((_, unit)) = starts.next_if(|(place, _)| *place == at) {
            result.push(Op::Start(unit));
        }
        result.push(op);
    }
    result
}

fn check(stages: &[StageSpec], units: &[UnitPlan]) -> Result<()> {
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
        Some(unit) => invalid("", format!("no stage uses unit `{}`", units[unit].name)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::Op::{Free, Gather, Reduce, Run, Start};
    use super::*;

    /// Embedding (unit 0), a layer (unit 1), a head (unit 2) that is tied to the embedding.
    fn tied(hold: Hold, ahead: usize) -> (Vec<StageSpec>, Vec<UnitPlan>) {
        let stages =
            vec![StageSpec::new("in", [0]), StageSpec::new("layer", [1]), StageSpec::new("out", [0, 2])];
        (stages, units(&["e", "l", "h"], hold, ahead))
    }

    fn units(names: &[&str], hold: Hold, ahead: usize) -> Vec<UnitPlan> {
        names.iter().map(|name| UnitPlan { name: (*name).to_owned(), hold, ahead }).collect()
    }

    #[test]
    fn a_tied_unit_is_gathered_for_each_use_and_reduced_after_its_last() {
        let (stages, units) = tied(Hold::Use, 0);
        let schedule = Schedule::new(&stages, &units).unwrap();
        #[rustfmt::skip]
        let evaluate = [
            Gather(0), Run(0), Free(0), Gather(1), Run(1), Free(1), Gather(0), Gather(2), Run(2),
            Free(0), Free(2),
        ];
        assert_eq!(schedule.evaluate, evaluate);
        // Backward begins with what forward ends with.
        assert_eq!(schedule.forward, evaluate[..9]);
        #[rustfmt::skip]
        assert_eq!(schedule.backward, [
            Run(2), Free(0), Free(2), Reduce(2),
            Gather(1), Run(1), Free(1), Reduce(1),
            Gather(0), Run(0), Free(0), Reduce(0),
        ]);
    }

    #[test]
    fn units_that_are_never_resharded_are_gathered_once() {
        let (stages, units) = tied(Hold::Pass, 0);
        let schedule = Schedule::new(&stages, &units).unwrap();
        assert_eq!(schedule.forward, [Gather(0), Run(0), Gather(1), Run(1), Gather(2), Run(2)]);
        let backward = [Run(2), Free(2), Reduce(2), Run(1), Free(1), Reduce(1), Run(0), Free(0), Reduce(0)];
        assert_eq!(schedule.backward, backward);
        assert_eq!(schedule.evaluate.last(), Some(&Free(2)));
    }

    #[test]
    fn a_unit_that_two_neighbours_share_is_not_gathered_twice() {
        let stages = [StageSpec::new("a", [0]), StageSpec::new("b", [0])];
        let schedule = Schedule::new(&stages, &units(&["u"], Hold::Use, 0)).unwrap();
        assert_eq!(schedule.forward, [Gather(0), Run(0), Run(1)]);
        assert_eq!(schedule.evaluate, [Gather(0), Run(0), Run(1), Free(0)]);
        assert_eq!(schedule.backward, [Run(1), Run(0), Free(0), Reduce(0)]);
    }

    #[test]
    fn units_of_a_step_are_gathered_where_they_may_be_missing_and_freed_by_no_pass() {
        let (stages, units) = tied(Hold::Step, 0);
        let schedule = Schedule::new(&stages, &units).unwrap();
        let forward = [Gather(0), Run(0), Gather(1), Run(1), Gather(2), Run(2)];
        assert_eq!(schedule.forward, forward);
        assert_eq!(schedule.evaluate, forward);
        assert_eq!(schedule.backward, [Run(2), Reduce(2), Run(1), Reduce(1), Run(0), Reduce(0)]);
    }

    #[test]
    fn a_gather_begins_one_stage_ahead_but_after_the_units_last_use() {
        let (stages, units) = tied(Hold::Use, 1);
        let schedule = Schedule::new(&stages, &units).unwrap();
        #[rustfmt::skip]
        assert_eq!(schedule.forward, [
            Gather(0), Start(1), Run(0), Free(0),
            Gather(1), Start(0), Start(2), Run(1), Free(1),
            Gather(0), Gather(2), Run(2),
        ]);
        #[rustfmt::skip]
        assert_eq!(schedule.backward, [
            Start(1), Run(2), Free(0), Free(2), Reduce(2),
            Gather(1), Start(0), Run(1), Free(1), Reduce(1),
            Gather(0), Run(0), Free(0), Reduce(0),
        ]);
        // Two stages ahead of its second use, the embedding is still in its first.
        let (stages, units) = tied(Hold::Use, 2);
        let schedule = Schedule::new(&stages, &units).unwrap();
        let start = [Gather(0), Start(1), Start(2), Run(0), Free(0), Start(0), Gather(1)];
        assert_eq!(schedule.forward[..7], start);
    }

    #[test]
    fn stages_that_cannot_run_are_refused_by_name() {
        let units = units(&["u", "v"], Hold::Use, 0);
        let refused = |stages: &[StageSpec]| Schedule::new(stages, &units).unwrap_err().to_string();
        assert!(refused(&[StageSpec::new("far", [0, 1, 2])]).contains("far"));
        assert!(refused(&[StageSpec::new("twice", [0, 0, 1])]).contains("twice"));
        assert!(refused(&[StageSpec::new("idle", [0])]).contains('v'));
        refused(&[]);
    }
}
