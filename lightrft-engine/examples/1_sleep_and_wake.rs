//! Sleep, wake and update, call by call, on an engine without a model.
//!
//! `cargo run -p lightrft-engine --example 1_sleep_and_wake` prints what each call does to state and memory.

use lightrft_engine::testing::{ScriptedEngine, TensorBytes};
use lightrft_engine::{Engine, EngineExt, Error, Level, Parts, Request, Sampling, Version};

fn show(call: &str, engine: &ScriptedEngine) {
    let memory = engine.memory_bytes().unwrap_or_default();
    let version = engine.version().map_or_else(|| "no version".to_owned(), |v| v.to_string());
    let (weights, cache, parked) = (memory.weights, memory.cache, memory.parked);
    let state = engine.state().to_string();
    println!(
        "{call:<28} {state:<30} {version:<11} weights {weights:>4} B, cache {cache:>4} B, parked {parked:>4} B"
    );
}

fn main() -> Result<(), Error> {
    let mut engine = ScriptedEngine::new(32);
    show("new", &engine);

    // Level 1 keeps the weights on the host: cheap to wake from when they will not change.
    engine.sleep(Level::One)?;
    show("sleep, level 1", &engine);
    engine.wake(Parts::All)?;
    show("wake", &engine);

    // Level 2 drops them: right before an update, which brings new ones anyway.
    engine.sleep(Level::Two)?;
    show("sleep, level 2", &engine);
    let request = Request::new([1, 2, 3], Sampling::default());
    if let Err(refused) = engine.complete(std::slice::from_ref(&request)) {
        println!("{:<28} {refused}", "generate");
    }

    // Weights first, the cache last: at no time do old weights, new weights and cache stand side by side.
    engine.wake(Parts::Weights)?;
    show("wake the weights", &engine);
    let weights = engine.example_weights(1);
    let mut update = engine.begin_update(Version(1))?;
    for tensor in &weights {
        update.push(&[TensorBytes::view(tensor)?])?;
    }
    update.commit()?;
    show("update to version 1", &engine);
    engine.wake(Parts::Cache)?;
    show("wake the cache", &engine);

    let completion = engine.complete(&[request])?.remove(0);
    println!("{:<28} {:?}, drawn by {}", "generate", completion.tokens, completion.version);
    Ok(())
}
