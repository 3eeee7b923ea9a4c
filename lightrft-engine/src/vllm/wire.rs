//! Generation on the wire: a request's JSON for `POST /inference/v1/generate`, and completions from its reply.

use serde::Serialize;

use super::reply::{Choice, StopReason, choices};
use crate::server::{Ask, Job, Reply};
use crate::{
    Completion, Error, FinishReason, LogProbs, Media, MediaKind, Request, Result, Sampling, Version,
};

/// What vLLM puts for a log-probability that is -inf or NaN.
const BROKEN_LOG_PROB: f32 = -9999.0;

/// Decides how a request's log-probabilities come about, or refuses.
pub(super) fn ask(index: usize, sampling: &Sampling, servers: LogProbs) -> Result<Ask> {
    let same_for_both = sampling.temperature == 1.0
        && sampling.top_k == 0
        && sampling.top_p == 1.0
        && sampling.min_p == 0.0
        && sampling.repetition_penalty == 1.0
        && sampling.min_new_tokens == 0;
    match sampling.log_probs {
        LogProbs::None => Ok(Ask::None),
        LogProbs::Processed if sampling.temperature == 0.0 => Ok(Ask::Certain),
        wanted if wanted == servers || same_for_both => Ok(Ask::Servers),
        wanted => Err(Error::Request {
            request: index,
            field: "log_probs",
            value: format!("{wanted:?}"),
            expected: "this server computes the other kind (its --logprobs-mode, told by `Driver::log_probs`), and \
                       with these temperature, filters and min_new_tokens they differ",
        }),
    }
}

/// Refuses what vLLM would quietly change.
pub(super) fn check_sampling(index: usize, sampling: &Sampling) -> Result<()> {
    let temperature = sampling.temperature;
    let expected = if temperature > 0.0 && temperature < 0.01 {
        "vLLM would draw at 0.01: 0, or at least 0.01, was expected"
    } else if temperature > 2.0 {
        "vLLM draws at 2 at most"
    } else {
        return Ok(());
    };
    Err(Error::Request { request: index, field: "temperature", value: temperature.to_string(), expected })
}

#[derive(Serialize)]
struct Body<'a> {
    request_id: &'a str,
    token_ids: &'a [u32],
    #[serde(skip_serializing_if = "Vec::is_empty")]
    content_parts: Vec<ContentPart<'a>>,
    sampling_params: SamplingParams<'a>,
}

#[derive(Serialize)]
struct ContentPart<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    url: &'a str,
    uuid: Option<&'a str>,
}

#[derive(Serialize)]
struct SamplingParams<'a> {
    n: usize,
    seed: u64,
    temperature: f32,
    top_p: f32,
    top_k: usize,
    min_p: f32,
    repetition_penalty: f32,
    max_tokens: usize,
    min_tokens: usize,
    stop_token_ids: &'a [u32],
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    stop: &'a [String],
    /// Only the caller's stop tokens end a completion.
    ignore_eos: bool,
    /// How many alternatives besides the token drawn.
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<u32>,
    detokenize: bool,
}

/// The body of a job's request, as JSON.
pub(super) fn body<'a>(request: &'a Request, job: Job, id: &'a str, ask: Ask) -> impl Serialize + 'a {
    let sampling = &request.sampling;
    let part = |media: &'a Media| {
        let kind = match media.kind() {
            MediaKind::Image => "image_url",
            MediaKind::Video => "video_url",
        };
        ContentPart { kind, url: media.url(), uuid: None }
    };
    // vLLM draws sample i of a request with its seed plus i, so a sample does not depend on how they were cut.
    let seed = seed(sampling.seed, request.id.unwrap_or(job.request as u64)) + job.first as u64;
    Body {
        request_id: id,
        token_ids: &request.prompt,
        content_parts: request.media.iter().map(part).collect(),
        sampling_params: SamplingParams {
            n: job.drawn,
            seed,
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            max_tokens: sampling.max_new_tokens,
            min_tokens: sampling.min_new_tokens,
            stop_token_ids: &sampling.stop_tokens,
            stop: &sampling.stop_strings,
            ignore_eos: true,
            logprobs: (ask == Ask::Servers).then_some(0),
            detokenize: !sampling.stop_strings.is_empty(),
        },
    }
}

/// The seed of a request's first sample, below 2^62: the others' follow it, and the server takes 64 bits with a sign.
fn seed(seed: u64, id: u64) -> u64 {
    // The finaliser of SplitMix64, which spreads neighbouring seeds and ids.
    let mut z = 0_u64;
    for word in [seed, id] {
        z = z.wrapping_add(word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
    }
    z >> 2
}

/// What a job's completions are held against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked<'a> {
    pub(super) request: &'a Request,
    pub(super) job: Job,
    pub(super) ask: Ask,
    pub(super) vocabulary: usize,
    /// The version of the weights that the server was given last.
    pub(super) version: Version,
}

