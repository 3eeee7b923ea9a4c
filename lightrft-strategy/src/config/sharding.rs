//! The settings as a [`Policy`] of sharding: how they map, which of them fit each other, and how a file writes them.

use lightrft_sharding::{
    Activations, GatherFrom, Mode, Overlap, Policy, Precision, ReshardAfterForward, ShardSize, Stage,
    Trainable,
};
use serde::{Deserialize, Deserializer};

use super::StrategyConfig;
use crate::error::{Error, Result};

impl StrategyConfig {
    /// How the policy is cut and run.
    ///
    /// # Errors
    /// [`Error::Sharding`] for a stage that does not exist.
    pub fn actor_policy(&self) -> Result<Policy> {
        let reshard_after_forward = match (self.reshard_after_forward, self.hpz_size) {
            (false, _) => ReshardAfterForward::Never,
            (true, 0 | 1) => ReshardAfterForward::Always,
            (true, ranks) => ReshardAfterForward::ToGroup(ranks),
        };
        let trainable = match &self.freeze_prefix[..] {
            [] => Trainable::All,
            prefixes => Trainable::ExceptPrefixes(prefixes.to_vec()),
        };
        Ok(Policy {
            mode: Mode::Train,
            stage: Stage::try_from(self.zero_stage)?,
            shard_size: self.shard_size,
            reshard_after_forward,
            prefetch: self.prefetch,
            overlap: if self.overlap_comm { Overlap::On } else { Overlap::Off },
            reduce_bucket_elems: self.reduce_bucket_size,
            param_dtype: self.param_dtype,
            gather_from: self.gather_from,
            reduce_dtype: self.reduce_dtype,
            grad_accum_dtype: self.grad_accum_dtype,
            persistence_threshold: self.persistence_threshold,
            trainable,
            activations: if self.gradient_checkpointing { Activations::Recompute } else { Activations::Keep },
            ..Policy::default()
        })
    }

    /// How the frozen reference is: cut where the policy's parameters are, whole on every rank where they are not, as
    /// LightRFT has it.
    ///
    /// # Errors
    /// As [`actor_policy`](Self::actor_policy).
    pub fn reference_policy(&self) -> Result<Policy> {
        let common = Policy {
            mode: Mode::Frozen,
            prefetch: self.prefetch,
            param_dtype: self.param_dtype,
            ..Policy::default()
        };
        Ok(match Stage::try_from(self.zero_stage)? {
            Stage::Zero3 => Policy {
                stage: Stage::Zero3,
                shard_size: self.reference_shard_size,
                persistence_threshold: self.persistence_threshold,
                ..common
            },
            _ => Policy { stage: Stage::Zero0, ..common },
        })
    }

    /// Checks what concerns sharding, by the names that the settings have here.
    pub(super) fn validate_sharding(&self, world: usize) -> Result<()> {
        let stage = format!("zero_stage = {}", self.zero_stage);
        if self.zero_stage > 3 {
            return Err(Error::config(stage, "0, 1, 2 or 3 was expected"));
        }
        let whole = self.zero_stage < 3;
        let contradictions = [
            (
                whole && self.hpz_size > 1,
                format!("hpz_size = {}", self.hpz_size),
                "stages 0 to 2 keep parameters whole: 1 was expected",
            ),
            (
                whole && !self.reshard_after_forward,
                "reshard_after_forward = false".to_owned(),
                "stages 0 to 2 keep parameters whole, and never free them: true was expected",
            ),
            (
                self.zero_stage == 0 && self.persistence_threshold > 0,
                format!("persistence_threshold = {}", self.persistence_threshold),
                "stage 0 keeps every unit whole: 0 was expected",
            ),
        ];
        for (wrong, field, expected) in contradictions {
            if wrong {
                return Err(Error::config(format!("{stage}, {field}"), expected));
            }
        }
        if self.hpz_size > 1 && !self.reshard_after_forward {
            return Err(Error::config(
                format!("hpz_size = {}, reshard_after_forward = false", self.hpz_size),
                "neighbours keep what is freed after forward, and nothing is",
            ));
        }
        let sizes = [
            ("shard_size", self.shard_size, self.zero_stage > 0),
            ("reference_shard_size", self.reference_shard_size, !whole),
        ];
        for (field, size, is_cut) in sizes {
            let ShardSize::Ranks(ranks) = size else { continue };
            let field = format!("{field} = {ranks}");
            if ranks == 0 || !world.is_multiple_of(ranks) {
                let expected = "the second must be a multiple of the first";
                return Err(Error::config(format!("{field}, world size = {world}"), expected));
            }
            if !is_cut && ranks > 1 {
                return Err(Error::config(format!("{stage}, {field}"), "nothing is cut in this stage"));
            }
        }
        let cut_over = match self.shard_size {
            ShardSize::Ranks(ranks) => ranks,
            _ => world,
        };
        if self.hpz_size < cut_over && !cut_over.is_multiple_of(self.hpz_size) {
            let fields = format!("hpz_size = {}, ranks that share a shard = {cut_over}", self.hpz_size);
            return Err(Error::config(fields, "the second must be a multiple of the first"));
        }
        if self.compute_dtype != Precision::F32 && self.compute_dtype != self.param_dtype {
            let name = |of: Precision| serde_json::to_string(&of).unwrap_or_default();
            return Err(Error::config(
                format!(
                    "compute_dtype = {}, param_dtype = {}",
                    name(self.compute_dtype),
                    name(self.param_dtype)
                ),
                "parameters are computed in as they were gathered, or in f32",
            ));
        }
        let small = [
            ("compute_dtype", self.compute_dtype),
            ("reduce_dtype", self.reduce_dtype),
            ("grad_accum_dtype", self.grad_accum_dtype),
        ];
        if let Some((field, _)) = small.into_iter().find(|(_, dtype)| *dtype == Precision::F16) {
            let expected =
                "\"f32\" or \"bf16\": losses are not scaled up, and gradients are too small for f16";
            return Err(Error::config(format!("{field} = \"f16\""), expected));
        }
        if self.gather_from == GatherFrom::Copy && self.param_dtype == Precision::F32 {
            return Err(Error::config(
                "gather_from = \"copy\", param_dtype = \"f32\"",
                "f32 masters are gathered where they lie",
            ));
        }
        if self.freeze_prefix.iter().any(String::is_empty) {
            return Err(Error::config(
                format!("freeze_prefix = {:?}", self.freeze_prefix),
                "every name begins with an empty prefix, and nothing would learn",
            ));
        }
        // What is left is the policies' own to say.
        self.actor_policy()?.validate(world)?;
        Ok(self.reference_policy()?.validate(world)?)
    }
}

