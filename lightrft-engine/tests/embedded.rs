//! The embedded engine: the suite, and its tokens and log-probabilities against plain full forward passes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use lightrft_engine::embedded::{
    Decoder, DecoderConfig, DrawKey, EmbeddedEngine, ModelError, Past, Settings, Weights, draw, uniform,
};
use lightrft_engine::testing::{Subject, TensorBytes, conformance};
use lightrft_engine::{
    Completion, Dtype, Engine, EngineExt, Error, FinishReason, Level, LogProbs, Parts, Request, Sampling,
    State, Version,
};

const VOCABULARY: usize = 96;

fn config(family: &str, tied: bool) -> DecoderConfig {
    DecoderConfig::from_json(&format!(
        r#"{{"model_type": "{family}", "vocab_size": {VOCABULARY}, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 10000.0,
            "max_position_embeddings": 64, "tie_word_embeddings": {tied}}}"#
    ))
    .unwrap()
}

fn weights(config: &DecoderConfig, seed: u64) -> Weights {
    Weights::random(config, seed, 0.25, &Device::Cpu).unwrap()
}

fn engine(config: &DecoderConfig, seed: u64, max_sequences: usize) -> EmbeddedEngine {
    let settings = Settings { max_sequences, ..Settings::default() };
    EmbeddedEngine::new(config.clone(), weights(config, seed), settings).unwrap()
}

fn bytes(weights: &Weights) -> Vec<TensorBytes> {
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    weights.iter().map(|(name, t)| TensorBytes::from_f32(name, t.dims(), &flat(t))).collect()
}

fn views(tensors: &[TensorBytes]) -> Vec<lightrft_engine::NamedTensor<'_>> {
    tensors.iter().map(|t| t.view().unwrap()).collect()
}

/// Requests whose prompts differ in length, drawn in every way, some ending early.
fn mixed_requests() -> Vec<Request> {
    let sampling = |i: u32| Sampling {
        temperature: [0.0, 1.0, 0.7, 1.3][i as usize % 4],
        top_k: [0, 5, 0, 20][i as usize % 4],
        top_p: [1.0, 1.0, 0.8, 0.95][i as usize % 4],
        seed: 11,
        max_new_tokens: 3 + 2 * i as usize,
        stop_tokens: (0..VOCABULARY as u32).filter(|t| t % 16 == i).collect(),
        ..Sampling::default()
    };
    (0..7_u32)
        .map(|i| {
            let prompt: Vec<u32> = (0..=3 * i).map(|t| (7 * t + 13 * i) % VOCABULARY as u32).collect();
            Request::new(prompt, sampling(i)).samples(1 + i as usize % 3).with_id(u64::from(i))
        })
        .collect()
}

/// What the engine should draw, computed without cache, padding or batch: a full forward pass for every token.
fn recomputed(
    decoder: &Decoder,
    weights: &Weights,
    request: &Request,
    sample: usize,
) -> (Vec<u32>, Vec<f32>) {
    let (mut tokens, mut log_probs) = (request.prompt.clone(), Vec::new());
    for position in 0..request.sampling.max_new_tokens {
        let ids = decoder.token_ids(&[&tokens]).unwrap();
        let frame = decoder.frame(tokens.len()).unwrap();
        let hidden = decoder.hidden(weights, &ids, &frame).unwrap();
        let logits = decoder.logits(weights, &hidden).unwrap().squeeze(0).unwrap().to_vec2::<f32>().unwrap();
        let key = DrawKey {
            seed: request.sampling.seed,
            request: request.id.unwrap(),
            sample: sample as u32,
            position: position as u32,
        };
        let past = Past { prompt: &request.prompt, completion: &tokens[request.prompt.len()..] };
        let drawn = draw(logits.last().unwrap(), &request.sampling, past, uniform(key)).unwrap();
        tokens.push(drawn.token);
        log_probs.push(drawn.raw_log_prob);
        if request.sampling.stop_tokens.contains(&drawn.token) {
            break;
        }
    }
    (tokens.split_off(request.prompt.len()), log_probs)
}

fn assert_close(got: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(got.len(), expected.len());
    for (g, e) in got.iter().zip(expected) {
        assert!((g - e).abs() <= tolerance, "{g} and {e} differ by more than {tolerance}");
    }
}

#[test]
fn the_embedded_engine_keeps_the_contract() {
    let config = config("qwen2", true);
    conformance(|| Subject { engine: Box::new(engine(&config, 1, 4)), weights: bytes(&weights(&config, 2)) });
}

