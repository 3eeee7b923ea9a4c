//! The RL loop: prompts, rollouts, rewards, advantages, clipped updates against a frozen reference, new weights for
//! the engine.
//!
//! One [`Grpo::step`] is the whole way of a prompt:
//!
//! ```text
//! sampler ► gather over the engine group ► wake, generate n answers, sleep ► reward ► group advantage
//!         ► micro-batches: clipped loss + KL, sharded backward ► AdamW ► weight update ► sleep
//! ```

use std::fmt;
use std::ops::Range;
use std::time::Instant;

use lightrft_collectives::{CommunicatorExt, ReduceOp};
use lightrft_data::{Dataset, DistributedSampler, JsonLines, Prompt, Resume, SamplerConfig, Shuffle, Tail};
use lightrft_engine::{Completion, Engine, FinishReason, Level, Request, Sampling, Version};
use serde::Serialize;
use xxhash_rust::xxh3::Xxh3;

use crate::checkpoint::{Loaded, RunState};
use crate::config::OldLogProbs;
use crate::error::{Error, Result};
use crate::model::{Sequence, TokenBatch};
use crate::prepare::{Actor, Reference};
use crate::rl::{
    ClipRange, Matrix, PolicyLoss, PolicyLossInput, Reduction, kl_loss, policy_loss, shape_rewards,
};
use crate::schedule::Schedule;
use crate::strategy::Strategy;
use crate::text::Text;

/// What an answer is worth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// The reward that the advantage is computed from.
    pub reward: f32,
    /// Whether the answer is right, for the accuracy that is shown.
    pub correct: bool,
}

/// Scores an answer's text against its prompt.
pub type RewardFn = Box<dyn Fn(&Prompt, &str) -> Score + Send>;

/// The parts of a run, made with [`Strategy`]'s `prepare_*` methods.
pub struct GrpoParts {
    /// The policy.
    pub actor: Actor,
    /// The frozen reference of the KL divergence. Without one, no KL is computed.
    pub reference: Option<Reference>,
    /// The engine, where [`Strategy::holds_engine`].
    pub engine: Option<Box<dyn Engine>>,
    /// The tokenizer.
    pub text: Text,
    /// The prompts to train on.
    pub prompts: JsonLines,
    /// Scores answers.
    pub reward: RewardFn,
    /// Tokens that end an answer.
    pub stop_tokens: Vec<u32>,
    /// Rollouts of the whole run, which the learning rate's schedule spans.
    pub total_steps: u64,
}

/// What one step did, averaged or summed over all ranks.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepMetrics {
    /// Rollouts done, this one included.
    pub step: u64,
    /// Passes over the prompts begun.
    pub epoch: u64,
    /// Mean reward.
    pub reward: f64,
    /// Share of right answers.
    pub accuracy: f64,
    /// Mean over tokens of the estimated KL divergence from the reference, before the step's updates.
    pub kl: f64,
    /// Mean answer length, in tokens.
    pub length: f64,
    /// Mean loss over the step's updates.
    pub loss: f64,
    /// Share of tokens whose ratio was clipped.
    pub clip_fraction: f64,
    /// Largest difference, over the rollout's tokens, between the engine's log-probability and the trainer's.
    pub log_prob_gap: f64,
    /// Global gradient norm before clipping, of the last update.
    pub grad_norm: f64,
    /// Learning rate of the last update.
    pub lr: f64,
    /// Updates skipped for a gradient that was not finite.
    pub skipped: u64,
    /// Answer tokens of all ranks.
    pub tokens: u64,
    /// Answer tokens of all ranks per second of the whole step.
    pub tokens_per_s: f64,
    /// Seconds in generation.
    pub generate_s: f64,
    /// Seconds in the reference's (and, where asked for, the policy's) forward passes.
    pub score_s: f64,
    /// Seconds in backward passes and the optimizer.
    pub train_s: f64,
    /// Seconds in the weight update.
    pub update_s: f64,
    /// Hash over every parameter after the step: two runs that agree in it are in the same state, bit for bit.
    pub parameters: String,
}

/// A prompt's answers, with what training needs of them.
struct Rollout {
    prompts: Vec<Vec<u32>>,
    completions: Vec<Completion>,
    scores: Vec<Score>,
}

