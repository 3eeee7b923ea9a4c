//! The status of a training step, a map of named numbers, reduced over all ranks in one collective.
//! `cargo run -p lightrft-collectives --example 5_status`   prints the reduced map, then what a misspelt key gives

use std::collections::BTreeMap;

use lightrft_collectives::local::World;
use lightrft_collectives::{CommunicatorExt, ReduceOp};

fn main() -> lightrft_collectives::Result<()> {
    let lines = World::run(3, |comm| {
        let rank = comm.rank() as f64;
        let mut status: BTreeMap<String, f64> =
            [("reward", rank), ("response_length_max", 100.0 * rank), ("tokens_sum", 10.0)]
                .map(|(key, value)| (key.to_string(), value))
                .into();
        comm.all_reduce_map_by(&mut status, |key| match key {
            key if key.ends_with("_max") => ReduceOp::Max,
            key if key.ends_with("_sum") => ReduceOp::Sum,
            _ => ReduceOp::Mean,
        })?;

        // Every rank learns which keys differ, and where; the group stays usable.
        let key = if comm.rank() == 1 { "looss" } else { "loss" };
        let mut misspelt = BTreeMap::from([(key.to_string(), 0.5f64)]);
        let refused = comm.all_reduce_map(&mut misspelt, ReduceOp::Mean).err();
        Ok((format!("{status:?}"), refused.map(|error| error.to_string())))
    })?;
    let (status, refused) = &lines[0];
    println!("{status}");
    println!("{}", refused.as_deref().unwrap_or("no error"));
    assert!(lines.iter().all(|line| *line == lines[0]), "the same on every rank");
    Ok(())
}
