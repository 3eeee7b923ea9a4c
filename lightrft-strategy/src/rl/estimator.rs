//! The advantage estimators by name, and the order in which their steps run.

use std::str::FromStr;

use super::{
    advantage::{
        Advantages, CpgdWeight, cpgd_advantages, cumulative_returns, gae, group_baseline, group_norm, rloo,
    },
    error::{Error, Result},
    matrix::{Mask, Matrix, expect_mask},
    moments::{MaskedSums, Scale, clip, standardize},
};

/// How rewards become advantages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum AdvantageEstimator {
    /// A critic's values and `lambda`-returns.
    Gae,
    /// Discounted returns, no baseline.
    Reinforce,
    /// Reward less the group's mean, undiscounted.
    ReinforceBaseline,
    /// Reward less the mean of the group's other samples.
    Rloo,
    /// GRPO: reward less the group's mean, over the group's deviation. Never whitened again.
    #[default]
    #[serde(alias = "grpo")]
    GroupNorm,
    /// Summed rewards, centred and scaled over the batch.
    Cpgd,
}

impl AdvantageEstimator {
    /// The name LightRFT's configuration uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gae => "gae",
            Self::Reinforce => "reinforce",
            Self::ReinforceBaseline => "reinforce_baseline",
            Self::Rloo => "rloo",
            Self::GroupNorm => "group_norm",
            Self::Cpgd => "cpgd",
        }
    }

    /// Whether a critic must supply values.
    pub fn needs_values(self) -> bool {
        self == Self::Gae
    }

    /// Whether LightRFT standardizes this estimator's advantages over the whole batch before training, with
    /// [`Scale::ACROSS_BATCH`].
    pub fn is_normalized_across_batch(self) -> bool {
        matches!(self, Self::Gae | Self::Reinforce | Self::ReinforceBaseline)
    }
}

impl FromStr for AdvantageEstimator {
    type Err = Error;

    /// `grpo` is `group_norm`, and stays it: LightRFT's trainers compare with `group_norm` alone and so normalise the
    /// advantages of `grpo` once more.
    fn from_str(name: &str) -> Result<Self> {
        Ok(match name {
            "gae" => Self::Gae,
            "reinforce" => Self::Reinforce,
            "reinforce_baseline" => Self::ReinforceBaseline,
            "rloo" => Self::Rloo,
            "group_norm" | "grpo" => Self::GroupNorm,
            "cpgd" => Self::Cpgd,
            _ => {
                return Err(Error::UnknownName {
                    what: "advantage estimator",
                    name: name.to_owned(),
                    known: "gae, reinforce, reinforce_baseline, rloo, group_norm (or grpo), cpgd",
                });
            }
        })
    }
}

/// The first half of the estimators that compare samples: one reward per sample becomes one score per sample.
///
/// `rewards` holds the `group_size` samples of the first prompt, then those of the second, and so on. The estimators
/// that do not look at the group return the rewards as they are.
///
/// # Errors
/// [`Error::GroupTooSmall`] for groups of one where the estimator compares with others, [`Error::Ungrouped`] when the
/// rewards do not divide into groups.
pub fn shape_rewards(estimator: AdvantageEstimator, rewards: &[f32], group_size: usize) -> Result<Vec<f32>> {
    match estimator {
        AdvantageEstimator::GroupNorm => group_norm(rewards, group_size),
        AdvantageEstimator::Rloo => rloo(rewards, group_size),
        AdvantageEstimator::ReinforceBaseline => group_baseline(rewards, group_size),
        AdvantageEstimator::Gae | AdvantageEstimator::Reinforce | AdvantageEstimator::Cpgd => {
            Ok(rewards.to_vec())
        }
    }
}

/// Whether the advantages of one call are standardized among themselves (LightRFT's `advantages_norm`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Whitening {
    /// Leave them.
    #[default]
    Off,
    /// Subtract the mean over unmasked tokens and divide by their unbiased deviation. Group-normed and CPGD
    /// advantages are left alone: they are normalised already.
    On,
}