/// The loop over a [`Strategy`].
pub struct Grpo<'a> {
    strategy: &'a Strategy,
    parts: GrpoParts,
    sampler: DistributedSampler,
    schedule: Schedule,
    step: u64,
    updates: u64,
    /// Whether the engine holds the policy's present weights; the same on every rank.
    engine_is_current: bool,
}

impl fmt::Debug for Grpo<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grpo")
            .field("step", &self.step)
            .field("updates", &self.updates)
            .finish_non_exhaustive()
    }
}

impl<'a> Grpo<'a> {
    /// A run at its beginning. Every prompt is tokenized once here, so that one that does not fit is found before
    /// anything is spent on it.
    ///
    /// # Errors
    /// [`Error::Prompt`] and [`Error::Tokenizer`] name the prompt, [`Error::Config`] a data set that is smaller than
    /// a rollout.
    pub fn new(strategy: &'a Strategy, parts: GrpoParts) -> Result<Self> {
        let config = strategy.config();
        let context = parts.actor.model.model().decoder().config().max_position_embeddings;
        if config.prompt_max_len + config.generate_max_len > context {
            return Err(Error::config(
                format!(
                    "prompt_max_len = {}, generate_max_len = {}",
                    config.prompt_max_len, config.generate_max_len
                ),
                format!("together they exceed the model's context of {context} tokens"),
            ));
        }
        if parts.prompts.len() < config.rollout_batch_size {
            return Err(Error::config(
                format!("rollout_batch_size = {}", config.rollout_batch_size),
                format!("{} holds only {} prompts", parts.prompts.path().display(), parts.prompts.len()),
            ));
        }
        let sampler = DistributedSampler::new(SamplerConfig {
            len: parts.prompts.len(),
            rank: strategy.rank(),
            world: strategy.world_size(),
            seed: config.seed,
            shuffle: Shuffle::TorchExact,
            tail: Tail::Drop,
        })?;
        let total = parts.total_steps * config.updates_per_rollout() as u64;
        let schedule = config.schedule(total)?;
        let this = Self { strategy, parts, sampler, schedule, step: 0, updates: 0, engine_is_current: false };
        for index in 0..this.parts.prompts.len() {
            this.encode(&this.parts.prompts, index)?;
        }
        Ok(this)
    }

    /// Rollouts done.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// The policy, for an export or a step of another kind. The engine is given its weights again before it generates,
    /// so call this on every rank alike.
    pub fn actor_mut(&mut self) -> &mut Actor {
        self.engine_is_current = false;
        &mut self.parts.actor
    }

    /// One rollout and the updates on it. *Collective.*
    ///
    /// # Errors
    /// Any of the parts'. The run can then only go on from a checkpoint.
    pub fn step(&mut self) -> Result<StepMetrics> {
        self.step_with(|| {})
    }

    /// As [`step`](Self::step), calling `between` after the rollout and before the first update.
    pub fn step_with(&mut self, between: impl FnOnce()) -> Result<StepMetrics> {
        let started = Instant::now();
        self.refresh_engine()?;
        let rollout = self.rollout()?;
        let generate_s = started.elapsed().as_secs_f64();
        between();

        let config = self.strategy.config();
        let rewards: Vec<f32> = rollout.scores.iter().map(|s| s.reward).collect();
        let advantages = shape_rewards(config.advantage_estimator, &rewards, config.n_samples_per_prompt)?;
        let mut tally = Tally::default();
        let mut micros = self.micro_batches(&rollout)?;
        self.score(&mut micros)?;
        let scored = started.elapsed().as_secs_f64();
        let report = self.train(&advantages, &micros, &mut tally)?;
        let trained = started.elapsed().as_secs_f64();
        drop(micros);
        self.step += 1;
        self.engine_is_current = false;
        self.refresh_engine()?;
        let elapsed = started.elapsed().as_secs_f64();

        let answers = rollout.completions.len() as f64;
        let tokens: usize = rollout.completions.iter().map(|c| c.tokens.len()).sum();
        let passes = (config.updates_per_rollout() * self.strategy.accumulated_gradient()) as f64;
        let ranks = self.strategy.world_size() as f64;
        let mut means = [
            f64::from(rewards.iter().sum::<f32>()) / answers,
            rollout.scores.iter().filter(|s| s.correct).count() as f64 / answers,
            tally.kl_sum / tokens.max(1) as f64,
            tokens as f64 / answers,
            // Each pass holds its share of the global mean: the sum over ranks is the loss.
            tally.loss * ranks / config.updates_per_rollout() as f64,
            tally.clip_fraction / passes,
            generate_s,
            scored - generate_s,
            trained - scored,
            elapsed - trained,
            tokens as f64,
        ];
        self.strategy.all_reduce_mean(&mut means)?;
        let mut gap = [tally.log_prob_gap];
        self.strategy.world().all_reduce(&mut gap, ReduceOp::Max)?;
        let [
            reward,
            accuracy,
            kl,
            length,
            loss,
            clip_fraction,
            generate_s,
            score_s,
            train_s,
            update_s,
            tokens,
        ] = means;
        let tokens = (tokens * ranks).round();
        Ok(StepMetrics {
            step: self.step,
            epoch: self.sampler.epoch(),
            reward,
            accuracy,
            kl,
            length,
            loss,
            clip_fraction,
            log_prob_gap: gap[0],
            grad_norm: report.grad_norm,
            lr: report.lr,
            skipped: self.parts.actor.optimizer.counters().skipped,
            tokens: tokens as u64,
            tokens_per_s: tokens / elapsed,
            generate_s,
            score_s,
            train_s,
            update_s,
            parameters: format!("{:016x}", self.fingerprint()?),
        })
    }

