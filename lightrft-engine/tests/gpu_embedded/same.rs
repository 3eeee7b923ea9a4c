//! Tokens and log-probabilities: those of the CPU, and the same bits in any company.

use candle_core::DType;
use lightrft_engine::embedded::{EmbeddedEngine, Settings, Weights};
use lightrft_engine::testing::{Subject, TensorBytes, conformance};
use lightrft_engine::{EngineExt, Request, Sampling, Version};

use crate::support::{assert_alike, bits, config, data, engine, large, on_gpu, prompt, weights};

const CASES: [&str; 7] =
    ["qwen2_tied", "qwen2_untied", "qwen3_tied", "qwen3_untied", "llama_tied", "llama_untied", "llama3_rope"];

#[derive(serde::Deserialize)]
struct Vectors {
    generations: Vec<Generation>,
}

#[derive(serde::Deserialize)]
struct Generation {
    prompt: Vec<u32>,
    new_tokens: Vec<u32>,
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_greedy_tokens_are_those_of_the_cpu_and_of_transformers() {
    for case in CASES {
        let folder = data("decoder").join(case);
        let text = std::fs::read_to_string(folder.join("vectors.json")).unwrap();
        let vectors: Vectors = serde_json::from_str(&text).unwrap();
        let requests: Vec<Request> = vectors
            .generations
            .iter()
            .map(|g| Request::new(g.prompt.clone(), Sampling::greedy(g.new_tokens.len())))
            .collect();
        let complete = |settings| {
            let mut engine = EmbeddedEngine::from_folder(&folder, settings).expect("these tests need a GPU");
            engine.complete(&requests).unwrap()
        };
        let got = complete(on_gpu());
        assert_alike(case, &got, &complete(Settings::default()), 1e-4);
        for (completion, g) in got.iter().zip(&vectors.generations) {
            assert_eq!(completion.tokens, g.new_tokens, "{case}");
        }
    }
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_first_tokens_of_narrow_weights_are_about_those_of_the_cpu() {
    let config = large();
    let requests: Vec<Request> =
        (0..40).map(|i| Request::new(prompt(i, 3 + 3 * i), Sampling::greedy(1))).collect();
    for (dtype, tolerance) in [(DType::F32, 1e-3), (DType::BF16, 6e-2), (DType::F16, 1e-2)] {
        let complete =
            |settings| engine(&config, 3, Settings { dtype, ..settings }).complete(&requests).unwrap();
        let (got, expected) = (complete(on_gpu()), complete(Settings::default()));
        let alike = got.iter().zip(&expected).filter(|(g, e)| g.tokens == e.tokens);
        let (mut same, mut most) = (0, 0f32);
        for (g, e) in alike {
            (same, most) = (same + 1, most.max((g.log_probs[0] - e.log_probs[0]).abs()));
        }
        println!("{dtype:?}: {same} of 40 first tokens, log-probabilities differ by {most:.1e} at most");
        assert!(most <= tolerance, "{dtype:?}: {most}");
        assert!(same >= if dtype == DType::F32 { 40 } else { 32 }, "{dtype:?}: {same} of 40");
    }
}

/// Prompts shorter and longer than a page, and one that shares its pages with many samples.
fn requests() -> Vec<Request> {
    [(1, 4), (15, 1), (16, 3), (17, 5), (40, 2), (300, 3), (5, 7)]
        .into_iter()
        .enumerate()
        .map(|(i, (length, samples))| {
            let sampling = Sampling {
                seed: 5,
                max_new_tokens: 3 + 9 * (i % 4),
                top_p: [1.0, 0.9][i % 2],
                ..Sampling::default()
            };
            Request::new(prompt(i as u32, length), sampling).samples(samples).with_id(i as u64)
        })
        .collect()
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_every_bit_is_the_same_in_any_company_and_under_any_budget() {
    let requests = requests();
    for (config, dtype) in
        [(config(), DType::F32), (config(), DType::BF16), (large(), DType::BF16), (large(), DType::F32)]
    {
        let element_bytes = if dtype == DType::F32 { 4 } else { 2 };
        let page_bytes = 2 * config.layers * config.kv_heads * config.head_dim * 16 * element_bytes;
        let alone: Vec<_> = requests
            .iter()
            .enumerate()
            .flat_map(|(i, r)| {
                let settings = Settings { dtype, max_sequences: 1, ..on_gpu() };
                let mut completions = engine(&config, 3, settings).complete(std::slice::from_ref(r)).unwrap();
                completions.iter_mut().for_each(|c| c.request = i);
                completions
            })
            .collect();
        // Among many tokens a draw now and then falls where rounding decides.
        if dtype == DType::F32 && config.vocab_size < 1000 {
            let on_cpu = engine(&config, 3, Settings::default()).complete(&requests).unwrap();
            assert_alike("drawn in f32", &alone, &on_cpu, 1e-3);
        }
        for (max_sequences, pages) in
            [(1, None), (4, None), (64, None), (64, Some(21)), (64, Some(24)), (5, Some(30))]
        {
            let cache_bytes = pages.map(|n: usize| (n * page_bytes) as u64);
            let mut engine = engine(&config, 3, Settings { dtype, max_sequences, cache_bytes, ..on_gpu() });
            for round in 0..2 {
                let together = engine.complete(&requests).unwrap();
                assert_eq!(
                    bits(&together),
                    bits(&alone),
                    "{dtype:?}, {max_sequences} at once, {pages:?} pages, {round}"
                );
            }
        }
    }
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_more_sequences_than_a_product_is_wide_are_the_same_bits_as_few() {
    let requests: Vec<Request> = (0..300)
        .map(|i| {
            let sampling = Sampling { seed: 5, max_new_tokens: 6, ..Sampling::default() };
            Request::new(prompt(i, 1 + i % 40), sampling)
        })
        .collect();
    for (config, dtype) in [(config(), DType::F32), (large(), DType::BF16)] {
        let complete = |max_sequences| {
            let settings = Settings { dtype, max_sequences, ..on_gpu() };
            bits(&engine(&config, 3, settings).complete(&requests).unwrap())
        };
        let together = complete(300);
        assert_eq!(together.len(), 300);
        assert_eq!(together, complete(20), "{dtype:?}");
    }
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_steps_that_were_recorded_compute_with_the_weights_of_an_update() {
    let (config, requests) = (config(), requests());
    let fresh = bits(&engine(&config, 4, on_gpu()).complete(&requests).unwrap());
    for adopted in [true, false] {
        let mut engine = engine(&config, 3, on_gpu());
        let before: Vec<_> = (0..3).map(|_| bits(&engine.complete(&requests).unwrap())).collect();
        assert!(before.iter().all(|b| *b == before[0] && *b != fresh));
        if adopted {
            engine.adopt(Version(1), &weights(&config, 4)).unwrap();
        } else {
            let tensors = bytes(&weights(&config, 4));
            let views: Vec<_> = tensors.iter().map(|t| t.view().unwrap()).collect();
            engine.replace_weights(Version(1), &views, 4096).unwrap();
        }
        assert_eq!(bits(&engine.complete(&requests).unwrap()), fresh, "adopted: {adopted}");
    }
}

fn bytes(weights: &Weights) -> Vec<TensorBytes> {
    let flat = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    weights.iter().map(|(name, t)| TensorBytes::from_f32(name, t.dims(), &flat(t))).collect()
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_the_embedded_engine_keeps_the_contract() {
    let config = config();
    let settings = || Settings { max_sequences: 4, ..on_gpu() };
    conformance(|| Subject {
        engine: Box::new(engine(&config, 1, settings())),
        weights: bytes(&weights(&config, 2)),
    });
}
