//! Two ranks, each a thread, add up their vectors.
//! `cargo run -p lightrft-collectives --example 1_all_reduce`   prints `every rank holds [3.0, 6.0, 9.0]`

use lightrft_collectives::local::World;
use lightrft_collectives::{CommunicatorExt, ReduceOp};

fn main() -> lightrft_collectives::Result<()> {
    let sums = World::run(2, |comm| {
        let factor = comm.rank() as f32 + 1.0;
        let mut data = [1.0, 2.0, 3.0].map(|x| x * factor);
        comm.all_reduce(&mut data, ReduceOp::Sum)?;
        Ok(data)
    })?;
    assert_eq!(sums[0], sums[1]);
    println!("every rank holds {:?}", sums[0]);
    Ok(())
}
