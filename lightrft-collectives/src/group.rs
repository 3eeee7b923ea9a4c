//! From a mesh axis, or a size, to a live group

use std::sync::Arc;

use crate::communicator::Communicator;
use crate::error::{Error, Result};
use crate::mesh::DeviceMesh;
use crate::operation::Call;
use crate::single::Single;
use crate::site;

/// The group of this rank's line along `axis`. Collective over `world`, whose ranks are those of `mesh`.
///
/// ```
/// use lightrft_collectives::{DeviceMesh, axis_group, local::World};
///
/// let ranks = World::run(4, |world| {
///     let mesh = DeviceMesh::new(&[("replicate", 2), ("shard", 2)])?;
///     Ok(axis_group(&*world, &mesh, "replicate")?.ranks().to_vec())
/// })?;
/// assert_eq!(ranks, [[0, 2], [1, 3], [0, 2], [1, 3]]);
/// # Ok::<_, lightrft_collectives::Error>(())
/// ```
///
/// Groups of one rank are made without a word between ranks.
///
/// # Errors
/// [`Error::Mesh`] if there is no such axis or the mesh has other ranks than the world; otherwise as
/// [`Communicator::subgroup`].
#[track_caller]
pub fn axis_group<C: Communicator + ?Sized>(
    world: &C,
    mesh: &DeviceMesh,
    axis: &str,
) -> Result<Arc<dyn Communicator>> {
    let _site = site::mark();
    check_mesh(world, mesh)?;
    one_of(world, &mesh.lines(axis)?)
}

/// The ranks of a mesh of groups are all those of the group it is made in, in any order.
fn check_mesh<C: Communicator + ?Sized>(world: &C, mesh: &DeviceMesh) -> Result<()> {
    let (ranks, size) = (mesh.ranks(), world.world_size());
    // No rank is in a mesh twice.
    if ranks.len() == size && ranks.iter().all(|rank| *rank < size) {
        return Ok(());
    }
    let got = format!("a mesh of the ranks {ranks:?}");
    Err(Error::Mesh { got, expected: format!("the {size} ranks of `{}`", world.name()) })
}

/// A mesh whose axes are live groups, each made once.
///
/// ```
/// use lightrft_collectives::{CommunicatorExt, DeviceMesh, MeshGroups, ReduceOp, local::World};
///
/// let sums = World::run(4, |world| {
///     let mesh = DeviceMesh::new(&[("replicate", 2), ("shard", 2), ("sp", 1)])?;
///     let mut groups = MeshGroups::new(world, mesh)?;
///     groups.flatten(&["replicate", "shard"], "data")?;
///     let mut sums = [1; 3];
///     for (sum, axis) in sums.iter_mut().zip(["shard", "sp", "data"]) {
///         groups.axis(axis)?.all_reduce(std::slice::from_mut(sum), ReduceOp::Sum)?;
///     }
///     Ok(sums)
/// })?;
/// assert_eq!(sums, [[2, 1, 4]; 4]);
/// # Ok::<_, lightrft_collectives::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct MeshGroups {
    world: Arc<dyn Communicator>,
    mesh: DeviceMesh,
    /// By name: the axes of the mesh, then what was flattened.
    groups: Vec<(String, Arc<dyn Communicator>)>,
}

impl MeshGroups {
    /// Makes the group of each axis. Collective over `world`, whose ranks are those of `mesh`. An axis of one rank needs no
    /// communication, one of all ranks in order is `world` itself.
    ///
    /// # Errors
    /// As [`axis_group`].
    #[track_caller]
    pub fn new(world: Arc<dyn Communicator>, mesh: DeviceMesh) -> Result<Self> {
        let _site = site::mark();
        check_mesh(&world, &mesh)?;
        let mut groups = MeshGroups { world, mesh, groups: Vec::new() };
        for axis in groups.mesh.axes().to_vec() {
            let group = groups.make(&groups.mesh, &axis)?;
            groups.groups.push((axis, group));
        }
        Ok(groups)
    }

    /// The arithmetic of the mesh.
    pub fn mesh(&self) -> &DeviceMesh {
        &self.mesh
    }

    /// The group of all ranks of the mesh.
    pub fn world(&self) -> &Arc<dyn Communicator> {
        &self.world
    }

    /// The group of this rank's line along an axis, or along what was flattened to that name.
    ///
    /// # Errors
    /// [`Error::Mesh`] if there is no such axis.
    pub fn axis(&self, axis: &str) -> Result<&Arc<dyn Communicator>> {
        let found = self.groups.iter().find(|(name, _)| name == axis);
        found.map(|(_, group)| group).ok_or_else(|| {
            let names: Vec<&str> = self.groups.iter().map(|(name, _)| name.as_str()).collect();
            Error::Mesh { got: format!("axis `{axis}`"), expected: format!("one of {names:?}") }
        })
    }

