//! Tokens a second of the embedded engine

use std::error::Error;
use std::thread;
use std::time::Instant;

use candle_core::Device;
use lightrft_engine::embedded::{DecoderConfig, EmbeddedEngine, Settings, Weights};
use lightrft_engine::{EngineExt, Request, Sampling};

use crate::Options;
use crate::report::{Measured, Row};

/// A call, and how many times the peer's speed is promised for it.
struct Case {
    what: &'static str,
    prompts: usize,
    prompt_tokens: usize,
    samples: usize,
    new_tokens: usize,
    promised: Option<f64>,
}

const CASES: [Case; 3] = [
    Case {
        what: "32 prompts of 32 tokens, 64 new each",
        prompts: 32,
        prompt_tokens: 32,
        samples: 1,
        new_tokens: 64,
        promised: Some(1.0),
    },
    Case {
        what: "1 prompt of 512 tokens, 8 samples of 64 new",
        prompts: 1,
        prompt_tokens: 512,
        samples: 8,
        new_tokens: 64,
        promised: Some(3.0),
    },
    Case {
        what: "1 prompt of 32 tokens, 64 new",
        prompts: 1,
        prompt_tokens: 32,
        samples: 1,
        new_tokens: 64,
        promised: None,
    },
];

/// What is promised beside the peer, where there is none.
pub(crate) fn unseen(options: &Options) -> Vec<String> {
    let wanted = CASES.iter().filter(|case| options.python.is_none() && options.wants(case.what));
    wanted
        .filter_map(|case| Some(format!("{}: {}, with --peers", case.what, target(case.promised?))))
        .collect()
}

fn target(promised: f64) -> String {
    format!(">= {promised:.1}x transformers")
}

/// SmolLM2-135M's shape.
pub(crate) fn config() -> Result<DecoderConfig, Box<dyn Error>> {
    Ok(DecoderConfig::from_json(
        r#"{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "max_position_embeddings": 8192, "rope_theta": 100000.0, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": true}"#,
    )?)
}

/// Ours and the peer's tokens a second, in turns.
pub(crate) fn measure(options: &Options) -> Result<Vec<Row>, Box<dyn Error>> {
    let cases: Vec<&Case> = CASES.iter().filter(|case| options.wants(case.what)).collect();
    if cases.is_empty() {
        return Ok(Vec::new());
    }
    let config = config()?;
    let weights = Weights::random(&config, 1, 0.02, &Device::Cpu)?;
    let mut engine = EmbeddedEngine::new(config, weights, Settings::default())?;
    let threads = thread::available_parallelism()?.get();
    let mut rows = Vec::new();
    for case in cases {
        let new_tokens = if options.quick { case.new_tokens / 4 } else { case.new_tokens };
        let tokens = case.prompts * case.samples * new_tokens;
        let (mut ours, mut peer) = (Vec::new(), Vec::new());
        for round in 0..=options.rounds {
            // The first is not counted, and short.
            let new_tokens = if round == 0 { 2 } else { new_tokens };
            let seconds = once(&mut engine, case, new_tokens)?;
            if round == 0 {
                continue;
            }
            ours.push(tokens as f64 / seconds);
            if let Some(python) = &options.python {
                let numbers = [case.prompts, case.prompt_tokens, case.samples, new_tokens, threads];
                let mut args = vec!["generate".to_owned()];
                args.extend(numbers.iter().map(ToString::to_string));
                peer.push(tokens as f64 * 1e9 / python.run(&args)?.parse::<f64>()?);
            }
        }
        let mut row = Row::new(case.what, "tokens/s", Measured::of(ours).ok_or("no rounds")?);
        if let Some(peer) = Measured::of(peer) {
            let met = case.promised.map(|promised| (promised, row.is_at_least(promised, &peer)));
            row = row.beside("transformers", peer);
            if let Some((promised, met)) = met {
                row = row.promise(target(promised), met);
            }
        }
        rows.push(row);
    }
    Ok(rows)
}

fn once(engine: &mut EmbeddedEngine, case: &Case, new_tokens: usize) -> Result<f64, Box<dyn Error>> {
    let sampling = Sampling { max_new_tokens: new_tokens, ..Sampling::default() };
    let prompt = |i: usize| -> Vec<u32> {
        (0..case.prompt_tokens as u32).map(|t| 1 + (t * 7919 + i as u32 * 104_729) % 49_151).collect()
    };
    let requests: Vec<Request> =
        (0..case.prompts).map(|i| Request::new(prompt(i), sampling.clone()).samples(case.samples)).collect();
    let begin = Instant::now();
    let completions = engine.complete(&requests)?;
    let seconds = begin.elapsed().as_secs_f64();
    let drawn: usize = completions.iter().map(|c| c.tokens.len()).sum();
    if drawn != case.prompts * case.samples * new_tokens {
        return Err(format!("{drawn} tokens were drawn").into());
    }
    Ok(seconds)
}
