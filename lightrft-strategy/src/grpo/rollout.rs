//! Prompts to scored answers: what is asked of the engine, what is checked of its reply, what an answer is worth.

use lightrft_data::{Dataset, JsonLines, Prompt};
use lightrft_engine::{Completion, FinishReason, Request, Sampling, Version};

use super::{Answer, Grpo, Score};
use crate::agree::agree;
use crate::error::{Error, Result};
use crate::text::Text;

/// A rank's answers, with what training needs of them.
pub(super) struct Rollout {
    pub(super) prompts: Vec<Vec<u32>>,
    /// Every prompt's answers side by side, in the order of the prompts.
    pub(super) completions: Vec<Completion>,
    pub(super) scores: Vec<Score>,
}

/// A prompt in text and tokens.
struct Asked {
    prompt: Prompt,
    tokens: Vec<u32>,
    /// Its index in the data set.
    index: usize,
}

/// Tokenizes every `step`th prompt of a data set from `first` on, and checks that it fits.
///
/// # Errors
/// [`Error::Prompt`] and [`Error::Tokenizer`] name the prompt, with its file and line; [`Error::Data`].
pub fn check_prompts(
    text: &Text,
    prompts: &JsonLines,
    prompt_max_len: usize,
    first: usize,
    step: usize,
) -> Result<()> {
    (first..prompts.len())
        .step_by(step.max(1))
        .try_for_each(|index| encode(text, prompts, index, prompt_max_len).map(drop))
}

fn encode(text: &Text, prompts: &JsonLines, index: usize, limit: usize) -> Result<Asked> {
    let prompt = prompts.get(index)?;
    let tokens = text.encode(&prompt.text).map_err(|error| match error {
        Error::Tokenizer(what) => Error::Tokenizer(format!("{}: {what}", prompts.locate(index))),
        other => other,
    })?;
    if tokens.is_empty() || tokens.len() > limit {
        return Err(Error::Prompt {
            location: prompts.locate(index),
            tokens: tokens.len(),
            what: format!("between 1 and prompt_max_len = {limit} were expected"),
        });
    }
    Ok(Asked { prompt, tokens, index })
}

impl Grpo<'_> {
    /// Samples answers to this rank's next prompts, and scores them. *Collective.*
    pub(super) fn rollout(&mut self) -> Result<Rollout> {
        let config = self.strategy.config();
        let per_rank = config.rollout_batch_size / self.strategy.world_size();
        if self.sampler.remaining() < per_rank as u64 {
            self.sampler.set_epoch(self.sampler.epoch() + 1, 0)?;
        }
        let sampling = Sampling {
            temperature: config.temperature,
            top_p: config.top_p,
            top_k: config.top_k,
            seed: mix(config.seed, self.step),
            max_new_tokens: config.generate_max_len,
            stop_tokens: self.parts.stop_tokens.clone(),
            ..Sampling::default()
        };
        let indices = self.sampler.next_indices(per_rank)?;
        let samples = config.n_samples_per_prompt;
        self.answers(self.read(&self.parts.prompts, indices), &sampling, samples)
    }

    /// The scores of greedy answers to this rank's part of the prompts `range`. *Collective.*
    pub(super) fn answer_greedily(
        &mut self,
        prompts: &JsonLines,
        range: std::ops::Range<usize>,
    ) -> Result<Vec<Score>> {
        let sampling = Sampling {
            stop_tokens: self.parts.stop_tokens.clone(),
            ..Sampling::greedy(self.strategy.config().generate_max_len)
        };
        let mine = range.skip(self.strategy.rank()).step_by(self.strategy.world_size());
        Ok(self.answers(self.read(prompts, mine), &sampling, 1)?.scores)
    }

    fn read(&self, prompts: &JsonLines, indices: impl IntoIterator<Item = usize>) -> Result<Vec<Asked>> {
        let limit = self.strategy.config().prompt_max_len;
        indices.into_iter().map(|index| encode(&self.parts.text, prompts, index, limit)).collect()
    }

    /// What one rank cannot do, the others learn before they train on the rest. *Collective.*
    fn answers(&mut self, asked: Result<Vec<Asked>>, sampling: &Sampling, samples: usize) -> Result<Rollout> {
        let asked = agree(&**self.strategy.world(), "reading prompts", asked)?;
        let requests: Vec<Request> = asked
            .iter()
            // The data set's index keys the sampling, so that it does not matter which rank asks.
            .map(|a| {
                Request::new(a.tokens.clone(), sampling.clone()).samples(samples).with_id(a.index as u64)
            })
            .collect();
        let scored = self.generate(&requests).and_then(|completions| {
            check_completions(&completions, &requests, Version(self.version))?;
            let scores =
                completions.iter().map(|c| self.judge(&asked[c.request], c)).collect::<Result<_>>()?;
            Ok((completions, scores))
        });
        let (completions, scores) = agree(&**self.strategy.world(), "generation and rewards", scored)?;
        Ok(Rollout { prompts: requests.into_iter().map(|r| r.prompt).collect(), completions, scores })
    }

    fn generate(&mut self, requests: &[Request]) -> Result<Vec<Completion>> {
        // An engine that slept after generating has dropped its weights.
        self.engine_is_current = !self.strategy.config().enable_engine_sleep;
        let offload = self.strategy.config().actor_offload;
        if offload {
            self.offloads.offload(&mut self.parts.actor.model)?;
        }
        let completions = self.strategy.gather_and_generate(self.parts.engine.as_deref_mut(), requests);
        if offload {
            self.offloads.reload(&mut self.parts.actor.model)?;
        }
        completions
    }

    fn judge(&self, asked: &Asked, completion: &Completion) -> Result<Score> {
        let text = match completion.finish {
            // The token that ended the answer is not part of its text.
            FinishReason::Stop(_) => &completion.tokens[..completion.tokens.len() - 1],
            _ => &completion.tokens[..],
        };
        let text = self.parts.text.decode(text)?;
        let score = (self.parts.reward)(&asked.prompt, &Answer { text: &text, finish: completion.finish });
        if !score.reward.is_finite() {
            return Err(Error::Reward {
                prompt: asked.prompt.text.clone(),
                answer: text,
                reward: score.reward,
            });
        }
        Ok(score)
    }
}

