//! Which settings contradict each other.

use super::StrategyConfig;
use crate::error::{Error, Result};
use crate::rl::AdvantageEstimator;

impl StrategyConfig {
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
            ("hpz_size", self.hpz_size),
            ("reduce_bucket_size", self.reduce_bucket_size),
        ];
        for (field, value) in positive {
            if value == 0 {
                return Err(Error::config(format!("{field} = 0"), "a positive number was expected"));
            }
        }
        self.validate_sharding(world)?;
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
            // Settings are kept in checkpoints as JSON, which has no infinity.
            (
                "max_ckpt_mem",
                self.max_ckpt_mem,
                self.max_ckpt_mem > 0.0 && self.max_ckpt_mem.is_finite(),
                "positive and finite",
            ),
            ("ema_beta", self.ema_beta, (0.0..=1.0).contains(&self.ema_beta), "in [0, 1]"),
        ];
        for (field, value, ok, expected) in ranges {
            if !ok {
                return Err(Error::config(format!("{field} = {value}"), format!("it must be {expected}")));
            }
        }
        self.schedule(1).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use lightrft_sharding::{GatherFrom, Precision, ShardSize};

    use super::*;
    use crate::schedule::Shape;

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
    }

    #[test]
    fn contradictions_of_sharding_are_refused_by_the_settings_names() {
        refused(|c| c.zero_stage = 4, 2, &["zero_stage = 4"]);
        refused(|c| c.hpz_size = 0, 2, &["hpz_size = 0"]);
        refused(|c| c.reduce_bucket_size = 0, 2, &["reduce_bucket_size = 0"]);
        refused(|c| (c.zero_stage, c.hpz_size) = (2, 2), 2, &["zero_stage = 2", "hpz_size = 2"]);
        refused(
            |c| (c.zero_stage, c.reshard_after_forward) = (1, false),
            2,
            &["zero_stage = 1", "reshard_after_forward = false"],
        );
        refused(
            |c| (c.hpz_size, c.reshard_after_forward) = (2, false),
            2,
            &["hpz_size = 2", "reshard_after_forward = false"],
        );
        refused(
            |c| (c.param_dtype, c.compute_dtype) = (Precision::F16, Precision::F16),
            2,
            &["compute_dtype = \"f16\""],
        );
        refused(|c| c.reduce_dtype = Precision::F16, 2, &["reduce_dtype = \"f16\""]);
        refused(|c| c.grad_accum_dtype = Precision::F16, 2, &["grad_accum_dtype = \"f16\""]);
        refused(|c| c.max_ckpt_mem = f64::INFINITY, 2, &["max_ckpt_mem = inf"]);
        refused(|c| c.gather_from = GatherFrom::Copy, 2, &["gather_from", "param_dtype = \"f32\""]);
        refused(
            |c| (c.zero_stage, c.persistence_threshold) = (0, 7),
            2,
            &["zero_stage = 0", "persistence_threshold = 7"],
        );
        refused(|c| c.shard_size = ShardSize::Ranks(3), 4, &["shard_size = 3", "world size = 4"]);
        refused(|c| c.shard_size = ShardSize::Ranks(0), 4, &["shard_size = 0"]);
        refused(
            |c| (c.zero_stage, c.shard_size) = (0, ShardSize::Ranks(2)),
            4,
            &["zero_stage = 0", "shard_size = 2"],
        );
        refused(
            |c| c.reference_shard_size = ShardSize::Ranks(3),
            4,
            &["reference_shard_size = 3", "world size = 4"],
        );
        refused(
            |c| (c.zero_stage, c.reference_shard_size) = (2, ShardSize::Ranks(2)),
            4,
            &["zero_stage = 2", "reference_shard_size = 2"],
        );
        refused(
            |c| (c.hpz_size, c.shard_size) = (3, ShardSize::Ranks(4)),
            8,
            &["hpz_size = 3", "share a shard = 4"],
        );
        refused(
            |c| c.compute_dtype = Precision::Bf16,
            2,
            &["compute_dtype = \"bf16\"", "param_dtype = \"f32\""],
        );
        refused(|c| c.freeze_prefix = vec![String::new()], 2, &["freeze_prefix"]);
        refused(|c| c.ema_beta = 1.5, 2, &["ema_beta = 1.5"]);
    }
}