    /// Share of right answers when the prompts `range` of a data set are answered greedily. *Collective.*
    ///
    /// # Errors
    /// Those of generation.
    pub fn evaluate(&mut self, prompts: &JsonLines, range: Range<usize>) -> Result<f64> {
        self.refresh_engine()?;
        let sampling = Sampling {
            stop_tokens: self.parts.stop_tokens.clone(),
            ..Sampling::greedy(self.strategy.config().generate_max_len)
        };
        let mine = range.skip(self.strategy.rank()).step_by(self.strategy.world_size());
        let mut requests = Vec::new();
        let mut asked = Vec::new();
        for index in mine {
            let (prompt, tokens) = self.encode(prompts, index)?;
            requests.push(Request::new(tokens, sampling.clone()));
            asked.push(prompt);
        }
        let completions = self.generate(&requests)?;
        let mut counts = [0.0, asked.len() as f64];
        for (prompt, completion) in asked.iter().zip(&completions) {
            counts[0] += f64::from(u8::from(self.judge(prompt, completion)?.correct));
        }
        self.strategy.world().all_reduce(&mut counts, ReduceOp::Sum)?;
        Ok(counts[0] / counts[1].max(1.0))
    }

    /// Where the run stands, with the caller's own state, for [`Strategy::save_ckpt`].
    pub fn state(&self, client: serde_json::Value) -> RunState {
        RunState {
            step: self.step,
            updates: self.updates,
            seed: self.strategy.config().seed,
            sampler: self.sampler.state(),
            client,
        }
    }

    /// Saves a checkpoint. *Collective.*
    ///
    /// # Errors
    /// As [`Strategy::save_ckpt`].
    pub fn save(
        &self,
        dir: &std::path::Path,
        client: serde_json::Value,
    ) -> Result<lightrft_ckpt::SaveReport> {
        self.strategy.save_ckpt(&self.parts.actor, dir, &self.state(client))
    }

    /// Goes on from the newest whole checkpoint; `None` when there is none. *Collective.*
    ///
    /// # Errors
    /// As [`Strategy::load_ckpt`], and [`Error::Resume`] for a checkpoint of a run with another seed.
    pub fn resume(&mut self, dir: &std::path::Path) -> Result<Option<Loaded>> {
        let Some(loaded) = self.strategy.load_ckpt(&mut self.parts.actor, dir)? else { return Ok(None) };
        let (state, seed) = (&loaded.state, self.strategy.config().seed);
        if state.seed != seed {
            return Err(Error::Resume {
                tag: loaded.report.tag.clone(),
                what: format!("it was made with seed {}, this run has seed {seed}", state.seed),
            });
        }
        if let Resume::Repeats { samples } = self.sampler.restore(&state.sampler)? {
            tracing::warn!(samples, "this number of ranks cannot resume exactly: some prompts come again");
        }
        self.step = state.step;
        self.updates = state.updates;
        self.engine_is_current = false;
        Ok(Some(loaded))
    }

