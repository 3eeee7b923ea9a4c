//! What the tests of servers on a GPU share: tiny models, weights on the card, memory that is free there.

#[path = "../live_models/mod.rs"]
mod live_models;

use std::path::{Path, PathBuf};
use std::time::Instant;

use lightrft_collectives::Buffer;
use lightrft_collectives::nccl::{DeviceMemory, Stream};
use lightrft_engine::testing::TensorBytes;
use lightrft_engine::{
    Dtype, Engine, EngineExt, Request, Result, Sampling, Staging, TensorInfo, UpdateReport, WeightSource,
};
use live_models::tensors_in;
use serde::Deserialize;

pub(crate) const MIB: usize = 1 << 20;

pub(crate) fn folder() -> PathBuf {
    let folder = std::env::var_os("LIGHTRFT_LIVE")
        .expect("LIGHTRFT_LIVE: run `cargo xtask live vllm-gpu|sglang-gpu DIR`");
    PathBuf::from(folder)
}

/// A greedy completion as `transformers` has it.
#[derive(Deserialize)]
pub(crate) struct Expected {
    pub(crate) prompt: Vec<u32>,
    pub(crate) tokens: Vec<u32>,
    pub(crate) log_probs: Vec<f32>,
}

pub(crate) fn expected(model: &str) -> Expected {
    serde_json::from_slice(&std::fs::read(folder().join("models").join(model).join("expected.json")).unwrap())
        .unwrap()
}

pub(crate) fn weights(model: &str) -> Vec<TensorBytes> {
    tensors_in(&folder().join("models").join(model))
}

/// Weights that lie on the GPU.
pub(crate) struct OnGpu {
    infos: Vec<TensorInfo>,
    memory: Vec<DeviceMemory>,
}

impl OnGpu {
    pub(crate) fn new(stream: &Stream, tensors: &[TensorBytes]) -> Self {
        let infos = tensors.iter().map(|t| t.view().unwrap().info()).collect();
        let upload = |tensor: &TensorBytes| {
            let words: Vec<u16> =
                tensor.bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
            match tensor.dtype {
                Dtype::F32 => {
                    let values: Vec<f32> = tensor
                        .bytes
                        .chunks_exact(4)
                        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                        .collect();
                    DeviceMemory::upload(stream, &values).unwrap()
                }
                _ => {
                    let values: Vec<half::bf16> = words.into_iter().map(half::bf16::from_bits).collect();
                    DeviceMemory::upload(stream, &values).unwrap()
                }
            }
        };
        Self { infos, memory: tensors.iter().map(upload).collect() }
    }
}

impl WeightSource for OnGpu {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn give(&mut self, staging: &mut Staging<'_>) -> Result<()> {
        for (info, memory) in self.infos.iter().zip(&self.memory) {
            let Buffer::Device(device) = memory.as_buffer() else { panic!("it is on the GPU") };
            staging.copy_from_gpu(&info.name, &device)?;
        }
        Ok(())
    }
}

/// The type of a tiny model's arithmetic, and how far log-probabilities of f32 on a CPU may be from it: kernels of f32
/// round to TF32 in places.
pub(crate) fn arithmetic() -> (String, f32) {
    let dtype = std::env::var("LIGHTRFT_LIVE_DTYPE").unwrap_or_else(|_| "float32".to_owned());
    let far = if dtype == "float32" { 0.01 } else { 0.15 };
    (dtype, far)
}

/// Bytes that are free on the card.
pub(crate) fn free(stream: &Stream) -> usize {
    stream.gpu().free_bytes().unwrap()
}

pub(crate) fn mib(bytes: usize) -> usize {
    bytes / MIB
}

