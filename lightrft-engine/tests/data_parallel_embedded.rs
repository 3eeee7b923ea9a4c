//! Embedded engines behind one handle draw, bit for bit, what one of them draws.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::num::NonZeroUsize;

use candle_core::Device;
use lightrft_engine::embedded::{DecoderConfig, EmbeddedEngine, Settings, Weights};
use lightrft_engine::{DataParallel, Engine, EngineExt, Request, Sampling};

fn engine(max_sequences: usize) -> EmbeddedEngine {
    let config = DecoderConfig::from_json(
        r#"{"model_type": "qwen2", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 64, "tie_word_embeddings": true}"#,
    )
    .unwrap();
    let weights = Weights::random(&config, 1, 0.25, &Device::Cpu).unwrap();
    let settings = Settings { max_sequences, threads: NonZeroUsize::new(1), ..Settings::default() };
    EmbeddedEngine::new(config, weights, settings).unwrap()
}

/// Prompts of different lengths, drawn in every way, some without an id.
fn requests(count: u32, samples: usize) -> Vec<Request> {
    let sampling = |n: u32| Sampling {
        temperature: [0.0, 1.0, 0.7][n as usize % 3],
        top_k: [0, 5, 0][n as usize % 3],
        seed: 11,
        max_new_tokens: 4 + n as usize % 9,
        stop_tokens: (0..96).filter(|t| t % 16 == n).collect(),
        ..Sampling::default()
    };
    let request = |n: u32| {
        let prompt: Vec<u32> = (0..=3 * n % 20).map(|t| (7 * t + 13 * n) % 96).collect();
        let request = Request::new(prompt, sampling(n)).samples(samples + n as usize % 3);
        if n.is_multiple_of(2) { request } else { request.with_id(u64::from(100 + n)) }
    };
    (0..count).map(request).collect()
}

#[test]
fn several_engines_draw_the_tokens_and_log_probabilities_of_one() {
    let requests_of = [requests(9, 1), requests(1, 8), requests(2, 5), requests(3, 1)];
    for count in [1, 2, 3] {
        let mut engines =
            DataParallel::new(count, |replica| Ok(Box::new(engine(2 + replica)) as Box<dyn Engine>)).unwrap();
        for requests in &requests_of {
            let expected = engine(64).complete(requests).unwrap();
            assert_eq!(engines.complete(requests).unwrap(), expected, "{count} engines");
        }
    }
}
