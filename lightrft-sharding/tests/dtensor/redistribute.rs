//! Laws of redistribution over replicated, sharded and ragged layouts, and which collectives it takes.

use std::slice::from_ref;
use std::sync::Arc;

use lightrft_collectives::{Call, DeviceMesh, ReduceOp};
use lightrft_sharding::{
    Cuts, DTensor, Layout, Placement,
    Placement::{Replicate, Shard},
};
use proptest::prelude::*;

use crate::support::{Picks, bits, expected, layout, mesh, meshes, on_mesh, shapes, values};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_was_distributed_is_given_back_bit_for_bit(sizes in meshes(), shape in shapes(), picks: Picks) {
        let mesh = mesh(&sizes);
        let layout = layout(&mesh, &shape, picks);
        let full = values(&shape);
        on_mesh(&mesh, |rank, groups, _| {
            // Only rank 0 is asked for the tensor.
            let given = (rank == 0).then_some(full.as_slice());
            let sent = DTensor::distribute(groups, &layout, &shape, given)?;
            assert_eq!(bits(sent.to_local()), expected(&layout, &shape, rank));
            assert_eq!(bits(&sent.full_tensor()?), bits(&full));
            let cut = DTensor::from_full(groups, &layout, &shape, &full)?;
            assert_eq!(bits(cut.to_local()), bits(sent.to_local()));
            let known = DTensor::from_local(groups, &layout, cut.into_local(), &shape)?;
            assert_eq!(known.spec(), sent.spec());
            Ok(())
        });
    }

    #[test]
    fn the_order_of_ranks_in_a_mesh_says_who_holds_what(
        ranks in (1usize..=6).prop_flat_map(|n| Just((0..n).collect::<Vec<usize>>()).prop_shuffle()),
        shape in shapes(), a: Picks, b: Picks,
    ) {
        let sizes = if ranks.len() % 2 == 0 { [("a0", 2), ("a1", ranks.len() / 2)] } else { [("a0", 1), ("a1", ranks.len())] };
        let mesh = Arc::new(DeviceMesh::of_ranks(ranks, &sizes).unwrap());
        let [a, b] = [a, b].map(|picks| layout(&mesh, &shape, picks));
        let full = values(&shape);
        on_mesh(&mesh, |rank, groups, _| {
            let given = (rank == mesh.ranks()[0]).then_some(full.as_slice());
            let at_a = DTensor::distribute(groups, &a, &shape, given)?;
            assert_eq!(bits(at_a.to_local()), expected(&a, &shape, rank));
            let at_b = at_a.redistribute(&b)?;
            assert_eq!(bits(at_b.to_local()), expected(&b, &shape, rank));
            assert_eq!(bits(&at_b.full_tensor()?), bits(&full));
            Ok(())
        });
    }

    #[test]
    fn any_way_to_a_layout_leads_to_the_same_bits_and_no_way_takes_no_call(
        sizes in meshes(), shape in shapes(), a: Picks, b: Picks, c: Picks,
    ) {
        let mesh = mesh(&sizes);
        let [a, b, c] = [a, b, c].map(|picks| layout(&mesh, &shape, picks));
        on_mesh(&mesh, |rank, groups, log| {
            let at_a = DTensor::from_full(groups, &a, &shape, &values(&shape))?;
            let at_b = at_a.view().redistribute(&b)?;
            assert_eq!(bits(at_b.to_local()), expected(&b, &shape, rank), "{a} to {b}");
            let direct = at_a.view().redistribute(&c)?;
            let by_b = at_b.view().redistribute(&c)?;
            assert_eq!(bits(direct.to_local()), expected(&c, &shape, rank), "{a} to {c}");
            assert_eq!(bits(by_b.to_local()), bits(direct.to_local()));
            assert_eq!(bits(at_b.redistribute(&a)?.to_local()), bits(at_a.to_local()));
            log.take();
            let same = at_a.view().redistribute(&a)?;
            assert_eq!(log.take(), []);
            assert_eq!(bits(same.to_local()), bits(at_a.to_local()));
            Ok(())
        });
    }

    #[test]
    fn a_reader_of_boxes_loads_any_layout_from_any_other(
        shape in shapes(), from in meshes(), to in meshes(), a: Picks, b: Picks,
    ) {
        // As many ranks as there were save; as many as there are load.
        let saving = mesh(&from);
        let layout_a = layout(&saving, &shape, a);
        let saved = on_mesh(&saving, |rank, groups, _| {
            let tensor = DTensor::from_full(groups, &layout_a, &shape, &values(&shape))?;
            let parts = if tensor.spec().is_first_replica(rank) { tensor.view().parts()? } else { Vec::new() };
            Ok(parts.into_iter().map(|(region, values)| (region, values.to_vec())).collect::<Vec<_>>())
        })
        .concat();
        let loading = mesh(&to);
        let layout_b = layout(&loading, &shape, b);
        on_mesh(&loading, |rank, groups, log| {
            let tensor = DTensor::load(groups, &layout_b, &shape, |region, out| {
                let copied: usize = saved.iter().map(|(from, values)| from.copy_overlap(values, region, out)).sum();
                assert_eq!(copied, region.elems(), "every element is read once");
                Ok::<_, lightrft_sharding::Error>(())
            })?;
            assert_eq!(bits(tensor.to_local()), expected(&layout_b, &shape, rank));
            assert_eq!(log.take(), []);
            Ok(())
        });
    }
}

