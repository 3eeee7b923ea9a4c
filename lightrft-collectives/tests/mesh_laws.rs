//! Laws of the mesh: it agrees with a model that stores all coordinates, and with torch's `DeviceMesh`
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;

use lightrft_collectives::local::World;
use lightrft_collectives::{
    Communicator, CommunicatorExt, DeviceMesh, Error, MeshGroups, ReduceOp, axis_group, sub_groups,
};
use proptest::prelude::*;
use serde::Deserialize;

const NAMES: [&str; 4] = ["pp", "dp", "cp", "tp"];

/// The plainest mesh: for each rank the coordinate along each axis, by name.
struct Model {
    axes: Vec<String>,
    places: BTreeMap<usize, BTreeMap<String, usize>>,
}

impl Model {
    fn of(ranks: &[usize], axes: &[(&str, usize)]) -> Model {
        let place = |index: usize| {
            let mut rest = index;
            let mut place = BTreeMap::new();
            for (name, size) in axes.iter().rev() {
                place.insert(name.to_string(), rest % size);
                rest /= size;
            }
            place
        };
        let places = ranks.iter().enumerate().map(|(index, rank)| (*rank, place(index))).collect();
        Model { axes: axes.iter().map(|(name, _)| name.to_string()).collect(), places }
    }

    /// The ranks that share with `rank` all coordinates but those along `free`, sorted by these, the last fastest.
    fn through(&self, rank: usize, free: &[&str]) -> Vec<usize> {
        let here = &self.places[&rank];
        let fixed = |axis: &&String| !free.contains(&axis.as_str());
        let same = |place: &BTreeMap<String, usize>| {
            self.axes.iter().filter(fixed).all(|axis| place[axis] == here[axis])
        };
        let mut found: Vec<(Vec<usize>, usize)> = self
            .places
            .iter()
            .filter(|(_, place)| same(place))
            .map(|(rank, place)| (free.iter().map(|axis| place[*axis]).collect(), *rank))
            .collect();
        found.sort();
        found.into_iter().map(|(_, rank)| rank).collect()
    }
}

/// Sizes of up to four axes, a shuffled list of ranks, and some of the axes in some order.
fn meshes() -> impl Strategy<Value = (Vec<(&'static str, usize)>, Vec<usize>, Vec<&'static str>)> {
    let sizes = proptest::collection::vec(1usize..5, 1..5);
    sizes.prop_flat_map(|sizes| {
        let axes: Vec<(&str, usize)> = NAMES.into_iter().zip(sizes).collect();
        let world: usize = axes.iter().map(|(_, size)| size).product();
        let names: Vec<&str> = axes.iter().map(|(name, _)| *name).collect();
        // Not the ranks 0..n: a mesh may be of any.
        let ranks = Just((0..world).map(|rank| 3 * rank + 1).collect::<Vec<usize>>()).prop_shuffle();
        let some = (1..=names.len(), Just(names).prop_shuffle())
            .prop_map(|(n, names)| names.into_iter().take(n).collect());
        (Just(axes), ranks, some)
    })
}

fn in_order<'a>(axes: &[(&'a str, usize)], some: &[&str]) -> Vec<&'a str> {
    axes.iter().map(|(name, _)| *name).filter(|name| some.contains(name)).collect()
}

