//! A model trained with parameters, gradients and optimizer state all sharded (ZeRO-3, FSDP), on three ranks.
//! `cargo run -p lightrft-sharding --example 2_train_tiny_zero3`   prints a falling loss
//!
//! On processes, only the line that makes the group changes.

mod tiny;

use lightrft_collectives::{CommunicatorExt as _, ReduceOp, local::World};
use lightrft_sharding::{AdamW, AdamWConfig, Error, Policy, ShardedModel};
use tiny::{Batch, Tiny};

const RANKS: usize = 3;
const TOKENS_PER_RANK: usize = 8;

fn main() -> Result<(), Error> {
    let losses = World::new(RANKS).launch(|comm| {
        let (rank, model) = (comm.rank(), Tiny { vocab: 24, width: 12, layers: 2 });
        let mut sharded = ShardedModel::new(model, comm.clone(), Policy::default())?;
        sharded.units_mut().load(tiny::start)?;
        let mut adamw = AdamW::new(AdamWConfig::default(), sharded.units())?;

        // Each rank has its own third of the tokens; after token t comes 5t + 1.
        let tokens: Vec<usize> = (0..TOKENS_PER_RANK).map(|i| rank * TOKENS_PER_RANK + i).collect();
        let targets = tokens.iter().map(|t| (5 * t + 1) % 24).collect();
        let batch = Batch { tokens, targets };
        let mut losses = Vec::new();
        for step in 0..60 {
            let (logits, tape) = sharded.forward(&batch)?;
            let (loss, grad) = model.loss(&logits, &batch, RANKS * TOKENS_PER_RANK);
            sharded.backward(tape, grad)?;
            let report = adamw.step(sharded.units_mut(), 0.02)?;
            let mut mean = [loss];
            comm.all_reduce(&mut mean, ReduceOp::Mean)?;
            if rank == 0 && step % 10 == 0 {
                println!("step {step:2}: loss {:.4}, gradient norm {:.4}", mean[0], report.grad_norm);
            }
            losses.push(mean[0]);
        }
        if rank == 0 {
            let persistent = sharded.units().persistent_bytes() + adamw.persistent_bytes();
            let transient = sharded.units().transient_bytes().peak;
            let elems = sharded.units().plan().elems();
            println!(
                "{elems} parameters: {persistent} bytes kept by each rank, {transient} more while it computes"
            );
        }
        Ok::<_, Error>(losses)
    })?;
    let (first, last) = (losses[0][0], losses[0][59]);
    println!("loss {first:.4} -> {last:.4}");
    assert!(last < first / 10.0);
    Ok(())
}
