//! What an `SGLang` server says, from any bytes.

use super::wire::{Asked, ask, completions};
use crate::fuzzing::{are_as_asked, request};
use crate::server::{Ask, Job, Reply, jobs};
use crate::{LogProbs, Version};

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
