//! What is cut, over which ranks, when units are freed, and in which types they travel: choices as plain data.
//!
//! All of them are choices over the same pieces. With S ranks in a shard group, R replicas of it, and P parameters:
//!
//! | stage | whole on each rank | cut over the shard group | gradients are exchanged |
//! |---|---|---|---|
//! | 0 | everything: 16 P bytes | nothing | at the step: all-reduces of buckets |
//! | 1 | parameters, gradients while they accumulate | master parameters, optimizer | at the step: reduce-scatters of buckets |
//! | 2 | parameters | and gradients | in each backward pass: reduce-scatters of buckets |
//! | 3 | one or two units at a time | and parameters: 16 P/S bytes | in each backward pass: a reduce-scatter of each unit |
//!
//! - Stage 0 is a mesh whose shard groups have one rank. Where there are replicas (stage 0, HSDP), the cut gradients
//!   are all-reduced over them once a step, after they have accumulated, however many passes there were; beside the last of
//!   these passes where that is announced, unit by unit.
//! - Whole parameters of stages 1 and 2 are gathered at their first use after the masters changed and stay until those
//!   change again: the all-gather of updated parameters, overlapped with the first forward pass.
//! - A unit is at most two flat segments, trainable and frozen, each cut evenly. Gradients and optimizer state exist for
//!   the trainable one alone. A gather of a mixed unit is two all-gathers.
//! - Masters are f32. Gathers carry `param_dtype`; gradients are summed over ranks in `reduce_dtype`, and over passes in
//!   `grad_accum_dtype`.
//! - hpZ keeps what was gathered, cut over a few neighbouring ranks, until the parameters change: gathers then stay among
//!   those ranks, backward and in later passes of the same step.
//! - Calls that overlap computing run in the plan's order on a thread of their own, over a group of their own.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::precision::Precision;
use crate::unit::Mode;

/// What ZeRO cuts over the ranks of a shard group (Rajbhandari et al. 2020).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub enum Stage {
    /// Nothing: data parallelism.
    Zero0,
    /// Optimizer state, and with it the master parameters.
    Zero1,
    /// Gradients as well.
    Zero2,
    /// Parameters as well.
    #[default]
    Zero3,
}

impl From<Stage> for u8 {
    fn from(stage: Stage) -> u8 {
        stage as u8
    }
}

impl TryFrom<u8> for Stage {
    type Error = Error;

    fn try_from(number: u8) -> Result<Self> {
        let stages = [Stage::Zero0, Stage::Zero1, Stage::Zero2, Stage::Zero3];
        stages.get(usize::from(number)).copied().ok_or(Error::InvalidSetting {
            setting: "stage",
            value: f64::from(number),
            expected: "0, 1, 2 or 3",
        })
    }
}

/// When a gathered unit is freed, in stage 3.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReshardAfterForward {
    /// After the forward stages that use it, and gathered again for backward: two all-gathers a pass, and no more
    /// memory than the units of one stage. Those of the last stage stay, since backward begins with them: one
    /// all-gather. (ZeRO-3; FSDP2's `reshard_after_forward=True`, and its default for the root.)
    #[default]
    Always,
    /// After backward: one all-gather a pass, and every unit whole between the passes.
    Never,
    /// As `Always`, but what was gathered stays, cut over so many neighbouring ranks of the shard group, until the
    /// parameters change; gathers until then are among these ranks alone. (hpZ of ZeRO++; FSDP2's integer.) Costs the
    /// bytes of the unit over that number of ranks. One rank means `Never`. All of the shard group, or more than it has,
    /// means `Always`: what is set for a node of eight also runs on two ranks (as DeepSpeed's `zero_hpz_partition_size`).
    ToGroup(usize),
}

/// Over how many ranks units are cut; the others of the world are replicas (HSDP).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShardSize {
    /// All.
    #[default]
    World,
    /// So many neighbours.
    Ranks(usize),
    /// LightRFT's rule: all for a model that trains. Otherwise by parameters: 1 below 10 billion, 8 below 80 billion,
    /// else all; a world that is smaller is one group.
    Auto,
}

/// Which parameters learn.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trainable {
    /// All.
    #[default]
    All,
    /// All but those whose names begin with one of these: LightRFT's `freeze_prefix`.
    ExceptPrefixes(Vec<String>),
    /// Only those whose names contain one of these, such as the adapters of LoRA.
    OnlyContaining(Vec<String>),
}

impl Trainable {
    /// Whether the parameter called `name` learns.
    pub fn includes(&self, name: &str) -> bool {
        match self {
            Trainable::All => true,
            Trainable::ExceptPrefixes(prefixes) => !prefixes.iter().any(|prefix| name.starts_with(prefix)),
            Trainable::OnlyContaining(parts) => parts.iter().any(|part| name.contains(part)),
        }
    }
}