#[track_caller]
pub(crate) fn is_as_transformers_says(engine: &mut dyn Engine, model: &str) {
    let expected = expected(model);
    let request = Request::new(expected.prompt, Sampling::greedy(expected.tokens.len()));
    let completion = engine.complete(&[request]).unwrap().remove(0);
    assert_eq!(completion.tokens, expected.tokens, "{model}");
    assert_eq!(Some(completion.version), engine.version());
    let far = completion.log_probs.iter().zip(&expected.log_probs).map(|(a, b)| (a - b).abs());
    let far = far.fold(0.0, f32::max);
    assert!(far < arithmetic().1, "{model}: log-probabilities differ by {far}");
    println!("  model {model}: tokens {:?}, log-probabilities within {far:.1e}", completion.tokens);
}

pub(crate) fn step<T>(what: &str, run: impl FnOnce() -> T) -> T {
    let since = Instant::now();
    let out = run();
    println!("ok: {what} ({:.1?})", since.elapsed());
    out
}

pub(crate) fn told(what: &str, report: UpdateReport) {
    println!(
        "  {what}: {} tensors, {} MiB in {} buckets: {:.1?} in all ({:.2} GB/s), source {:.1?}, engine {:.1?}",
        report.tensors,
        mib(report.bytes as usize),
        report.buckets,
        report.elapsed,
        report.bytes as f64 / report.elapsed.as_secs_f64() / 1e9,
        report.gathering,
        report.pushing,
    );
}

/// Parameters of a Qwen2.5-0.5B in bf16, which is 0.99 GB, and a folder of it without weights.
pub(crate) fn larger(folder_of_tokenizer: &Path) -> (tempfile::TempDir, Vec<TensorInfo>) {
    let (layers, hidden, inner, kv, vocabulary) = (24, 896, 4864, 128, 151_936);
    let config = serde_json::json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "dtype": "bfloat16",
        "torch_dtype": "bfloat16", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": vocabulary, "tie_word_embeddings": true,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "use_sliding_window": false,
        "bos_token_id": 0, "eos_token_id": 2, "initializer_range": 0.02, "attention_dropout": 0.0, "use_cache": true,
    });
    let folder = tempfile::tempdir().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(folder_of_tokenizer.join(file), folder.path().join(file)).unwrap();
    }
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let mut infos = Vec::new();
    let mut add = |name: String, shape: &[usize]| {
        infos.push(TensorInfo { name, dtype: Dtype::BF16, shape: shape.to_vec() });
    };
    add("model.embed_tokens.weight".to_owned(), &[vocabulary, hidden]);
    for layer in 0..layers {
        let mut of = |name: &str, shape: &[usize]| add(format!("model.layers.{layer}.{name}"), shape);
        of("input_layernorm.weight", &[hidden]);
        for (name, rows) in [("q", hidden), ("k", kv), ("v", kv)] {
            of(&format!("self_attn.{name}_proj.weight"), &[rows, hidden]);
            of(&format!("self_attn.{name}_proj.bias"), &[rows]);
        }
        of("self_attn.o_proj.weight", &[hidden, hidden]);
        of("post_attention_layernorm.weight", &[hidden]);
        of("mlp.gate_proj.weight", &[inner, hidden]);
        of("mlp.up_proj.weight", &[inner, hidden]);
        of("mlp.down_proj.weight", &[hidden, inner]);
    }
    add("model.norm.weight".to_owned(), &[hidden]);
    (folder, infos)
}

/// Values of both signs around 0.02, different everywhere.
pub(crate) fn made(infos: &[TensorInfo], seed: u32) -> Vec<TensorBytes> {
    let mut state = seed;
    let mut tensor = |info: &TensorInfo| {
        let count = info.bytes().unwrap() / 2;
        let mut bytes = Vec::with_capacity(2 * count);
        for _ in 0..count {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = 0x3c00_u16 | (state >> 24) as u16 | ((state >> 8) as u16 & 0x8000);
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        TensorBytes { name: info.name.clone(), dtype: info.dtype, shape: info.shape.clone(), bytes }
    };
    infos.iter().map(&mut tensor).collect()
}
