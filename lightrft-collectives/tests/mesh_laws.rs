//! Laws of the mesh: coordinates and ranks are two names for one thing, lines cover the world once
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use lightrft_collectives::local::World;
use lightrft_collectives::{DeviceMesh, Error, axis_group, sub_groups};
use proptest::prelude::*;

const NAMES: [&str; 3] = ["pp", "dp", "tp"];

fn mesh() -> impl Strategy<Value = DeviceMesh> {
    proptest::collection::vec(1usize..5, 1..4)
        .prop_map(|sizes| DeviceMesh::new(&NAMES.into_iter().zip(sizes).collect::<Vec<_>>()).unwrap())
}

proptest! {
    #[test]
    fn every_rank_has_its_own_coordinates(mesh in mesh()) {
        let mut next = 0;
        for rank in 0..mesh.ranks().len() {
            let place = mesh.coordinates(rank).unwrap();
            let row_major = place.iter().zip(mesh.sizes()).fold(0, |sum, (c, size)| sum * size + c);
            prop_assert_eq!(row_major, next);
            next += 1;
        }
        prop_assert_eq!(mesh.coordinates(next), None);
    }

    #[test]
    fn lines_along_an_axis_cover_the_world_once(mesh in mesh()) {
        for axis in mesh.axes() {
            let lines = mesh.lines(axis).unwrap();
            for line in &lines {
                prop_assert_eq!(line.len(), mesh.size(axis).unwrap());
                for (place, rank) in line.iter().enumerate() {
                    prop_assert_eq!(mesh.coordinate(axis, *rank).unwrap(), place);
                    prop_assert_eq!(&mesh.line(axis, *rank).unwrap(), line);
                }
            }
            let mut all: Vec<usize> = lines.concat();
            all.sort_unstable();
            prop_assert_eq!(&all, mesh.ranks());
        }
    }

    #[test]
    fn a_slice_of_a_slice_is_a_line(mesh in mesh(), rank in 0usize..64) {
        let rank = rank % mesh.ranks().len();
        let names: Vec<&str> = mesh.axes().iter().map(String::as_str).collect();
        prop_assert_eq!(&mesh.slice(&names, rank).unwrap(), &mesh);
        if let [first, second, ..] = names[..] {
            let slice = mesh.slice(&[second, first], rank).unwrap();
            prop_assert_eq!(slice.axes(), [first, second]);
            prop_assert_eq!(slice.line(second, rank).unwrap(), mesh.line(second, rank).unwrap());
        }
    }
}

#[test]
fn what_is_no_mesh_is_refused() {
    for axes in [&[][..], &[("dp", 0)], &[("dp", 2), ("dp", 2)], &[("", 2)], &[("a", usize::MAX), ("b", 2)]] {
        assert!(matches!(DeviceMesh::new(axes), Err(Error::Mesh { .. })), "{axes:?}");
    }
    let mesh = DeviceMesh::new(&[("dp", 2)]).unwrap();
    assert!(matches!(mesh.line("tp", 0), Err(Error::Mesh { got, .. }) if got.contains("tp")));
    assert!(matches!(mesh.line("dp", 2), Err(Error::Mesh { got, .. }) if got.contains('2')));
}

#[test]
fn sub_groups_are_neighbours_and_strides() {
    let groups = World::run(4, |world| {
        let groups = sub_groups(&*world, 2)?;
        assert!(matches!(sub_groups(&*world, 3), Err(Error::Mesh { .. })));
        Ok((groups.consecutive.ranks().to_vec(), groups.strided.ranks().to_vec()))
    })
    .unwrap();
    let expected = [([0, 1], [0, 2]), ([0, 1], [1, 3]), ([2, 3], [0, 2]), ([2, 3], [1, 3])];
    for ((consecutive, strided), expected) in groups.into_iter().zip(expected) {
        assert_eq!((consecutive.as_slice(), strided.as_slice()), (&expected.0[..], &expected.1[..]));
    }
}

#[test]
fn an_axis_of_another_world_is_refused_before_anything_is_sent() {
    let mesh = DeviceMesh::new(&[("dp", 3)]).unwrap();
    World::run(2, |world| {
        assert!(matches!(axis_group(&*world, &mesh, "dp"), Err(Error::Mesh { .. })));
        Ok(())
    })
    .unwrap();
}
