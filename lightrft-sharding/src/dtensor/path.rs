//! From one layout to another, an axis at a time: pure, and the same on every rank.

use lightrft_collectives::ReduceOp;

use super::layout::Layout;
use super::placement::Placement;
use crate::error::{Error, Result};

/// One axis takes another placement. It shards last, or did, so that parts are boxes all the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) axis: usize,
    pub(super) to: Layout,
}

/// The steps from `from` to `to`, both over one mesh, cheapest first: what is cut locally before anything is sent makes
/// that smaller, and a sum that is scattered leaves less for the next one (so `[Partial, Partial]` to
/// `[Replicate, Shard]` is a reduce-scatter and then an all-reduce of the shard). None when nothing changes. Axes of one
/// rank take no step.
///
/// # Errors
/// [`Error::Redistribute`] where an axis cannot take the placement.
pub(super) fn steps(from: &Layout, to: &Layout) -> Result<Vec<Step>> {
    if from.mesh() != to.mesh() {
        let mesh = |layout: &Layout| {
            let mesh = layout.mesh();
            format!("{:?} x {:?} of ranks {:?}", mesh.axes(), mesh.sizes(), mesh.ranks())
        };
        return Err(Error::ForeignMesh { from: mesh(from), to: mesh(to) });
    }
    for axis in large_axes(from) {
        legal(from, to, axis)?;
    }
    let mut steps: Vec<Step> = Vec::new();
    let mut at = from.clone();
    // An axis takes its placement at once, or is replicated before: two steps at most. The limit is for a mistake here,
    // which must not become a rank that never answers.
    for _ in 0..=2 * from.placements().len() {
        let Some((axis, placement)) = next(&at, to) else { return Ok(steps) };
        at = at.moved(axis, placement);
        steps.push(Step { axis, to: at.clone() });
    }
    let expected = format!("a layout that {from} leads to");
    Err(Error::InvalidLayout { what: to.to_string(), expected })
}

fn large_axes(layout: &Layout) -> impl Iterator<Item = usize> + '_ {
    (0..layout.placements().len()).filter(|&axis| layout.ranks(axis) > 1)
}

fn legal(from: &Layout, to: &Layout, axis: usize) -> Result<()> {
    let (before, after) = (&from.placements()[axis], &to.placements()[axis]);
    let why = match (before, after) {
        (Placement::Partial(a), Placement::Partial(b)) if a == b => return Ok(()),
        (Placement::Partial(_), Placement::Partial(_)) => {
            "contributions to one operation are none to another"
        }
        (_, Placement::Partial(ReduceOp::Product)) => "a product has no contributions to be made of it",
        (Placement::Shard { .. } | Placement::Ragged(_), Placement::Partial(op)) if *op != ReduceOp::Sum => {
            "replicate it first: only a sum can have contributions that are parts"
        }
        _ => return Ok(()),
    };
    Err(Error::Redistribute {
        axis: from.mesh().axes()[axis].clone(),
        from: before.clone(),
        to: after.clone(),
        why,
    })
}

/// The next axis to move and what it becomes; `None` when all are as they shall be.
fn next(at: &Layout, to: &Layout) -> Option<(usize, Placement)> {
    use Placement::{Partial, Ragged, Replicate, Shard};

    let open: Vec<usize> = large_axes(at).filter(|&axis| !settled(at, to, axis)).collect();
    let now = |axis: usize| &at.placements()[axis];
    let goal = |axis: usize| &to.placements()[axis];
    let is_cut = |axis: usize| matches!(now(axis), Shard { .. } | Ragged(_));
    // Whether an axis could be cut as it shall be, now.
    let fits = |axis: usize| fits(at, to, axis);
    // Whether it could give up its part now: nothing was cut within it.
    let innermost = |axis: usize| match now(axis) {
        Shard { dim } => at.cuts_of(*dim).last() == Some(&axis),
        _ => true,
    };
    let find = |wanted: &dyn Fn(usize) -> bool| open.iter().copied().find(|&axis| wanted(axis));
    let becomes_its_goal = |axis: usize| (axis, goal(axis).clone());

    // A local cut.
    find(&|axis| *now(axis) == Replicate && fits(axis))
        // A reduce-scatter.
        .or_else(|| find(&|axis| matches!(now(axis), Partial(_)) && fits(axis)))
        // An all-to-all.
        .or_else(|| find(&|axis| is_cut(axis) && innermost(axis) && fits(axis)))
        // An all-reduce.
        .or_else(|| find(&|axis| matches!(now(axis), Partial(_)) && *goal(axis) == Replicate))
        // An all-gather, innermost first.
        .or_else(|| find(&|axis| is_cut(axis) && innermost(axis) && *goal(axis) == Replicate))
        .map(becomes_its_goal)
        // An all-gather that lets another axis be cut before this one.
        .or_else(|| {
            find(&|axis| is_cut(axis) && innermost(axis) && matches!(goal(axis), Shard { .. } | Ragged(_)))
                .map(|axis| (axis, Replicate))
        })
        // Contributions, last: they are as large as what they are made from, or larger.
        .or_else(|| find(&|axis| matches!(goal(axis), Partial(_)) && innermost(axis)).map(becomes_its_goal))
        // A sum that is to be cut where another axis stands in the way, which is partial too.
        .or_else(|| find(&|axis| matches!(now(axis), Partial(_))).map(|axis| (axis, Replicate)))
}

