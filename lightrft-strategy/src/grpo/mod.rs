//! The RL loop: prompts, rollouts, rewards, advantages, clipped updates against a frozen reference, new weights for
//! the engine.
//!
//! One [`Grpo::step`] is the whole way of a prompt:
//!
//! ```text
//! sampler ► gather over the engine group ► wake, generate n answers, sleep ► reward ► group advantage
//!         ► micro-batches: clipped loss + KL, sharded backward ► AdamW ► weight update ► sleep
//! ```

mod report;
mod rollout;
mod update;

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use lightrft_ckpt::SaveReport;
use lightrft_collectives::{CommunicatorExt, ReduceOp};
use lightrft_data::{Dataset, DistributedSampler, JsonLines, Prompt, Resume, SamplerConfig, Shuffle, Tail};
use lightrft_engine::{Engine, FinishReason, Level, Version};
use xxhash_rust::xxh3::Xxh3;

use self::report::Tally;
use crate::actor_saver::ActorSaver;
use crate::agree::agree;
use crate::checkpoint::{LoadOptions, Loaded, RunState};
use crate::error::{Error, Result};
use crate::offload::OffloadTally;
use crate::prepare::{Actor, Reference};
use crate::rl::shape_rewards;
use crate::schedule::Schedule;
use crate::strategy::Strategy;
use crate::text::Text;

pub use self::report::StepMetrics;
pub use self::rollout::check_prompts;

/// An answer as a reward sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answer<'a> {
    /// Its text, without special tokens and without the token that ended it.
    pub text: &'a str,
    /// Why it ended. One that ended for its length is unfinished.
    pub finish: FinishReason,
}

/// What an answer is worth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// The reward that the advantage is computed from; finite.
    pub reward: f32,
    /// Whether the answer is right, for the accuracy that is shown.
    pub correct: bool,
}

