//! One token out of one row of logits: pure arithmetic, and random numbers that do not depend on the batch.

use std::cmp::Ordering;

use super::cpu::{BLOCK, Vectors, greatest, sum_exp, weigh};
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
    /// A logit is NaN or +inf, as it is or after the penalty.
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

/// The tokens before the one that is drawn.
#[derive(Clone, Copy, Debug, Default)]
pub struct Past<'a> {
    /// Tokens of the prompt.
    pub prompt: &'a [u32],
    /// Tokens of the completion so far.
    pub completion: &'a [u32],
}

/// Draws the token that follows `past` from its `logits`, with the random number `u` of [0, 1).
///
/// In this order: stop tokens are out before [`Sampling::min_new_tokens`]; the repetition penalty; temperature; `min_p`;
/// the `top_k` most likely, the lower id first among equals; of these the shortest run from the most likely whose
/// probabilities reach `top_p`. Temperature 0 takes the most likely token after the penalty, the lowest id among equals,
/// and `u` does not matter.
///
/// Exponentials are taken in f32, their sums in f64. [`Sampling::stop_strings`] are not looked at.
///
/// # Errors
/// [`Unusable`] for logits that are NaN or +inf, or that leave nothing to draw.
pub fn draw(logits: &[f32], sampling: &Sampling, past: Past<'_>, u: f64) -> Result<Draw, Unusable> {
    Sampler::default().draw(logits, sampling, past, u)
}

/// [`draw`] with memory that is used again.
#[derive(Debug, Default)]
pub(super) struct Sampler {
    /// Logits after bans and the penalty.
    processed: Vec<f32>,
    /// Whether the penalty has met a token, a bit for each.
    seen: Vec<u64>,
    weights: Vec<f32>,
    /// Sums of blocks of `weights`.
    sums: Vec<f64>,
    /// Tokens that filters may keep, with their logits.
    candidates: Vec<(u32, f32)>,
}

impl Sampler {
    pub(super) fn draw(
        &mut self,
        logits: &[f32],
        sampling: &Sampling,
        past: Past<'_>,
        u: f64,
    ) -> Result<Draw, Unusable> {
        let vectors = Vectors::widest();
        let raw_most = greatest(vectors, logits);
        if raw_most.is_nan() {
            return Err(not_finite(logits));
        }
        if raw_most == f32::NEG_INFINITY {
            return Err(Unusable::NothingLeft);
        }
        let as_they_are = !self.process(logits, sampling, past);
        let processed = if as_they_are { logits } else { self.processed.as_slice() };
        let most = if as_they_are { raw_most } else { greatest(vectors, processed) };
        if most.is_nan() {
            return Err(not_finite(processed));
        }
        if most == f32::NEG_INFINITY {
            return Err(Unusable::NothingLeft);
        }
        let raw =
            |token: usize, total: f64| (f64::from(logits[token]) - f64::from(raw_most) - total.ln()) as f32;
        let temperature = sampling.temperature;
        if temperature == 0.0 {
            let best = processed.iter().position(|l| *l == most).unwrap_or(0);
            let raw_log_prob = raw(best, sum_exp(vectors, logits, raw_most));
            return Ok(Draw { token: best as u32, raw_log_prob, processed_log_prob: 0.0 });
        }

        self.weights.resize(logits.len(), 0.0);
        self.sums.resize(logits.len().div_ceil(BLOCK), 0.0);
        weigh(vectors, processed, most, temperature, sampling.min_p, &mut self.weights, &mut self.sums);
        let all: f64 = self.sums.iter().sum();
        let raw_total = if as_they_are && temperature == 1.0 && sampling.min_p == 0.0 {
            all
        } else {
            sum_exp(vectors, logits, raw_most)
        };
        let keep_all_k = sampling.top_k == 0 || sampling.top_k >= logits.len();
        let (token, total) = if keep_all_k && sampling.top_p >= 1.0 {
            (self.pick(u * all), all)
        } else {
            self.filtered(as_they_are.then_some(logits), most, sampling, u)
        };
        let logit = if as_they_are { logits[token] } else { self.processed[token] };
        let exponent = (f64::from(logit) - f64::from(most)) / f64::from(temperature);
        Ok(Draw {
            token: token as u32,
            raw_log_prob: raw(token, raw_total),
            processed_log_prob: ((exponent - total.ln()) as f32).min(0.0),
        })
    }

