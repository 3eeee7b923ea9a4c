//! One unit over three ranks: who owns what, the unit made whole again, and a gradient summed into its shards.
//! `cargo run -p lightrft-sharding --example 1_shard_and_gather`

use std::convert::Infallible;
use std::sync::Arc;

use lightrft_collectives::local::World;
use lightrft_sharding::{Error, Mode, ParamSpec, Plan, ShardedUnits, UnitSpec};

fn main() -> Result<(), Error> {
    let unit = UnitSpec::new("mlp", [ParamSpec::new("mlp.weight", [3, 2]), ParamSpec::new("mlp.bias", [2])]);
    let plan = Arc::new(Plan::new(vec![unit], 3)?);
    let flat = &plan.units()[0];
    println!(
        "{} elements, {} with padding, {} on each rank",
        flat.elems(),
        flat.padded_elems(),
        flat.shard_elems()
    );
    for rank in 0..3 {
        for (param, owned) in flat.owned_parts(rank) {
            println!("rank {rank}: {}[{:?}] at {:?}", flat.params()[param].name(), owned.param, owned.shard);
        }
    }

    let ranks = World::new(3).launch(|comm| {
        let rank = comm.rank();
        let mut units = ShardedUnits::new(Arc::clone(&plan), comm, Mode::Train)?;
        // Each rank is asked for what it owns, and for nothing else.
        units.load(|param, range, out| {
            let base = if param.name() == "mlp.weight" { 0 } else { 100 };
            out.iter_mut().zip(range).for_each(|(value, at)| *value = (base + at) as f32);
            Ok::<_, Infallible>(())
        })?;
        let whole = units.gather(0)?.values().to_vec();
        // Every rank has a gradient of the whole unit; the sum comes back cut.
        units.reduce_gradient(0, vec![rank as f32 + 1.0; 8])?;
        let grad = units.grad(0)?.map(<[f32]>::to_vec);
        Ok::<_, Error>((units.param(0)?.to_vec(), whole, grad))
    })?;

    for (rank, (shard, whole, grad)) in ranks.iter().enumerate() {
        println!("rank {rank}: shard {shard:?}, gradient {grad:?}, gathered {whole:?}");
        assert_eq!(whole[..8], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 100.0, 101.0]);
    }
    assert_eq!(ranks[2].2.as_deref(), Some(&[6.0, 6.0, 0.0][..])); // 1 + 2 + 3, and the padding
    Ok(())
}
