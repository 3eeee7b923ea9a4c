//! Sums of one layer's gradients travel while the next layer's are computed.
//! `cargo run -p lightrft-collectives --example 4_overlap`   prints `8 layers summed, the first 3.0, the last 24.0`

use lightrft_collectives::local::World;
use lightrft_collectives::{Communicator, GroupOptions, Queue, ReduceOp};

const LAYERS: usize = 8;

/// Stands for a backward pass: the gradient of one layer on this rank.
fn gradient(layer: usize, rank: usize) -> Vec<f32> {
    vec![(layer + 1) as f32 * (rank + 1) as f32; 10_000]
}

fn main() -> lightrft_collectives::Result<()> {
    let sums = World::run(2, |world| {
        // A group of its own, so that its calls and the world's need no common order.
        let everyone: Vec<usize> = (0..world.world_size()).collect();
        let group = world.subgroup_with(&everyone, &GroupOptions::default().exclusive())?;
        let queue = Queue::new(group.unwrap_or_else(|| world.clone()))?;

        // Each gradient moves into its call at once, and comes back as the sum.
        let calls: Vec<_> =
            (0..LAYERS).map(|layer| queue.all_reduce(gradient(layer, world.rank()), ReduceOp::Sum)).collect();
        calls.into_iter().map(|call| Ok(call.wait()?[0])).collect::<lightrft_collectives::Result<Vec<f32>>>()
    })?;
    assert_eq!(sums[0], sums[1]);
    println!("{LAYERS} layers summed, the first {:?}, the last {:?}", sums[0][0], sums[0][LAYERS - 1]);
    Ok(())
}