/// Scores an answer against its prompt.
pub type RewardFn = Box<dyn Fn(&Prompt, &Answer<'_>) -> Score + Send>;

/// The parts of a run, made with [`Strategy`]'s `prepare_*` methods.
pub struct GrpoParts {
    /// The policy.
    pub actor: Actor,
    /// The frozen reference of the KL divergence. Without one, no KL is computed.
    pub reference: Option<Reference>,
    /// The engine, on the ranks where [`Strategy::holds_engine`] says so and on no others.
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

/// The loop over a [`Strategy`].
pub struct Grpo<'a> {
    strategy: &'a Strategy,
    parts: GrpoParts,
    sampler: DistributedSampler,
    schedule: Schedule,
    step: u64,
    updates: u64,
    /// Counts the weights that engines were given.
    version: u64,
    /// Whether the engine holds the policy's present weights; the same on every rank.
    engine_is_current: bool,
    /// What was given up around generation in this step.
    offloads: OffloadTally,
    /// Saves in the background, once there was one.
    saver: Option<ActorSaver>,
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
    /// A run at its beginning. Every prompt is tokenized once here, each rank taking a part, so that one that does
    /// not fit is found before anything is spent on it. *Collective.*
    ///
    /// # Errors
    /// [`Error::Prompt`] and [`Error::Tokenizer`] name the prompt; [`Error::Config`] for parts that do not fit the
    /// settings or each other. All ranks fail together.
    pub fn new(strategy: &'a Strategy, mut parts: GrpoParts) -> Result<Self> {
        let checked = check_parts(strategy, &parts).and_then(|()| {
            let (rank, world) = (strategy.rank(), strategy.world_size());
            check_prompts(&parts.text, &parts.prompts, strategy.config().prompt_max_len, rank, world)
        });
        agree(&**strategy.world(), "preparing the run", checked)?;
        let config = strategy.config();
        let sampler = DistributedSampler::new(SamplerConfig {
            len: parts.prompts.len(),
            rank: strategy.rank(),
            world: strategy.world_size(),
            seed: config.seed,
            shuffle: Shuffle::TorchExact,
            tail: Tail::Drop,
        })?;
        let updates = parts.total_steps.saturating_mul(config.updates_per_rollout() as u64);
        let schedule = config.schedule(updates)?;
        let mut offloads = OffloadTally::default();
        if config.adam_offload {
            offloads.offload(&mut parts.actor.optimizer)?;
        }
        if let Some(reference) = parts.reference.as_mut().filter(|_| config.reference_offload) {
            offloads.offload(&mut reference.model)?;
        }
        Ok(Self {
            strategy,
            parts,
            sampler,
            schedule,
            step: 0,
            updates: 0,
            version: 0,
            engine_is_current: false,
            offloads,
            saver: None,
        })
    }

    /// Rollouts done.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// The policy, for an export or a step of another kind. The engine is given its weights again before it generates,
    /// so call this on every rank alike. With [`adam_offload`](crate::StrategyConfig::adam_offload) its optimizer is
    /// offloaded but while the loop trains: see [`Strategy::maybe_load_optimizer`].
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
    ///
    /// # Errors
    /// As there.
    pub fn step_with(&mut self, between: impl FnOnce()) -> Result<StepMetrics> {
        let mut tally = Tally::default();
        self.offloads = OffloadTally::default();
        let began = Instant::now();
        let mut clock = began;
        // Seconds since the last call.
        let mut lap = || std::mem::replace(&mut clock, Instant::now()).elapsed().as_secs_f64();

        self.refresh_engine()?;
        tally.seconds.update = lap();
        let rollout = self.rollout()?;
        tally.seconds.generate = lap();
        between();
        lap();

        let config = self.strategy.config();
        let rewards: Vec<f32> = rollout.scores.iter().map(|s| s.reward).collect();
        tally.reward = rewards.iter().map(|r| f64::from(*r)).sum();
        tally.correct = rollout.scores.iter().filter(|s| s.correct).count();
        tally.answers = rewards.len();
        tally.tokens = rollout.completions.iter().map(|c| c.tokens.len()).sum();
        let advantages = shape_rewards(config.advantage_estimator, &rewards, config.n_samples_per_prompt)?;
        let micros = self.micro_batches(&rollout)?;
        tally.seconds.score = lap();
        let last = self.train(&advantages, &micros, &mut tally)?;
        drop(micros);
        tally.seconds.train = lap();
        self.step += 1;
        self.engine_is_current = false;
        self.refresh_engine()?;
        tally.seconds.update += lap();
        tally.seconds.all = began.elapsed().as_secs_f64();

        let config = self.strategy.config();
        tally.offloads = self.offloads;
        let total = tally.total(&**self.strategy.world(), config.updates_per_rollout())?;
        let offloads = config.adam_offload || config.actor_offload || config.reference_offload;
        let parameters_hash = match config.log_parameters_hash {
            true => Some(format!("{:016x}", self.parameters_hash()?)),
            false => None,
        };
        Ok(StepMetrics {
            step: self.step,
            epoch: self.sampler.epoch(),
            reward: total.reward,
            accuracy: total.accuracy,
            kl: total.kl,
            length: total.length,
            loss: total.loss,
            clip_fraction: total.clip_fraction,
            log_prob_gap: total.log_prob_gap,
            grad_norm: last.grad_norm,
            lr: last.lr,
            skipped_updates: self.parts.actor.optimizer.counters().skipped,
            tokens: total.tokens as u64,
            tokens_per_s: total.tokens / total.seconds.all,
            generate_s: total.seconds.generate,
            score_s: total.seconds.score,
            train_s: total.seconds.train,
            update_s: total.seconds.update,
            offload: offloads.then_some(total.offload),
            parameters_hash,
        })
    }

    /// Share of right answers when the prompts `range` of a data set are answered greedily. *Collective.*
    ///
    /// # Errors
    /// Those of generation, and [`Error::Config`] for an empty range.
    pub fn evaluate(&mut self, prompts: &JsonLines, range: Range<usize>) -> Result<f64> {
        if range.is_empty() || range.end > prompts.len() {
            return Err(Error::config(
                format!("evaluation of prompts {range:?}"),
                format!("{} holds {}", prompts.path().display(), prompts.len()),
            ));
        }
        self.refresh_engine()?;
        let scores = self.answer_greedily(prompts, range)?;
        let mut counts = [scores.iter().filter(|s| s.correct).count() as i64, scores.len() as i64];
        self.strategy.world().all_reduce(&mut counts, ReduceOp::Sum)?;
        Ok(counts[0] as f64 / counts[1] as f64)
    }

    /// Where the run stands, with the caller's own state, for [`Strategy::save_ckpt`].
    pub fn state(&self, client: serde_json::Value) -> RunState {
        RunState {
            step: self.step,
            updates: self.updates,
            total_steps: self.parts.total_steps,
            settings: self.strategy.config().clone(),
            sampler: self.sampler.state(),
            client,
        }
    }

    /// Saves a checkpoint, durable when this returns. *Collective.*
    ///
    /// # Errors
    /// As [`Strategy::save_ckpt`], and those of a save in the background that was not told of yet.
    pub fn save(&mut self, dir: &Path, client: serde_json::Value) -> Result<SaveReport> {
        self.finish_saves()?;
        // It has the directory to itself.
        self.saver = None;
        self.strategy.save_ckpt(&self.parts.actor, dir, &self.state(client))
    }

    /// Saves a checkpoint when [`save_steps`](crate::StrategyConfig::save_steps) or the end of the run asks for one.
    /// Returns the report of what was saved; with [`async_save`](crate::StrategyConfig::async_save) that is the save
    /// before, and the one that is due has begun: call [`finish_saves`](Self::finish_saves) at the end. *Collective.*
    ///
    /// # Errors
    /// As [`Strategy::save_ckpt`], or as [`ActorSaver::save`]; but when it is the save before that failed, the one that is
    /// due has begun nevertheless.
    pub fn save_if_due(&mut self, dir: &Path, client: serde_json::Value) -> Result<Option<SaveReport>> {
        let every = self.strategy.config().save_steps as u64;
        let due = every > 0 && (self.step.is_multiple_of(every) || self.step == self.parts.total_steps);
        if !due {
            return Ok(None);
        }
        if !self.strategy.config().async_save {
            return self.save(dir, client).map(Some);
        }
        let state = self.state(client);
        // Its failure must not cost the run the save that is due.
        let before = self.finish_saves();
        let saver = match self.saver.take().filter(|saver| saver.dir() == dir) {
            Some(saver) => self.saver.insert(saver),
            None => self.saver.insert(self.strategy.actor_saver(dir)?),
        };
        saver.save(&self.parts.actor, &state)?;
        before
    }

    /// Waits for the save in the background, if there is one, and reports it. *Collective.*
    ///
    /// # Errors
    /// As [`ActorSaver::finish`].
    pub fn finish_saves(&mut self) -> Result<Option<SaveReport>> {
        self.saver.as_mut().map_or(Ok(None), ActorSaver::finish)
    }

    /// Goes on from the newest whole checkpoint; `None` when there is none. *Collective.*
    ///
    /// With the same settings and number of ranks the run goes on bit for bit; [`Loaded::changed`] names what differs.
    ///
    /// # Errors
    /// As [`Strategy::load_ckpt`], and [`Error::Resume`] for a checkpoint of a run with another seed or other prompts;
    /// the policy is then as it was.
    pub fn resume(&mut self, dir: &Path) -> Result<Option<Loaded>> {
        // What is being saved may be what is loaded.
        self.finish_saves()?;
        let (seed, world) = (self.strategy.config().seed, self.strategy.world());
        let mut sampler = self.sampler.clone();
        let check = |tag: &str, state: &RunState| {
            let wrong = |what: String| Err(Error::Resume { tag: tag.to_owned(), what });
            if state.settings.seed != seed {
                let saved = state.settings.seed;
                return wrong(format!("it was made with seed {saved}, this run has seed {seed}"));
            }
            match sampler.restore(&state.sampler) {
                Ok(Resume::Exact) => Ok(()),
                Ok(Resume::Repeats { samples }) => {
                    tracing::warn!(
                        samples,
                        "this number of ranks cannot resume exactly: some prompts come again"
                    );
                    Ok(())
                }
                Err(error) => wrong(error.to_string()),
            }
        };
        let Some(mut loaded) =
            crate::checkpoint::load(world, &mut self.parts.actor, dir, &LoadOptions::default(), check)?
        else {
            return Ok(None);
        };
        let state = &loaded.state;
        loaded.changed = state.settings.differences(self.strategy.config());
        if state.total_steps != self.parts.total_steps {
            loaded.changed.push(format!("total_steps: {} -> {}", state.total_steps, self.parts.total_steps));
        }
        self.sampler = sampler;
        self.step = state.step;
        self.updates = state.updates;
        self.engine_is_current = false;
        Ok(Some(loaded))
    }

    /// A hash over every rank's parameters, the same on every rank: two runs on as many ranks have the same one when
    /// their parameters are the same, bit for bit. *Collective.*
    ///
    /// # Errors
    /// [`Error::Collectives`].
    pub fn parameters_hash(&self) -> Result<u64> {
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
        self.version += 1;
        let engine = self.parts.engine.as_deref_mut();
        self.strategy.update_engine_weights(&mut self.parts.actor, engine, Version(self.version))?;
        let asleep =
            match self.parts.engine.as_deref_mut().filter(|_| self.strategy.config().enable_engine_sleep) {
                Some(engine) => engine.sleep(Level::One).map_err(Error::from),
                None => Ok(()),
            };
        agree(&**self.strategy.world(), "engine sleep", asleep)?;
        self.engine_is_current = true;
        Ok(())
    }
}

/// What can be said of the parts before anything is computed.
fn check_parts(strategy: &Strategy, parts: &GrpoParts) -> Result<()> {
    let config = strategy.config();
    let model = parts.actor.model.model().decoder().config();
    let (context, vocabulary) = (model.max_position_embeddings, model.vocab_size);
    let lengths =
        format!("prompt_max_len = {}, generate_max_len = {}", config.prompt_max_len, config.generate_max_len);
    let longest = config.prompt_max_len.saturating_add(config.generate_max_len);
    if longest > context {
        let what = format!("together they exceed the model's max_position_embeddings = {context}");
        return Err(Error::config(lengths, what));
    }
    if parts.prompts.len() < config.rollout_batch_size {
        return Err(Error::config(
            format!("rollout_batch_size = {}", config.rollout_batch_size),
            format!("{} holds only {} prompts", parts.prompts.path().display(), parts.prompts.len()),
        ));
    }
    if config.use_kl_loss && parts.reference.is_none() {
        return Err(Error::config(
            "use_kl_loss = true, reference = none",
            "the penalty needs a model to compare with",
        ));
    }
    if parts.engine.is_some() != strategy.holds_engine() {
        let (has, should) = (parts.engine.is_some(), strategy.holds_engine());
        return Err(Error::config(
            format!("rank {}: an engine is {}", strategy.rank(), if has { "given" } else { "missing" }),
            format!("Strategy::holds_engine() is {should} here"),
        ));
    }
    if let Some(engine) = &parts.engine {
        let limits = engine.limits();
        if limits.vocabulary != vocabulary || limits.context_tokens < longest {
            return Err(Error::config(
                format!(
                    "the engine has {} tokens and a context of {}",
                    limits.vocabulary, limits.context_tokens
                ),
                format!("the policy has {vocabulary} tokens, and {lengths} must fit"),
            ));
        }
    }
    if let Some(token) = parts.stop_tokens.iter().find(|t| **t as usize >= vocabulary) {
        return Err(Error::config(
            format!("stop token {token}"),
            format!("the vocabulary ends at {}", vocabulary - 1),
        ));
    }
    Ok(())
}
