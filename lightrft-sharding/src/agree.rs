//! Do all ranks mean the same model, or the same tensor? Asked once, before anything is cut.

use lightrft_collectives::{Communicator, CommunicatorExt as _, Dtype};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::compute::StageSpec;
use crate::dtensor::Layout;
use crate::error::{Error, Result};
use crate::plan::Plan;

/// What this rank has prepared, unless another rank of `comm` has prepared something else, or could not: then an error on
/// every rank. A rank that could not prepare it gets its own error, and leaves nobody waiting.
///
/// `lines` tells all that the order and the sizes of later calls depend on. Sends eight bytes per rank; the lines follow
/// only when those differ, which all ranks see alike.
pub(crate) fn on_model<T>(
    prepared: Result<T>,
    lines: impl FnOnce(&T) -> Vec<String>,
    comm: &dyn Communicator,
) -> Result<T> {
    if comm.world_size() == 1 {
        return prepared;
    }
    let lines = match &prepared {
        Ok(made) => lines(made),
        Err(error) => vec![format!("refused: {error}")],
    };
    let failed = Error::collective("comparison", "the plans");
    let mut prints = vec![0u8; comm.world_size() * size_of::<u64>()];
    let mut print = Xxh3::new();
    for line in &lines {
        print.update(line.as_bytes());
        print.update(b"\n");
    }
    comm.all_gather(&print.digest().to_le_bytes(), &mut prints).map_err(&failed)?;
    let mut prints = prints.chunks_exact(size_of::<u64>());
    let first = prints.next();
    if prints.all(|print| Some(print) == first) {
        return prepared;
    }
    let all = comm.all_gather_object(&lines).map_err(&failed)?;
    let prepared = prepared?;
    let Some((ours, others)) = all.split_first() else { return Ok(prepared) };
    for (peer, theirs) in others.iter().enumerate() {
        if let Some((ours, theirs)) = first_different(ours, theirs) {
            return Err(Error::PlanMismatch { rank: 0, ours, peer: peer + 1, theirs });
        }
    }
    Ok(prepared)
}

/// How everything lies, and what learns, for the comparison.
pub(crate) fn plan_lines(plan: &Plan) -> Vec<String> {
    let mut lines = vec![format!("{} ranks, alignment {}", plan.world_size(), plan.alignment())];
    for unit in plan.units() {
        let whole = if unit.is_whole() { ", not cut" } else { "" };
        lines.push(format!("unit `{}`{whole}", unit.name()));
        lines.extend(unit.params().iter().map(|param| {
            let frozen = if param.is_trainable() { "" } else { ", frozen" };
            format!("`{}` of shape {:?}{frozen}", param.name(), param.shape())
        }));
    }
    lines
}

/// The stages in their order, for the comparison: they decide the order of gathers.
pub(crate) fn stage_lines(stages: &[StageSpec]) -> impl Iterator<Item = String> + '_ {
    stages.iter().map(|stage| format!("stage `{}` of units {:?}", stage.name, stage.units))
}

/// Returns an error, the same on every rank, unless all ranks of `comm` mean the same tensor and each brings as many
/// elements as it shall (`got`, `expected`). The layout need not be one that the shape can have: a rank whose shape is
/// wrong must not leave the others waiting.
pub(crate) fn on_tensor(
    (dtype, shape, layout): (Dtype, &[usize], &Layout),
    (got, expected): (usize, usize),
    comm: &dyn Communicator,
) -> Result<()> {
    let tensor = format!("{dtype:?} {shape:?} as {layout}");
    if comm.world_size() == 1 {
        return if got == expected {
            Ok(())
        } else {
            Err(Error::LocalLength { rank: 0, tensor, got, expected })
        };
    }
    // The text shows the first of many cut points; a number stands for all of them.
    let print = xxh3_64(format!("{:?}", layout.placements()).as_bytes());
    let claim = (tensor, print, got, expected);
    let claims =
        comm.all_gather_object(&claim).map_err(Error::collective("comparison", "a distributed tensor"))?;
    let Some((ours, ours_print, ..)) = claims.first() else { return Ok(()) };
    for (peer, (theirs, print, ..)) in claims.iter().enumerate() {
        if ours != theirs || ours_print != print {
            let other_cuts = if ours == theirs { " with other cut points" } else { "" };
            let (ours, theirs) = (ours.clone(), format!("{theirs}{other_cuts}"));
            return Err(Error::TensorMismatch { rank: 0, ours, peer, theirs });
        }
    }
    for (rank, (tensor, _, got, expected)) in claims.into_iter().enumerate() {
        if got != expected {
            return Err(Error::LocalLength { rank, tensor, got, expected });
        }
    }
    Ok(())
}

