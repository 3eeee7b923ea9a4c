//! One RL step in one process: a tiny random model, prompts, answers, a reward, an update.
//! `cargo run -p lightrft-strategy --example 1_one_step`

use std::error::Error;
use std::path::Path;

use lightrft_collectives::Rendezvous;
use lightrft_data::{JsonLines, JsonLinesOptions};
use lightrft_engine::embedded::{DecoderConfig, Weights};
use lightrft_strategy::{Grpo, GrpoParts, Score, Strategy, StrategyConfig, Text, write_model};

fn main() -> Result<(), Box<dyn Error>> {
    // A model folder as Hugging Face lays it out: here a random one, with the arithmetic example's tokenizer.
    let work = std::env::temp_dir().join(format!("lightrft-one-step-{}", std::process::id()));
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data");
    let config = DecoderConfig::from_json(
        r#"{"model_type": "llama", "vocab_size": 16, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}"#,
    )?;
    write_model(&work, &config, &Weights::random(&config, 1, 0.1, &candle_core::Device::Cpu)?)?;
    std::fs::copy(data.join("tokenizer.json"), work.join("tokenizer.json"))?;

    // A world of one rank; under torchrun the same lines make a world of many.
    let settings = StrategyConfig {
        rollout_batch_size: 8,
        n_samples_per_prompt: 4,
        train_batch_size: 32,
        micro_train_batch_size: 16,
        prompt_max_len: 12,
        generate_max_len: 4,
        actor_lr: 1e-3,
        lr_warmup_ratio: 0.0,
        enable_engine_sleep: true,
        ..StrategyConfig::default()
    };
    let strategy = Strategy::with_world(settings, Rendezvous::from_env()?.init()?)?;
    let actor = strategy.prepare_actor(&work)?;
    let parts = GrpoParts {
        engine: strategy.prepare_engine(&actor)?,
        actor,
        reference: Some(strategy.prepare_reference(&work)?),
        text: Text::from_folder(&work)?,
        prompts: JsonLines::open(data.join("arithmetic_train.jsonl"), JsonLinesOptions::default())?,
        // A random model never answers a sum; it can learn to use digits.
        reward: Box::new(|_, answer| Score {
            reward: answer.text.chars().filter(char::is_ascii_digit).count() as f32,
            correct: !answer.text.is_empty() && answer.text.chars().all(|c| c.is_ascii_digit()),
        }),
        stop_tokens: vec![1],
        total_steps: 3,
    };
    let mut grpo = Grpo::new(&strategy, parts)?;
    for _ in 0..3 {
        let m = grpo.step()?;
        println!(
            "step {}  reward {:.3}  loss {:+.4}  log-prob gap {:.1e}",
            m.step, m.reward, m.loss, m.log_prob_gap
        );
        assert!(m.log_prob_gap < 1e-4);
    }
    std::fs::remove_dir_all(&work)?;
    Ok(())
}