/// Compares an engine's reply with what was asked: a reply that is short, out of order or without log-probabilities
/// would train the wrong tokens without a sign.
fn check_completions(completions: &[Completion], requests: &[Request], version: Version) -> Result<()> {
    let wrong = |what: String| Err(Error::Completions { what });
    let expected = requests.iter().enumerate().flat_map(|(r, q)| (0..q.samples).map(move |s| (r, s)));
    let total = requests.iter().map(|r| r.samples).sum::<usize>();
    if completions.len() != total {
        return wrong(format!("{} completions came, {total} were asked for", completions.len()));
    }
    for ((request, sample), c) in expected.zip(completions) {
        let at = format!("request {request}, sample {sample}");
        if (c.request, c.sample) != (request, sample) {
            return wrong(format!("at the place of {at} stands request {}, sample {}", c.request, c.sample));
        }
        if c.tokens.is_empty() || c.log_probs.len() != c.tokens.len() {
            let (tokens, log_probs) = (c.tokens.len(), c.log_probs.len());
            return wrong(format!("{at}: {tokens} tokens with {log_probs} log-probabilities"));
        }
        if c.version != version {
            return wrong(format!("{at} was drawn from {}, the policy stands at {version}", c.version));
        }
    }
    Ok(())
}

/// A seed for each step: SplitMix64's finaliser over both.
fn mix(seed: u64, step: u64) -> u64 {
    let mut z = seed.wrapping_add(step.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_that_does_not_match_is_refused() {
        let request = Request::new([3], Sampling::default()).samples(2);
        let good = |request, sample| Completion {
            request,
            sample,
            tokens: vec![4, 1],
            log_probs: vec![-1.0, -2.0],
            finish: FinishReason::Stop(1),
            version: Version(3),
        };
        let requests = [request.clone(), request];
        let all = vec![good(0, 0), good(0, 1), good(1, 0), good(1, 1)];
        check_completions(&all, &requests, Version(3)).unwrap();
        let refused = |change: &dyn Fn(&mut Vec<Completion>), names: &[&str]| {
            let mut reply = all.clone();
            change(&mut reply);
            let text = check_completions(&reply, &requests, Version(3)).unwrap_err().to_string();
            assert!(names.iter().all(|name| text.contains(name)), "{text}");
        };
        refused(&|r| drop(r.pop()), &["3 completions", "4"]);
        refused(&|r| r.swap(1, 2), &["request 0, sample 1", "request 1, sample 0"]);
        refused(&|r| r[3].log_probs.clear(), &["request 1, sample 1", "2 tokens with 0"]);
        refused(&|r| r[0].version = Version(2), &["version 2", "version 3"]);
        refused(&|r| (r[0].tokens, r[0].log_probs) = (vec![], vec![]), &["0 tokens"]);
    }
}
