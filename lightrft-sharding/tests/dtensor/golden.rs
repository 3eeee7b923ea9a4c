//! Local shapes and global offsets against torch's, for all of its 1,175 layouts.

use lightrft_collectives::{Dtype, ReduceOp};
use lightrft_sharding::{DTensorSpec, Layout, Placement, Region};
use serde::Deserialize;

use crate::support::{box_elements, mesh, ranges, really_split, torch_chunk};

#[derive(Deserialize)]
struct File {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    shape: Vec<usize>,
    mesh: Vec<usize>,
    placements: Vec<String>,
    /// Of each rank: local shape, global offset and, of small tensors, the elements.
    ranks: Vec<Vec<Vec<usize>>>,
}

/// torch's `_StridedShard(dim, factor)` says: of the axes that shard this dim, those to the right with `factor` ranks
/// together cut first.
fn layout(case: &Case) -> Layout {
    let mut orders: Vec<Vec<usize>> = vec![Vec::new(); case.shape.len()];
    let mut placements = vec![Placement::Replicate; case.mesh.len()];
    for (axis, text) in case.placements.iter().enumerate().rev() {
        if text == "P" {
            placements[axis] = Placement::Partial(ReduceOp::Sum);
        }
        let Some(shard) = text
            .trim_start_matches('S')
            .split_once('x')
            .or_else(|| text.strip_prefix('S').map(|dim| (dim, "1")))
        else {
            continue;
        };
        let (dim, factor): (usize, usize) = (shard.0.parse().unwrap(), shard.1.parse().unwrap());
        placements[axis] = Placement::Shard { dim };
        let order = &mut orders[dim];
        let first = |n: usize| order[..n].iter().map(|&axis| case.mesh[axis]).product::<usize>();
        let place = (0..=order.len()).find(|&n| first(n) == factor).unwrap();
        order.insert(place, axis);
    }
    let mesh = mesh(&case.mesh);
    let mut layout = Layout::new(mesh.clone(), placements).unwrap();
    for (dim, order) in orders.iter().enumerate() {
        let names: Vec<&str> = order.iter().map(|&axis| mesh.axes()[axis].as_str()).collect();
        layout = layout.with_order(dim, &names).unwrap();
    }
    layout
}

/// `_StridedShard` computes its parts by a formula that holds for even splits. Where it does not, it gives other rows
/// than splitting first by the right axis and then by the left does; these are the cases in the file.
const TORCH_DIFFERS: [(&[usize], &[usize]); 9] = [
    (&[7], &[3, 2]),
    (&[17], &[4, 2]),
    (&[7, 2], &[3, 2]),
    (&[9, 16], &[4, 2]),
    (&[13, 11], &[3, 2]),
    (&[151, 896], &[3, 2]),
    (&[5], &[2, 2, 2]),
    (&[17], &[2, 2, 2]),
    (&[5, 7, 3], &[2, 2, 2]),
];

#[test]
fn local_shapes_and_offsets_are_torchs_except_where_strided_shard_is_wrong() {
    let file: File = serde_json::from_str(include_str!("../data/dtensor_local_shapes.json")).unwrap();
    assert_eq!(file.cases.len(), 1175);
    let (mut ranks, mut differing) = (0, Vec::new());
    for case in &file.cases {
        let layout = layout(case);
        let spec = DTensorSpec::new(layout.clone(), case.shape.clone(), Dtype::F32).unwrap();
        let mut same = true;
        for (rank, torch) in case.ranks.iter().enumerate() {
            let ours = layout.region(&case.shape, rank).unwrap();
            assert_eq!(spec.local_shape(rank).as_ref(), Some(&ours.sizes));
            assert_eq!(spec.boxes(rank).as_deref(), Some(std::slice::from_ref(&ours)));
            // Ours are what splitting leaves, everywhere.
            let split = really_split(&layout, &case.shape, &layout.mesh().coordinates(rank).unwrap());
            for (dim, (left, whole)) in split.iter().zip(&case.shape).enumerate() {
                let offset =
                    if left.is_empty() && !layout.order(dim).is_empty() { *whole } else { left.start };
                assert_eq!((ours.offsets[dim], ours.sizes[dim]), (offset, left.len()), "{:?}", case.shape);
            }
            let torchs = Region::new(torch[1].clone(), torch[0].clone());
            let elements =
                torch.get(2).is_none_or(|elements| *elements == box_elements(&ranges(&ours), &case.shape));
            same &= ours == torchs && elements;
            ranks += 1;
        }
        if !same {
            assert!(
                case.placements.iter().any(|placement| placement.starts_with("SS")),
                "{:?}",
                case.placements
            );
            differing.push((case.shape.as_slice(), case.mesh.as_slice()));
        }
        assert_eq!(layout.region(&case.shape, case.ranks.len()), None, "a rank outside the mesh has no part");
    }
    assert_eq!(ranks, 5863);
    assert_eq!(differing.len(), TORCH_DIFFERS.len(), "{differing:?}");
    assert!(TORCH_DIFFERS.iter().all(|case| differing.contains(case)), "{differing:?}");
}

/// What `_StridedShard(0, tp)` and `Shard(0)` on a mesh (dp, tp) leave: the dp-th chunk of each of the tp chunks, joined,
/// and of that the tp-th chunk.
fn strided_shard(n: usize, [dp, tp]: [usize; 2], at: [usize; 2]) -> Vec<usize> {
    let pieces = torch_chunk(0..n, tp).into_iter();
    let joined: Vec<usize> = pieces.flat_map(|piece| torch_chunk(piece, dp).swap_remove(at[0])).collect();
    torch_chunk(0..joined.len(), tp).swap_remove(at[1]).map(|place| joined[place]).collect()
}

#[test]
fn strided_shard_is_wrong_for_ten_of_two_hundred_sizes_where_an_order_is_right() {
    let mut differing = Vec::new();
    for axes in [[2, 2], [2, 3], [2, 4], [3, 2], [4, 2]] {
        let mesh = mesh(&axes);
        let layout = Layout::new(mesh.clone(), vec![Placement::Shard { dim: 0 }; 2]).unwrap();
        let layout = layout.with_order(0, &["a1", "a0"]).unwrap();
        for n in 1..=40 {
            let mut same = true;
            for rank in 0..axes[0] * axes[1] {
                let at = [rank / axes[1], rank % axes[1]];
                let ours = box_elements(&ranges(&layout.region(&[n], rank).unwrap()), &[n]);
                let right_to_left =
                    torch_chunk(torch_chunk(0..n, axes[1]).swap_remove(at[1]), axes[0]).swap_remove(at[0]);
                assert_eq!(ours, right_to_left.collect::<Vec<_>>());
                same &= ours == strided_shard(n, axes, at);
            }
            if !same {
                differing.push((axes, n));
            }
        }
    }
    let at = |axes: [usize; 2], sizes: &[usize]| sizes.iter().map(move |&n| (axes, n)).collect::<Vec<_>>();
    assert_eq!(differing, [at([3, 2], &[7, 13, 19, 25, 31, 37]), at([4, 2], &[9, 17, 25, 33])].concat());
}