/// A shard size in a file: `"world"` or -1, `"auto"`, or a number of ranks.
pub(super) mod shard_size {
    use lightrft_sharding::ShardSize;
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serializer};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Number(i64),
        Name(String),
    }

    pub(in crate::config) fn serialize<S: Serializer>(
        size: &ShardSize,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match size {
            ShardSize::World => serializer.serialize_str("world"),
            ShardSize::Auto => serializer.serialize_str("auto"),
            ShardSize::Ranks(ranks) => serializer.serialize_u64(*ranks as u64),
        }
    }

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<ShardSize, D::Error> {
        let wrong = |written: String| {
            D::Error::custom(format!(
                "a shard size of {written}: \"world\", \"auto\" or a number of ranks was expected"
            ))
        };
        match Written::deserialize(deserializer)? {
            Written::Number(-1) => Ok(ShardSize::World),
            Written::Number(ranks) => match usize::try_from(ranks) {
                Ok(ranks) if ranks > 0 => Ok(ShardSize::Ranks(ranks)),
                _ => Err(wrong(ranks.to_string())),
            },
            Written::Name(name) => match name.as_str() {
                "world" => Ok(ShardSize::World),
                "auto" => Ok(ShardSize::Auto),
                _ => Err(wrong(format!("{name:?}"))),
            },
        }
    }
}

/// A type by its name, or LightRFT's `bf16 = true`.
pub(super) fn dtype_or_bf16<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Precision, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        IsBf16(bool),
        Named(Precision),
    }
    Ok(match Written::deserialize(deserializer)? {
        Written::IsBf16(true) => Precision::Bf16,
        Written::IsBf16(false) => Precision::F32,
        Written::Named(precision) => precision,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lightrfts_and_deepspeeds_names_are_read_too() {
        let read = |text: &str| toml::from_str::<StrategyConfig>(text).unwrap();
        let theirs = read(
            "zpg = 8\nbf16 = true\ngrad_accum_dtype = \"fp32\"\nreduce_dtype = \"bfloat16\"\nshard_size = -1\n\
             initial_model_shard_size = \"auto\"\n",
        );
        let ours = read(
            "hpz_size = 8\nparam_dtype = \"bf16\"\ngrad_accum_dtype = \"f32\"\nreduce_dtype = \"bf16\"\n\
             shard_size = \"world\"\nreference_shard_size = \"auto\"\n",
        );
        assert_eq!(theirs, ours);
        assert_eq!(read("bf16 = false\n"), StrategyConfig::default());
        assert_eq!(read("shard_size = 4\n").shard_size, ShardSize::Ranks(4));
        for (text, names) in [
            ("shard_size = 0\n", "shard size of 0"),
            ("shard_size = \"some\"\n", "some"),
            ("zpg = 2\nhpz_size = 2\n", "hpz_size"),
            ("param_dtype = \"int8\"\n", "param_dtype"),
        ] {
            let error = toml::from_str::<StrategyConfig>(text).unwrap_err().to_string();
            assert!(error.contains(names), "{error}");
        }
    }

    #[test]
    fn settings_come_back_from_a_checkpoint_as_they_went() {
        let config = StrategyConfig {
            shard_size: ShardSize::Ranks(2),
            reference_shard_size: ShardSize::Auto,
            param_dtype: Precision::Bf16,
            freeze_prefix: vec!["visual".to_owned()],
            ..StrategyConfig::default()
        };
        let written = serde_json::to_value(&config).unwrap();
        assert_eq!(serde_json::from_value::<StrategyConfig>(written).unwrap(), config);
    }
}
