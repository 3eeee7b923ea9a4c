//! Every choice of a run, with LightRFT's names, checked once so that no two of them disagree.

use std::fmt::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::rl::{AdvantageEstimator, KlEstimator};
use crate::schedule::{Schedule, Shape};

/// Which engine generates the rollouts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum EngineType {
    /// Our own, in the trainer's process.
    #[default]
    Embedded,
}

/// Where the log-probabilities come from that a policy update is measured against.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OldLogProbs {
    /// The engine's own, given with every completion. One forward pass less.
    #[default]
    Engine,
    /// Computed again by the policy before its first update on the rollout.
    Policy,
}

/// A run's settings. Names and defaults are LightRFT's, but for those that say otherwise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StrategyConfig {
    /// Seeds the order of the prompts and every sampled token.
    pub seed: u64,
    /// The global gradient norm is clipped to this; 0 switches clipping off.
    pub max_norm: f64,
    /// Sequences of one rank in one forward and backward pass.
    pub micro_train_batch_size: usize,
    /// Sequences of all ranks in one optimizer step.
    pub train_batch_size: usize,
    /// What is sharded: 0, nothing; 1, optimizer state; 2, gradients as well; 3, parameters as well. LightRFT's default is
    /// 2.
    pub zero_stage: u8,
    /// Which engine generates.
    pub engine_type: EngineType,
    /// Ranks that share one engine: consecutive ranks form a group, whose first rank holds the engine.
    pub engine_tp_size: usize,
    /// Whether the engine gives its memory back while the policy trains.
    pub enable_engine_sleep: bool,
    /// Learning rate of the policy.
    pub actor_lr: f64,
    /// Decay rates of AdamW.
    pub adam_betas: (f64, f64),
    /// Decoupled weight decay; biases and norms are never decayed.
    pub l2: f64,
    /// Part of the optimizer steps in which the learning rate rises from 0.
    pub lr_warmup_ratio: f64,
    /// The learning rate's schedule, by transformers' name: `lr_scheduler = { name = "linear" }`.
    pub lr_scheduler: Shape,
    /// Prompts of all ranks in one rollout.
    pub rollout_batch_size: usize,
    /// Most sequences that one rank's engine decodes at once; 0 leaves it to the engine. LightRFT's default is 2.
    pub micro_rollout_batch_size: usize,
    /// Answers sampled for each prompt: the group of the group-normalised advantage.
    pub n_samples_per_prompt: usize,
    /// Longest prompt, in tokens.
    pub prompt_max_len: usize,
    /// Longest answer, in tokens.
    pub generate_max_len: usize,
    /// Temperature of the rollouts. Log-probabilities, the engine's and the trainer's, are those at temperature 1.
    pub temperature: f32,
    /// Nucleus of the rollouts, 1 for all.
    pub top_p: f32,
    /// Most likely tokens that the rollouts may draw, 0 for all. LightRFT writes -1 for all.
    pub top_k: usize,
    /// Optimizer passes over each rollout.
    pub max_epochs: usize,
    /// How rewards become advantages.
    pub advantage_estimator: AdvantageEstimator,
    /// Where the old log-probabilities come from.
    pub old_log_probs: OldLogProbs,
    /// Clip range of the probability ratio.
    pub eps_clip: f64,
    /// Whether the loss holds a KL penalty against the frozen reference.
    pub use_kl_loss: bool,
    /// Weight of that penalty.
    pub init_kl_coef: f64,
    /// How that KL divergence is estimated.
    pub kl_estimator: KlEstimator,
    /// Steps between checkpoints; 0 for none.
    pub save_steps: usize,
    /// Checkpoints kept.
    pub max_ckpt_num: usize,
    /// Bytes of checkpoints kept, in GiB.
    pub max_ckpt_mem: f64,
    /// Whether each step hashes all parameters, to compare runs bit for bit. Costs one pass over the shards.
    pub log_parameters_hash: bool,
}

impl Default for StrategyConfig {
    fn default() -> Self {
        Self {
            seed: 42,
            max_norm: 1.0,
            micro_train_batch_size: 1,
            train_batch_size: 128,
            zero_stage: 3,
            engine_type: EngineType::Embedded,
            engine_tp_size: 1,
            enable_engine_sleep: false,
            actor_lr: 1e-5,
            adam_betas: (0.9, 0.95),
            l2: 0.0,
            lr_warmup_ratio: 0.03,
            lr_scheduler: Shape::default(),
            rollout_batch_size: 16,
            micro_rollout_batch_size: 0,
            n_samples_per_prompt: 8,
            prompt_max_len: 1024,
            generate_max_len: 1024,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            max_epochs: 1,
            advantage_estimator: AdvantageEstimator::GroupNorm,
            old_log_probs: OldLogProbs::Engine,
            eps_clip: 0.2,
            use_kl_loss: false,
            init_kl_coef: 0.01,
            kl_estimator: KlEstimator::K3,
            save_steps: 0,
            max_ckpt_num: 3,
            max_ckpt_mem: 1000.0,
            log_parameters_hash: false,
        }
    }
}

