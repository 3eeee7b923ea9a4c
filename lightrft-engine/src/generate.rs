//! Prompts in, completions out: token ids both ways, with the log-probabilities and the version behind them.

use serde::{Deserialize, Serialize};

use crate::{Error, Media, Result, Version};

/// A prompt, and how many completions of it to draw.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Token ids of the prompt; at least one.
    pub prompt: Vec<u32>,
    /// Completions to draw; at least one.
    pub samples: usize,
    /// Index of the first of them, 0 unless a prompt's samples are drawn in several calls: sample `i` is the same in
    /// whichever call it is drawn.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub first_sample: usize,
    /// How tokens are drawn, and when to stop.
    pub sampling: Sampling,
    /// Keys this request's random numbers, together with [`Sampling::seed`] and the sample's index. `None` takes the
    /// request's index in the call; give an id where the same rollout may be cut into other calls, or over several
    /// engines, and must still draw the same tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// Pictures and films of the prompt, those of a kind in the order of their pads: each stands in the prompt as ONE pad
    /// token of the model (`image_token_id`, `video_token_id` of its configuration), which the engine expands.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub media: Vec<Media>,
}

impl Request {
    /// One completion of `prompt`, drawn by `sampling`.
    pub fn new(prompt: impl Into<Vec<u32>>, sampling: Sampling) -> Self {
        Self { prompt: prompt.into(), samples: 1, first_sample: 0, sampling, id: None, media: Vec::new() }
    }

    /// The same prompt with `samples` completions.
    #[must_use]
    pub fn samples(mut self, samples: usize) -> Self {
        self.samples = samples;
        self
    }

    /// The same request, whose samples begin with number `first`.
    #[must_use]
    pub fn from_sample(mut self, first: usize) -> Self {
        self.first_sample = first;
        self
    }

    /// The same request with its own key to the random numbers.
    #[must_use]
    pub fn with_id(mut self, id: u64) -> Self {
        self.id = Some(id);
        self
    }

    /// The same request with the pictures and films of its prompt.
    #[must_use]
    pub fn with_media(mut self, media: impl IntoIterator<Item = Media>) -> Self {
        self.media = media.into_iter().collect();
        self
    }
}

/// How the next token is drawn, and when a completion ends.
///
/// What is done to the logits, in vLLM's order: stop tokens are banned before [`min_new_tokens`](Self::min_new_tokens);
/// [`repetition_penalty`](Self::repetition_penalty); then, unless greedy, [`temperature`](Self::temperature),
/// [`min_p`](Self::min_p), [`top_k`](Self::top_k), [`top_p`](Self::top_p), each over what the former left.
/// (`transformers` takes `min_p` last, so that its `top_p` counts tokens that `min_p` then drops.)
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token, and the lowest id among equals.
    pub temperature: f32,
    /// Keeps the `k` most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest most likely tokens whose probabilities reach `p`, in (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Keeps the tokens whose probability is at least this share of the most likely one's, in [0, 1]; 0 keeps all.
    pub min_p: f32,
    /// Makes tokens of the prompt and of the completion so far less likely: their positive logits are divided by it,
    /// their negative ones multiplied (Keskar et al. 2019). Positive; 1 changes nothing, less than 1 favours repetition.
    pub repetition_penalty: f32,
    /// Same seed, same weights, same request: same tokens.
    pub seed: u64,
    /// Ends a completion after this many tokens; at least 1.
    pub max_new_tokens: usize,
    /// No stop token is drawn before this many tokens.
    pub min_new_tokens: usize,
    /// Tokens that end a completion. The one drawn is the completion's last token.
    pub stop_tokens: Vec<u32>,
    /// Texts that end a completion: at the first token whose text completes one of them, from
    /// [`min_new_tokens`](Self::min_new_tokens) on. That token is the completion's last, with its log-probability, even
    /// if its text goes on past the stop text. Only the completion's own text counts, never the prompt's. An engine
    /// that knows no text refuses them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stop_strings: Vec<String>,
    /// Which log-probabilities come with a completion.
    pub log_probs: LogProbs,
}

impl Default for Sampling {
    /// Draws from the model's own distribution, at most 16 tokens, with [`LogProbs::Raw`].
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
            max_new_tokens: 16,
            min_new_tokens: 0,
            stop_tokens: Vec::new(),
            stop_strings: Vec::new(),
            log_probs: LogProbs::Raw,
        }
    }
}

impl Sampling {
    /// Always the most likely token, at most `max_new_tokens` of them.
    pub fn greedy(max_new_tokens: usize) -> Self {
        Self { temperature: 0.0, max_new_tokens, ..Self::default() }
    }
}

/// Under which distribution the log-probabilities of the sampled tokens are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum LogProbs {
    /// None are returned.
    None,
    /// The model's own: the log-softmax of its logits, before temperature, filters and the ban on early stops. This is
    /// what a trainer's forward pass computes, whatever the temperature of the rollout.
    #[default]
    Raw,
    /// That of the draw itself: after temperature, filters and the ban on early stops, renormalised. 0 when greedy.
    Processed,
}

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum FinishReason {
    /// This stop token was drawn; it is the last of the completion's tokens.
    Stop(u32),
    /// The completion's text holds this one of [`Sampling::stop_strings`] (its index there; the lowest if one token
    /// completed several).
    StopString(usize),
    /// [`Sampling::max_new_tokens`] were drawn.
    Length,
    /// Somebody aborted it; the tokens drawn so far are there, perhaps none.
    Aborted,
}

