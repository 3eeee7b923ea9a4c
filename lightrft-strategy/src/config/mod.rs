//! Every choice of a run, with LightRFT's names, checked once so that no two of them disagree.

mod check;
mod sharding;

use std::fmt::Write as _;
use std::path::Path;

use lightrft_sharding::{GatherFrom, Precision, ShardSize};
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
    /// Over how many ranks what is sharded is cut; the others of the world are replicas (HSDP). `"world"` (LightRFT's
    /// -1), a number of ranks, or `"auto"`, which for a model that trains is the world.
    #[serde(with = "sharding::shard_size")]
    pub shard_size: ShardSize,
    /// The same for the frozen reference, where it is sharded: in stage 3. `"auto"` keeps one below 10 billion parameters
    /// whole on each rank, and cuts one below 80 billion over 8.
    #[serde(alias = "initial_model_shard_size", with = "sharding::shard_size")]
    pub reference_shard_size: ShardSize,
    /// Whether stage 3 frees a unit after forward and gathers it again for backward, which costs an all-gather and saves
    /// the memory of all units between the passes.
    pub reshard_after_forward: bool,
    /// Neighbouring ranks that keep what forward gathered among them, until the parameters change: hpZ of ZeRO++, in
    /// stage 3. 1 for none, and all that share a shard where it is more than those.
    #[serde(alias = "zpg")]
    pub hpz_size: usize,
    /// Stages that a gather runs ahead of computing; 0 waits for each. One more unit in memory for each.
    pub prefetch: usize,
    /// Whether gradients are exchanged beside the backward pass: one more gradient in memory.
    pub overlap_comm: bool,
    /// Most elements of gradients in one exchange: in stages 0 to 2, between replicas, and of units that stay whole.
    pub reduce_bucket_size: usize,
    /// Units of fewer elements are whole on every rank, in stages 1 to 3.
    pub persistence_threshold: usize,
    /// What parameters are gathered in; masters are always f32. LightRFT's `bf16` is true or false, and its default true.
    #[serde(alias = "bf16", deserialize_with = "sharding::dtype_or_bf16")]
    pub param_dtype: Precision,
    /// What gathers in a narrower type read of each shard: the f32 masters, which each gather rounds, or a copy of it, 2 bytes
    /// for each parameter of the shard, which each step rounds.
    pub gather_from: GatherFrom,
    /// What the model computes in: f32, into which narrower parameters are cast when they arrive, or the type of
    /// [`param_dtype`](Self::param_dtype), which is slower than f32 on a CPU.
    pub compute_dtype: Precision,
    /// What gradients are sent in. Sums over ranks are taken in f32.
    pub reduce_dtype: Precision,
    /// What gradients add up in over the passes of a step. LightRFT's default is the model's type.
    pub grad_accum_dtype: Precision,
    /// Whether backward computes each layer again instead of keeping its activations. The gradients are the same, bit for
    /// bit.
    pub gradient_checkpointing: bool,
    /// Parameters whose names begin with one of these do not learn. LightRFT's is true for `visual`, or false.
    pub freeze_prefix: Vec<String>,
    /// Whether the optimizer's state leaves the device between training phases.
    pub adam_offload: bool,
    /// Whether the policy gives up, while the engine generates, all memory but what exists nowhere else: gathered units,
    /// gradients, buffers.
    pub actor_offload: bool,
    /// Whether the reference does so while it is not used. LightRFT's always does.
    pub reference_offload: bool,
    /// Whether a moving average of the policy is kept: 4 bytes for each parameter that learns, sharded.
    pub enable_ema: bool,
    /// The weight of the past in that average.
    pub ema_beta: f64,
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
    /// Whether a checkpoint is written while the run goes on, which then waits only until it is copied. The copy takes as
    /// much host memory as the rank's shards with their moments.
    pub async_save: bool,
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
            shard_size: ShardSize::World,
            reference_shard_size: ShardSize::World,
            reshard_after_forward: true,
            hpz_size: 1,
            prefetch: 1,
            overlap_comm: false,
            reduce_bucket_size: 500_000_000,
            persistence_threshold: 0,
            param_dtype: Precision::F32,
            gather_from: GatherFrom::Masters,
            compute_dtype: Precision::F32,
            reduce_dtype: Precision::F32,
            grad_accum_dtype: Precision::F32,
            gradient_checkpointing: false,
            freeze_prefix: Vec::new(),
            adam_offload: false,
            actor_offload: false,
            reference_offload: false,
            enable_ema: false,
            ema_beta: 0.992,
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
            async_save: false,
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