/// Whether the exchange of a gradient runs beside the backward pass of what comes next.
///
/// Reduce-scatters of stages 2 and 3 belong to every pass. What belongs to the step (all of stages 0 and 1, all-reduces over
/// replicas) runs beside a pass only if it is announced as the last before it:
/// [`backward_last`](crate::ShardedModel::backward_last).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlap {
    /// It is waited for: one gradient in memory at a time.
    #[default]
    Off,
    /// It runs beside (`overlap_comm`): two gradients in memory, and of what goes to replicas a shard more.
    On,
}

/// What gathers in half precision read of each rank's shard. Either way the same bits are gathered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GatherFrom {
    /// The f32 masters, which each gather rounds anew. (FSDP2.)
    #[default]
    Masters,
    /// A copy of the shard in `param_dtype`, kept beside the masters: 2 P/N bytes more, from the first gather on. [`AdamW`](crate::AdamW) writes the copy in the pass that steps the masters; where these are
    /// changed otherwise, as by loading, the next gather does. Pays where units are gathered often between two steps.
    /// (DeepSpeed's parameters.)
    Copy,
}

/// What a stage keeps for backward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activations {
    /// Its input: backward computes the stage again.
    #[default]
    Recompute,
    /// What [`forward_saving`](crate::StagedModel::forward_saving) returns: backward need not compute it again.
    Keep,
}

/// How a model is cut and run. Every rank has the same one; that they do is checked when units are made.
///
/// ```
/// use lightrft_sharding::{Policy, Precision, ReshardAfterForward, Stage};
///
/// let hpz = Policy {
///     reshard_after_forward: ReshardAfterForward::ToGroup(8),
///     param_dtype: Precision::Bf16,
///     ..Policy::default()
/// };
/// hpz.validate(64)?;
/// let contradiction = Policy { stage: Stage::Zero1, ..hpz }.validate(64).unwrap_err();
/// assert!(contradiction.to_string().contains("stage = 1"));
/// assert!(contradiction.to_string().contains("reshard_after_forward = to_group(8)"));
/// # Ok::<_, lightrft_sharding::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Whether the model trains.
    pub mode: Mode,
    /// What is cut.
    pub stage: Stage,
    /// Over how many ranks.
    pub shard_size: ShardSize,
    /// When gathered units are freed, in stage 3.
    pub reshard_after_forward: ReshardAfterForward,
    /// Gathers run so many stages ahead of computing; 0 waits for each. One more unit in memory for each.
    pub prefetch: usize,
    /// Whether gradients are exchanged beside backward.
    pub overlap: Overlap,
    /// Most elements of units that are exchanged in one call: in stages 0 to 2, and in stage 3 between replicas and for
    /// units that are not cut. A larger unit goes alone; several are packed, in a second buffer of their size.
    pub reduce_bucket_elems: usize,
    /// What parameters are gathered and computed in.
    pub param_dtype: Precision,
    /// What gathers read where that is not f32.
    pub gather_from: GatherFrom,
    /// What gradients are sent in. On the host sums over ranks are of f32 and rounded once; NCCL may round each partial sum.
    pub reduce_dtype: Precision,
    /// What gradients add up in over the passes of a step.
    pub grad_accum_dtype: Precision,
    /// Units of fewer elements are not cut.
    pub persistence_threshold: usize,
    /// Which parameters learn.
    pub trainable: Trainable,
    /// What stages keep for backward.
    pub activations: Activations,
    /// Every shard is a multiple of so many elements; see [`Plan::with_alignment`](crate::Plan::with_alignment).
    pub alignment: usize,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            mode: Mode::Train,
            stage: Stage::Zero3,
            shard_size: ShardSize::World,
            reshard_after_forward: ReshardAfterForward::Always,
            prefetch: 1,
            overlap: Overlap::Off,
            // DeepSpeed's default.
            reduce_bucket_elems: 500_000_000,
            param_dtype: Precision::F32,
            gather_from: GatherFrom::Masters,
            reduce_dtype: Precision::F32,
            grad_accum_dtype: Precision::F32,
            persistence_threshold: 0,
            trainable: Trainable::All,
            activations: Activations::Recompute,
            alignment: 1,
        }
    }
}

