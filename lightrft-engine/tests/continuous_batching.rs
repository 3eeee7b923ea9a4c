//! Requests that join and leave between steps: the same bits in any company, under any budget, on any threads.
#![cfg(feature = "embedded")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use candle_core::{DType, Device};
use lightrft_engine::embedded::{DecoderConfig, Detokenize, EmbeddedEngine, Settings, Weights};
use lightrft_engine::{
    Completion, Engine, EngineExt, Error, FinishReason, Level, Parts, Progress, Request, Sampling, Version,
    Watch,
};

const VOCABULARY: u32 = 160;
/// Keys and values of one page of 16 tokens: 2 layers, 2 heads, 12 elements a key, 16 a value.
const PAGE_BYTES: u64 = 2 * 2 * (12 + 16) * 16 * 4;

fn config() -> DecoderConfig {
    DecoderConfig::from_json(&format!(
        r#"{{"model_type": "qwen3", "vocab_size": {VOCABULARY}, "hidden_size": 40, "intermediate_size": 72,
            "num_hidden_layers": 2, "num_attention_heads": 10, "num_key_value_heads": 2, "head_dim": 12,
            "max_position_embeddings": 1024, "tie_word_embeddings": true}}"#
    ))
    .unwrap()
}

fn engine(settings: Settings) -> EmbeddedEngine {
    let config = config();
    let weights = Weights::random(&config, 3, 0.2, &Device::Cpu).unwrap();
    EmbeddedEngine::new(config, weights, settings).unwrap()
}

fn prompt(seed: u32, length: u32) -> Vec<u32> {
    (0..length).map(|i| (i * 37 + seed * 11) % VOCABULARY).collect()
}

/// Prompts shorter and longer than a page and than a step, with one and many samples.
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

/// Tokens and the bits of their log-probabilities, by request and sample.
fn bits(completions: &[Completion]) -> Vec<(usize, usize, Vec<u32>, Vec<u32>)> {
    let bits = |c: &Completion| c.log_probs.iter().map(|l| l.to_bits()).collect();
    completions.iter().map(|c| (c.request, c.sample, c.tokens.clone(), bits(c))).collect()
}

#[test]
fn every_bit_is_the_same_in_any_company_on_any_threads_and_under_any_budget() {
    let requests = requests();
    let alone: Vec<_> = requests
        .iter()
        .enumerate()
        .flat_map(|(i, r)| {
            let settings =
                Settings { max_sequences: 1, threads: NonZeroUsize::new(1), ..Settings::default() };
            let mut completions = engine(settings).complete(std::slice::from_ref(r)).unwrap();
            completions.iter_mut().for_each(|c| c.request = i);
            bits(&completions)
        })
        .collect();
    for (max_sequences, threads, pages) in
        [(1, 1, None), (4, 2, None), (64, 3, None), (64, 1, Some(21)), (64, 2, Some(24)), (5, 1, Some(30))]
    {
        let settings = Settings {
            max_sequences,
            threads: NonZeroUsize::new(threads),
            cache_bytes: pages.map(|n: u64| n * PAGE_BYTES),
            ..Settings::default()
        };
        let mut engine = engine(settings);
        for round in 0..2 {
            let together = bits(&engine.complete(&requests).unwrap());
            assert_eq!(
                together, alone,
                "{max_sequences} at once, {threads} threads, {pages:?} pages, {round}"
            );
        }
    }
}

#[test]
fn a_prompt_is_computed_once_for_all_its_samples() {
    let mut engine = engine(Settings::default());
    let sampling = Sampling { max_new_tokens: 1, ..Sampling::default() };
    engine.complete(&[Request::new(prompt(1, 160), sampling.clone()).samples(32)]).unwrap();
    assert_eq!(engine.memory_bytes().unwrap().cache, 10 * PAGE_BYTES, "no sample has pages of its own yet");
    let sampling = Sampling { max_new_tokens: 3, ..sampling };
    engine.complete(&[Request::new(prompt(1, 160), sampling).samples(32)]).unwrap();
    assert_eq!(engine.memory_bytes().unwrap().cache, 42 * PAGE_BYTES, "one more page for each sample");
}