    /// Makes the group of several axes together, to be had under `name` as well as the axes themselves. Collective over the
    /// mesh's ranks.
    ///
    /// # Errors
    /// As [`DeviceMesh::flatten`], also if `name` was used before; otherwise as [`Communicator::subgroup`].
    #[track_caller]
    pub fn flatten(&mut self, axes: &[&str], name: &str) -> Result<&Arc<dyn Communicator>> {
        let _site = site::mark();
        if self.groups.iter().any(|(other, _)| other == name) {
            return Err(Error::Mesh {
                got: format!("axis `{name}` again"),
                expected: "a name of its own".into(),
            });
        }
        let group = self.make(&self.mesh.flatten(axes, name)?, name)?;
        self.groups.push((name.into(), group));
        self.axis(name)
    }

    fn make(&self, mesh: &DeviceMesh, axis: &str) -> Result<Arc<dyn Communicator>> {
        let lines = mesh.lines(axis)?;
        let whole = lines.len() == 1 && lines[0].iter().enumerate().all(|(place, rank)| place == *rank);
        if whole { Ok(self.world.clone()) } else { one_of(&self.world, &lines) }
    }
}

/// The two groups that LightRFT makes for an engine over `size` ranks.
#[derive(Clone, Debug)]
pub struct SubGroups {
    /// `size` neighbours, `[i * size, (i + 1) * size)`: the ranks of one engine.
    pub consecutive: Arc<dyn Communicator>,
    /// Every `size`-th rank, `[i, i + size, ...]`: the same place in all engines.
    pub strided: Arc<dyn Communicator>,
}

/// Cuts the world into consecutive groups of `size` ranks and, across them, strided ones. Collective over `world`.
///
/// # Errors
/// [`Error::Mesh`] if the world is no multiple of `size`; otherwise as [`Communicator::subgroup`].
#[track_caller]
pub fn sub_groups<C: Communicator + ?Sized>(world: &C, size: usize) -> Result<SubGroups> {
    let _site = site::mark();
    let ranks = world.world_size();
    if size == 0 || !ranks.is_multiple_of(size) {
        let got = format!("groups of {size} ranks");
        return Err(Error::Mesh {
            got,
            expected: format!("a divisor of the {ranks} ranks of `{}`", world.name()),
        });
    }
    let mesh = DeviceMesh::new(&[("strided", ranks / size), ("consecutive", size)])?;
    let consecutive = axis_group(world, &mesh, "consecutive")?;
    Ok(SubGroups { consecutive, strided: axis_group(world, &mesh, "strided")? })
}

/// Makes all the groups, as every rank must, and returns the one that this rank is in.
fn one_of<C: Communicator + ?Sized>(world: &C, lists: &[Vec<usize>]) -> Result<Arc<dyn Communicator>> {
    let rank = world.rank();
    let mut mine = None;
    for list in lists {
        // Every rank knows that such a group has nobody to talk to.
        if list.len() > 1 {
            mine = world.subgroup(list)?.or(mine);
        } else if list.contains(&rank) {
            mine = Some(Single::group(format!("{}/alone", world.name()), world.ranks()[rank]));
        }
    }
    let missing = || Error::Members { group: world.name().into(), ranks: Vec::new() };
    mine.ok_or_else(missing)
}

/// The members of a new group must be ranks of its parent, each once.
pub(crate) fn check_members<C: Communicator + ?Sized>(parent: &C, ranks: &[usize]) -> Result<()> {
    let (world, group) = (parent.world_size(), parent.name());
    let mut seen = vec![false; world];
    for &rank in ranks {
        match seen.get_mut(rank) {
            None => {
                let group = group.into();
                return Err(Error::Rank { call: Call::Subgroup, group, what: "member", rank, world });
            }
            Some(true) => return Err(Error::Members { group: group.into(), ranks: ranks.to_vec() }),
            Some(new) => *new = true,
        }
    }
    if ranks.is_empty() {
        return Err(Error::Members { group: group.into(), ranks: Vec::new() });
    }
    Ok(())
}

/// The name of the group in the place of `name`: `world`, `world~1`, `world~2`.
pub(crate) fn next_name(name: &str) -> String {
    match name.rsplit_once('~').map(|(stem, number)| (stem, number.parse::<u64>())) {
        Some((stem, Ok(number))) => format!("{stem}~{}", number + 1),
        _ => format!("{name}~1"),
    }
}

/// The error of a second [`rebuild`](Communicator::rebuild).
pub(crate) fn rebuilt_before<C: Communicator + ?Sized>(dead: &C) -> Error {
    Error::NoRebuild { group: dead.name().into(), why: "that was done, or tried, before" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_on() {
        assert_eq!(next_name("world"), "world~1");
        assert_eq!(next_name("world~9"), "world~10");
        assert_eq!(next_name("world/3~1"), "world/3~2");
        assert_eq!(next_name("world~1/0"), "world~1/0~1");
    }
}
