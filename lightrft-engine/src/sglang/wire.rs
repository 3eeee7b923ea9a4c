//! Generation on the wire: a request's JSON for `POST /generate`, and completions from its reply.

use serde::{Deserialize, Serialize};

use super::settings::Seeds;
use crate::server::{Ask, Job, MediaLimits, Model, Reply};
use crate::{Completion, Error, FinishReason, LogProbs, MediaKind, Request, Result, Sampling, Version};

/// Decides how a request's log-probabilities come about, or refuses.
///
/// `SGLang` applies a ban on early stops and the repetition penalty to the logits first of all, and takes the model's own
/// distribution after them; it takes that of the draw after the temperature, and before top-k, top-p and min-p.
pub(super) fn ask(index: usize, sampling: &Sampling, servers: LogProbs) -> Result<Ask> {
    let greedy = sampling.temperature == 0.0;
    let untouched = sampling.min_new_tokens == 0 && sampling.repetition_penalty == 1.0;
    let unfiltered = sampling.top_k == 0 && sampling.top_p == 1.0 && sampling.min_p == 0.0;
    // At temperature 1 the server's kinds are the same, and it draws greedily at temperature 1.
    let either = greedy || sampling.temperature == 1.0;
    let expected = match sampling.log_probs {
        LogProbs::None => return Ok(Ask::None),
        LogProbs::Processed if greedy => return Ok(Ask::Certain),
        LogProbs::Raw if !untouched => {
            "SGLang gives them after a ban on early stops and the repetition penalty: without min_new_tokens and with \
             repetition_penalty = 1, or `None`, was expected"
        }
        LogProbs::Processed if !unfiltered => {
            "SGLang gives them before its filters: without top_k, top_p and min_p, or `None`, was expected"
        }
        wanted if wanted == servers || either => return Ok(Ask::Servers),
        _ => {
            "this server computes the other kind (SGLANG_RETURN_ORIGINAL_LOGPROB, told by `Driver::log_probs`), and at \
             this temperature they differ"
        }
    };
    let value = format!("{:?}", sampling.log_probs);
    Err(Error::Request { request: index, field: "log_probs", value, expected })
}

/// Refuses what `SGLang` would quietly change, and what would bring it down.
pub(super) fn check(index: usize, request: &Request, model: &Model, limits: MediaLimits) -> Result<()> {
    let sampling = &request.sampling;
    let bad = |field, value: String, expected| Err(Error::Request { request: index, field, value, expected });
    if sampling.temperature > 0.0 && sampling.temperature < 1e-6 {
        let expected = "SGLang draws greedily below 0.000001: 0 or more than that was expected";
        return bad("temperature", sampling.temperature.to_string(), expected);
    }
    if sampling.repetition_penalty > 2.0 {
        let expected = "SGLang takes 2 at most";
        return bad("repetition_penalty", sampling.repetition_penalty.to_string(), expected);
    }
    if sampling.min_new_tokens > 0 && !sampling.stop_strings.is_empty() {
        let expected = "SGLang ends at stop_strings before min_new_tokens too: only one of them was expected";
        return bad("min_new_tokens", sampling.min_new_tokens.to_string(), expected);
    }
    if sampling.stop_strings.len() > 32 {
        return bad("stop_strings", sampling.stop_strings.len().to_string(), "SGLang takes 32 at most");
    }
    for (kind, name) in [(MediaKind::Image, "images"), (MediaKind::Video, "videos")] {
        let media = request.media.iter().filter(|media| media.kind() == kind).count();
        let pads = model.pad(kind).map(|pad| request.prompt.iter().filter(|token| **token == pad).count());
        match pads {
            // With more pads than media, pads would be read as text; pads that are expanded already hang the server
            // for ever; of more media than pads some would be left out.
            Some(pads) if pads != media => {
                let expected = "as many pads as media were expected, one for each: the server expands it";
                return bad("media", format!("{media} {name} for {pads} pads"), expected);
            }
            None if media > 0 => {
                let expected = "the model folder names no pad for them";
                return bad("media", format!("{media} {name}"), expected);
            }
            _ => limits.check(index, kind, media)?,
        }
    }
    Ok(())
}