    /// Fills `processed` with the logits after bans and the penalty; `false` if neither changes any.
    fn process(&mut self, logits: &[f32], sampling: &Sampling, past: Past<'_>) -> bool {
        let banned: &[u32] =
            if past.completion.len() < sampling.min_new_tokens { &sampling.stop_tokens } else { &[] };
        let penalty = sampling.repetition_penalty;
        if banned.is_empty() && penalty == 1.0 {
            return false;
        }
        self.processed.clear();
        self.processed.extend_from_slice(logits);
        for token in banned {
            if let Some(logit) = self.processed.get_mut(*token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        if penalty != 1.0 {
            self.seen.clear();
            self.seen.resize(logits.len().div_ceil(64), 0);
            for token in past.prompt.iter().chain(past.completion) {
                let (word, bit) = (*token as usize / 64, 1 << (token % 64));
                let (Some(seen), Some(logit)) =
                    (self.seen.get_mut(word), self.processed.get_mut(*token as usize))
                else {
                    continue;
                };
                if *seen & bit == 0 {
                    *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
                    *seen |= bit;
                }
            }
        }
        true
    }

    /// The token in whose part of the summed weights `reach` falls.
    fn pick(&self, reach: f64) -> usize {
        let (mut block, mut reached) = (0, 0.0);
        while block + 1 < self.sums.len() && reached + self.sums[block] <= reach {
            reached += self.sums[block];
            block += 1;
        }
        let mut last = None;
        for (token, weight) in self.weights.iter().enumerate().skip(block * BLOCK) {
            reached += f64::from(*weight);
            if *weight > 0.0 {
                last = Some(token);
                if reached > reach {
                    break;
                }
            }
        }
        // Rounding may put `reach` past a row that ends in tokens of no weight.
        let heaviest = || self.weights.iter().rposition(|w| *w > 0.0).unwrap_or(0);
        last.unwrap_or_else(heaviest)
    }

    /// A token of those that top-k and top-p keep, and the sum of the weights kept.
    fn filtered(&mut self, raw: Option<&[f32]>, most: f32, sampling: &Sampling, u: f64) -> (usize, f64) {
        let logits = raw.unwrap_or(&self.processed);
        self.candidates.clear();
        let weighed = self.weights.iter().zip(logits).enumerate();
        self.candidates.extend(weighed.filter(|(_, (w, _))| **w > 0.0).map(|(t, (_, l))| (t as u32, *l)));
        if sampling.top_k > 0 && sampling.top_k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(sampling.top_k, most_likely_first);
            self.candidates.truncate(sampling.top_k);
        }
        let (most, temperature) = (f64::from(most), f64::from(sampling.temperature));
        let weigh = |logit: f32| ((f64::from(logit) - most) / temperature).exp();
        let kept = nucleus(&mut self.candidates, f64::from(sampling.top_p), weigh);
        let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
        let mut reached = 0.0;
        let chosen = kept.iter().find(|(_, weight)| {
            reached += weight;
            reached > u * total
        });
        let token = chosen.or(kept.last()).map_or(0, |(token, _)| *token);
        (token as usize, total)
    }
}

/// What is wrong with logits whose [`greatest`] is NaN.
fn not_finite(logits: &[f32]) -> Unusable {
    let bad = logits.iter().position(|l| l.is_nan() || *l == f32::INFINITY);
    Unusable::NotFinite(bad.unwrap_or(0))
}

fn most_likely_first(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The shortest run from the most likely token whose share of the weights reaches `top_p`, with the weights.
fn nucleus(tokens: &mut [(u32, f32)], top_p: f64, weigh: impl Fn(f32) -> f64) -> Vec<(u32, f64)> {
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