#[test]
fn cached_and_batched_generation_equals_full_recomputation_token_by_token() {
    for (family, tied) in [("qwen2", true), ("llama", false), ("qwen3", true)] {
        let config = config(family, tied);
        let weights = weights(&config, 3);
        let decoder = Decoder::new(config.clone(), candle_core::DType::F32, &Device::Cpu).unwrap();
        let requests = mixed_requests();
        let completions = engine(&config, 3, 6).complete(&requests).unwrap();
        let stopped = completions.iter().filter(|c| matches!(c.finish, FinishReason::Stop(_))).count();
        assert!(stopped > 0 && stopped < completions.len(), "rows leave the batch early and late: {stopped}");
        for c in &completions {
            let (tokens, log_probs) = recomputed(&decoder, &weights, &requests[c.request], c.sample);
            assert_eq!(c.tokens, tokens, "{family}: request {}, sample {}", c.request, c.sample);
            assert_close(&c.log_probs, &log_probs, 1e-5);
        }
    }
}

#[test]
fn log_probs_equal_those_of_a_trainers_forward_pass() {
    let config = config("llama", true);
    let weights = weights(&config, 4);
    let decoder = Decoder::new(config.clone(), candle_core::DType::F32, &Device::Cpu).unwrap();
    let requests = mixed_requests();
    for c in engine(&config, 4, 64).complete(&requests).unwrap() {
        let prompt = &requests[c.request].prompt;
        let all = [prompt.as_slice(), &c.tokens].concat();
        let length = all.len() - 1;
        let ids = decoder.token_ids(&[&all[..length]]).unwrap();
        let targets = decoder.token_ids(&[&all[1..]]).unwrap();
        let frame = decoder.frame(length).unwrap();
        let hidden = decoder.hidden(&weights, &ids, &frame).unwrap();
        let log_probs = decoder.log_probs(&weights, &hidden, &targets).unwrap();
        let log_probs = log_probs.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_close(&c.log_probs, &log_probs[prompt.len() - 1..], 1e-5);
    }
}

#[test]
fn a_seed_draws_the_same_tokens_in_every_batch() {
    let config = config("qwen2", false);
    let requests = mixed_requests();
    let drawn = |max_sequences: usize, order: &[usize]| -> HashMap<(u64, usize), Vec<u32>> {
        let reordered: Vec<Request> = order.iter().map(|i| requests[*i].clone()).collect();
        let completions = engine(&config, 5, max_sequences).complete(&reordered).unwrap();
        completions.into_iter().map(|c| ((reordered[c.request].id.unwrap(), c.sample), c.tokens)).collect()
    };
    let forward: Vec<usize> = (0..requests.len()).collect();
    let backward: Vec<usize> = forward.iter().rev().copied().collect();
    let alone = drawn(1, &forward);
    for max_sequences in [2, 5, 64] {
        assert_eq!(drawn(max_sequences, &forward), alone, "{max_sequences} sequences at once");
        assert_eq!(drawn(max_sequences, &backward), alone, "{max_sequences} sequences at once, reordered");
    }
    let halves: HashMap<_, _> = drawn(4, &forward[..3]).into_iter().chain(drawn(4, &forward[3..])).collect();
    assert_eq!(halves, alone, "over two engines");
}

#[test]
fn processed_log_probs_are_those_of_the_draw() {
    let config = config("llama", true);
    let sampling = |log_probs| Sampling { top_k: 1, seed: 1, log_probs, ..Sampling::default() };
    let complete = |log_probs| -> Vec<Completion> {
        engine(&config, 6, 8).complete(&[Request::new([1, 2], sampling(log_probs))]).unwrap()
    };
    assert!(complete(LogProbs::Processed)[0].log_probs.iter().all(|l| *l == 0.0), "one token is left");
    assert!(complete(LogProbs::Raw)[0].log_probs.iter().all(|l| *l < 0.0), "the model was not certain");
}

