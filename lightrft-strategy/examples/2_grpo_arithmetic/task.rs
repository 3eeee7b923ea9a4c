//! The task: sums as text in, their value as text out, and a small model that can learn them.

use std::path::{Path, PathBuf};

use lightrft_data::Prompt;
use lightrft_engine::FinishReason;
use lightrft_engine::embedded::{DecoderConfig, Family, RopeScaling};
use lightrft_strategy::{Answer, Score, StrategyConfig};

/// The character tokenizer: special tokens, digits, and the signs of the questions.
pub(crate) const TOKENIZER: &str = include_str!("../data/tokenizer.json");
/// Number of its tokens.
const VOCABULARY: usize = 16;
/// The token `<eos>`.
pub(crate) const END: u32 = 1;

/// `{"prompt": "47+8=", "label": "55"}`, the questions that are trained on.
pub(crate) fn training_file() -> PathBuf {
    data("arithmetic_train.jsonl")
}

/// Questions of the same form that training never sees.
pub(crate) fn held_out_file() -> PathBuf {
    data("arithmetic_heldout.jsonl")
}

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data").join(name)
}

/// 1 for exactly the right answer that was ended, else 0.
pub(crate) fn score(prompt: &Prompt, answer: &Answer<'_>) -> Score {
    let ended = matches!(answer.finish, FinishReason::Stop(_));
    let correct = ended && prompt.label.as_deref() == Some(answer.text);
    Score { reward: f32::from(u8::from(correct)), correct }
}

/// A Qwen2 of about 120,000 parameters.
pub(crate) fn model() -> DecoderConfig {
    DecoderConfig {
        family: Family::Qwen2,
        vocab_size: VOCABULARY,
        hidden_size: 64,
        intermediate_size: 256,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        max_position_embeddings: 32,
        tie_word_embeddings: true,
        qkv_bias: true,
        output_bias: false,
        mlp_bias: false,
        eos_token_ids: vec![END],
    }
}

/// The run's settings for a world of `ranks`.
pub(crate) fn settings(seed: u64, ranks: usize, steps: u64) -> StrategyConfig {
    // 64 prompts, or the next number that the ranks divide.
    let rollout = 64_usize.next_multiple_of(ranks);
    let samples = 8;
    StrategyConfig {
        seed,
        rollout_batch_size: rollout,
        n_samples_per_prompt: samples,
        train_batch_size: rollout * samples,
        micro_train_batch_size: rollout * samples / ranks,
        micro_rollout_batch_size: 256,
        prompt_max_len: 12,
        generate_max_len: 4,
        enable_engine_sleep: true,
        actor_lr: 1e-3,
        l2: 1.0,
        lr_warmup_ratio: 0.02,
        use_kl_loss: true,
        init_kl_coef: 1e-3,
        // About ten in a run, and never every step, so that a resumed run repeats some.
        save_steps: (steps / 10).max(2) as usize,
        async_save: true,
        max_ckpt_num: 2,
        log_parameters_hash: true,
        ..StrategyConfig::default()
    }
}
