//! Readers of what servers say, for the fuzz targets and the inputs that they have found.
//!
//! Each function takes any bytes. It panics if a reader breaks its word; a reader that panics, or takes memory or time
//! without bound, is found by whoever calls.

#[cfg(any(feature = "sglang", feature = "vllm"))]
pub use crate::server::fuzzing::{errors, metrics};
#[cfg(feature = "sglang")]
pub use crate::sglang::fuzzing::{sglang_listings, sglang_replies};
#[cfg(feature = "vllm")]
pub use crate::vllm::fuzzing::{vllm_listings, vllm_replies};

#[cfg(any(feature = "sglang", feature = "vllm"))]
use crate::{Completion, LogProbs, Request, Sampling};

/// What was asked for before a reply came, by one byte.
#[cfg(any(feature = "sglang", feature = "vllm"))]
pub(crate) fn request(shape: u8) -> Request {
    let log_probs = [LogProbs::Raw, LogProbs::None, LogProbs::Processed][usize::from(shape % 3)];
    let stops = ["a", "b"].map(str::to_owned).to_vec();
    let stop_strings = if shape & 32 == 0 { Vec::new() } else { stops };
    let temperature = if shape & 64 == 0 { 1.0 } else { 0.0 };
    let max_new_tokens = usize::from(shape >> 3 & 3) * 2 + 1;
    let sampling = Sampling {
        max_new_tokens,
        log_probs,
        stop_strings,
        temperature,
        stop_tokens: vec![308],
        ..Sampling::default()
    };
    Request::new([1, 2, 3], sampling).samples(usize::from(shape >> 7) + 2)
}

/// Completions that were taken are those that were asked for, whatever the reply says.
#[cfg(any(feature = "sglang", feature = "vllm"))]
pub(crate) fn are_as_asked(request: &Request, completions: &[Completion], vocabulary: usize) {
    assert_eq!(completions.len(), request.samples, "as many as were asked for");
    for (sample, completion) in completions.iter().enumerate() {
        assert_eq!((completion.request, completion.sample), (4, sample));
        assert!(completion.tokens.len() <= request.sampling.max_new_tokens);
        assert!(completion.tokens.iter().all(|token| (*token as usize) < vocabulary));
        let log_probs =
            if request.sampling.log_probs == LogProbs::None { 0 } else { completion.tokens.len() };
        assert_eq!(completion.log_probs.len(), log_probs);
        assert!(completion.log_probs.iter().all(|log_prob| log_prob.is_finite()));
    }
}
