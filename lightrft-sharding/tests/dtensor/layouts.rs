//! Laws of layouts: what ranks hold, without any communication.

use std::sync::Arc;

use lightrft_collectives::{DeviceMesh, Dtype, ReduceOp};
use lightrft_sharding::{DTensorSpec, Layout, Placement, Placement::Shard, Region};
use proptest::prelude::*;

use crate::support::{Picks, box_elements, elements, layout, mesh, meshes, ranges, shapes};

fn spec(layout: &Layout, shape: &[usize]) -> DTensorSpec {
    DTensorSpec::new(layout.clone(), shape, Dtype::F32).unwrap()
}

/// The elements of a rank's boxes, one box after another.
fn of_boxes(spec: &DTensorSpec, rank: usize) -> Vec<usize> {
    let boxes = spec.boxes(rank).unwrap();
    boxes.iter().flat_map(|region| box_elements(&ranges(region), spec.shape())).collect()
}

proptest! {
    #[test]
    fn chunks_do_not_grow_and_empty_ones_come_last(n in 0usize..200, ranks in 1usize..20) {
        let layout = Layout::new(mesh(&[ranks]), [Shard { dim: 0 }]).unwrap();
        let sizes: Vec<usize> = (0..ranks).map(|rank| layout.region(&[n], rank).unwrap().sizes[0]).collect();
        prop_assert_eq!(sizes.iter().sum::<usize>(), n);
        prop_assert!(sizes.windows(2).all(|pair| pair[0] >= pair[1]), "{:?}", sizes);
        let full = n.div_ceil(ranks);
        prop_assert!(sizes.iter().filter(|&&size| size != full && size != 0).count() <= 1, "{:?}", sizes);
    }

    #[test]
    fn a_rank_holds_what_really_splitting_leaves_it(
        sizes in meshes(), shape in shapes(), picks: Picks,
    ) {
        let mesh = mesh(&sizes);
        let layout = layout(&mesh, &shape, picks);
        let spec = spec(&layout, &shape);
        for rank in 0..mesh.ranks().len() {
            let mine = elements(&layout, &shape, rank);
            prop_assert_eq!(spec.local_elems(rank), Some(mine.len()));
            prop_assert_eq!(spec.local_shape(rank).unwrap().iter().product::<usize>(), mine.len());
            prop_assert_eq!(of_boxes(&spec, rank), mine);
        }
    }

    #[test]
    fn the_parts_of_first_replicas_partition_the_tensor_and_replicas_hold_the_same(
        sizes in meshes(), shape in shapes(), picks: Picks,
    ) {
        let mesh = mesh(&sizes);
        let spec = spec(&layout(&mesh, &shape, picks), &shape);
        let mut owners = vec![0; spec.elems()];
        let mut firsts = std::collections::HashMap::new();
        for rank in 0..mesh.ranks().len() {
            // What tells parts apart are the coordinates along axes that are not replicated.
            let placements = spec.layout().placements().iter();
            let at = mesh.coordinates(rank).unwrap();
            let part: Vec<usize> =
                placements.zip(at).map(|(p, at)| if *p == Placement::Replicate { 0 } else { at }).collect();
            if spec.is_first_replica(rank) {
                of_boxes(&spec, rank).into_iter().for_each(|at| owners[at] += 1);
                prop_assert!(firsts.insert(part, rank).is_none());
            } else {
                prop_assert_eq!(spec.boxes(rank), spec.boxes(firsts[&part]));
            }
        }
        prop_assert!(owners.iter().all(|&owners| owners == 1), "{:?}", owners);
    }

    #[test]
    fn permuting_the_mesh_and_the_order_alike_leaves_every_part_where_it_is(
        sizes in prop::collection::vec(1usize..=3, 3), shape in shapes(), picks: Picks, turn in 0usize..3, flip: bool,
    ) {
        let mesh = mesh(&sizes);
        let before = layout(&mesh, &shape, picks);
        let mut axes = [0, 1, 2];
        axes.rotate_left(turn);
        if flip {
            axes.swap(0, 1);
        }
        let names: Vec<(&str, usize)> = axes.iter().map(|&axis| (mesh.axes()[axis].as_str(), sizes[axis])).collect();
        // The ranks in the order of their permuted coordinates.
        let mut ranks = mesh.ranks().to_vec();
        ranks.sort_by_key(|&rank| {
            let at = mesh.coordinates(rank).unwrap();
            axes.iter().map(|&axis| at[axis]).collect::<Vec<_>>()
        });
        let permuted = Arc::new(DeviceMesh::of_ranks(ranks, &names).unwrap());
        let placements: Vec<Placement> = axes.iter().map(|&axis| before.placements()[axis].clone()).collect();
        let mut after = Layout::new(permuted, placements).unwrap();
        for dim in 0..shape.len() {
            let order: Vec<&str> = before.order(dim).iter().map(|&axis| mesh.axes()[axis].as_str()).collect();
            after = after.with_order(dim, &order).unwrap();
        }
        for rank in 0..mesh.ranks().len() {
            prop_assert_eq!(spec(&before, &shape).boxes(rank), spec(&after, &shape).boxes(rank));
        }
    }

    #[test]
    fn an_axis_of_one_rank_makes_no_difference(
        sizes in prop::collection::vec(1usize..=3, 1..=2), shape in shapes(), picks: Picks, place in 0usize..3, pick in 0usize..8,
    ) {
        let plain = layout(&mesh(&sizes), &shape, picks);
        let place = place.min(sizes.len());
        let mut with_one = sizes.clone();
        with_one.insert(place, 1);
        let wider = mesh(&with_one);
        let mut placements = plain.placements().to_vec();
        let alone = match pick % (shape.len() + 2) {
            0 => Placement::Replicate,
            1 => Placement::Partial(ReduceOp::Max),
            dim => Shard { dim: dim - 2 },
        };
        placements.insert(place, alone);
        let mut layout = Layout::new(wider.clone(), placements).unwrap();
        for dim in 0..shape.len() {
            let moved = |axis: usize| axis + usize::from(axis >= place);
            let mut order: Vec<usize> = plain.order(dim).into_iter().map(moved).collect();
            if layout.order(dim).contains(&place) {
                order.insert(pick % (order.len() + 1), place);
            }
            let names: Vec<&str> = order.iter().map(|&axis| wider.axes()[axis].as_str()).collect();
            layout = layout.with_order(dim, &names).unwrap();
        }
        for rank in 0..wider.ranks().len() {
            prop_assert_eq!(spec(&plain, &shape).boxes(rank), spec(&layout, &shape).boxes(rank));
        }
    }

    #[test]
    fn the_order_tp_then_dp_is_a_split_by_tp_of_which_each_part_is_split_by_dp(
        n in 0usize..60, dp in 1usize..5, tp in 1usize..5,
    ) {
        let mesh = Arc::new(DeviceMesh::new(&[("dp", dp), ("tp", tp)]).unwrap());
        let layout = Layout::new(mesh, [Shard { dim: 0 }, Shard { dim: 0 }]).unwrap();
        let layout = layout.with_order(0, &["tp", "dp"]).unwrap();
        let rows: Vec<usize> = (0..n).collect();
        let part = |rows: &[usize], ranks: usize, at: usize| -> Vec<usize> {
            let size = rows.len().div_ceil(ranks).max(1);
            rows.chunks(size).nth(at).unwrap_or(&[]).to_vec()
        };
        for rank in 0..dp * tp {
            let expected = part(&part(&rows, tp, rank % tp), dp, rank / tp);
            prop_assert_eq!(elements(&layout, &[n], rank), expected.clone());
            let region = layout.region(&[n], rank).unwrap();
            prop_assert_eq!(box_elements(&ranges(&region), &[n]), expected);
        }
    }

    #[test]
    fn a_range_of_a_flattened_tensor_is_few_boxes_in_its_order(shape in shapes(), a in 0usize..400, b in 0usize..400) {
        let elems: usize = shape.iter().product();
        let (a, b) = (a.min(elems), b.min(elems));
        let range = a.min(b)..a.max(b);
        let boxes = Region::of_range(range.clone(), &shape);
        prop_assert!(boxes.len() <= (2 * shape.len()).saturating_sub(1).max(1), "{:?}", boxes);
        let flat: Vec<usize> = boxes.iter().flat_map(|region| box_elements(&ranges(region), &shape)).collect();
        prop_assert_eq!(flat, range.collect::<Vec<_>>());
    }

    #[test]
    fn boxes_share_what_copying_the_overlap_copies(
        shape in prop::collection::vec(1usize..6, 0..=3), cuts in prop::array::uniform12(0usize..6),
    ) {
        let region = |cuts: &[usize]| -> Region {
            let range = |d: usize| {
                let (a, b) = (cuts[2 * d].min(shape[d]), cuts[2 * d + 1].min(shape[d]));
                (a.min(b), a.abs_diff(b))
            };
            let (offsets, sizes): (Vec<usize>, Vec<usize>) = (0..shape.len()).map(range).unzip();
            Region::new(offsets, sizes)
        };
        let (a, b) = (region(&cuts[..6]), region(&cuts[6..]));
        let (in_a, in_b) = (box_elements(&ranges(&a), &shape), box_elements(&ranges(&b), &shape));
        let mut out = vec![usize::MAX; in_b.len()];
        let copied = a.copy_overlap(&in_a, &b, &mut out);
        let expected: Vec<usize> = in_b.iter().map(|e| if in_a.contains(e) { *e } else { usize::MAX }).collect();
        prop_assert_eq!(copied, in_b.iter().filter(|e| in_a.contains(e)).count());
        prop_assert_eq!(a.intersection(&b).map_or(0, |both| both.elems()), copied);
        prop_assert_eq!(out, expected);
    }
}