#[test]
fn the_cache_keeps_its_budget_and_is_given_back_by_sleep() {
    let budget = 24 * PAGE_BYTES + 100;
    let mut engine = engine(Settings { cache_bytes: Some(budget), ..Settings::default() });
    let expected = bits(&engine.complete(&requests()).unwrap());
    let held = engine.memory_bytes().unwrap().cache;
    assert!(held > 20 * PAGE_BYTES && held <= budget, "{held} of {budget}");
    engine.sleep(Level::One).unwrap();
    assert_eq!(engine.memory_bytes().unwrap().cache, 0);
    engine.wake(Parts::All).unwrap();
    assert_eq!(bits(&engine.complete(&requests()).unwrap()), expected);
}

#[test]
fn a_request_that_would_not_fit_the_cache_alone_is_refused_with_the_numbers() {
    let mut engine = engine(Settings { cache_bytes: Some(3 * PAGE_BYTES), ..Settings::default() });
    let ask = |length, max_new_tokens| Request::new(prompt(1, length), Sampling::greedy(max_new_tokens));
    // 48 tokens fit: the last one drawn is never computed.
    engine.complete(&[ask(40, 9).samples(3)]).unwrap();
    match engine.complete(&[ask(1, 1), ask(40, 10)]).unwrap_err() {
        Error::CacheExceeded { request: 1, tokens: 49, needed_bytes, cache_bytes } => {
            assert_eq!((needed_bytes, cache_bytes), (4 * PAGE_BYTES, 3 * PAGE_BYTES));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_finished_completion_makes_room_at_once() {
    // One completion of 40 tokens and many short ones, two at a time: the short ones pass one after the other while the
    // long one goes on.
    let mut engine = engine(Settings { max_sequences: 2, ..Settings::default() });
    let long = Request::new(prompt(1, 4), Sampling { max_new_tokens: 40, ..Sampling::default() });
    let short = Request::new(prompt(2, 4), Sampling { max_new_tokens: 4, ..Sampling::default() }).samples(9);
    let mut seen: Vec<Progress> = Vec::new();
    let mut listener = |p: Progress| seen.push(p);
    let mut watch = Watch::within(Duration::from_secs(600)).telling(&mut listener);
    engine.generate(&[long, short], &mut watch).unwrap();
    assert_eq!(seen.last(), Some(&Progress { done: 10, total: 10, tokens: 76 }));
    assert!(seen.len() <= 45, "{} steps for 40 tokens of the longest", seen.len());
}

#[test]
fn a_call_that_fails_leaves_no_pages_taken() {
    let mut engine = engine(Settings { cache_bytes: Some(24 * PAGE_BYTES), ..Settings::default() });
    let expected = bits(&engine.complete(&requests()).unwrap());
    for _ in 0..3 {
        let mut steps = 0;
        let mut count = |_: Progress| {
            steps += 1;
            if steps == 4 {
                std::thread::sleep(Duration::from_millis(50));
            }
        };
        let mut watch = Watch::within(Duration::from_millis(40)).telling(&mut count);
        assert!(matches!(engine.generate(&requests(), &mut watch), Err(Error::Deadline { .. })));
    }
    assert_eq!(bits(&engine.complete(&requests()).unwrap()), expected);
}

#[test]
fn narrow_weights_compute_what_their_widened_copies_compute() {
    let config = config();
    let request =
        Request::new(prompt(4, 20), Sampling { max_new_tokens: 12, ..Sampling::default() }).samples(3);
    let wide = Weights::random(&config, 3, 0.2, &Device::Cpu).unwrap();
    for dtype in [DType::BF16, DType::F16] {
        let as_type = |weights: &Weights, dtype| -> Weights {
            weights.iter().map(|(n, t)| (n.to_owned(), t.to_dtype(dtype).unwrap())).collect()
        };
        let narrow = as_type(&wide, dtype);
        let settings = Settings { dtype, ..Settings::default() };
        let mut from_narrow = EmbeddedEngine::new(config.clone(), narrow.clone(), settings).unwrap();
        let widened = as_type(&narrow, DType::F32);
        let mut from_wide = EmbeddedEngine::new(config.clone(), widened, Settings::default()).unwrap();
        let request = std::slice::from_ref(&request);
        assert_eq!(
            bits(&from_narrow.complete(request).unwrap()),
            bits(&from_wide.complete(request).unwrap())
        );
        let bytes = [from_narrow.memory_bytes().unwrap().weights, from_wide.memory_bytes().unwrap().weights];
        assert_eq!(2 * bytes[0], bytes[1]);
    }
}

#[test]
fn adopted_tensors_are_used_without_a_copy() {
    let config = config();
    let weights = |seed| Weights::random(&config, seed, 0.2, &Device::Cpu).unwrap();
    let mut engine = EmbeddedEngine::without_weights(config.clone(), Settings::default()).unwrap();
    let request = Request::new(prompt(1, 4), Sampling::greedy(6));
    let theirs = weights(3);
    engine.adopt(Version(7), &theirs).unwrap();
    let before = engine.complete(std::slice::from_ref(&request)).unwrap().remove(0);
    assert_eq!(before.version, Version(7));

    // What the trainer writes in place is what the engine computes with.
    let other = weights(4);
    for (name, tensor) in theirs.iter() {
        let source = other.tensor(name).unwrap();
        tensor.slice_set(source, 0, 0).unwrap();
    }
    let after = engine.complete(std::slice::from_ref(&request)).unwrap().remove(0);
    let mut fresh = EmbeddedEngine::new(config.clone(), weights(4), Settings::default()).unwrap();
    assert_eq!(after.tokens, fresh.complete(std::slice::from_ref(&request)).unwrap()[0].tokens);
    assert_ne!(after.tokens, before.tokens);

    // A set that does not fit changes nothing.
    let part: Weights = other.iter().skip(1).map(|(n, t)| (n.to_owned(), t.clone())).collect();
    assert!(engine.adopt(Version(8), &part).is_err());
    assert_eq!((engine.version(), engine.state().can_generate()), (Some(Version(7)), true));
    engine.sleep(Level::One).unwrap();
    assert!(matches!(engine.adopt(Version(8), &other), Err(Error::Refused(_))));
}

/// Token `t` is the letter `t % 26`.
#[derive(Debug)]
struct Letters;

impl Detokenize for Letters {
    fn text(&self, tokens: &[u32]) -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
        Ok(tokens.iter().map(|t| char::from(b'a' + (t % 26) as u8)).collect())
    }
}

#[test]
fn a_stop_string_ends_a_completion_at_the_token_that_completes_it() {
    let mut engine = engine(Settings { detokenizer: Some(Arc::new(Letters)), ..Settings::default() });
    let sampling = Sampling { max_new_tokens: 30, seed: 2, ..Sampling::default() };
    let free = engine.complete(&[Request::new([1, 2], sampling.clone())]).unwrap().remove(0);
    let text = Letters.text(&free.tokens).unwrap();
    let stop = &text[10..13];
    let end = text.find(stop).unwrap() + 3;

    let stops = vec!["never there".to_owned(), stop.to_owned()];
    let stopping = Sampling { stop_strings: stops, ..sampling };
    let stopped = engine.complete(&[Request::new([1, 2], stopping.clone())]).unwrap().remove(0);
    assert_eq!(stopped.finish, FinishReason::StopString(1));
    assert_eq!(
        (&stopped.tokens, &stopped.log_probs),
        (&free.tokens[..end].to_vec(), &free.log_probs[..end].to_vec())
    );

    let late = Sampling { min_new_tokens: end, ..stopping };
    let later = engine.complete(&[Request::new([1, 2], late)]).unwrap().remove(0);
    assert!(later.tokens.len() > end, "{} tokens", later.tokens.len());
}

#[test]
fn stop_strings_without_a_tokenizer_are_refused() {
    let stopping = Sampling { stop_strings: vec!["\n".into()], ..Sampling::default() };
    let error = engine(Settings::default()).complete(&[Request::new([1], stopping)]).unwrap_err();
    assert!(matches!(error, Error::Request { field: "stop_strings", .. }), "{error:?}");
}