#[test]
fn half_precision_weights_are_taken_and_converted() {
    let config = config("llama", true);
    let mut engine = engine(&config, 1, 8);
    let request = Request::new([9, 8, 7], Sampling::greedy(6));
    let rounded: Vec<TensorBytes> = bytes(&weights(&config, 2))
        .into_iter()
        .map(|t| {
            let halves = t.bytes.chunks_exact(4).flat_map(|b| [b[2], b[3]]).collect();
            TensorBytes { dtype: Dtype::BF16, bytes: halves, ..t }
        })
        .collect();
    let widened: Vec<TensorBytes> = rounded
        .iter()
        .map(|t| {
            let wide = t.bytes.chunks_exact(2).flat_map(|b| [0, 0, b[0], b[1]]).collect();
            TensorBytes { dtype: Dtype::F32, bytes: wide, ..t.clone() }
        })
        .collect();
    engine.replace_weights(Version(1), &views(&rounded), 1 << 12).unwrap();
    let from_halves = engine.complete(std::slice::from_ref(&request)).unwrap().remove(0);
    engine.replace_weights(Version(2), &views(&widened), 1 << 12).unwrap();
    let from_words = engine.complete(&[request]).unwrap().remove(0);
    assert_eq!((from_halves.tokens, from_halves.log_probs), (from_words.tokens, from_words.log_probs));
}

#[test]
fn an_engine_without_weights_waits_for_them() {
    let config = config("qwen2", true);
    let mut late = EmbeddedEngine::without_weights(config.clone(), Settings::default()).unwrap();
    assert_eq!((late.state(), late.version()), (State::EMPTY, None));
    late.replace_weights(Version(3), &views(&bytes(&weights(&config, 7))), 1 << 20).unwrap();
    let request = Request::new([1, 2, 3], Sampling::default()).samples(3);
    let mut expected = engine(&config, 7, 64).complete(std::slice::from_ref(&request)).unwrap();
    expected.iter_mut().for_each(|c| c.version = Version(3));
    assert_eq!(late.complete(&[request]).unwrap(), expected);
}

#[test]
fn broken_weights_are_named_by_the_first_draw_that_meets_them() {
    let config = config("llama", true);
    let mut engine = engine(&config, 1, 8);
    let mut broken = bytes(&weights(&config, 2));
    let norm = broken.iter_mut().find(|t| t.name == "model.norm.weight").unwrap();
    norm.bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    engine.replace_weights(Version(1), &views(&broken), 1 << 20).unwrap();
    let error = engine.complete(&[Request::new([1], Sampling::greedy(2))]).unwrap_err();
    assert!(matches!(error, Error::Logits { request: 0, sample: 0, position: 0, .. }), "{error:?}");
}

fn save(folder: &Path, config: &DecoderConfig, weights: &Weights, files: usize) {
    std::fs::write(folder.join("config.json"), config.to_json()).unwrap();
    let mut parts = vec![HashMap::new(); files];
    let mut index = serde_json::Map::new();
    let name = |file| format!("model-{:05}-of-{files:05}.safetensors", file + 1);
    for (at, (tensor, value)) in weights.iter().enumerate() {
        parts[at % files].insert(tensor.to_owned(), value.clone());
        index.insert(tensor.to_owned(), name(at % files).into());
    }
    if let [only] = parts.as_slice() {
        candle_core::safetensors::save(only, folder.join("model.safetensors")).unwrap();
        return;
    }
    for (file, part) in parts.iter().enumerate() {
        candle_core::safetensors::save(part, folder.join(name(file))).unwrap();
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": index });
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn a_folder_in_one_file_or_in_three_is_the_same_engine() {
    let config = config("qwen2", false);
    let request = Request::new([1, 2, 3], Sampling::default()).samples(2);
    let expected = engine(&config, 8, 64).complete(std::slice::from_ref(&request)).unwrap();
    for files in [1, 3] {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), &config, &weights(&config, 8), files);
        let mut loaded = EmbeddedEngine::from_folder(folder.path(), Settings::default()).unwrap();
        assert_eq!(loaded.complete(std::slice::from_ref(&request)).unwrap(), expected, "{files} files");
    }
}

#[test]
fn the_folders_tokenizer_reads_stop_strings() {
    let config = config("qwen3", true);
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), &config, &weights(&config, 8), 1);
    let request = Request::new([1, 2, 3], Sampling::default());
    let expected = engine(&config, 8, 64).complete(std::slice::from_ref(&request)).unwrap().remove(0);

    let words: serde_json::Map<String, serde_json::Value> =
        (0..VOCABULARY).map(|token| (format!("word{token}"), token.into())).collect();
    let model = serde_json::json!({ "type": "WordLevel", "vocab": words, "unk_token": "word0" });
    let tokenizer = serde_json::json!({ "version": "1.0", "added_tokens": [], "model": model });
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let mut loaded = EmbeddedEngine::from_folder(folder.path(), Settings::default()).unwrap();
    let mut stopping = request.clone();
    stopping.sampling.stop_strings = vec![format!("word{} word{}", expected.tokens[4], expected.tokens[5])];
    let stopped = loaded.complete(std::slice::from_ref(&stopping)).unwrap().remove(0);
    assert_eq!((stopped.finish, &stopped.tokens[..]), (FinishReason::StopString(0), &expected.tokens[..6]));

    std::fs::write(&path, "{").unwrap();
    let error = EmbeddedEngine::from_folder(folder.path(), Settings::default()).unwrap_err();
    assert!(error.to_string().contains("tokenizer.json"), "{error}");
}