/// One completion of one prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Completion {
    /// Index of the request in the call.
    pub request: usize,
    /// Index of the sample, from [`Request::first_sample`] on.
    pub sample: usize,
    /// The tokens drawn, without the prompt, with the stop token if there was one.
    pub tokens: Vec<u32>,
    /// Log-probability (natural logarithm) of each token of `tokens`, as [`Sampling::log_probs`] asked; empty for
    /// [`LogProbs::None`].
    pub log_probs: Vec<f32>,
    /// Why it ended.
    pub finish: FinishReason,
    /// The version of the weights that drew it.
    pub version: Version,
}

/// What an engine's model and memory allow of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Number of token ids.
    pub vocabulary: usize,
    /// Longest prompt plus completion, in tokens.
    pub context_tokens: usize,
}

/// Checks every request of a call before anything is generated. Engines of text call it first; it refuses media.
///
/// # Errors
/// [`Error::Request`] names the field and its value, [`Error::ContextExceeded`] both numbers,
/// [`Error::OutsideVocabulary`] the token.
pub fn check_requests(requests: &[Request], limits: Limits) -> Result<()> {
    check_fields(requests, limits)?;
    match requests.iter().position(|request| !request.media.is_empty()) {
        None => Ok(()),
        Some(index) => Err(Error::Request {
            request: index,
            field: "media",
            value: format!("{:?}", requests[index].media),
            expected: "this engine reads text alone",
        }),
    }
}

/// The same for engines that check the media themselves.
pub(crate) fn check_fields(requests: &[Request], limits: Limits) -> Result<()> {
    requests.iter().enumerate().try_for_each(|(index, request)| check(index, request, limits))
}

/// Refuses texts that end a completion, for an engine that knows token ids alone.
///
/// # Errors
/// [`Error::Request`] names the first request that has them.
pub fn refuse_stop_strings(requests: &[Request]) -> Result<()> {
    match requests.iter().enumerate().find(|(_, r)| !r.sampling.stop_strings.is_empty()) {
        None => Ok(()),
        Some((request, r)) => Err(Error::Request {
            request,
            field: "stop_strings",
            value: format!("{:?}", r.sampling.stop_strings),
            expected: "this engine knows no text: give stop_tokens, or an engine that has the tokenizer",
        }),
    }
}

fn check(index: usize, request: &Request, limits: Limits) -> Result<()> {
    let s = &request.sampling;
    let bad = |field, value: &dyn ToString, expected| {
        Err(Error::Request { request: index, field, value: value.to_string(), expected })
    };
    if request.prompt.is_empty() {
        return bad("prompt", &"[]", "at least one token was expected");
    }
    if request.samples == 0 {
        return bad("samples", &request.samples, "at least 1 was expected");
    }
    if u32::try_from(request.samples).is_err() {
        return bad("samples", &request.samples, "fewer than 2^32 were expected");
    }
    if u32::try_from(request.samples.saturating_add(request.first_sample)).is_err() {
        return bad("first_sample", &request.first_sample, "numbers of samples below 2^32 were expected");
    }
    if !(s.temperature.is_finite() && s.temperature >= 0.0) {
        return bad("temperature", &s.temperature, "a finite number of at least 0 was expected");
    }
    if !(s.top_p > 0.0 && s.top_p <= 1.0) {
        return bad("top_p", &s.top_p, "a number in (0, 1] was expected");
    }
    if !(0.0..=1.0).contains(&s.min_p) {
        return bad("min_p", &s.min_p, "a number in [0, 1] was expected");
    }
    if !(s.repetition_penalty.is_finite() && s.repetition_penalty > 0.0) {
        return bad("repetition_penalty", &s.repetition_penalty, "a finite number above 0 was expected");
    }
    if s.stop_strings.iter().any(String::is_empty) {
        return bad("stop_strings", &"\"\"", "an empty text would end every completion at once");
    }
    if s.max_new_tokens == 0 {
        return bad("max_new_tokens", &s.max_new_tokens, "at least 1 was expected");
    }
    if s.min_new_tokens > s.max_new_tokens {
        return Err(Error::Request {
            request: index,
            field: "min_new_tokens and max_new_tokens",
            value: format!("{} and {}", s.min_new_tokens, s.max_new_tokens),
            expected: "the first must not exceed the second",
        });
    }
    let (prompt_tokens, max_new_tokens) = (request.prompt.len(), s.max_new_tokens);
    if prompt_tokens.saturating_add(max_new_tokens) > limits.context_tokens {
        let context_tokens = limits.context_tokens;
        return Err(Error::ContextExceeded { request: index, prompt_tokens, max_new_tokens, context_tokens });
    }
    for (field, tokens) in [("prompt", &request.prompt), ("stop_tokens", &s.stop_tokens)] {
        if let Some(position) = tokens.iter().position(|t| *t as usize >= limits.vocabulary) {
            let (token, vocabulary) = (tokens[position], limits.vocabulary);
            return Err(Error::OutsideVocabulary { request: index, field, position, token, vocabulary });
        }
    }
    let banned = if s.min_new_tokens == 0 { 0 } else { distinct(&s.stop_tokens) };
    if banned >= limits.vocabulary {
        return bad(
            "stop_tokens",
            &banned,
            "with min_new_tokens > 0, at least one token must not be a stop token",
        );
    }
    Ok(())
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde asks for it
fn is_zero(number: &usize) -> bool {
    *number == 0
}

fn distinct(tokens: &[u32]) -> usize {
    let mut sorted = tokens.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    sorted.len()
}