#[derive(Serialize)]
struct Body<'a> {
    rid: Vec<String>,
    input_ids: Vec<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    image_data: Option<Vec<Vec<&'a str>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    video_data: Option<Vec<Vec<&'a str>>>,
    sampling_params: Vec<SamplingParams<'a>>,
    return_logprob: bool,
}

#[derive(Serialize)]
struct SamplingParams<'a> {
    max_new_tokens: usize,
    min_new_tokens: usize,
    temperature: f32,
    top_p: f32,
    /// -1 keeps all.
    top_k: i64,
    min_p: f32,
    repetition_penalty: f32,
    stop_token_ids: &'a [u32],
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    stop: &'a [String],
    /// With it, stop tokens are ignored as well.
    ignore_eos: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    sampling_seed: Option<i64>,
}

/// The body of a job's request, as JSON: a batch of one prompt for each sample, since samples of one prompt would share
/// their seed.
pub(super) fn body<'a>(
    request: &'a Request,
    job: Job,
    rids: Vec<String>,
    ask: Ask,
    seeds: Seeds,
) -> impl Serialize + 'a {
    let sampling = &request.sampling;
    let media = |kind| {
        let urls: Vec<&str> = request.media.iter().filter(|m| m.kind() == kind).map(|m| m.url()).collect();
        (!urls.is_empty()).then(|| vec![urls; job.drawn])
    };
    let params = |at: usize| {
        let seed = seed(sampling.seed, request.id.unwrap_or(job.request as u64), (job.first + at) as u64);
        SamplingParams {
            max_new_tokens: sampling.max_new_tokens,
            min_new_tokens: sampling.min_new_tokens,
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: i64::try_from(sampling.top_k).ok().filter(|k| (1..1 << 30).contains(k)).unwrap_or(-1),
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            stop_token_ids: &sampling.stop_tokens,
            stop: &sampling.stop_strings,
            ignore_eos: sampling.stop_tokens.is_empty(),
            sampling_seed: (seeds == Seeds::Honoured).then_some(seed),
        }
    };
    Body {
        rid: rids,
        input_ids: vec![&request.prompt; job.drawn],
        image_data: media(MediaKind::Image),
        video_data: media(MediaKind::Video),
        sampling_params: (0..job.drawn).map(params).collect(),
        return_logprob: ask == Ask::Servers,
    }
}