impl StrategyConfig {
    /// Reads a TOML file; what it does not name keeps its default.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::ConfigFile`] with the line of an unknown or ill-typed field.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        toml::from_str(&text).map_err(|e| Error::ConfigFile { path: path.to_owned(), what: e.to_string() })
    }

    /// Checks that the settings fit each other and a world of `world` ranks.
    ///
    /// # Errors
    /// [`Error::Config`] names every field that takes part, with its value.
    pub fn validate(&self, world: usize) -> Result<()> {
        let positive = [
            ("micro_train_batch_size", self.micro_train_batch_size),
            ("train_batch_size", self.train_batch_size),
            ("engine_tp_size", self.engine_tp_size),
            ("rollout_batch_size", self.rollout_batch_size),
            ("n_samples_per_prompt", self.n_samples_per_prompt),
            ("prompt_max_len", self.prompt_max_len),
            ("generate_max_len", self.generate_max_len),
            ("max_epochs", self.max_epochs),
            ("max_ckpt_num", self.max_ckpt_num),
        ];
        for (field, value) in positive {
            if value == 0 {
                return Err(Error::config(format!("{field} = 0"), "a positive number was expected"));
            }
        }
        if self.zero_stage > 3 {
            return Err(Error::config(
                format!("zero_stage = {}", self.zero_stage),
                "0, 1, 2 or 3 was expected",
            ));
        }
        let product = |a: usize, b: usize, fields: &str| {
            a.checked_mul(b)
                .ok_or_else(|| Error::config(format!("{fields} = {a} and {b}"), "their product overflows"))
        };
        let per_pass = product(self.micro_train_batch_size, world, "micro_train_batch_size and world size")?;
        if !self.train_batch_size.is_multiple_of(per_pass) {
            return Err(Error::config(
                format!(
                    "train_batch_size = {}, micro_train_batch_size = {}, world size = {world}",
                    self.train_batch_size, self.micro_train_batch_size
                ),
                format!("the first must be a multiple of the other two's product, {per_pass}"),
            ));
        }
        if !self.rollout_batch_size.is_multiple_of(world) {
            return Err(Error::config(
                format!("rollout_batch_size = {}, world size = {world}", self.rollout_batch_size),
                "the first must be a multiple of the second, so that every rank has as many prompts",
            ));
        }
        let sequences = product(
            self.rollout_batch_size,
            self.n_samples_per_prompt,
            "rollout_batch_size and n_samples_per_prompt",
        )?;
        product(sequences, self.max_epochs, "sequences of a rollout and max_epochs")?;
        if !sequences.is_multiple_of(self.train_batch_size) {
            return Err(Error::config(
                format!(
                    "rollout_batch_size = {}, n_samples_per_prompt = {}, train_batch_size = {}",
                    self.rollout_batch_size, self.n_samples_per_prompt, self.train_batch_size
                ),
                "the product of the first two must be a multiple of the third, so that no sample is left over",
            ));
        }
        if !world.is_multiple_of(self.engine_tp_size) {
            return Err(Error::config(
                format!("engine_tp_size = {}, world size = {world}", self.engine_tp_size),
                "the second must be a multiple of the first",
            ));
        }
        let estimator = self.advantage_estimator;
        if !matches!(estimator, AdvantageEstimator::GroupNorm | AdvantageEstimator::Rloo) {
            return Err(Error::config(
                format!("advantage_estimator = {}", estimator.name()),
                "the GRPO loop takes group_norm or rloo: the others need a critic, or whitening over the batch",
            ));
        }
        if self.n_samples_per_prompt == 1 {
            return Err(Error::config(
                format!("advantage_estimator = {}, n_samples_per_prompt = 1", estimator.name()),
                "a group of one sample has nothing to compare with: at least 2 were expected",
            ));
        }
        let (beta1, beta2) = self.adam_betas;
        let temperature = f64::from(self.temperature);
        let ranges = [
            (
                "temperature",
                temperature,
                temperature > 0.0 && temperature.is_finite(),
                "positive: the samples of a group must differ",
            ),
            ("top_p", f64::from(self.top_p), self.top_p > 0.0 && self.top_p <= 1.0, "in (0, 1]"),
            ("adam_betas.0", beta1, (0.0..1.0).contains(&beta1), "in [0, 1)"),
            ("adam_betas.1", beta2, (0.0..1.0).contains(&beta2), "in [0, 1)"),
            (
                "max_norm",
                self.max_norm,
                self.max_norm >= 0.0 && self.max_norm.is_finite(),
                "finite, 0 or more",
            ),
            (
                "actor_lr",
                self.actor_lr,
                self.actor_lr >= 0.0 && self.actor_lr.is_finite(),
                "finite, 0 or more",
            ),
            ("l2", self.l2, self.l2 >= 0.0 && self.l2.is_finite(), "finite, 0 or more"),
            (
                "lr_warmup_ratio",
                self.lr_warmup_ratio,
                (0.0..=1.0).contains(&self.lr_warmup_ratio),
                "in [0, 1]",
            ),
            ("eps_clip", self.eps_clip, self.eps_clip > 0.0 && self.eps_clip < 1.0, "in (0, 1)"),
            (
                "init_kl_coef",
                self.init_kl_coef,
                self.init_kl_coef >= 0.0 && self.init_kl_coef.is_finite(),
                "finite, 0 or more",
            ),
            ("max_ckpt_mem", self.max_ckpt_mem, self.max_ckpt_mem > 0.0, "positive"),
        ];
        for (field, value, ok, expected) in ranges {
            if !ok {
                return Err(Error::config(format!("{field} = {value}"), format!("it must be {expected}")));
            }
        }
        self.schedule(1).map(drop)
    }

    /// The learning rate over a run of `updates` optimizer steps.
    ///
    /// # Errors
    /// [`Error::Config`] for a schedule whose numbers contradict each other.
    pub fn schedule(&self, updates: u64) -> Result<Schedule> {
        let updates = updates as usize;
        let warmup = (updates as f64 * self.lr_warmup_ratio).ceil() as usize;
        Schedule::new(self.lr_scheduler, self.actor_lr, warmup, Some(updates)).map_err(|e| {
            let fields = format!("lr_scheduler = {}, actor_lr = {}", self.lr_scheduler.name(), self.actor_lr);
            Error::config(fields, e.to_string())
        })
    }

    /// Backward passes of one rank before each optimizer step.
    pub fn accumulated_gradient(&self, world: usize) -> usize {
        self.train_batch_size / (self.micro_train_batch_size * world)
    }

    /// Optimizer steps that one rollout gives.
    pub fn updates_per_rollout(&self) -> usize {
        self.rollout_batch_size * self.n_samples_per_prompt / self.train_batch_size * self.max_epochs
    }

    /// The settings that differ from the defaults, a line each.
    pub fn summary(&self) -> String {
        let mut text = String::new();
        for (field, default, value) in Self::default().compare(self) {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "  {field:<26} {value:<20} (default {default})");
        }
        text
    }

    /// What `other` has changed, as `field: mine -> its`.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        self.compare(other)
            .into_iter()
            .map(|(field, mine, its)| format!("{field}: {mine} -> {its}"))
            .collect()
    }

    fn compare(&self, other: &Self) -> Vec<(String, String, String)> {
        let table =
            |c: &Self| serde_json::to_value(c).ok().and_then(|v| v.as_object().cloned()).unwrap_or_default();
        let (mine, its) = (table(self), table(other));
        mine.into_iter()
            .filter_map(|(field, value)| {
                let other = its.get(&field).filter(|other| **other != value)?;
                Some((field, value.to_string(), other.to_string()))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut StrategyConfig), world: usize, names: &[&str]) {
        let mut config = StrategyConfig::default();
        change(&mut config);
        let text = config.validate(world).expect_err("a contradiction").to_string();
        for name in names {
            assert!(text.contains(name), "`{text}` should name {name}");
        }
    }

    #[test]
    fn contradictions_are_refused_with_every_field_named() {
        StrategyConfig::default().validate(2).unwrap();
        refused(|_| {}, 3, &["train_batch_size = 128", "micro_train_batch_size = 1", "world size = 3"]);
        refused(|c| c.rollout_batch_size = 15, 2, &["rollout_batch_size = 15", "world size = 2"]);
        refused(|c| c.n_samples_per_prompt = 3, 2, &["n_samples_per_prompt = 3", "train_batch_size"]);
        refused(|c| c.engine_tp_size = 4, 2, &["engine_tp_size = 4", "world size = 2"]);
        refused(
            |c| {
                c.n_samples_per_prompt = 1;
                c.train_batch_size = 16;
            },
            2,
            &["n_samples_per_prompt = 1", "advantage_estimator"],
        );
        refused(|c| c.advantage_estimator = AdvantageEstimator::Gae, 2, &["advantage_estimator"]);
        refused(|c| c.eps_clip = 1.5, 2, &["eps_clip = 1.5"]);
        let end_above_start = Shape::Polynomial { lr_end: 1.0, power: 1.0 };
        refused(|c| c.lr_scheduler = end_above_start, 2, &["lr_scheduler = polynomial", "actor_lr"]);
        refused(|c| c.zero_stage = 4, 2, &["zero_stage = 4"]);
    }

    #[test]
    fn a_file_keeps_the_defaults_it_does_not_name_and_refuses_unknown_fields() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.toml");
        std::fs::write(&path, "seed = 7\nadvantage_estimator = \"rloo\"\n").unwrap();
        let config = StrategyConfig::from_file(&path).unwrap();
        assert_eq!((config.seed, config.max_norm), (7, 1.0));
        assert_eq!(config.advantage_estimator, AdvantageEstimator::Rloo);
        let summary = config.summary();
        assert!(summary.contains("seed") && !summary.contains("max_norm"), "{summary}");
        std::fs::write(&path, "sed = 7\n").unwrap();
        let text = StrategyConfig::from_file(&path).unwrap_err().to_string();
        assert!(text.contains("sed") && text.contains("run.toml"), "{text}");
    }
}
