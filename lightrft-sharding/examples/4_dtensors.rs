//! A tensor on eight ranks: distributed from one, laid out otherwise, saved in parts, and loaded by four ranks.
//! `cargo run -p lightrft-sharding --example 4_dtensors`   prints who holds what, and ends with `four ranks have it`

use std::sync::Arc;

use lightrft_collectives::{Communicator, DeviceMesh, MeshGroups, local::World};
use lightrft_sharding::{
    DTensor, Error, Layout,
    Placement::{Replicate, Shard},
    Region,
};

const SHAPE: [usize; 2] = [10, 6];

fn main() -> Result<(), Error> {
    let full: Vec<f32> = (0..60u8).map(f32::from).collect();

    // Eight ranks as two times four: ten rows over "dp", six columns over "tp".
    let mesh = Arc::new(DeviceMesh::new(&[("dp", 2), ("tp", 4)])?);
    let blocks = Layout::new(Arc::clone(&mesh), [Shard { dim: 0 }, Shard { dim: 1 }])?;
    let saved: Vec<Vec<(Region, Vec<f32>)>> = World::new(8).launch(|comm| {
        let rank = comm.rank();
        let groups = Arc::new(MeshGroups::new(comm, DeviceMesh::clone(&mesh))?);
        // One rank has read the tensor; the others get their parts of it.
        let tensor = DTensor::distribute(&groups, &blocks, &SHAPE, (rank == 0).then_some(&full[..]))?;

        // Rows by "tp" first and within these by "dp", as when tensor parallelism came before data parallelism.
        let rows = blocks.placed([Shard { dim: 0 }, Shard { dim: 0 }])?.with_order(0, &["tp", "dp"])?;
        let tensor = tensor.redistribute(&rows)?;
        // Replicated along "dp": what was cut last is gathered.
        let replicas = tensor.view().redistribute(&rows.placed([Replicate, Shard { dim: 0 }])?)?;
        assert_eq!(replicas.full_tensor()?, full);

        // What a checkpoint would write: boxes with their values, each element on one rank.
        let parts = if tensor.spec().is_first_replica(rank) { tensor.view().parts()? } else { Vec::new() };
        Ok::<_, Error>(parts.into_iter().map(|(region, values)| (region, values.to_vec())).collect())
    })?;
    for (rank, parts) in saved.iter().enumerate() {
        for (Region { offsets, sizes }, _) in parts {
            println!("rank {rank} of 8 saves {sizes:?} at {offsets:?}");
        }
    }

    // Four ranks, columns: each takes from every saved box what it needs of it.
    let mesh = Arc::new(DeviceMesh::new(&[("shard", 4)])?);
    let columns = Layout::new(Arc::clone(&mesh), [Shard { dim: 1 }])?;
    let whole = World::new(4).launch(|comm| {
        let groups = Arc::new(MeshGroups::new(comm, DeviceMesh::clone(&mesh))?);
        let tensor = DTensor::load(&groups, &columns, &SHAPE, |wanted, out| {
            for (region, values) in saved.iter().flatten() {
                region.copy_overlap(values, wanted, out);
            }
            Ok::<_, Error>(())
        })?;
        let shape = tensor.spec().local_shape(groups.world().rank()).unwrap_or_default();
        Ok::<_, Error>((shape, tensor.full_tensor()?))
    })?;
    for (rank, (shape, values)) in whole.iter().enumerate() {
        println!("rank {rank} of 4 loads {shape:?}");
        assert_eq!(*values, full);
    }
    println!("four ranks have it");
    Ok(())
}
