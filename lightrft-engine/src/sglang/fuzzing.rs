//! What an `SGLang` server says, from any bytes.

use super::control::{RankChecksums, read_checksums, read_model_info, read_server_info};
use super::wire::{Asked, ask, completions};
use crate::fuzzing::{are_as_asked, request};
use crate::server::{Ask, Job, Reply, jobs};
use crate::transfer::{Checksums, without_counterpart};
use crate::{LogProbs, MediaKind, NamedTensor, Version};

/// The reply to a request for completions; the first byte says what was asked for.
pub fn sglang_replies(bytes: &[u8]) {
    let Some((&shape, reply)) = bytes.split_first() else { return };
    let request = request(shape);
    let Some(job) = jobs(std::slice::from_ref(&request), 8).into_iter().next() else { return };
    let ask = ask(0, &request.sampling, LogProbs::Raw).unwrap_or(Ask::None);
    if ask == Ask::None && request.sampling.log_probs != LogProbs::None {
        return;
    }
    let job = Job { request: 4, ..job };
    let asked = Asked { request: &request, job, ask, vocabulary: 320, version: (Version(9), false) };
    if let Ok(found) = completions(&Reply::of(reply.to_vec()), asked) {
        are_as_asked(&request, &found, 320);
    }
}

/// What it says of itself and of its model, and the checksums of its workers.
pub fn sglang_listings(bytes: &[u8]) {
    let reply = Reply::of(bytes.to_vec());
    if let Ok(info) = read_server_info(&reply) {
        let (_, _, limits) = (info.shards(), info.memory_saver(), info.media_limits());
        for (kind, most) in [(MediaKind::Image, limits.images), (MediaKind::Video, limits.videos)] {
            let takes = |count| limits.check(0, kind, count).is_ok();
            assert!(most.is_none_or(|most| takes(most) && (most == usize::MAX || !takes(most + 1))));
        }
    }
    let _ = read_model_info(&reply);
    let names = [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.norm.weight",
    ];
    for RankChecksums { checksums: held } in read_checksums(&reply).unwrap_or_default() {
        let mut checksums = Checksums::default();
        for name in names {
            if let Ok(tensor) = NamedTensor::new(name, safetensors::Dtype::F16, &[1], &[0, 0]) {
                checksums.add(&tensor);
            }
        }
        let covered = without_counterpart(&names.map(str::to_owned), held.keys()).is_none();
        let equal = checksums.compare("SGLang", Version(1), &held).is_ok();
        assert!(covered || !equal, "what has no counterpart cannot be equal");
        assert!(!equal || held.values().any(|sum| sum.len() >= 16), "a few digits are no checksum");
    }
}