/// Whether an axis has its final placement, with nothing still to change outside it.
fn settled(at: &Layout, to: &Layout, axis: usize) -> bool {
    if at.placements()[axis] != to.placements()[axis] {
        return false;
    }
    let Some(dim) = at.dim(axis) else { return true };
    let (now, goal) = (at.cuts_of(dim), to.cuts_of(dim));
    let outside = |order: &[usize]| order.iter().position(|&other| other == axis);
    let (Some(i), Some(j)) = (outside(&now), outside(&goal)) else { return false };
    now[..i] == goal[..j]
}

/// Whether an axis that shall be cut can be now: what cuts outside it does so already, and nothing is there that cannot
/// stand beside it.
fn fits(at: &Layout, to: &Layout, axis: usize) -> bool {
    let others = || large_axes(at).filter(|&other| other != axis);
    match &to.placements()[axis] {
        Placement::Ragged(_) => others().all(|other| at.dim(other).is_none() && !at.is_ragged(other)),
        Placement::Shard { dim } => {
            let mut now = at.cuts_of(*dim);
            now.retain(|&other| other != axis);
            let goal = to.cuts_of(*dim);
            let place = goal.iter().position(|&other| other == axis);
            // In another place of the same dim, it has to let go of it first.
            at.dim(axis) != Some(*dim)
                && place.is_some_and(|place| now == goal[..place])
                && others().all(|other| !at.is_ragged(other))
        }
        Placement::Replicate | Placement::Partial(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use lightrft_collectives::{DeviceMesh, Dtype};
    use proptest::prelude::*;

    use super::*;
    use crate::dtensor::{Cuts, DTensorSpec};

    const SHAPE: [usize; 2] = [7, 5];

    /// Any layout of a 7 x 5 tensor on three axes: two kinds of cut in any order, sums, ragged parts.
    fn layout(picks: [usize; 3], order: usize, sizes: [usize; 3]) -> Option<Layout> {
        let axes = [("x", sizes[0]), ("y", sizes[1]), ("z", sizes[2])];
        let mesh = Arc::new(DeviceMesh::new(&axes).unwrap());
        let placement = |(pick, ranks): (usize, usize)| match pick {
            0 => Placement::Replicate,
            1 => Placement::Partial(ReduceOp::Sum),
            2 | 3 => Placement::Ragged(Cuts::sorted((0..ranks).map(|i| i * pick).chain([35]))),
            pick => Placement::Shard { dim: pick % 2 },
        };
        let placements: Vec<Placement> = picks.into_iter().zip(sizes).map(placement).collect();
        let mut layout = Layout::new(mesh, placements).ok()?;
        for dim in 0..2 {
            let mut cutting = layout.order(dim);
            if !cutting.is_empty() {
                let turn = order % cutting.len();
                cutting.rotate_left(turn);
            }
            let names: Vec<&str> = cutting.iter().map(|&axis| axes[axis].0).collect();
            layout = layout.with_order(dim, &names).unwrap();
        }
        Some(layout)
    }

    proptest! {
        #![proptest_config(ProptestConfig { max_global_rejects: 100_000, ..ProptestConfig::with_cases(2000) })]

        #[test]
        fn every_way_ends_at_its_goal_by_layouts_that_can_be(
            from in prop::array::uniform3(0usize..8), to in prop::array::uniform3(0usize..8),
            orders in prop::array::uniform2(0usize..6), sizes in prop::array::uniform3(1usize..4),
        ) {
            let (from, to) = (layout(from, orders[0], sizes), layout(to, orders[1], sizes));
            let (Some(from), Some(to)) = (from, to) else { return Err(TestCaseError::reject("no layout")) };
            let steps = steps(&from, &to).unwrap();
            prop_assert!(steps.len() <= 2 * 3, "{} to {}: {:?}", from, to, steps);
            prop_assert_eq!(steps.is_empty(), large_axes(&from).all(|axis| settled(&from, &to, axis)));
            let mut before = from.clone();
            for Step { axis, to } in &steps {
                prop_assert!(Layout::new(Arc::clone(to.mesh()), to.placements()).is_ok());
                // What the axis cut, nothing was cut within; what others cut, they cut as before.
                if let Some(dim) = before.dim(*axis) {
                    prop_assert_eq!(before.cuts_of(dim).last().copied(), Some(*axis));
                }
                for dim in 0..2 {
                    let others = |layout: &Layout| {
                        let mut cuts = layout.cuts_of(dim);
                        cuts.retain(|other| other != axis);
                        cuts
                    };
                    prop_assert_eq!(others(&before), others(to));
                }
                before = to.clone();
            }
            let boxes = |layout: &Layout| {
                let spec = DTensorSpec::new(layout.clone(), SHAPE, Dtype::F32).unwrap();
                (0..layout.mesh().ranks().len()).map(|rank| spec.boxes(rank)).collect::<Vec<_>>()
            };
            prop_assert_eq!(boxes(&before), boxes(&to));
        }
    }
}