/// Options of [`estimate_advantages`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdvantageConfig {
    /// The estimator.
    pub estimator: AdvantageEstimator,
    /// Discount per token. [`AdvantageEstimator::ReinforceBaseline`] is undiscounted whatever it says.
    pub gamma: f64,
    /// GAE's mixing parameter.
    pub lambda: f64,
    /// Whether to standardize.
    pub whitening: Whitening,
    /// Largest magnitude of an advantage, applied after whitening; `None` for no limit.
    pub clip: Option<f32>,
    /// How CPGD weighs its scores.
    pub cpgd_weight: CpgdWeight,
}

impl Default for AdvantageConfig {
    fn default() -> Self {
        Self {
            estimator: AdvantageEstimator::default(),
            gamma: 1.0,
            lambda: 1.0,
            whitening: Whitening::Off,
            clip: None,
            cpgd_weight: CpgdWeight::default(),
        }
    }
}

/// What [`estimate_advantages`] is computed from.
#[derive(Clone, Copy, Debug)]
pub struct AdvantageInput<'a> {
    /// Token rewards, as [`token_rewards`](super::token_rewards) makes them from shaped rewards.
    pub rewards: Matrix<'a>,
    /// The critic's values, which [`AdvantageEstimator::Gae`] needs.
    pub values: Option<Matrix<'a>>,
    /// Which tokens count; `None` for all.
    pub mask: Option<Mask<'a>>,
}

/// The second half of every estimator: token rewards become token advantages, then whitened, then clipped.
///
/// Returns the advantages and the share of unmasked tokens that the clip changed, 0 without a clip. LightRFT counts
/// padding in that share, and for GAE counts after clipping, so that it is always 0.
///
/// CPGD's score is the row's summed token reward. LightRFT sums its one-dimensional reward over samples instead, so
/// that every score is the same and every advantage 0.
///
/// # Errors
/// [`Error::Missing`] for GAE without values, [`Error::Shape`] when inputs differ in shape, [`Error::Range`] for a
/// negative clip.
pub fn estimate_advantages(
    input: &AdvantageInput<'_>,
    config: &AdvantageConfig,
) -> Result<(Advantages, f64)> {
    let AdvantageInput { rewards, values, mask } = *input;
    expect_mask(mask, &rewards)?;
    if let Some(limit) = config.clip.filter(|limit| limit.is_nan() || *limit < 0.0) {
        return Err(Error::Range { what: "clip", got: f64::from(limit), want: "at least 0" });
    }
    let mut whitening_eps = Some(1e-8);
    let mut out = match config.estimator {
        AdvantageEstimator::Gae => {
            let values = values.ok_or(Error::Missing { estimator: "gae", what: "values" })?;
            whitening_eps = Some(1e-9);
            gae(rewards, values, mask, config.gamma, config.lambda)?
        }
        AdvantageEstimator::Cpgd => {
            whitening_eps = None;
            let advantages = cpgd_advantages(rewards, mask, config.cpgd_weight)?;
            Advantages { returns: advantages.clone(), advantages }
        }
        estimator => {
            let gamma = match estimator {
                AdvantageEstimator::ReinforceBaseline => 1.0,
                _ => config.gamma,
            };
            if estimator == AdvantageEstimator::GroupNorm {
                whitening_eps = None;
            }
            let returns = cumulative_returns(rewards, mask, gamma)?;
            Advantages { advantages: returns.clone(), returns }
        }
    };
    if let (Whitening::On, Some(eps)) = (config.whitening, whitening_eps) {
        let sums = MaskedSums::of(Matrix::new(&out.advantages, rewards.rows(), rewards.cols())?, mask)?;
        standardize(&mut out.advantages, mask.map(|mask| mask.as_slice()), &sums, Scale::Unbiased { eps })?;
    }
    let mut clipped = 0.0;
    if let Some(limit) = config.clip {
        clipped = clipped_share(&out.advantages, mask, limit);
        clip(&mut out.advantages, limit);
    }
    Ok((out, clipped))
}

fn clipped_share(advantages: &[f32], mask: Option<Mask<'_>>, limit: f32) -> f64 {
    let (mut beyond, mut tokens) = (0_usize, 0_usize);
    for (at, advantage) in advantages.iter().enumerate() {
        if mask.is_none_or(|mask| mask.as_slice()[at]) {
            tokens += 1;
            beyond += usize::from(advantage.abs() > limit);
        }
    }
    beyond as f64 / tokens.max(1) as f64
}