proptest! {
    #[test]
    fn coordinates_lines_and_slices_are_the_models((axes, ranks, some) in meshes()) {
        let (mesh, model) = (DeviceMesh::of_ranks(ranks.clone(), &axes).unwrap(), Model::of(&ranks, &axes));
        for &rank in &ranks {
            let place: Vec<usize> = axes.iter().map(|(name, _)| model.places[&rank][*name]).collect();
            prop_assert_eq!(mesh.coordinates(rank), Some(place));
            for (name, _) in &axes {
                prop_assert_eq!(mesh.coordinate(name, rank).unwrap(), model.places[&rank][*name]);
                prop_assert_eq!(mesh.line(name, rank).unwrap(), model.through(rank, &[*name]));
            }
            // A slice keeps the mesh's order, however its axes are listed.
            let slice = mesh.slice(&some, rank).unwrap();
            let kept = in_order(&axes, &some);
            prop_assert_eq!(slice.axes(), &kept[..]);
            prop_assert_eq!(slice.ranks(), model.through(rank, &kept));
            prop_assert_eq!(slice.line(kept[0], rank).unwrap(), model.through(rank, &kept[..1]));
        }
        prop_assert_eq!(mesh.coordinates(0), None);
    }

    #[test]
    fn lines_along_an_axis_cover_the_world_once((axes, ranks, _) in meshes()) {
        let mesh = DeviceMesh::of_ranks(ranks.clone(), &axes).unwrap();
        for (axis, size) in axes {
            let lines = mesh.lines(axis).unwrap();
            for line in &lines {
                prop_assert_eq!(line.len(), size);
                for rank in line {
                    prop_assert_eq!(&mesh.line(axis, *rank).unwrap(), line);
                }
            }
            let (mut all, mut ranks) = (lines.concat(), ranks.clone());
            all.sort_unstable();
            ranks.sort_unstable();
            prop_assert_eq!(all, ranks);
        }
    }

    #[test]
    fn a_flattened_axis_runs_through_the_ranks_of_its_parts((axes, ranks, some) in meshes()) {
        let (mesh, model) = (DeviceMesh::of_ranks(ranks.clone(), &axes).unwrap(), Model::of(&ranks, &axes));
        let flat = mesh.flatten(&some, "flat").unwrap();
        for &rank in &ranks {
            prop_assert_eq!(flat.line("flat", rank).unwrap(), model.through(rank, &some));
            // The other axes are what they were.
            for (other, _) in axes.iter().filter(|(name, _)| !some.contains(name)) {
                prop_assert_eq!(flat.line(other, rank).unwrap(), mesh.line(other, rank).unwrap());
            }
        }
    }

    #[test]
    fn unflatten_undoes_flatten_of_neighbours((axes, ranks, _) in meshes(), from in 0usize..4, n in 1usize..5) {
        let mesh = DeviceMesh::of_ranks(ranks, &axes).unwrap();
        let from = from % axes.len();
        let parts = &axes[from..axes.len().min(from + n)];
        let names: Vec<&str> = parts.iter().map(|(name, _)| *name).collect();
        let flat = mesh.flatten(&names, "flat").unwrap();
        prop_assert_eq!(flat.unflatten("flat", parts).unwrap(), mesh);
    }
}

/// What torch says, see `tools/make_mesh_vectors.py`.
#[derive(Deserialize)]
struct Torch {
    meshes: Vec<TorchMesh>,
}

#[derive(Deserialize)]
struct TorchMesh {
    axes: Vec<(String, usize)>,
    slices: Vec<Vec<String>>,
    flatten: Vec<String>,
    unflatten: (String, Vec<(String, usize)>),
    ranks: Vec<Seen>,
}

#[derive(Deserialize)]
struct Seen {
    coordinates: Vec<usize>,
    lines: Vec<Vec<usize>>,
    slices: Vec<serde_json::Value>,
    #[serde(default)]
    flatten: Vec<usize>,
    unflatten: Vec<Vec<usize>>,
}

/// The numbers of nested lists, in order.
fn numbers(nested: &serde_json::Value) -> Vec<usize> {
    match nested.as_array() {
        Some(list) => list.iter().flat_map(numbers).collect(),
        None => vec![nested.as_u64().unwrap() as usize],
    }
}

fn borrowed(axes: &[(String, usize)]) -> Vec<(&str, usize)> {
    axes.iter().map(|(name, size)| (name.as_str(), *size)).collect()
}

#[test]
fn torch_sees_the_same_meshes() {
    let torch: Torch = serde_json::from_str(include_str!("data/mesh.json")).unwrap();
    assert_eq!(torch.meshes.len(), 5);
    for case in torch.meshes {
        let mesh = DeviceMesh::new(&borrowed(&case.axes)).unwrap();
        assert_eq!(case.ranks.len(), mesh.ranks().len());
        for (rank, seen) in case.ranks.iter().enumerate() {
            assert_eq!(mesh.coordinates(rank).unwrap(), seen.coordinates);
            for (axis, line) in mesh.axes().iter().zip(&seen.lines) {
                assert_eq!(&mesh.line(axis, rank).unwrap(), line);
            }
            for (axes, ranks) in case.slices.iter().zip(&seen.slices) {
                let axes: Vec<&str> = axes.iter().map(String::as_str).collect();
                assert_eq!(mesh.slice(&axes, rank).unwrap().ranks(), numbers(ranks));
            }
            if !case.flatten.is_empty() {
                let axes: Vec<&str> = case.flatten.iter().map(String::as_str).collect();
                assert_eq!(mesh.flatten(&axes, "flat").unwrap().line("flat", rank).unwrap(), seen.flatten);
            }
            let (axis, parts) = &case.unflatten;
            let cut = mesh.unflatten(axis, &borrowed(parts)).unwrap();
            for ((part, _), line) in parts.iter().zip(&seen.unflatten) {
                assert_eq!(&cut.line(part, rank).unwrap(), line);
            }
        }
    }
}

