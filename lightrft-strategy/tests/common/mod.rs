//! A tiny model folder, and worlds of threads to train it on.
#![allow(dead_code, clippy::unwrap_used)]

pub(crate) mod counted;

use std::path::Path;
use std::sync::Arc;

use candle_core::Device;
use lightrft_collectives::Communicator;
use lightrft_collectives::local::World;
use lightrft_data::{SamplerState, Shuffle, Tail};
use lightrft_engine::embedded::{DecoderConfig, Weights};
use lightrft_strategy::{Actor, RunState, StrategyConfig};

/// A model small enough for many runs; `changes` are fields of its `config.json`.
pub(crate) fn config(changes: serde_json::Value) -> DecoderConfig {
    let mut json = serde_json::json!({
        "model_type": "qwen2", "vocab_size": 16, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 32, "tie_word_embeddings": true, "eos_token_id": 1
    });
    for (field, value) in changes.as_object().unwrap() {
        json[field] = value.clone();
    }
    DecoderConfig::from_json(&json.to_string()).unwrap()
}

/// Writes a random model, and the tokenizer of the example.
pub(crate) fn write_folder(folder: &Path, config: &DecoderConfig, seed: u64) {
    let weights = Weights::random(config, seed, 0.2, &Device::Cpu).unwrap();
    lightrft_strategy::write_model(folder, config, &weights).unwrap();
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data/tokenizer.json");
    std::fs::copy(tokenizer, folder.join("tokenizer.json")).unwrap();
}

/// Runs `rank_main` on `ranks` threads.
pub(crate) fn on_ranks<T: Send>(
    ranks: usize,
    rank_main: impl Fn(Arc<dyn Communicator>) -> lightrft_strategy::Result<T> + Sync,
) -> Vec<T> {
    World::new(ranks).launch(rank_main).unwrap()
}

/// Every parameter, gathered. *Collective.*
pub(crate) fn all_parameters(actor: &mut Actor) -> lightrft_strategy::Result<Vec<f32>> {
    let mut parameters = Vec::new();
    actor.model.units_mut().for_each_full_unit(|unit, values| {
        parameters.extend_from_slice(&values[..unit.elems()]);
        Ok::<_, lightrft_strategy::Error>(())
    })?;
    Ok(parameters)
}

/// Settings for `rows` sequences a step, `micro` of them in one pass.
pub(crate) fn settings(rows: usize, micro: usize) -> StrategyConfig {
    StrategyConfig {
        train_batch_size: rows,
        micro_train_batch_size: micro,
        rollout_batch_size: rows,
        n_samples_per_prompt: 2,
        prompt_max_len: 8,
        generate_max_len: 8,
        ..StrategyConfig::default()
    }
}

/// `count` prompts with answers of pseudo-random tokens and lengths, the same in every call.
pub(crate) fn sequences(count: usize) -> Vec<(Vec<u32>, Vec<u32>)> {
    let mut state = 7u32;
    let mut next = |below: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) % below
    };
    (0..count)
        .map(|i| {
            // One total length, so that every way to cut the batch pads alike.
            let prompt = 2 + i % 4;
            let mut tokens = |n: usize| (0..n).map(|_| 2 + next(14)).collect::<Vec<u32>>();
            (tokens(prompt), tokens(9 - prompt))
        })
        .collect()
}

/// The state of a run that stands at `step`.
pub(crate) fn run_state(step: u64) -> RunState {
    RunState {
        step,
        updates: step,
        total_steps: 10,
        settings: StrategyConfig::default(),
        sampler: SamplerState {
            len: 100,
            seed: 42,
            shuffle: Shuffle::TorchExact,
            tail: Tail::Drop,
            epoch: 2,
            consumed: 48,
            world: 2,
            groups: None,
            mixture: None,
        },
        client: serde_json::json!({ "accuracy_before": 0.1 }),
    }
}
