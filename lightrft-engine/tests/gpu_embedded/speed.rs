//! Tokens a second, beside which `benches/peers/generate_gpu.py` prints those of `transformers`.

use std::time::Instant;

use candle_core::{DType, Device as TensorDevice, Tensor};
use lightrft_engine::embedded::{DecoderConfig, EmbeddedEngine, Settings, Weights};
use lightrft_engine::{EngineExt, Request, Sampling};

use crate::support::on_gpu;

const SMOLLM2_135M: &str = r#"{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "rope_theta": 100000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": true}"#;
const QWEN25_05B: &str = r#"{"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
    "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": true}"#;

/// Weights of about the right size, from a few random numbers.
fn weights(config: &DecoderConfig) -> Weights {
    let mut state = 1_u64;
    let some: Vec<f32> = (0..1 << 20)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * 0.07
        })
        .collect();
    let parameters = config.parameter_groups().into_iter().flat_map(|g| g.parameters);
    let tensor = |shape: Vec<usize>, phase: usize| {
        let elems: usize = shape.iter().product();
        let data: Vec<half::bf16> = match shape.len() {
            1 => vec![half::bf16::ONE; elems],
            _ => some
                .iter()
                .cycle()
                .skip(phase % 999_983)
                .take(elems)
                .map(|x| half::bf16::from_f32(*x))
                .collect(),
        };
        Tensor::from_vec(data, shape, &TensorDevice::Cpu).unwrap()
    };
    parameters.enumerate().map(|(i, p)| (p.name, tensor(p.shape, i * 7919))).collect()
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu bench"]
fn gpu_bench_tokens_per_second() {
    println!("| model, bf16 | sequences | prompt | new | tokens/s | steps/s |");
    println!("|---|---|---|---|---|---|");
    for (name, config) in [("SmolLM2-135M", SMOLLM2_135M), ("Qwen2.5-0.5B", QWEN25_05B)] {
        let config = DecoderConfig::from_json(config).unwrap();
        let vocabulary = config.vocab_size as u32;
        let settings = Settings { dtype: DType::BF16, max_sequences: 256, ..on_gpu() };
        let mut engine = EmbeddedEngine::new(config.clone(), weights(&config), settings).unwrap();
        for sequences in [1, 32, 256_u32] {
            let (length, new) = (128, 128);
            let requests = |new| -> Vec<Request> {
                let sampling = Sampling { max_new_tokens: new, ..Sampling::default() };
                let prompt = |i: u32| {
                    (0..length).map(|t| 1 + (t * 7919 + i * 104_729) % (vocabulary - 1)).collect::<Vec<_>>()
                };
                (0..sequences).map(|i| Request::new(prompt(i), sampling.clone())).collect()
            };
            engine.complete(&requests(8)).unwrap();
            let requests = requests(new);
            let begin = Instant::now();
            let completions = engine.complete(&requests).unwrap();
            let seconds = begin.elapsed().as_secs_f64();
            let tokens: usize = completions.iter().map(|c| c.tokens.len()).sum();
            assert_eq!(tokens, sequences as usize * new);
            println!(
                "| {name} | {sequences} | {length} | {new} | {:.0} | {:.0} |",
                tokens as f64 / seconds,
                new as f64 / seconds
            );
        }
    }
}