    /// A hash over every parameter's bits, the same on every rank. *Collective.*
    ///
    /// # Errors
    /// [`Error::Collectives`].
    pub fn fingerprint(&self) -> Result<u64> {
        let units = self.parts.actor.model.units();
        let mut hash = Xxh3::new();
        for unit in 0..units.plan().units().len() {
            hash.update(bytemuck::cast_slice(units.param(unit)?));
        }
        let mut all = vec![0i64; self.strategy.world_size()];
        self.strategy.world().all_gather(&[hash.digest() as i64], &mut all)?;
        let mut hash = Xxh3::new();
        hash.update(bytemuck::cast_slice(&all));
        Ok(hash.digest())
    }

    /// Sees to it that the engine holds the policy's present weights.
    fn refresh_engine(&mut self) -> Result<()> {
        if self.engine_is_current {
            return Ok(());
        }
        let engine = self.parts.engine.as_deref_mut();
        self.strategy.update_engine_weights(&mut self.parts.actor, engine, Version(self.step))?;
        if let Some(engine) =
            self.parts.engine.as_deref_mut().filter(|_| self.strategy.config().enable_engine_sleep)
        {
            engine.sleep(Level::One)?;
        }
        self.engine_is_current = true;
        Ok(())
    }

    fn generate(&mut self, requests: &[Request]) -> Result<Vec<Completion>> {
        // An engine that slept after generating has dropped its weights.
        self.engine_is_current = !self.strategy.config().enable_engine_sleep;
        self.strategy.gather_and_generate(self.parts.engine.as_deref_mut(), requests)
    }

    fn encode(&self, prompts: &JsonLines, index: usize) -> Result<(Prompt, Vec<u32>)> {
        let prompt = prompts.get(index)?;
        let tokens = self.parts.text.encode(&prompt.text)?;
        let limit = self.strategy.config().prompt_max_len;
        if tokens.is_empty() || tokens.len() > limit {
            return Err(Error::Prompt {
                index,
                source_name: prompts.locate(index),
                tokens: tokens.len(),
                what: format!("between 1 and prompt_max_len = {limit} were expected"),
            });
        }
        Ok((prompt, tokens))
    }

    /// The answer's text without the token that ended it, scored.
    fn judge(&self, prompt: &Prompt, completion: &Completion) -> Result<Score> {
        let tokens = match completion.finish {
            FinishReason::Stop(_) => &completion.tokens[..completion.tokens.len().saturating_sub(1)],
            // An answer that did not end is not an answer.
            _ => return Ok((self.parts.reward)(prompt, "")),
        };
        Ok((self.parts.reward)(prompt, &self.parts.text.decode(tokens)?))
    }

    fn rollout(&mut self) -> Result<Rollout> {
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
        let mut asked = Vec::with_capacity(per_rank);
        let mut requests = Vec::with_capacity(per_rank);
        for index in self.sampler.next_indices(per_rank)? {
            let (prompt, tokens) = self.encode(&self.parts.prompts, index)?;
            // The data set's index keys the sampling, so that it does not matter which rank asks.
            let request = Request::new(tokens, sampling.clone()).samples(config.n_samples_per_prompt);
            requests.push(request.with_id(index as u64));
            asked.push(prompt);
        }
        let completions = self.generate(&requests)?;
        let scores = completions
            .iter()
            .map(|c| match asked.get(c.request) {
                Some(prompt) => self.judge(prompt, c),
                None => Ok(Score { reward: 0.0, correct: false }),
            })
            .collect::<Result<_>>()?;
        Ok(Rollout { prompts: requests.into_iter().map(|r| r.prompt).collect(), completions, scores })
    }

    fn micro_batches(&self, rollout: &Rollout) -> Result<Vec<Micro>> {
        let decoder = self.parts.actor.model.model().decoder();
        let size = self.strategy.config().micro_train_batch_size;
        let mut micros = Vec::new();
        for (at, chunk) in rollout.completions.chunks(size).enumerate() {
            let sequences: Vec<Sequence<'_>> = chunk
                .iter()
                .map(|c| Sequence { prompt: &rollout.prompts[c.request], answer: &c.tokens })
                .collect();
            let batch = TokenBatch::new(decoder, &sequences)?;
            let engine = batch.scatter(|row| &chunk[row].log_probs);
            micros.push(Micro { first: at * size, batch, engine, old: None, reference: None });
        }
        Ok(micros)
    }

