//! One token out of one row of logits: pure arithmetic, and random numbers that do not depend on the batch.

use std::cmp::Ordering;

use crate::Sampling;

/// What a token was drawn with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// The token.
    pub token: u32,
    /// Its log-probability under the logits as they are: [`LogProbs::Raw`](crate::LogProbs::Raw).
    pub raw_log_prob: f32,
    /// Its log-probability in the draw itself: [`LogProbs::Processed`](crate::LogProbs::Processed).
    pub processed_log_prob: f32,
}

/// A row of logits that no token can be drawn from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unusable {
    /// A logit is NaN or +inf.
    #[error("the logit of token {0} is NaN or +inf")]
    NotFinite(usize),
    /// No token that may be drawn has a logit above -inf.
    #[error("every token that may be drawn has the logit -inf")]
    NothingLeft,
}

/// What a random number belongs to. Nothing in it depends on which other rows are in the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DrawKey {
    /// [`Sampling::seed`].
    pub seed: u64,
    /// [`Request::id`](crate::Request::id), or the request's index in the call.
    pub request: u64,
    /// Index of the sample.
    pub sample: u32,
    /// Index of the token in the completion.
    pub position: u32,
}

/// The random number of a draw, uniform in [0, 1), a multiple of 2^-53.
///
/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the seed as its key, and
/// request, sample and position as its counter: any number of any sequence at once, and no state to keep.
pub fn uniform(key: DrawKey) -> f64 {
    let (low, high) = halves(key.request);
    let words = philox4x32_10([low, high, key.sample, key.position], halves(key.seed).into());
    let bits = (u64::from(words[0]) << 32 | u64::from(words[1])) >> 11;
    bits as f64 / (1_u64 << 53) as f64
}

fn halves(word: u64) -> (u32, u32) {
    (word as u32, (word >> 32) as u32)
}

fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let (low0, high0) = halves(0xD251_1F53 * u64::from(counter[0]));
        let (low1, high1) = halves(0xCD9E_8D57 * u64::from(counter[2]));
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// Draws the token at `position` of a completion from its `logits`, with the random number `u` of [0, 1).
///
/// Stop tokens are out before [`Sampling::min_new_tokens`]. Then: temperature; the `top_k` most likely, the lower id
/// first among equals; of these the shortest run from the most likely whose probabilities reach `top_p`. Temperature 0
/// takes the most likely token that is left, the lowest id among equals, and `u` does not matter.
///
/// Sums are taken in f64.
///
/// # Errors
/// [`Unusable`] for logits that are NaN or +inf, or that leave nothing to draw.
pub fn draw(logits: &[f32], sampling: &Sampling, position: usize, u: f64) -> Result<Draw, Unusable> {
    let mut top = f32::NEG_INFINITY;
    for (token, logit) in logits.iter().enumerate() {
        if logit.is_nan() || *logit == f32::INFINITY {
            return Err(Unusable::NotFinite(token));
        }
        top = top.max(*logit);
    }
    if top == f32::NEG_INFINITY {
        return Err(Unusable::NothingLeft);
    }
    let log_sum: f64 = logits.iter().map(|l| f64::from((l - top).exp())).sum::<f64>().ln();
    let raw = |token: usize| (f64::from(logits[token]) - f64::from(top) - log_sum) as f32;

    let banned: &[u32] = if position < sampling.min_new_tokens { &sampling.stop_tokens } else { &[] };
    let allowed = || {
        let open = |(token, logit): &(usize, &f32)| {
            **logit > f32::NEG_INFINITY && (banned.is_empty() || !banned.contains(&(*token as u32)))
        };
        logits.iter().enumerate().filter(open).map(|(token, logit)| (token, *logit))
    };
    let mut best: Option<(usize, f32)> = None;
    for (token, logit) in allowed() {
        if best.is_none_or(|(_, most)| logit > most) {
            best = Some((token, logit));
        }
    }
    let Some((best, most)) = best else { return Err(Unusable::NothingLeft) };
    if sampling.temperature == 0.0 {
        return Ok(Draw { token: best as u32, raw_log_prob: raw(best), processed_log_prob: 0.0 });
    }

    let (most, temperature) = (f64::from(most), f64::from(sampling.temperature));
    let weigh = |logit: f32| ((f64::from(logit) - most) / temperature).exp();
    let keep_all_k = sampling.top_k == 0 || sampling.top_k >= logits.len();
    let (token, weight, total) = if keep_all_k && sampling.top_p >= 1.0 {
        pick(|| allowed().map(|(token, logit)| (token, weigh(logit))), u)
    } else {
        let mut kept: Vec<(usize, f32)> = allowed().collect();
        if !keep_all_k && sampling.top_k < kept.len() {
            kept.select_nth_unstable_by(sampling.top_k, most_likely_first);
            kept.truncate(sampling.top_k);
        }
        let kept = nucleus(kept, f64::from(sampling.top_p), weigh);
        pick(|| kept.iter().copied(), u)
    }
    .unwrap_or((best, 1.0, 1.0));
    Ok(Draw {
        token: token as u32,
        raw_log_prob: raw(token),
        processed_log_prob: (weight / total).ln() as f32,
    })
}

fn most_likely_first(a: &(usize, f32), b: &(usize, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The shortest run from the most likely token whose share of the weights reaches `top_p`, with the weights.
fn nucleus(mut tokens: Vec<(usize, f32)>, top_p: f64, weigh: impl Fn(f32) -> f64) -> Vec<(usize, f64)> {
    let total: f64 = tokens.iter().map(|(_, logit)| weigh(*logit)).sum();
    let enough = if top_p >= 1.0 { f64::INFINITY } else { top_p * total };
    let mut kept = Vec::new();
    let (mut sorted, mut reached) = (0, 0.0);
    // Most nuclei are small: order a few of the tokens, and eight times as many only when those do not suffice.
    let mut next = 64;
    while sorted < tokens.len() && reached < enough {
        let rest = &mut tokens[sorted..];
        let count = next.min(rest.len());
        if count < rest.len() {
            rest.select_nth_unstable_by(count, most_likely_first);
        }
        rest[..count].sort_unstable_by(most_likely_first);
        for (token, logit) in &rest[..count] {
            if reached >= enough {
                break;
            }
            let weight = weigh(*logit);
            reached += weight;
            kept.push((*token, weight));
        }
        sorted += count;
        next *= 8;
    }
    kept
}

/// The token in whose part of the summed weights `u` falls, its weight, and the sum.
fn pick<I: Iterator<Item = (usize, f64)>>(weights: impl Fn() -> I, u: f64) -> Option<(usize, f64, f64)> {
    let total: f64 = weights().map(|(_, weight)| weight).sum();
    let mut reached = 0.0;
    let mut last = None;
    for (token, weight) in weights() {
        reached += weight;
        if weight > 0.0 {
            last = Some((token, weight, total));
        }
        if reached > u * total {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the authors publish with their Random123 library.
    #[test]
    fn philox_gives_the_published_words() {
        let pi = ([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]);
        let cases = [
            (([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            (([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]),
        ];
        for ((counter, key), words) in cases {
            assert_eq!(philox4x32_10(counter, key), words);
        }
    }
}
