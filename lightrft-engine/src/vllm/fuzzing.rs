//! What a vLLM server says, from any bytes.

use serde_json::Value;

use super::control::{Held, read_checksums, read_models};
use super::wire::{Asked, ask, completions};
use crate::fuzzing::{are_as_asked, request};
use crate::server::{Ask, Job, Reply, jobs};
use crate::transfer::{Checksums, without_counterpart};
use crate::{LogProbs, NamedTensor, Version};

/// The reply to a request for completions; the first byte says what was asked for.
pub fn vllm_replies(bytes: &[u8]) {
    let Some((&shape, reply)) = bytes.split_first() else { return };
    let request = request(shape);
    let Some(job) = jobs(std::slice::from_ref(&request), 8).into_iter().next() else { return };
    let ask = ask(0, &request.sampling, LogProbs::Raw).unwrap_or(Ask::None);
    if ask == Ask::None && request.sampling.log_probs != LogProbs::None {
        return;
    }
    let job = Job { request: 4, ..job };
    let asked = Asked { request: &request, job, ask, vocabulary: 320, version: Version(9) };
    let Ok(found) = completions(&Reply::of(reply.to_vec()), asked) else { return };
    are_as_asked(&request, &found, 320);
    // What the reader steps over may be anything but JSON; where all of it is, another reader finds the same.
    let Ok(value) = serde_json::from_slice::<Value>(reply) else { return };
    let choices = value["choices"].as_array().map(Vec::as_slice).unwrap_or_default();
    for completion in found.iter().take(job.drawn) {
        let index = Some(completion.sample as u64);
        let choice = choices.iter().find(|choice| choice["index"].as_u64() == index).unwrap_or(&Value::Null);
        let tokens = choice["token_ids"].as_array().map(Vec::as_slice).unwrap_or_default();
        assert!(tokens.iter().map(Value::as_u64).eq(completion.tokens.iter().map(|t| Some(u64::from(*t)))));
        if ask == Ask::Servers {
            let content = choice["logprobs"]["content"].as_array().map(Vec::as_slice).unwrap_or_default();
            assert_eq!(content.len(), completion.log_probs.len());
            for (entry, found) in content.iter().zip(&completion.log_probs) {
                // The other reader may be off by a last place of an f64, and so on the other side of the middle between
                // two f32.
                let other = entry["logprob"].as_f64().unwrap_or(f64::NAN) as f32;
                assert!((other - found).abs() <= other.abs() * f32::EPSILON, "{other} {completion:?}");
            }
        }
    }
}

/// The lists of models and of checksums.
pub fn vllm_listings(bytes: &[u8]) {
    let reply = Reply::of(bytes.to_vec());
    let _ = read_models(&reply);
    let Ok(Held { sums, .. }) = read_checksums(&reply) else { return };
    let mut checksums = Checksums::default();
    let names = [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.norm.weight",
    ];
    for name in names {
        if let Ok(tensor) = NamedTensor::new(name, safetensors::Dtype::F16, &[1], &[0, 0]) {
            checksums.add(&tensor);
        }
    }
    let names = names.map(str::to_owned);
    let covered = without_counterpart(&names, sums.iter().map(|(name, _)| name)).is_none();
    let equal = checksums.compare("vLLM", Version(1), sums.iter().map(|(name, sum)| (name, sum))).is_ok();
    // Half of a fused parameter was pushed: whatever is reported of it, it cannot be what was.
    assert!(covered || !equal, "what has no counterpart cannot be equal");
}
