//! What is refused, in which words, and that nothing is sent before.

use std::sync::Arc;

use lightrft_collectives::{DeviceMesh, Dtype, ReduceOp};
use lightrft_sharding::{
    Cuts, DTensor, DTensorSpec, Error, Layout, Placement,
    Placement::{Partial, Ragged, Replicate, Shard},
};

use crate::support::{mesh, on_mesh};

fn ragged(points: &[usize]) -> Placement {
    Ragged(Cuts::new(points).unwrap())
}

#[test]
fn layouts_that_cannot_be_are_refused() {
    let invalid = |sizes: &[usize], placements: &[Placement]| {
        let error = Layout::new(mesh(sizes), placements).unwrap_err();
        assert!(matches!(error, Error::InvalidLayout { .. }), "{error}");
        error.to_string()
    };
    assert!(invalid(&[2, 2], &[Replicate]).contains("2 axes"));
    assert!(invalid(&[2], &[ragged(&[0, 4])]).contains("2 ranks of `a0`"));
    invalid(&[2, 2], &[Partial(ReduceOp::Sum), Partial(ReduceOp::Max)]);
    invalid(&[2, 2], &[ragged(&[0, 1, 4]), Shard { dim: 0 }]);
    invalid(&[2, 2], &[ragged(&[0, 1, 4]), ragged(&[0, 2, 4])]);
    // Over one rank it is no cut.
    Layout::new(mesh(&[2, 1]), [ragged(&[0, 1, 4]), Shard { dim: 0 }]).unwrap();

    let layout = Layout::new(mesh(&[2, 2]), [Shard { dim: 0 }, Shard { dim: 0 }]).unwrap();
    for (dim, order) in [(0, &["a1"][..]), (0, &["a1", "a1"]), (0, &["a1", "b"]), (1, &["a0"])] {
        assert!(matches!(layout.clone().with_order(dim, order), Err(Error::InvalidLayout { .. })));
    }
    for points in [&[][..], &[0], &[1, 4], &[0, 3, 2]] {
        assert!(matches!(Cuts::new(points), Err(Error::InvalidLayout { .. })));
    }
}

#[test]
fn specifications_that_do_not_fit_their_tensor_are_refused() {
    let spec = |placement: Placement, shape: &[usize], dtype| {
        let layout = Layout::new(mesh(&[2]), [placement]).unwrap();
        DTensorSpec::new(layout, shape, dtype)
    };
    let refused = |placement: Placement, shape: &[usize], dtype| {
        assert!(matches!(spec(placement, shape, dtype), Err(Error::InvalidLayout { .. })));
    };
    refused(Shard { dim: 0 }, &[], Dtype::F32);
    refused(Shard { dim: 2 }, &[4, 4], Dtype::F32);
    refused(ragged(&[0, 1, 4]), &[5], Dtype::F32);
    refused(Partial(ReduceOp::Mean), &[4], Dtype::I64);
    refused(Replicate, &[usize::MAX, 3], Dtype::F32);
    spec(Partial(ReduceOp::Sum), &[4], Dtype::I64).unwrap();
}

#[test]
fn pairs_that_mean_nothing_are_refused_before_anything_is_sent() {
    let mesh = mesh(&[2]);
    let sum = Partial(ReduceOp::Sum);
    for (from, to) in [
        (sum.clone(), Partial(ReduceOp::Max)),
        (Replicate, Partial(ReduceOp::Product)),
        (Shard { dim: 0 }, Partial(ReduceOp::Product)),
        (Shard { dim: 0 }, Partial(ReduceOp::Mean)),
        (ragged(&[0, 1, 4]), Partial(ReduceOp::Min)),
    ] {
        let [from, to] = [from, to].map(|placement| Layout::new(Arc::clone(&mesh), [placement]).unwrap());
        on_mesh(&mesh, |_, groups, log| {
            let tensor = DTensor::from_full(groups, &from, &[4], &[1f32; 4])?;
            // One rank alone: if anything were sent, it would wait for the other.
            let error = tensor.redistribute(&to).unwrap_err();
            assert!(matches!(&error, Error::Redistribute { axis, .. } if axis == "a0"), "{error}");
            assert_eq!(log.take(), []);
            Ok(())
        });
    }
}

#[test]
fn a_tensor_does_not_leave_its_mesh() {
    let other = Arc::new(DeviceMesh::new(&[("other", 2)]).unwrap());
    let other = Layout::new(other, [Shard { dim: 0 }]).unwrap();
    let ours = mesh(&[2]);
    on_mesh(&ours, |_, groups, log| {
        let refused = |error| assert!(matches!(error, Error::ForeignMesh { .. }));
        let whole = Layout::replicated(Arc::clone(&ours));
        let tensor = DTensor::from_full(groups, &whole, &[2], &[1i32, 2])?;
        refused(tensor.redistribute(&other).unwrap_err());
        refused(DTensor::from_full(groups, &other, &[2], &[1i32, 2]).unwrap_err());
        refused(DTensor::from_local(groups, &other, vec![1i32], &[2]).unwrap_err());
        refused(DTensor::distribute(groups, &other, &[2], Some(&[1i32, 2])).unwrap_err());
        assert_eq!(log.take(), []);
        Ok(())
    });
}