/// The calls of the first rank for going from one layout to another, of a tensor of zeros.
fn calls(sizes: &[usize], shape: &[usize], from: &[Placement], to: &[Placement]) -> Vec<Call> {
    let mesh = mesh(sizes);
    let layout = |placements: &[Placement]| Layout::new(Arc::clone(&mesh), placements).unwrap();
    let (from, to) = (layout(from), layout(to));
    let elems = shape.iter().product();
    let mut calls = on_mesh(&mesh, |_, groups, log| {
        let tensor = DTensor::from_full(groups, &from, shape, &vec![0f32; elems])?;
        assert_eq!(log.take(), [], "a part of what everyone has is taken without a call");
        tensor.redistribute(&to)?;
        Ok(log.take())
    });
    let first = calls.swap_remove(0);
    assert!(calls.iter().all(|other| *other == first), "all ranks make the same calls");
    first
}

#[test]
fn each_pair_takes_the_collective_it_is_known_by_and_none_when_none_is_needed() {
    let ragged = |points: &[usize]| Placement::Ragged(Cuts::new(points).unwrap());
    let (rows, columns, sum) = (Shard { dim: 0 }, Shard { dim: 1 }, Placement::Partial(ReduceOp::Sum));
    let uneven = ragged(&[0, 5, 24]);
    let is_rows = ragged(&[0, 12, 24]);
    for (from, to, expected) in [
        (&rows, &Replicate, &[Call::AllGather][..]),
        (&uneven, &Replicate, &[Call::AllGatherV]),
        (&rows, &columns, &[Call::AllToAllV]),
        (&rows, &uneven, &[Call::AllToAllV]),
        (&uneven, &columns, &[Call::AllToAllV]),
        (&uneven, &ragged(&[0, 6, 24]), &[Call::AllToAllV]),
        (&sum, &Replicate, &[Call::AllReduce]),
        (&sum, &columns, &[Call::ReduceScatter]),
        (&sum, &uneven, &[Call::ReduceScatter]),
        (&Replicate, &columns, &[]),
        (&Replicate, &uneven, &[]),
        (&Replicate, &sum, &[]),
        (&columns, &sum, &[]),
        (&uneven, &sum, &[]),
        // The same parts under other names.
        (&rows, &is_rows, &[]),
        (&is_rows, &rows, &[]),
        (&rows, &rows, &[]),
    ] {
        assert_eq!(calls(&[2], &[4, 6], from_ref(from), from_ref(to)), expected, "{from} to {to}");
        assert_eq!(calls(&[1], &[4, 6], &[Replicate], from_ref(&columns)), []);
        let empty = ragged(&[0, 0, 0]);
        let emptied =
            |p: &Placement| if matches!(p, Placement::Ragged(_)) { empty.clone() } else { p.clone() };
        assert_eq!(calls(&[2], &[4, 0], &[emptied(from)], &[emptied(to)]), [], "no element, no call");
    }
}

#[test]
fn several_axes_take_a_call_each_and_send_little_first() {
    use Placement::Partial;

    let (rows, columns, sum) = (Shard { dim: 0 }, Shard { dim: 1 }, Partial(ReduceOp::Sum));
    let go = |from: [Placement; 2], to: [Placement; 2]| calls(&[2, 2], &[4, 6], &from, &to);
    // Replicas of shards: what is scattered first makes the all-reduce small.
    assert_eq!(
        go([sum.clone(), sum.clone()], [Replicate, rows.clone()]),
        [Call::ReduceScatter, Call::AllReduce]
    );
    assert_eq!(go([rows.clone(), rows.clone()], [Replicate, Replicate]), [Call::AllGather; 2]);
    // Columns are cut before rows are gathered.
    assert_eq!(go([rows.clone(), Replicate], [Replicate, columns.clone()]), [Call::AllGather]);
    // The outer axis can only give up rows when the inner one has.
    assert_eq!(go([rows.clone(), rows.clone()], [Replicate, rows.clone()]), [Call::AllGather; 2]);
    assert_eq!(go([rows.clone(), rows.clone()], [rows.clone(), columns]), [Call::AllToAllV]);
    // An axis of one rank takes none.
    let alone = calls(&[2, 1], &[4, 6], &[rows.clone(), sum], &[Replicate, rows]);
    assert_eq!(alone, [Call::AllGather]);
}

#[test]
fn distribution_compares_and_then_sends_once() {
    let mesh = mesh(&[4]);
    for (shape, placement, call) in [
        (&[8usize, 3][..], Shard { dim: 0 }, Some(Call::Scatter)),
        (&[7, 3], Shard { dim: 0 }, Some(Call::AllToAllV)),
        (&[7, 3], Replicate, Some(Call::Broadcast)),
        (&[0, 3], Shard { dim: 0 }, None),
    ] {
        let layout = Layout::new(Arc::clone(&mesh), [placement]).unwrap();
        let full = values(shape);
        let logs = on_mesh(&mesh, |_, groups, log| {
            DTensor::distribute(groups, &layout, shape, Some(&full))?;
            Ok(log.take())
        });
        for log in logs {
            assert_eq!(log.last().copied().filter(|_| log.len() > 1), call, "{shape:?}");
            assert!(log.len() <= 2, "{log:?}");
        }
    }
}