/// What stands in the first place where two lists differ, on either side.
fn first_different(ours: &[String], theirs: &[String]) -> Option<(String, String)> {
    let length = ours.len().max(theirs.len());
    let line =
        |side: &[String], at: usize| side.get(at).cloned().unwrap_or_else(|| "nothing more".to_owned());
    (0..length).map(|at| (line(ours, at), line(theirs, at))).find(|(ours, theirs)| ours != theirs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{ParamSpec, UnitSpec};
    use crate::policy::Policy;

    fn plan(dim: usize, threshold: usize) -> Vec<String> {
        let unit = UnitSpec::new("u", [ParamSpec::new("a", [1]), ParamSpec::new("b", [dim, 2])]);
        let policy = Policy { persistence_threshold: threshold, ..Policy::default() };
        plan_lines(&Plan::with_policy(vec![unit], 2, &policy).unwrap())
    }

    #[test]
    fn the_first_difference_names_both_sides() {
        assert_eq!(first_different(&plan(3, 0), &plan(3, 0)), None);
        let (ours, theirs) = first_different(&plan(3, 0), &plan(4, 0)).unwrap();
        assert!(
            ours.contains("b") && ours.contains("[3, 2]") && theirs.contains("[4, 2]"),
            "{ours} / {theirs}"
        );
        let (_, theirs) = first_different(&plan(3, 0), &[]).unwrap();
        assert_eq!(theirs, "nothing more");
        let (ours, theirs) = first_different(&plan(3, 0), &plan(3, 100)).unwrap();
        assert!(!ours.contains("not cut") && theirs.contains("not cut"), "{ours} / {theirs}");
    }

    /// What each of two ranks gets for what it prepared.
    fn agreed(prepared: fn(usize) -> Result<Vec<String>>) -> Vec<Result<Vec<String>>> {
        let world = lightrft_collectives::local::World::new(2);
        world.launch(|comm| Ok::<_, Error>(on_model(prepared(comm.rank()), Vec::clone, &*comm))).unwrap()
    }

    #[test]
    fn a_rank_that_could_not_prepare_leaves_nobody_waiting() {
        let refusal = || Error::InvalidPlan { world: 2, alignment: 0 };
        let results = agreed(|rank| {
            if rank == 1 { Err(Error::InvalidPlan { world: 2, alignment: 0 }) } else { Ok(vec!["a".into()]) }
        });
        assert!(
            matches!(&results[0], Err(Error::PlanMismatch { theirs, .. }) if theirs.contains("refused")),
            "{results:?}"
        );
        assert_eq!(results[1].as_ref().unwrap_err().to_string(), refusal().to_string());
        let results = agreed(|_| Err(Error::InvalidPlan { world: 2, alignment: 0 }));
        assert!(results.iter().all(|result| matches!(result, Err(Error::InvalidPlan { .. }))), "{results:?}");
    }

    #[test]
    fn stages_in_another_order_are_a_difference() {
        let stages =
            |order: [usize; 2]| order.map(|unit| StageSpec { name: "layer".into(), units: vec![unit] });
        let (ours, theirs): (Vec<_>, Vec<_>) =
            (stage_lines(&stages([0, 1])).collect(), stage_lines(&stages([1, 0])).collect());
        assert!(first_different(&ours, &theirs).is_some());
    }
}