#[test]
fn shapes_that_disagree_are_an_error_on_every_rank_that_shows_both() {
    let mesh = mesh(&[3]);
    let rows = Layout::new(Arc::clone(&mesh), [Shard { dim: 0 }]).unwrap();
    let errors = on_mesh(&mesh, |rank, groups, _| {
        let shape = if rank == 2 { [6, 5] } else { [6, 4] };
        let one = DTensor::from_local(groups, &rows, vec![0f32; 2 * shape[1]], &shape).unwrap_err();
        let two = DTensor::distribute(groups, &rows, &shape, Some(&[0f32; 24])).unwrap_err();
        // The ranks' parts tell the whole, if they are alike.
        let local = [2, if rank == 2 { 5 } else { 4 }];
        let three = DTensor::from_even_local(groups, &rows, vec![0f32; 2 * local[1]], &local).unwrap_err();
        let cuts = if rank == 2 { ragged(&[0, 1, 2, 6]) } else { ragged(&[0, 2, 2, 6]) };
        let ragged = rows.placed([cuts])?;
        let four = DTensor::from_local(groups, &ragged, vec![0f32; 6], &[6]).unwrap_err();
        // A shape that the layout cannot have is no reason to leave the others waiting.
        let shape = [if rank == 2 { 7 } else { 6 }];
        let five =
            DTensor::from_local(groups, &rows.placed([self::ragged(&[0, 2, 4, 6])])?, vec![0f32; 2], &shape);
        Ok([one, two, three, four, five.unwrap_err()])
    });
    for [one, two, three, four, five] in errors {
        for error in [&one, &two, &three, &four, &five] {
            assert!(matches!(error, Error::TensorMismatch { rank: 0, peer: 2, .. }), "{error}");
        }
        let text = one.to_string();
        assert!(text.contains("[6, 4]") && text.contains("[6, 5]") && text.contains("Shard(0)"), "{text}");
    }
}

#[test]
fn cut_points_that_disagree_are_found_however_many_there_are() {
    let mesh = mesh(&[6]);
    let errors = on_mesh(&mesh, |rank, groups, _| {
        // Those of rank 4 differ behind the first five, which messages show.
        let points = if rank == 4 { [0, 1, 2, 3, 4, 4, 5] } else { [0, 1, 2, 3, 4, 5, 5] };
        let layout = Layout::new(Arc::clone(&mesh), [ragged(&points)])?;
        let elems = points[rank + 1] - points[rank];
        Ok(DTensor::from_local(groups, &layout, vec![0f32; elems], &[5]).unwrap_err())
    });
    for error in errors {
        assert!(matches!(error, Error::TensorMismatch { rank: 0, peer: 4, .. }), "{error}");
        assert!(error.to_string().contains("other cut points"), "{error}");
    }
}

#[test]
fn values_of_the_wrong_length_are_an_error_on_every_rank_that_names_it() {
    let mesh = mesh(&[3]);
    let rows = Layout::new(Arc::clone(&mesh), [Shard { dim: 0 }]).unwrap();
    let errors = on_mesh(&mesh, |rank, groups, _| {
        let shape = [7, 2];
        let elems = rows.region(&shape, rank).unwrap().elems();
        let short = vec![0f32; elems - usize::from(rank == 1)];
        let one = DTensor::from_local(groups, &rows, short, &shape).unwrap_err();
        let two = DTensor::<f32>::distribute(groups, &rows, &shape, None).unwrap_err();
        let three = DTensor::from_full(groups, &rows, &shape, &[0f32; 13]).unwrap_err();
        assert!(matches!(three, Error::Length { got: 13, expected: 14, .. }), "{three}");
        // Equal parts of seven rows over three ranks there are none.
        let four = DTensor::from_even_local(groups, &rows, vec![0f32; elems], &[elems / 2, 2]).unwrap_err();
        assert!(matches!(four, Error::TensorMismatch { .. }), "{four}");
        Ok([one, two])
    });
    for [one, two] in errors {
        assert!(matches!(one, Error::LocalLength { rank: 1, got: 5, expected: 6, .. }), "{one}");
        assert!(matches!(two, Error::LocalLength { rank: 0, got: 0, expected: 14, .. }), "{two}");
    }
}

#[test]
fn a_whole_shape_is_inferred_from_even_parts_but_not_from_flat_ones() {
    let mesh = mesh(&[2, 2]);
    let columns = Layout::new(Arc::clone(&mesh), [Replicate, Shard { dim: 1 }]).unwrap();
    let flat = columns.placed([Replicate, ragged(&[0, 2, 4])]).unwrap();
    on_mesh(&mesh, |_, groups, log| {
        let tensor = DTensor::from_even_local(groups, &columns, vec![1u8; 6], &[3, 2])?;
        assert_eq!(tensor.spec().shape(), [3, 4]);
        log.take();
        let error = DTensor::from_even_local(groups, &flat, vec![1u8; 2], &[2]).unwrap_err();
        assert!(matches!(error, Error::InvalidLayout { .. }));
        assert_eq!(log.take(), []);
        Ok(())
    });
}

#[test]
fn contributions_are_neither_saved_nor_loaded() {
    let mesh = mesh(&[2]);
    let sum = Layout::new(Arc::clone(&mesh), [Partial(ReduceOp::Sum)]).unwrap();
    on_mesh(&mesh, |_, groups, _| {
        let tensor = DTensor::from_full(groups, &sum, &[2], &[1f32, 2.0])?;
        assert!(matches!(tensor.view().parts(), Err(Error::PartialValues { .. })));
        let loaded = DTensor::<f32>::load(groups, &sum, &[2], |_, _| Ok::<_, Error>(()));
        assert!(matches!(loaded, Err(Error::PartialValues { .. })));
        Ok(())
    });
}
