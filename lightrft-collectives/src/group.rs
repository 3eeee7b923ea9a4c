//! From a mesh axis, or a size, to a live group

use std::sync::Arc;

use crate::communicator::Communicator;
use crate::error::{Error, Result};
use crate::mesh::DeviceMesh;
use crate::operation::Call;

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
/// # Errors
/// [`Error::Mesh`] if there is no such axis or the mesh has other ranks than the world; otherwise as
/// [`Communicator::subgroup`].
pub fn axis_group<C: Communicator + ?Sized>(
    world: &C,
    mesh: &DeviceMesh,
    axis: &str,
) -> Result<Arc<dyn Communicator>> {
    if mesh.ranks().len() != world.world_size() {
        let got = format!("a mesh of {} ranks", mesh.ranks().len());
        return Err(Error::Mesh {
            got,
            expected: format!("the {} ranks of `{}`", world.world_size(), world.name()),
        });
    }
    one_of(world, &mesh.lines(axis)?)
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
pub fn sub_groups<C: Communicator + ?Sized>(world: &C, size: usize) -> Result<SubGroups> {
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
    let mut mine = None;
    for list in lists {
        mine = world.subgroup(list)?.or(mine);
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
