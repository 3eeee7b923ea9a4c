//! Generation with the embedded engine: a tiny random model, or a Llama or Qwen2 folder.
//!
//! `cargo run -p lightrft-engine --features embedded --example 3_generate_embedded [FOLDER]` prints the completions'
//! token ids with their log-probabilities, and the tokens per second.

use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::Device;
use lightrft_engine::embedded::{DecoderConfig, EmbeddedEngine, Settings, Weights};
use lightrft_engine::{Engine, Error, LogProbs, Request, Sampling, Watch};

fn tiny() -> Result<EmbeddedEngine, Error> {
    let config = DecoderConfig::from_json(
        r#"{"model_type": "qwen2", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 256, "tie_word_embeddings": true}"#,
    )?;
    let weights = Weights::random(&config, 1, 0.1, &Device::Cpu)?;
    EmbeddedEngine::new(config, weights, Settings::default())
}

fn main() -> Result<(), Error> {
    let mut engine = match std::env::args().nth(1) {
        Some(folder) => EmbeddedEngine::from_folder(Path::new(&folder), Settings::default())?,
        None => tiny()?,
    };
    println!("{} parameters, {:?}", engine.config().parameter_count(), engine.memory_bytes());

    let sampling = Sampling {
        temperature: 0.8,
        top_p: 0.95,
        seed: 7,
        max_new_tokens: 24,
        stop_tokens: engine.end_tokens().to_vec(),
        log_probs: LogProbs::Raw,
        ..Sampling::default()
    };
    // Prompts of different lengths, four samples each; every prompt is computed once.
    let requests: Vec<Request> = (1..5_u32)
        .map(|n| Request::new((1..=4 * n).collect::<Vec<_>>(), sampling.clone()).samples(4))
        .collect();

    let started = Instant::now();
    let mut tell =
        |p: lightrft_engine::Progress| eprint!("\r{} of {} done, {} tokens", p.done, p.total, p.tokens);
    let completions =
        engine.generate(&requests, &mut Watch::within(Duration::from_secs(600)).telling(&mut tell))?;
    let seconds = started.elapsed().as_secs_f64();
    eprintln!();

    for c in completions.iter().step_by(4) {
        let log_prob: f32 = c.log_probs.iter().sum();
        println!("prompt {}: {:?} ({:?}, log-probability {log_prob:.2})", c.request, c.tokens, c.finish);
    }
    let tokens: usize = completions.iter().map(|c| c.tokens.len()).sum();
    println!("{tokens} tokens in {seconds:.2} s: {:.0} tokens/s", tokens as f64 / seconds);
    Ok(())
}