#[test]
fn a_folder_says_which_tokens_end_an_answer() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config("qwen2", true);
    config.eos_token_ids = vec![7];
    save(folder.path(), &config, &weights(&config, 1), 1);
    let open = || EmbeddedEngine::from_folder(folder.path(), Settings::default());
    let generation = folder.path().join("generation_config.json");
    assert_eq!(open().unwrap().end_tokens(), [7], "without generation_config.json");
    for (text, expected) in [
        (r#"{"eos_token_id": [5, 7], "temperature": 0.7}"#, &[5, 7][..]),
        (r#"{"eos_token_id": 5}"#, &[5]),
        (r#"{"eos_token_id": null}"#, &[7]),
        (r#"{"temperature": 0.7}"#, &[7]),
    ] {
        std::fs::write(&generation, text).unwrap();
        assert_eq!(open().unwrap().end_tokens(), expected, "{text}");
    }
    for text in ["{", r#"{"eos_token_id": "</s>"}"#, r#"{"eos_token_id": [5, 96]}"#] {
        std::fs::write(&generation, text).unwrap();
        let error = open().unwrap_err();
        assert!(
            matches!(&error, Error::Model(ModelError::Malformed { path, .. }) if *path == generation),
            "{text}: {error:?}"
        );
    }

    // The third token of an answer, named as one that ends it.
    let ask = |engine: &mut EmbeddedEngine| {
        let stop_tokens = engine.end_tokens().to_vec();
        let sampling = Sampling { stop_tokens, ..Sampling::greedy(8) };
        engine.complete(&[Request::new([3, 1, 4], sampling)]).unwrap().remove(0)
    };
    std::fs::write(&generation, r#"{"eos_token_id": []}"#).unwrap();
    let whole = ask(&mut open().unwrap()).tokens;
    std::fs::write(&generation, format!(r#"{{"eos_token_id": [{}]}}"#, whole[2])).unwrap();
    let ended = ask(&mut open().unwrap());
    let first = whole.iter().position(|token| *token == whole[2]).unwrap();
    assert_eq!(ended.tokens, whole[..=first], "it ends with the token that was named");
    assert_eq!(ended.finish, FinishReason::Stop(whole[2]));
}

#[test]
fn a_folder_of_another_model_is_refused_by_the_tensors_name() {
    let config = config("llama", false);
    let open = |weights: &Weights| {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), &config, weights, 1);
        EmbeddedEngine::from_folder(folder.path(), Settings::default()).map(drop).unwrap_err()
    };
    let without = |gone: &str| -> Weights {
        let all = weights(&config, 1);
        all.iter().filter(|(n, _)| *n != gone).map(|(n, t)| (n.to_owned(), t.clone())).collect()
    };
    let norm = "model.norm.weight";
    let error = open(&without(norm));
    assert!(
        matches!(&error, Error::Model(ModelError::MissingTensor { name, .. }) if name == norm),
        "{error:?}"
    );

    let mut misshapen = without(norm);
    misshapen.insert(norm.to_owned(), Tensor::zeros(33, candle_core::DType::F32, &Device::Cpu).unwrap());
    let error = open(&misshapen);
    assert!(matches!(&error, Error::Model(ModelError::Shape { got, .. }) if *got == [33]), "{error:?}");

    let nowhere = tempfile::tempdir().unwrap();
    let error = EmbeddedEngine::from_folder(nowhere.path(), Settings::default()).unwrap_err();
    assert!(error.to_string().contains("config.json"), "{error}");
}

#[test]
fn sleeping_mid_training_and_waking_draws_the_same_tokens() {
    let config = config("qwen2", true);
    let mut engine = engine(&config, 9, 8);
    let request = Request::new([5, 5, 5], Sampling::default()).samples(2);
    let expected = engine.complete(std::slice::from_ref(&request)).unwrap();
    engine.sleep(Level::One).unwrap();
    engine.wake(Parts::All).unwrap();
    assert_eq!(engine.complete(&[request]).unwrap(), expected);
}