/// The completions of a job, from its reply.
pub(super) fn completions(reply: &Reply, asked: Asked<'_>) -> Result<Vec<Completion>> {
    let mut choices = reply.scan(choices)?;
    choices.sort_by_key(|choice| choice.index);
    let whole = choices.iter().map(|choice| choice.index).eq(0..asked.job.drawn);
    // Some servers leave samples out that were aborted before the others.
    let left_out = choices.iter().any(|choice| choice.finish_reason.as_deref() == Some("abort"))
        && choices.windows(2).all(|pair| pair[0].index < pair[1].index)
        && choices.last().is_some_and(|last| last.index < asked.job.drawn);
    if !whole && !left_out {
        let found: Vec<usize> = choices.iter().map(|choice| choice.index).take(8).collect();
        return Err(reply
            .unexpected(&format!("{} choices were asked for, got {found:?}", asked.job.drawn))
            .into());
    }
    let mut completions = asked.job.unbegun(asked.version);
    completions.truncate(asked.job.drawn);
    for choice in choices {
        let at = choice.index;
        let found = completion(reply, choice, asked)?;
        if let Some(place) = completions.get_mut(at) {
            *place = found;
        }
    }
    if let Some(first) = completions.first().cloned() {
        let more = completions.len()..asked.job.wanted;
        completions.extend(more.map(|at| Completion { sample: asked.job.first + at, ..first.clone() }));
    }
    Ok(completions)
}

fn completion(reply: &Reply, choice: Choice, asked: Asked<'_>) -> Result<Completion> {
    let wrong = |what: String| Error::from(reply.unexpected(&format!("choice {}: {what}", choice.index)));
    let sampling = &asked.request.sampling;
    let tokens = choice.tokens;
    if tokens.len() > sampling.max_new_tokens {
        return Err(wrong(format!("{} tokens of at most {}", tokens.len(), sampling.max_new_tokens)));
    }
    if let Some(token) = tokens.iter().find(|token| **token as usize >= asked.vocabulary) {
        return Err(wrong(format!("token {token} of a vocabulary of {}", asked.vocabulary)));
    }
    let finish = match (choice.finish_reason.as_deref(), choice.stop_reason) {
        (Some("length"), _) => FinishReason::Length,
        (Some("abort"), _) => FinishReason::Aborted,
        (Some("stop"), Some(StopReason::Token(token))) if tokens.last() == Some(&token) => {
            FinishReason::Stop(token)
        }
        (Some("stop"), Some(StopReason::Text(text))) => {
            match sampling.stop_strings.iter().position(|stop| *stop == text) {
                Some(at) => FinishReason::StopString(at),
                None => return Err(wrong("stopped by a text that was not asked for".to_owned())),
            }
        }
        (Some("stop"), None) => match (tokens.last(), sampling.stop_strings.len()) {
            // Tokens are looked at before texts.
            (Some(token), _) if sampling.stop_tokens.contains(token) => FinishReason::Stop(*token),
            (_, 1) => FinishReason::StopString(0),
            (_, 0) => {
                let what = "stopped, though its last token is no stop token and no text was to stop it";
                return Err(wrong(what.to_owned()));
            }
            (_, texts) => {
                return Err(wrong(format!(
                    "stopped, and this server does not say by which of {texts} texts: ask for one stop string, or take a \
                     newer vLLM"
                )));
            }
        },
        (reason, _) => return Err(wrong(format!("finish_reason {reason:?} with an unknown stop_reason"))),
    };
    let log_probs = match asked.ask {
        Ask::None => Vec::new(),
        Ask::Certain => vec![0.0; tokens.len()],
        Ask::Servers => {
            let (log_probs, of) = (choice.log_probs, choice.log_probs_of);
            if of != tokens {
                let what = format!("{} log-probabilities for {} tokens", of.len(), tokens.len());
                return Err(wrong(what));
            }
            let broken = |l: &f32| !(l.is_finite() && *l > BROKEN_LOG_PROB);
            if let Some(position) = log_probs.iter().position(broken) {
                return Err(Error::Logits {
                    request: asked.job.request,
                    sample: asked.job.first + choice.index,
                    position,
                    reason: "its log-probability is NaN or -inf".to_owned(),
                });
            }
            log_probs
        }
    };
    // Where weights changed under way, the oldest: the caller must not take it for newer than it is.
    let version = match &choice.first_version {
        None => asked.version,
        Some(version) => match version.parse() {
            Ok(number) => Version(number),
            Err(_) => {
                return Err(wrong(format!(
                    "drawn by weights `{version}`, which somebody else must have sent"
                )));
            }
        },
    };
    let (request, sample) = (asked.job.request, asked.job.first + choice.index);
    Ok(Completion { request, sample, tokens, log_probs, finish, version })
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