#[test]
fn what_is_no_mesh_is_refused() {
    for axes in [&[][..], &[("dp", 0)], &[("dp", 2), ("dp", 2)], &[("", 2)], &[("a", usize::MAX), ("b", 2)]] {
        assert!(matches!(DeviceMesh::new(axes), Err(Error::Mesh { .. })), "{axes:?}");
    }
    let mesh = DeviceMesh::new(&[("dp", 2), ("sp", 2)]).unwrap();
    assert!(matches!(mesh.line("tp", 0), Err(Error::Mesh { got, .. }) if got.contains("tp")));
    assert!(matches!(mesh.line("dp", 4), Err(Error::Mesh { got, .. }) if got.contains('4')));
    let wrong = [
        mesh.slice(&[], 0),
        mesh.slice(&["dp", "dp"], 0),
        mesh.flatten(&["dp", "dp"], "flat"),
        mesh.flatten(&["dp"], "sp"),
        mesh.flatten(&["dp", "sp"], ""),
        mesh.unflatten("dp", &[("a", 2), ("b", 2)]),
        mesh.unflatten("dp", &[("sp", 2)]),
        mesh.unflatten("tp", &[("a", 2)]),
        DeviceMesh::of_ranks(vec![0, 1, 0], &[("dp", 3)]),
        DeviceMesh::of_ranks(vec![0, 1], &[("dp", 3)]),
    ];
    for (i, result) in wrong.into_iter().enumerate() {
        assert!(matches!(result, Err(Error::Mesh { .. })), "{i}: {result:?}");
    }
    assert_eq!(
        mesh.flatten(&["dp", "sp"], "dp").unwrap().axes(),
        ["dp"],
        "the name of a merged axis is free"
    );
}

#[test]
fn sub_groups_are_those_of_lightrft() {
    // create_sub_group(size) of LightRFT: range(i * size, (i + 1) * size), and range(i, world, size).
    for (world, size) in [(4, 2), (6, 2), (6, 3), (3, 1), (3, 3)] {
        let groups = World::run(world, |comm| {
            assert!(matches!(sub_groups(&comm, 5), Err(Error::Mesh { .. })));
            assert!(matches!(sub_groups(&comm, 0), Err(Error::Mesh { .. })));
            let groups = sub_groups(&comm, size)?;
            // What LightRFT checks on each: all sum up.
            for group in [&groups.consecutive, &groups.strided] {
                let mut sum = [1.1f32];
                group.all_reduce(&mut sum, ReduceOp::Mean)?;
                assert!((sum[0] - 1.1).abs() < 1e-6);
            }
            Ok((groups.consecutive.ranks().to_vec(), groups.strided.ranks().to_vec()))
        })
        .unwrap();
        for (rank, (consecutive, strided)) in groups.into_iter().enumerate() {
            let engine = rank / size;
            assert_eq!(consecutive, (engine * size..(engine + 1) * size).collect::<Vec<_>>());
            assert_eq!(strided, (rank % size..world).step_by(size).collect::<Vec<_>>());
        }
    }
}

#[test]
fn a_mesh_of_groups_makes_only_what_it_needs() {
    let mesh = DeviceMesh::new(&[("replicate", 1), ("shard", 4)]).unwrap();
    World::run(4, |world| {
        let mut groups = MeshGroups::new(world.clone(), mesh.clone())?;
        assert_eq!(groups.axis("shard")?.name(), world.name(), "the world in order is the world");
        assert_eq!(groups.axis("replicate")?.ranks(), [world.rank()]);
        // No call was made for either: the first group that is has the first number.
        let name = groups.flatten(&["shard", "replicate"], "flat")?.name().to_string();
        assert_eq!(name, world.name());
        let backwards: Vec<usize> = (0..4).rev().collect();
        assert_eq!(world.subgroup(&backwards)?.unwrap().name(), "world/0");
        // Two axes of the same lines have one group.
        let square = DeviceMesh::new(&[("dp", 2), ("one", 1), ("sp", 2)])?;
        let mut groups = MeshGroups::new(world.clone(), square)?;
        let both = groups.flatten(&["one", "sp"], "one_sp")?.name().to_string();
        assert_eq!(both, groups.axis("sp")?.name());
        Ok(())
    })
    .unwrap();
}

#[test]
fn an_axis_of_another_world_is_refused_before_anything_is_sent() {
    for ranks in [vec![0, 1, 2], vec![0], vec![0, 2]] {
        let mesh = DeviceMesh::of_ranks(ranks.clone(), &[("dp", ranks.len())]).unwrap();
        World::run(2, |world| {
            assert!(matches!(axis_group(&world, &mesh, "dp"), Err(Error::Mesh { .. })), "{ranks:?}");
            Ok(())
        })
        .unwrap();
    }
}
