//! Do all ranks mean the same model, or the same tensor? Asked once, before anything is cut.

use lightrft_collectives::{Communicator, CommunicatorExt as _, Dtype};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::dtensor::Layout;
use crate::error::{Error, Result};
use crate::plan::{Plan, UnitSpec};
use crate::policy::Policy;

/// Returns an error, the same on every rank, unless all ranks of `comm` have equal plans and policies.
///
/// Sends eight bytes per rank; the full specifications follow only when those differ, which all ranks see alike.
pub(crate) fn on_plan(plan: &Plan, policy: &Policy, comm: &dyn Communicator) -> Result<()> {
    if comm.world_size() == 1 {
        return Ok(());
    }
    let failed = Error::collective("comparison", "the plans");
    let mut prints = vec![0u8; comm.world_size() * size_of::<u64>()];
    let policy = policy.lines();
    let mut print = Xxh3::with_seed(plan.fingerprint());
    policy.iter().for_each(|line| print.update(line.as_bytes()));
    comm.all_gather(&print.digest().to_le_bytes(), &mut prints).map_err(&failed)?;
    let mut prints = prints.chunks_exact(size_of::<u64>());
    let first = prints.next();
    if prints.all(|print| Some(print) == first) {
        return Ok(());
    }
    let all = comm.all_gather_object(&(policy, plan.specs())).map_err(&failed)?;
    let Some(((policy, units), others)) = all.split_first() else {
        return Ok(());
    };
    for (peer, (peer_policy, peer_units)) in others.iter().enumerate() {
        let difference = first_different(policy, peer_policy).or_else(|| first_difference(units, peer_units));
        if let Some((ours, theirs)) = difference {
            return Err(Error::PlanMismatch { rank: 0, ours, peer: peer + 1, theirs });
        }
    }
    Ok(())
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

/// What stands in the first place where two models differ, on either side.
fn first_difference(ours: &[UnitSpec], theirs: &[UnitSpec]) -> Option<(String, String)> {
    first_different(&lines(ours), &lines(theirs))
}

fn first_different(ours: &[String], theirs: &[String]) -> Option<(String, String)> {
    let length = ours.len().max(theirs.len());
    let line =
        |side: &[String], at: usize| side.get(at).cloned().unwrap_or_else(|| "nothing more".to_owned());
    (0..length).map(|at| (line(ours, at), line(theirs, at))).find(|(ours, theirs)| ours != theirs)
}

fn lines(units: &[UnitSpec]) -> Vec<String> {
    let mut lines = Vec::new();
    for unit in units {
        lines.push(format!("unit `{}`", unit.name));
        lines.extend(unit.params.iter().map(|param| format!("`{}` of shape {:?}", param.name, param.shape)));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::ParamSpec;

    #[test]
    fn the_first_difference_names_both_sides() {
        let model = |dim| vec![UnitSpec::new("u", [ParamSpec::new("a", [1]), ParamSpec::new("b", [dim, 2])])];
        assert_eq!(first_difference(&model(3), &model(3)), None);
        let (ours, theirs) = first_difference(&model(3), &model(4)).unwrap();
        assert!(
            ours.contains("b") && ours.contains("[3, 2]") && theirs.contains("[4, 2]"),
            "{ours} / {theirs}"
        );
        let (_, theirs) = first_difference(&model(3), &[]).unwrap();
        assert_eq!(theirs, "nothing more");
    }
}
