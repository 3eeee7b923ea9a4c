//! Models and requests of these tests.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use candle_core::Device as TensorDevice;
use lightrft_engine::Completion;
use lightrft_engine::embedded::{DecoderConfig, Device, EmbeddedEngine, Settings, Weights};

pub(crate) const VOCABULARY: u32 = 160;

/// Heads of an odd size, five of which share keys.
pub(crate) fn config() -> DecoderConfig {
    DecoderConfig::from_json(&format!(
        r#"{{"model_type": "qwen3", "vocab_size": {VOCABULARY}, "hidden_size": 40, "intermediate_size": 72,
            "num_hidden_layers": 2, "num_attention_heads": 10, "num_key_value_heads": 2, "head_dim": 12,
            "max_position_embeddings": 1024, "tie_word_embeddings": true}}"#
    ))
    .unwrap()
}

/// A model of 250 MB in f32.
pub(crate) fn large() -> DecoderConfig {
    DecoderConfig::from_json(
        r#"{"model_type": "llama", "vocab_size": 16384, "hidden_size": 1024, "intermediate_size": 4096,
            "num_hidden_layers": 3, "num_attention_heads": 16, "num_key_value_heads": 8,
            "max_position_embeddings": 512, "tie_word_embeddings": true}"#,
    )
    .unwrap()
}

pub(crate) fn weights(config: &DecoderConfig, seed: u64) -> Weights {
    /// Clones share the tensors.
    static MADE: Mutex<Vec<(usize, u64, Weights)>> = Mutex::new(Vec::new());
    let mut made = MADE.lock().unwrap();
    let known = made.iter().find(|(width, s, _)| (*width, *s) == (config.hidden_size, seed));
    if let Some((.., weights)) = known {
        return weights.clone();
    }
    // As trained ones: a sum over the width keeps its size.
    let std = if config.hidden_size > 100 { 0.03 } else { 0.2 };
    let weights = Weights::random(config, seed, std, &TensorDevice::Cpu).unwrap();
    made.push((config.hidden_size, seed, weights.clone()));
    weights
}

pub(crate) fn on_gpu() -> Settings {
    Settings { device: Device::Cuda(0), ..Settings::default() }
}

pub(crate) fn engine(config: &DecoderConfig, seed: u64, settings: Settings) -> EmbeddedEngine {
    EmbeddedEngine::new(config.clone(), weights(config, seed), settings).expect("these tests need a GPU")
}

pub(crate) fn prompt(seed: u32, length: u32) -> Vec<u32> {
    (0..length).map(|i| (i * 37 + seed * 11) % VOCABULARY).collect()
}

/// A folder of this crate's test data, here or where these tests were carried to.
pub(crate) fn data(name: &str) -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    if built.exists() { built } else { Path::new("lightrft-engine/tests/data").join(name) }
}

/// Tokens and the bits of their log-probabilities, by request and sample.
pub(crate) fn bits(completions: &[Completion]) -> Vec<(usize, usize, Vec<u32>, Vec<u32>)> {
    let bits = |c: &Completion| c.log_probs.iter().map(|l| l.to_bits()).collect();
    completions.iter().map(|c| (c.request, c.sample, c.tokens.clone(), bits(c))).collect()
}

/// The same tokens, with log-probabilities that differ by `tolerance` at most.
pub(crate) fn assert_alike(what: &str, got: &[Completion], expected: &[Completion], tolerance: f32) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let mut most = 0f32;
    for (got, expected) in got.iter().zip(expected) {
        assert_eq!(got.tokens, expected.tokens, "{what}: request {}, sample {}", got.request, got.sample);
        for (g, e) in got.log_probs.iter().zip(&expected.log_probs) {
            most = most.max((g - e).abs());
        }
    }
    println!("{what}: log-probabilities differ by {most:.1e} at most");
    assert!(most <= tolerance, "{what}: {most}");
}
