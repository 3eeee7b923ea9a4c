//! The groups that a policy exchanges over, from a mesh: shard groups, their replicas, neighbours for hpZ.

use std::sync::Arc;

use lightrft_collectives::{Communicator, DeviceMesh, GroupOptions, MeshGroups, Queue};

use crate::error::{Error, Result};
use crate::host::HostMemory;
use crate::memory::Memory;
use crate::policy::{Overlap, Policy, ReshardAfterForward, Stage};

/// Live groups of this rank. What runs on a queue has a group of its own, so that its calls have an order of their own.
#[derive(Debug)]
pub(crate) struct Groups {
    /// All ranks.
    pub(crate) world: Arc<dyn Communicator>,
    /// Those that units are cut over.
    pub(crate) shard: Arc<dyn Communicator>,
    /// Those that hold the same shards.
    pub(crate) replicate: Arc<dyn Communicator>,
    /// Neighbours in the shard group that keep gathered units among them.
    pub(crate) near: Option<Arc<dyn Communicator>>,
    /// Where gathers run ahead of computing.
    pub(crate) gathers: Option<Queue>,
    /// Where reduce-scatters run beside backward.
    pub(crate) reduces: Option<Queue>,
    /// Where sums over replicas run beside the last backward before a step. The step's own go through it too: a rank that
    /// took another pass for the last is then found out by the sizes of its calls, not by a deadline.
    pub(crate) sums: Option<Arc<Queue>>,
}

impl Groups {
    /// One shard group of all ranks, nothing overlapped.
    pub(crate) fn flat(world: Arc<dyn Communicator>) -> Result<Self> {
        let size = world.world_size();
        Self::new::<HostMemory>(world, &mesh(size, size)?, &Policy { prefetch: 0, ..Policy::default() })
    }

    /// The groups for `policy` on a mesh of two axes. *Collective.*
    pub(crate) fn new<Mem: Memory>(
        world: Arc<dyn Communicator>,
        mesh: &DeviceMesh,
        policy: &Policy,
    ) -> Result<Self> {
        let failed = Error::collective("making the groups", "the mesh");
        let [replicate, shard] = mesh.axes() else {
            return Err(misfit(mesh, &*world));
        };
        let groups = MeshGroups::new(Arc::clone(&world), mesh.clone()).map_err(&failed)?;
        let axis = |name: &str| groups.axis(name).map(Arc::clone).map_err(&failed);
        let (replicate, shard) = (axis(replicate)?, axis(shard)?);
        let size = shard.world_size();
        let exclusive = GroupOptions::default().exclusive();
        let queue = |over: &Arc<dyn Communicator>, wanted: bool| -> Result<Option<Queue>> {
            if !wanted || over.world_size() == 1 || !Mem::THREADS {
                return Ok(None);
            }
            let all: Vec<usize> = (0..over.world_size()).collect();
            let own = over.subgroup_with(&all, &exclusive).map_err(&failed)?;
            own.map(Queue::new).transpose().map_err(&failed)
        };
        let gathers = queue(&shard, policy.prefetch > 0)?;
        let reduces = queue(&shard, policy.overlap == Overlap::On)?;
        let sums = queue(&replicate, policy.overlap == Overlap::On)?.map(Arc::new);
        let mut near = None;
        if let ReshardAfterForward::ToGroup(ranks) = effective_reshard(policy, size) {
            let places: Vec<usize> = (0..size).collect();
            for neighbours in places.chunks(ranks) {
                near = shard.subgroup_with(neighbours, &exclusive).map_err(&failed)?.or(near);
            }
        }
        Ok(Self { world, shard, replicate, near, gathers, reduces, sums })
    }

    /// Whether what one rank holds all ranks hold.
    pub(crate) fn all_are_replicas(&self) -> bool {
        self.replicate.world_size() == self.world.world_size()
    }

    /// Where ranks sum what all of them hold whole.
    pub(crate) fn whole_comm(&self) -> Arc<dyn Communicator> {
        if self.all_are_replicas() { self.sums_comm() } else { Arc::clone(&self.world) }
    }

    /// Where replicas sum their shards.
    pub(crate) fn sums_comm(&self) -> Arc<dyn Communicator> {
        match &self.sums {
            Some(queue) => Arc::<Queue>::clone(queue),
            None => Arc::clone(&self.replicate),
        }
    }
}

/// `world` ranks in shard groups of `ranks`, neighbours together.
pub(crate) fn mesh(world: usize, ranks: usize) -> Result<DeviceMesh> {
    DeviceMesh::new(&[("replicate", world / ranks.max(1)), ("shard", ranks)])
        .map_err(Error::collective("making the mesh", "the world"))
}

/// A caller's mesh with both axes: one axis is that of the shards, of two the first is that of replicas.
///
/// # Errors
/// [`Error::MeshMismatch`] for another number of axes or of ranks.
pub(crate) fn two_axes(mesh: &DeviceMesh, world: &dyn Communicator) -> Result<DeviceMesh> {
    if mesh.ranks().len() != world.world_size() {
        return Err(misfit(mesh, world));
    }
    match mesh.axes() {
        [_, _] => Ok(mesh.clone()),
        [shard] => {
            let axes = [("replicas", 1), (shard.as_str(), mesh.ranks().len())];
            DeviceMesh::of_ranks(mesh.ranks().to_vec(), &axes)
                .map_err(Error::collective("making the mesh", "the world"))
        }
        _ => Err(misfit(mesh, world)),
    }
}

fn misfit(mesh: &DeviceMesh, world: &dyn Communicator) -> Error {
    Error::MeshMismatch {
        axes: mesh.axes().to_vec(),
        sizes: mesh.sizes().to_vec(),
        group: world.name().to_owned(),
        world: world.world_size(),
    }
}

/// What `reshard_after_forward` comes to over shard groups of `size` ranks.
pub(crate) fn effective_reshard(policy: &Policy, size: usize) -> ReshardAfterForward {
    match policy.reshard_after_forward {
        _ if policy.stage != Stage::Zero3 => ReshardAfterForward::Always,
        ReshardAfterForward::ToGroup(1) => ReshardAfterForward::Never,
        ReshardAfterForward::ToGroup(ranks) if ranks >= size => ReshardAfterForward::Always,
        other => other,
    }
}
