//! The decoder's logits and gradients, and the engine's generation, equal those of `transformers` (see `tests/data/README.md`).
#![cfg(feature = "embedded")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use lightrft_engine::embedded::{Decoder, DecoderConfig, EmbeddedEngine, Settings, Weights};
use lightrft_engine::{EngineExt, Request, Sampling};

const CASES: [&str; 7] =
    ["qwen2_tied", "qwen2_untied", "qwen3_tied", "qwen3_untied", "llama_tied", "llama_untied", "llama3_rope"];
const TOLERANCE: f32 = 1e-5;

#[derive(serde::Deserialize)]
struct Vectors {
    input_ids: Vec<Vec<u32>>,
    logits: Vec<Vec<Vec<f32>>>,
    loss: f32,
    generations: Vec<Generation>,
}

#[derive(serde::Deserialize)]
struct Generation {
    prompt: Vec<u32>,
    new_tokens: Vec<u32>,
    logits: Vec<Vec<f32>>,
}

fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/decoder").join(case)
}

fn load(case: &str) -> (Decoder, Weights, Vectors) {
    let folder = folder(case);
    let config = DecoderConfig::from_folder(&folder).unwrap();
    let weights = Weights::from_folder(&folder, &config, DType::F32, &Device::Cpu).unwrap();
    let decoder = Decoder::new(config, DType::F32, &Device::Cpu).unwrap();
    let text = std::fs::read_to_string(folder.join("vectors.json")).unwrap();
    (decoder, weights, serde_json::from_str(&text).unwrap())
}

fn assert_close(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    // Relative to the largest element: the vectors' own rounding is that of f32 sums.
    let scale = want.iter().fold(1f32, |m, x| m.max(x.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= TOLERANCE * scale, "{what}, element {i}: {g}, transformers has {w}");
    }
}

#[test]
fn logits_equal_those_of_transformers() {
    for case in CASES {
        let (decoder, weights, v) = load(case);
        let ids = decoder.token_ids(&v.input_ids).unwrap();
        let frame = decoder.frame(v.input_ids[0].len()).unwrap();
        let x = decoder.hidden(&weights, &ids, &frame).unwrap();
        let logits = decoder.logits(&weights, &x).unwrap();
        let got = logits.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let want: Vec<f32> = v.logits.concat().concat();
        assert_close(case, &got, &want);
    }
}

#[test]
fn every_parameter_gets_the_gradient_that_transformers_computes() {
    for case in CASES {
        let (decoder, weights, v) = load(case);
        let vars: Vec<(String, Var)> =
            weights.iter().map(|(n, t)| (n.to_owned(), Var::from_tensor(t).unwrap())).collect();
        let tracked: Weights = vars.iter().map(|(n, var)| (n.clone(), var.as_tensor().clone())).collect();
        let ids = decoder.token_ids(&v.input_ids).unwrap();
        let (batch, length) = ids.dims2().unwrap();
        let frame = decoder.frame(length).unwrap();
        let x = decoder.hidden(&tracked, &ids, &frame).unwrap();
        let x = x.narrow(1, 0, length - 1).unwrap();
        let targets = ids.narrow(1, 1, length - 1).unwrap();
        let log_probs = decoder.log_probs(&tracked, &x, &targets).unwrap();
        let loss = (log_probs.sum_all().unwrap() * (-1.0 / (batch * (length - 1)) as f64)).unwrap();
        let got = loss.to_scalar::<f32>().unwrap();
        assert!((got - v.loss).abs() < TOLERANCE, "{case}: loss {got}, transformers has {}", v.loss);

        let grads = loss.backward().unwrap();
        let want =
            candle_core::safetensors::load(folder(case).join("grads.safetensors"), &Device::Cpu).unwrap();
        assert_eq!(want.len(), vars.len(), "{case}: the vectors name every parameter");
        for (name, var) in &vars {
            let got = grads.get(var.as_tensor()).unwrap_or_else(|| panic!("{case}: no gradient for {name}"));
            let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(flat(got).iter().any(|g| *g != 0.0), "{case}: the gradient of {name} is zero");
            assert_close(&format!("{case}: gradient of {name}"), &flat(got), &flat(&want[name]));
        }
    }
}

#[test]
fn greedy_generation_repeats_that_of_transformers() {
    for case in CASES {
        let (decoder, weights, v) = load(case);
        for g in &v.generations {
            let mut tokens = g.prompt.clone();
            for (token, want) in g.new_tokens.iter().zip(&g.logits) {
                let frame = decoder.frame(tokens.len()).unwrap();
                let ids = decoder.token_ids(&[&tokens]).unwrap();
                let x = decoder.hidden(&weights, &ids, &frame).unwrap();
                let last = x.narrow(1, tokens.len() - 1, 1).unwrap();
                let logits = decoder.logits(&weights, &last).unwrap();
                let logits = logits.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert_close(case, &logits, want);
                let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
                assert_eq!(best as u32, *token, "{case}");
                tokens.push(*token);
            }
        }
    }
}

#[test]
fn the_engine_draws_the_greedy_tokens_of_transformers() {
    for case in CASES {
        let (decoder, _, v) = load(case);
        let mut engine = EmbeddedEngine::from_folder(&folder(case), Settings::default()).unwrap();
        let requests: Vec<Request> = v
            .generations
            .iter()
            .map(|g| Request::new(g.prompt.clone(), Sampling::greedy(g.new_tokens.len())))
            .collect();
        for (completion, g) in engine.complete(&requests).unwrap().iter().zip(&v.generations) {
            assert_eq!(completion.tokens, g.new_tokens, "{case}");
            for ((log_prob, logits), token) in completion.log_probs.iter().zip(&g.logits).zip(&g.new_tokens) {
                let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
                let want = f64::from(logits[*token as usize]) - total.ln();
                assert!((f64::from(*log_prob) - want).abs() < 2e-5, "{case}: {log_prob}, {want}");
            }
        }
        assert_eq!(engine.config(), decoder.config());
    }
}
