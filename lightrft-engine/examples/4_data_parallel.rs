//! Two engines behind one handle, one of which dies: the run goes on, and the next call has two again.
//!
//! `cargo run -p lightrft-engine --example 4_data_parallel` prints what becomes of each replica, and that the completions
//! are those of one engine that never dies. The engines are scripted; those of servers are made by
//! `vllm::VllmEngine::start` and `sglang::SglangEngine::start` in the same place.

use std::sync::atomic::{AtomicBool, Ordering};

use lightrft_engine::testing::{ScriptedEngine, TensorBytes};
use lightrft_engine::{DataParallel, Engine, EngineExt, Error, Request, Result, Sampling, Version};

/// What a trainer would read from its last checkpoint.
fn give_weights(engine: &mut dyn Engine, to: Version) -> Result<()> {
    let weights = ScriptedEngine::new(64).example_weights(to.0);
    let tensors = weights.iter().map(TensorBytes::view).collect::<Result<Vec<_>>>()?;
    engine.replace_weights(to, &tensors, 1 << 20)
}

fn main() -> Result<(), Error> {
    let first = AtomicBool::new(true);
    let make = move |replica| -> Result<Box<dyn Engine>> {
        let engine = ScriptedEngine::new(64);
        let dies = replica == 1 && first.swap(false, Ordering::SeqCst);
        // After an update of three calls: begin, push, commit.
        Ok(Box::new(if dies { engine.dying_at(3) } else { engine }))
    };
    let mut engines = DataParallel::new(2, make)?
        .with_weights(give_weights)
        .telling(|event| println!("          {event:?}"));

    let requests: Vec<Request> =
        (1..9).map(|n| Request::new(vec![n; 4 * n as usize], Sampling::default()).samples(2)).collect();
    for version in (1..4).map(Version) {
        give_weights(&mut engines, version)?;
        let completions = engines.complete(&requests)?;

        let mut one = ScriptedEngine::new(64);
        give_weights(&mut one, version)?;
        let same = completions == one.complete(&requests)?;
        println!("{version}: {} completions, as one engine draws them: {same}", completions.len());
        for (index, replica) in engines.replicas().iter().enumerate() {
            println!("          replica {index}: {:?}, {}", replica.service, replica.state);
        }
    }
    Ok(())
}
