//! A call's requests as HTTP requests: some samples of one prompt each.

use crate::{Completion, FinishReason, Request, Version};

/// One HTTP request: some samples of one prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Job {
    /// Index of the request in the call.
    pub(crate) request: usize,
    /// Index of the first of its samples.
    pub(crate) first: usize,
    /// How many completions are drawn.
    pub(crate) drawn: usize,
    /// How many the caller gets: more than are drawn only if each is the same.
    pub(crate) wanted: usize,
}

/// Cuts requests into jobs of at most `most` samples. A greedy completion is drawn once, however often it is wanted: vLLM
/// refuses to draw it twice.
pub(crate) fn jobs(requests: &[Request], most: usize) -> Vec<Job> {
    let mut jobs = Vec::new();
    for (request, asked) in requests.iter().enumerate() {
        if asked.sampling.temperature == 0.0 {
            jobs.push(Job { request, first: asked.first_sample, drawn: 1, wanted: asked.samples });
            continue;
        }
        for first in (0..asked.samples).step_by(most.max(1)) {
            let drawn = most.max(1).min(asked.samples - first);
            jobs.push(Job { request, first: asked.first_sample + first, drawn, wanted: drawn });
        }
    }
    jobs
}

impl Job {
    /// Completions of a job that was aborted before it was sent.
    pub(crate) fn unbegun(self, version: Version) -> Vec<Completion> {
        let empty = |at| Completion {
            request: self.request,
            sample: self.first + at,
            tokens: Vec::new(),
            log_probs: Vec::new(),
            finish: FinishReason::Aborted,
            version,
        };
        (0..self.wanted).map(empty).collect()
    }
}

/// How a request's log-probabilities come about on a server that computes one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// None are wanted.
    None,
    /// The server's are those that are wanted.
    Servers,
    /// A greedy draw is certain: no server is needed to know.
    Certain,
}
