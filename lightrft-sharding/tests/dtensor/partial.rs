//! Laws of contributions: what they add up to, in which layouts, and what may be made contributions again.

use std::sync::Arc;

use lightrft_collectives::ReduceOp;
use lightrft_sharding::{
    Cuts, DTensor, Layout, Placement,
    Placement::{Partial, Replicate},
};
use proptest::prelude::*;

use crate::support::{Picks, bits, elements, layout, mesh, meshes, on_mesh, shapes, values};

/// Whole numbers that f32 adds and multiplies exactly.
fn contribution(rank: usize, elems: usize) -> Vec<f32> {
    (0..elems).map(|i| ((i * 7 + rank * 5) % 11) as f32 - 3.0).collect()
}

fn fold(op: ReduceOp, ranks: usize, elems: usize) -> Vec<f32> {
    let all: Vec<Vec<f32>> = (0..ranks).map(|rank| contribution(rank, elems)).collect();
    let at = |i: usize| all.iter().map(move |rank| rank[i]);
    let one = |i: usize| match op {
        ReduceOp::Sum => at(i).sum(),
        ReduceOp::Mean => at(i).sum::<f32>() * (1.0 / ranks as f32),
        ReduceOp::Min => at(i).fold(f32::INFINITY, f32::min),
        ReduceOp::Max => at(i).fold(f32::NEG_INFINITY, f32::max),
        ReduceOp::Product => at(i).product(),
    };
    (0..elems).map(one).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn contributions_become_their_reduction_in_every_layout(
        ranks in 1usize..=8, shape in shapes(), op in prop::sample::select(&ReduceOp::ALL), picks: Picks,
    ) {
        let mesh = mesh(&[ranks]);
        let elems = shape.iter().product();
        let partial = Layout::new(Arc::clone(&mesh), [Partial(op)]).unwrap();
        let to = layout(&mesh, &shape, picks);
        let expected = fold(op, ranks, elems);
        on_mesh(&mesh, |rank, groups, _| {
            let tensor = DTensor::from_local(groups, &partial, contribution(rank, elems), &shape)?;
            let whole = tensor.full_tensor()?;
            assert_eq!(whole, expected);
            // Scattered or reduced whole, the bits are the same.
            let part = tensor.redistribute(&to)?;
            let mine: Vec<f32> = elements(&to, &shape, rank).into_iter().map(|at| whole[at]).collect();
            assert_eq!(bits(part.to_local()), bits(&mine), "{op} to {to}");
            assert_eq!(bits(&part.full_tensor()?), bits(&whole));
            Ok(())
        });
    }

    #[test]
    fn sums_over_several_axes_are_the_same_in_every_layout(sizes in meshes(), shape in shapes(), picks: Picks, which in 1usize..8) {
        let mesh = mesh(&sizes);
        let elems: usize = shape.iter().product();
        let kept = layout(&mesh, &shape, [picks[0], picks[1], picks[2], 1, 0, picks[5], picks[6], 0]);
        let to = layout(&mesh, &shape, [picks[2], picks[3], picks[4], picks[7], picks[0], picks[1], picks[5], picks[6]]);
        // Some axes are sums, the others stay.
        let summed: Vec<usize> = (0..sizes.len()).filter(|axis| which & (1 << axis) != 0).collect();
        let mut placements = kept.placements().to_vec();
        summed.iter().for_each(|&axis| placements[axis] = Partial(ReduceOp::Sum));
        let partial = kept.placed(placements).unwrap();
        // The coordinates along the summed axes make one number, that of the contribution.
        let number = |rank: usize| {
            let at = mesh.coordinates(rank).unwrap();
            summed.iter().fold(0, |n, &axis| n * sizes[axis] + at[axis])
        };
        let contributions = summed.iter().map(|&axis| sizes[axis]).product();
        let whole = fold(ReduceOp::Sum, contributions, elems);
        on_mesh(&mesh, |rank, groups, _| {
            let all = contribution(number(rank), elems);
            let local = elements(&partial, &shape, rank).into_iter().map(|at| all[at]).collect();
            let tensor = DTensor::from_local(groups, &partial, local, &shape)?;
            let part = tensor.redistribute(&to)?;
            let mine: Vec<f32> = elements(&to, &shape, rank).into_iter().map(|at| whole[at]).collect();
            assert_eq!(part.to_local(), mine, "{partial} to {to}");
            Ok(())
        });
    }

    #[test]
    fn values_made_contributions_are_given_back(sizes in meshes(), shape in shapes(), picks: Picks, axis in 0usize..3) {
        let mesh = mesh(&sizes);
        let from = layout(&mesh, &shape, picks);
        let axis = axis % sizes.len();
        for op in [ReduceOp::Sum, ReduceOp::Mean, ReduceOp::Min, ReduceOp::Max] {
            // A mean adds before it divides: only numbers of few bits come back to the bit.
            let full = if op == ReduceOp::Mean { contribution(0, values(&shape).len()) } else { values(&shape) };
            // Replicas, shards and ragged parts become sums; replicas alone become the others.
            let mut placements = from.placements().to_vec();
            if op != ReduceOp::Sum {
                placements.fill(Replicate);
            }
            let start = if op == ReduceOp::Sum { from.clone() } else { from.placed(placements.clone()).unwrap() };
            placements[axis] = Partial(op);
            let partial = from.placed(placements).unwrap();
            on_mesh(&mesh, |_, groups, _| {
                let tensor = DTensor::from_full(groups, &start, &shape, &full)?;
                let contributions = tensor.view().redistribute(&partial)?;
                let back = contributions.redistribute(&start)?;
                if op == ReduceOp::Mean && !sizes[axis].is_power_of_two() {
                    // It multiplies by a reciprocal, which rounds.
                    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= a.abs() * 2.0 * f32::EPSILON;
                    assert!(back.to_local().iter().zip(tensor.to_local()).all(near));
                } else {
                    assert_eq!(bits(back.to_local()), bits(tensor.to_local()), "{start} to {partial} and back");
                }
                Ok(())
            });
        }
    }
}

#[test]
fn sharded_contributions_hold_the_identity_where_others_hold_values() {
    let mesh = mesh(&[3]);
    for placement in [Placement::Shard { dim: 0 }, Placement::Ragged(Cuts::new([0, 2, 3, 4]).unwrap())] {
        let from = Layout::new(Arc::clone(&mesh), [placement]).unwrap();
        let sum = from.placed([Partial(ReduceOp::Sum)]).unwrap();
        let locals = on_mesh(&mesh, |_, groups, _| {
            let tensor = DTensor::from_full(groups, &from, &[4], &[1i32, 2, 3, 4])?;
            Ok(tensor.redistribute(&sum)?.into_local())
        });
        assert_eq!(locals[0], [1, 2, 0, 0]);
        assert_eq!(locals.iter().map(|local| local[3]).sum::<i32>(), 4);
    }
}