/// The seed of one sample, of 63 bits: the server takes 64 with a sign.
fn seed(seed: u64, id: u64, sample: u64) -> i64 {
    // The finaliser of SplitMix64, which spreads neighbouring seeds, ids and samples.
    let mut z = 0_u64;
    for word in [seed, id, sample] {
        z = z.wrapping_add(word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
    }
    (z >> 1).cast_signed()
}

#[derive(Deserialize)]
struct Drawn {
    #[serde(default)]
    output_ids: Vec<u32>,
    meta_info: MetaInfo,
}

/// Log-probability, token and its text; `SGLang` writes NaN and infinities as nothing.
type TokenLogProb = (Option<f32>, u32, Option<String>);

#[derive(Deserialize)]
struct MetaInfo {
    finish_reason: Option<Finish>,
    output_token_logprobs: Option<Vec<TokenLogProb>>,
    weight_version: Option<String>,
    /// Spans of the completion by the weights that drew them.
    weight_versions: Option<Vec<Span>>,
}

#[derive(Deserialize)]
struct Finish {
    #[serde(rename = "type")]
    kind: String,
    matched: Option<Matched>,
    message: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Matched {
    Token(u32),
    Text(String),
}

#[derive(Deserialize)]
struct Span {
    version: String,
}

/// What a job's completions are held against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked<'a> {
    pub(super) request: &'a Request,
    pub(super) job: Job,
    pub(super) ask: Ask,
    pub(super) vocabulary: usize,
    /// The version of the weights that the server was given last, and whether it was told.
    pub(super) version: (Version, bool),
}

/// The completions of a job, from its reply.
pub(super) fn completions(reply: &Reply, asked: Asked<'_>) -> Result<Vec<Completion>> {
    let drawn: Vec<Drawn> = reply.json()?;
    if drawn.len() != asked.job.drawn {
        let what = format!("{} completions were asked for, got {}", asked.job.drawn, drawn.len());
        return Err(reply.unexpected(&what).into());
    }
    let parsed = drawn.into_iter().enumerate().map(|(at, drawn)| completion(reply, at, drawn, asked));
    let mut completions = parsed.collect::<Result<Vec<_>>>()?;
    if let Some(first) = completions.first().cloned() {
        let more = completions.len()..asked.job.wanted;
        completions.extend(more.map(|at| Completion { sample: asked.job.first + at, ..first.clone() }));
    }
    Ok(completions)
}

fn completion(reply: &Reply, at: usize, drawn: Drawn, asked: Asked<'_>) -> Result<Completion> {
    let wrong = |what: String| Error::from(reply.unexpected(&format!("completion {at}: {what}")));
    let sampling = &asked.request.sampling;
    let (tokens, meta) = (drawn.output_ids, drawn.meta_info);
    if tokens.len() > sampling.max_new_tokens {
        return Err(wrong(format!("{} tokens of at most {}", tokens.len(), sampling.max_new_tokens)));
    }
    if let Some(token) = tokens.iter().find(|token| **token as usize >= asked.vocabulary) {
        return Err(wrong(format!("token {token} of a vocabulary of {}", asked.vocabulary)));
    }
    let Some(reason) = meta.finish_reason else { return Err(wrong("no finish_reason".to_owned())) };
    let finish = match (reason.kind.as_str(), reason.matched) {
        ("length", _) if tokens.len() == sampling.max_new_tokens => FinishReason::Length,
        ("length", _) => {
            let (got, most) = (tokens.len(), sampling.max_new_tokens);
            return Err(wrong(format!("cut short by the server's own limits: {got} of {most} tokens")));
        }
        ("abort", _) => FinishReason::Aborted,
        ("stop", Some(Matched::Token(token))) if tokens.last() == Some(&token) => FinishReason::Stop(token),
        ("stop", Some(Matched::Text(text))) => match sampling.stop_strings.iter().position(|s| *s == text) {
            Some(at) => FinishReason::StopString(at),
            None => return Err(wrong("stopped by a text that was not asked for".to_owned())),
        },
        (kind, _) => {
            let message = reason.message.map(|m| format!(" ({m})")).unwrap_or_default();
            return Err(wrong(format!("ended by `{kind}`{message}")));
        }
    };
    let log_probs = match asked.ask {
        Ask::None => Vec::new(),
        Ask::Certain => vec![0.0; tokens.len()],
        Ask::Servers => {
            let found = meta.output_token_logprobs.unwrap_or_default();
            if !found.iter().map(|(_, token, _)| *token).eq(tokens.iter().copied()) {
                return Err(wrong(format!("{} log-probabilities for {} tokens", found.len(), tokens.len())));
            }
            let broken = |position| Error::Logits {
                request: asked.job.request,
                sample: asked.job.first + at,
                position,
                reason: "its log-probability is NaN or -inf".to_owned(),
            };
            let finite = |(position, (log_prob, _, _)): (usize, &TokenLogProb)| {
                log_prob.filter(|l| l.is_finite()).ok_or_else(|| broken(position))
            };
            found.iter().enumerate().map(finite).collect::<Result<_>>()?
        }
    };
    // Where weights changed under way, the oldest: the caller must not take it for newer than it is.
    let spans = meta.weight_versions.unwrap_or_default();
    let named = spans.first().map(|span| span.version.as_str()).or(meta.weight_version.as_deref());
    let version = match named {
        // What a server says that was never told.
        None | Some("default") => match asked.version {
            (version, false) => version,
            (version, true) => {
                let what = format!(
                    "drawn by weights without a name, where version {} was expected: the server was started anew, and \
                     has its first weights. Update them",
                    version.0
                );
                return Err(wrong(what));
            }
        },
        Some(named) => match named.parse() {
            Ok(number) => Version(number),
            Err(_) => {
                return Err(wrong(format!("drawn by weights `{named}`, which somebody else must have sent")));
            }
        },
    };
    let (request, sample) = (asked.job.request, asked.job.first + at);
    Ok(Completion { request, sample, tokens, log_probs, finish, version })
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