impl Policy {
    /// Checks the choices against each other and a world of `world` ranks.
    ///
    /// # Errors
    /// [`Error::Contradiction`] names two fields and their values; [`Error::InvalidSetting`] one.
    pub fn validate(&self, world: usize) -> Result<()> {
        let contradiction =
            |first: String, second: String, why| Err(Error::Contradiction { first, second, why });
        let zero = |setting| Err(Error::InvalidSetting { setting, value: 0.0, expected: "at least 1" });
        if self.reduce_bucket_elems == 0 {
            return zero("reduce_bucket_elems");
        }
        if self.alignment == 0 {
            return zero("alignment");
        }
        let stage = format!("stage = {}", u8::from(self.stage));
        if let ReshardAfterForward::ToGroup(ranks) = self.reshard_after_forward {
            if ranks == 0 {
                return zero("reshard_after_forward");
            }
            if self.stage != Stage::Zero3 {
                let group = format!("reshard_after_forward = to_group({ranks})");
                return contradiction(stage, group, "stages 0 to 2 keep parameters whole");
            }
        }
        if self.stage == Stage::Zero0 && self.persistence_threshold > 0 {
            let threshold = format!("persistence_threshold = {}", self.persistence_threshold);
            return contradiction(stage, threshold, "stage 0 keeps every unit whole");
        }
        if self.gather_from == GatherFrom::Copy && self.param_dtype == Precision::F32 {
            let why = "the masters are f32, and are gathered where they lie";
            return contradiction("gather_from = copy".to_owned(), "param_dtype = f32".to_owned(), why);
        }
        if let ShardSize::Ranks(ranks) = self.shard_size {
            if ranks == 0 {
                return zero("shard_size");
            }
            let size = format!("shard_size = {ranks}");
            if self.stage == Stage::Zero0 && ranks != 1 {
                return contradiction(stage, size, "stage 0 cuts nothing");
            }
            if !world.is_multiple_of(ranks) {
                let why = "the second must be a multiple of the first";
                return contradiction(size, format!("world size = {world}"), why);
            }
            self.validate_near(ranks)?;
        } else if self.shard_size == ShardSize::World {
            self.validate_near(world)?;
        }
        Ok(())
    }

    /// Checks the smaller group of `reshard_after_forward` against the shard group.
    pub(crate) fn validate_near(&self, shard_size: usize) -> Result<()> {
        match self.reshard_after_forward {
            ReshardAfterForward::ToGroup(ranks)
                if ranks < shard_size && !shard_size.is_multiple_of(ranks) =>
            {
                Err(Error::Contradiction {
                    first: format!("reshard_after_forward = to_group({ranks})"),
                    second: format!("shard_size = {shard_size}"),
                    why: "the second must be a multiple of the first",
                })
            }
            _ => Ok(()),
        }
    }

    /// Ranks of a shard group in a world of `world` ranks, for a model of `elems` parameters.
    ///
    /// # Errors
    /// As [`validate`](Self::validate).
    pub fn shard_ranks(&self, world: usize, elems: usize) -> Result<usize> {
        const BILLION: usize = 1_000_000_000;
        self.validate(world)?;
        let ranks = match self.shard_size {
            _ if self.stage == Stage::Zero0 => 1,
            ShardSize::World => world,
            ShardSize::Ranks(ranks) => ranks,
            ShardSize::Auto if self.mode == Mode::Train => world,
            ShardSize::Auto if elems < 10 * BILLION => 1,
            ShardSize::Auto if elems < 80 * BILLION => world.min(8),
            ShardSize::Auto => world,
        };
        if !world.is_multiple_of(ranks) {
            return Err(Error::Contradiction {
                first: format!("shard_size = {ranks} (auto)"),
                second: format!("world size = {world}"),
                why: "the second must be a multiple of the first",
            });
        }
        self.validate_near(ranks)?;
        Ok(ranks)
    }

    /// The fields with their values, for the comparison between ranks.
    pub(crate) fn lines(&self) -> Vec<String> {
        let Policy {
            mode,
            stage,
            shard_size,
            reshard_after_forward,
            prefetch,
            overlap,
            reduce_bucket_elems,
            param_dtype,
            gather_from,
            reduce_dtype,
            grad_accum_dtype,
            persistence_threshold,
            trainable,
            activations,
            alignment,
        } = self;
        vec![
            format!("mode = {mode:?}"),
            format!("stage = {}", u8::from(*stage)),
            format!("shard_size = {shard_size:?}"),
            format!("reshard_after_forward = {reshard_after_forward:?}"),
            format!("prefetch = {prefetch}"),
            format!("overlap = {overlap:?}"),
            format!("reduce_bucket_elems = {reduce_bucket_elems}"),
            format!("param_dtype = {param_dtype:?}"),
            format!("gather_from = {gather_from:?}"),
            format!("reduce_dtype = {reduce_dtype:?}"),
            format!("grad_accum_dtype = {grad_accum_dtype:?}"),
            format!("persistence_threshold = {persistence_threshold}"),
            format!("trainable = {trainable:?}"),
            format!("activations = {activations:?}"),
            format!("alignment = {alignment}"),
        ]
    }
}