    /// Log-probabilities under the reference, and under the policy before its first update where they are asked for.
    fn score(&mut self, micros: &mut [Micro]) -> Result<()> {
        for micro in micros {
            if let Some(reference) = self.parts.reference.as_mut() {
                micro.reference = Some(self.strategy.reference_log_probs(reference, &micro.batch)?);
            }
            if self.strategy.config().old_log_probs == OldLogProbs::Policy {
                micro.old = Some(self.strategy.policy_log_probs(&mut self.parts.actor, &micro.batch)?);
            }
        }
        Ok(())
    }

    fn train(&mut self, advantages: &[f32], micros: &[Micro], tally: &mut Tally) -> Result<Update> {
        let config = self.strategy.config();
        let reduction = Reduction::sequences_of(config.train_batch_size);
        let options =
            PolicyLoss { clip: ClipRange::symmetric(config.eps_clip), reduction, ..PolicyLoss::default() };
        let first_update = self.updates;
        let mut last = Update { grad_norm: 0.0, lr: 0.0 };
        for epoch in 0..config.max_epochs {
            for micro in micros {
                let (rows, cols) = (micro.batch.rows(), micro.batch.cols());
                let on_policy = self.updates == first_update;
                let before = epoch == 0;
                self.strategy.backward(&mut self.parts.actor, &micro.batch, |log_probs| {
                    let new = Matrix::new(log_probs, rows, cols)?;
                    let mask = Matrix::new(micro.batch.mask(), rows, cols)?;
                    let old = micro.old.as_deref().unwrap_or(&micro.engine);
                    let input = PolicyLossInput {
                        log_probs: new,
                        old_log_probs: Matrix::new(old, rows, cols)?,
                        advantages: Matrix::new(&advantages[micro.first..micro.first + rows], rows, 1)?,
                        mask: Some(mask),
                    };
                    let mut out = policy_loss(&input, &options)?;
                    tally.loss += out.loss;
                    tally.clip_fraction += out.stats.clip_fraction;
                    if let Some(reference) = &micro.reference {
                        let base = Matrix::new(reference, rows, cols)?;
                        if before {
                            tally.add_kl(log_probs, reference, micro.batch.mask(), config.kl_estimator);
                        }
                        if config.use_kl_loss {
                            let kl = kl_loss(new, base, Some(mask), config.kl_estimator, reduction)?;
                            tally.loss += config.init_kl_coef * kl.loss;
                            for (g, k) in out.grad.iter_mut().zip(&kl.grad) {
                                *g += config.init_kl_coef as f32 * k;
                            }
                        }
                    }
                    if on_policy {
                        tally.compare(log_probs, &micro.engine, micro.batch.mask());
                    }
                    Ok(((), out.grad))
                })?;
                let lr = self.schedule.lr(self.updates as usize);
                if let Some(report) = self.strategy.optimizer_step(&mut self.parts.actor, lr)? {
                    self.updates += 1;
                    last = Update { grad_norm: f64::from(report.grad_norm), lr };
                }
            }
        }
        Ok(last)
    }
}

/// One micro-batch with the log-probabilities that its loss compares with, each `[rows, cols]`.
struct Micro {
    /// Index of its first completion.
    first: usize,
    batch: TokenBatch,
    engine: Vec<f32>,
    old: Option<Vec<f32>>,
    reference: Option<Vec<f32>>,
}

struct Update {
    grad_norm: f64,
    lr: f64,
}

/// Sums of one rank over a step.
#[derive(Default)]
struct Tally {
    loss: f64,
    kl_sum: f64,
    clip_fraction: f64,
    log_prob_gap: f64,
}

impl Tally {
    fn add_kl(&mut self, new: &[f32], reference: &[f32], mask: &[bool], estimator: crate::rl::KlEstimator) {
        for ((n, r), _) in new.iter().zip(reference).zip(mask).filter(|(_, keep)| **keep) {
            self.kl_sum += estimator.at(f64::from(n - r)).0;
        }
    }

    fn compare(&mut self, new: &[f32], engine: &[f32], mask: &[bool]) {
        for ((n, e), _) in new.iter().zip(engine).zip(mask).filter(|(_, keep)| **keep) {
            self.log_prob_gap = self.log_prob_gap.max(f64::from((n - e).abs()));
        }
    }
}

/// A seed for each step: SplitMix64's finaliser over both.
fn mix(seed: u64, step: u64) -> u64 {
    let mut z = seed.wrapping_add(step.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
