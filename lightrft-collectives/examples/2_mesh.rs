//! Four ranks as a 2 x 2 mesh: sums along each axis.
//! `cargo run -p lightrft-collectives --example 2_mesh`   prints four lines, `rank 3 (1, 1): shard 5, replicate 4` the last

use lightrft_collectives::local::World;
use lightrft_collectives::{CommunicatorExt, DeviceMesh, ReduceOp, axis_group};

fn main() -> lightrft_collectives::Result<()> {
    let lines = World::run(4, |world| {
        let mesh = DeviceMesh::new(&[("replicate", 2), ("shard", 2)])?;
        let mut sums = [0i32; 2];
        for (sum, axis) in sums.iter_mut().zip(["shard", "replicate"]) {
            *sum = world.rank() as i32;
            axis_group(&*world, &mesh, axis)?.all_reduce(std::slice::from_mut(sum), ReduceOp::Sum)?;
        }
        let place = mesh.coordinates(world.rank()).unwrap_or_default();
        let [shard, replicate] = sums;
        Ok(format!(
            "rank {} ({}, {}): shard {shard}, replicate {replicate}",
            world.rank(),
            place[0],
            place[1]
        ))
    })?;
    for line in lines {
        println!("{line}");
    }
    Ok(())
}
