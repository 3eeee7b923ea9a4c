//! The reply of `POST /inference/v1/generate`, as far as a completion is made of it.

use crate::server::{Keys, Malformed, Read, Scan};

/// One completion as the server tells it.
#[derive(Debug, Default)]
pub(super) struct Choice {
    pub(super) index: usize,
    pub(super) finish_reason: Option<String>,
    pub(super) stop_reason: Option<StopReason>,
    pub(super) tokens: Vec<u32>,
    pub(super) log_probs: Vec<f32>,
    /// The token of each log-probability.
    pub(super) log_probs_of: Vec<u32>,
    /// Of the weights that drew the first token; older servers do not say.
    pub(super) first_version: Option<String>,
}

/// What ended a completion that stopped.
#[derive(Debug)]
pub(super) enum StopReason {
    Token(u32),
    Text(String),
}

/// The choices of a reply, in its order.
pub(super) fn choices(scan: &mut Scan<'_>) -> Read<Vec<Choice>> {
    let mut choices = None;
    scan.object(|key, scan| match key {
        b"choices" => {
            let mut all = Vec::new();
            scan.array(|scan| choice(scan).map(|choice| all.push(choice)))?;
            choices = Some(all);
            Ok(())
        }
        _ => scan.skip(),
    })?;
    match choices {
        Some(choices) => Ok(choices),
        None => scan.wrong("`choices` before"),
    }
}

fn choice(scan: &mut Scan<'_>) -> Read<Choice> {
    let (mut choice, mut index) = (Choice::default(), None);
    scan.object(|key, scan| {
        match key {
            b"index" => index = Some(scan.integer("an index")?),
            b"finish_reason" => choice.finish_reason = scan.option(|scan| Ok(scan.string()?.into_owned()))?,
            b"stop_reason" => choice.stop_reason = scan.option(stop_reason)?,
            b"token_ids" => {
                let tokens = scan.option(|scan| {
                    let mut tokens = Vec::new();
                    scan.array(|scan| token(scan).map(|token| tokens.push(token)))?;
                    Ok(tokens)
                })?;
                choice.tokens = tokens.unwrap_or_default();
            }
            b"logprobs" => {
                let found = scan.option(log_probs)?.flatten();
                (choice.log_probs, choice.log_probs_of) = found.unwrap_or_default();
            }
            b"weight_versions" => choice.first_version = scan.option(first_version)?.flatten(),
            _ => scan.skip()?,
        }
        Ok(())
    })?;
    choice.index = required(scan, index, "`index` before")?;
    Ok(choice)
}

fn required<T>(scan: &Scan<'_>, found: Option<T>, expected: &'static str) -> Result<T, Malformed> {
    found.map_or_else(|| scan.wrong(expected), Ok)
}

fn token(scan: &mut Scan<'_>) -> Read<u32> {
    scan.integer("a token")
}

fn named_token(scan: &mut Scan<'_>) -> Read<Option<u32>> {
    Ok(scan.string()?.strip_prefix("token_id:").and_then(|token| token.parse().ok()))
}

fn stop_reason(scan: &mut Scan<'_>) -> Read<StopReason> {
    if scan.is_string() {
        return Ok(StopReason::Text(scan.string()?.into_owned()));
    }
    token(scan).map(StopReason::Token)
}

/// What a key of an entry among the log-probabilities means.
#[derive(Clone, Copy)]
enum Entry {
    Id,
    /// Older servers write the token as `token_id:7`.
    Name,
    LogProb,
    Alternatives,
    Other,
}

/// The log-probability of every token, and the tokens.
fn log_probs(scan: &mut Scan<'_>) -> Read<Option<(Vec<f32>, Vec<u32>)>> {
    let mut content = None;
    scan.object(|key, scan| match key {
        b"content" => {
            content = scan.option(entries)?;
            Ok(())
        }
        _ => scan.skip(),
    })?;
    Ok(content)
}

fn entries(scan: &mut Scan<'_>) -> Read<(Vec<f32>, Vec<u32>)> {
    let (mut log_probs, mut tokens) = (Vec::new(), Vec::new());
    let mut keys = Keys::default();
    let name = |key: &[u8]| match key {
        b"token_id" => Entry::Id,
        b"token" => Entry::Name,
        b"logprob" => Entry::LogProb,
        b"top_logprobs" => Entry::Alternatives,
        _ => Entry::Other,
    };
    scan.array(|scan| {
        let (mut log_prob, mut of) = (None, None);
        let start = scan.at();
        scan.alike(&mut keys, name, |key, scan| {
            match key {
                Entry::Id => of = Some(token(scan)?),
                Entry::Name => of = of.or(scan.option(named_token)?.flatten()),
                Entry::LogProb => log_prob = Some(scan.float()?),
                Entry::Alternatives => match scan.since(start).strip_suffix(b",\"top_logprobs\":") {
                    Some(entry) => scan.skip_copy(entry)?,
                    None => scan.skip()?,
                },
                Entry::Other => scan.skip()?,
            }
            Ok(())
        })?;
        log_probs.push(required(scan, log_prob, "`logprob` before")?);
        tokens.push(required(scan, of, "`token_id` before")?);
        Ok(())
    })?;
    Ok((log_probs, tokens))
}

fn first_version(scan: &mut Scan<'_>) -> Read<Option<String>> {
    let mut first = None;
    scan.array(|scan| {
        let mut version = None;
        scan.object(|key, scan| match key {
            b"version" => {
                version = Some(scan.string()?.into_owned());
                Ok(())
            }
            _ => scan.skip(),
        })?;
        let version = required(scan, version, "`version` before")?;
        first.get_or_insert(version);
        Ok(())
    })?;
    Ok(first)
}
