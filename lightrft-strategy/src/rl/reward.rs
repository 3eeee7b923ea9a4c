//! Rewards before they become advantages: length penalties, filters, the KL penalty and its coefficient.

use super::{
    error::{Error, Result},
    matrix::{Mask, Matrix, expect_len, expect_mask, row_mask},
};

/// DAPO's soft punishment of answers that run into the length limit (arXiv 2503.14476, eq. 13).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Overlong {
    free_tokens: usize,
    buffer_tokens: usize,
    factor: f64,
}

impl Overlong {
    /// Punishes the last `buffer_tokens` of `max_new_tokens`, by up to `factor`.
    ///
    /// # Errors
    /// [`Error::Range`] unless `1 <= buffer_tokens <= max_new_tokens`.
    pub fn new(max_new_tokens: usize, buffer_tokens: usize, factor: f64) -> Result<Self> {
        match max_new_tokens.checked_sub(buffer_tokens) {
            Some(free_tokens) if buffer_tokens > 0 => Ok(Self { free_tokens, buffer_tokens, factor }),
            _ => Err(Error::Range {
                what: "buffer_tokens",
                got: buffer_tokens as f64,
                want: "at least 1 and at most the new tokens allowed",
            }),
        }
    }

    /// What to add to the reward of an answer of `tokens` tokens: 0 up to the buffer, then linearly down to
    /// `-factor` at its end, and on in the same line past it.
    pub fn penalty(&self, tokens: usize) -> f32 {
        let over = tokens.saturating_sub(self.free_tokens) as f64;
        (-(over / self.buffer_tokens as f64 * self.factor)).min(0.0) as f32
    }
}

/// Which groups teach nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum GroupFilter {
    /// All rewards of the group are equal, whatever they are: its advantages are 0.
    #[default]
    Equal,
    /// All are 0, or all are 1. LightRFT's `dynamic_sampling`, which keeps a group of equal partial rewards.
    AllWrongOrAllRight,
}

/// For each group, whether `filter` drops it. The rewards are the raw ones, without penalties.
///
/// A dropped group trains nothing when the caller clears its rows of the action mask: the losses give 0 for such
/// rows, where LightRFT's are NaN.
///
/// # Errors
/// [`Error::Ungrouped`] when the rewards do not divide into groups.
pub fn uninformative_groups(rewards: &[f32], group_size: usize, filter: GroupFilter) -> Result<Vec<bool>> {
    if group_size == 0 || !rewards.len().is_multiple_of(group_size) {
        return Err(Error::Ungrouped { rewards: rewards.len(), group_size });
    }
    Ok(rewards
        .chunks_exact(group_size)
        .map(|group| match filter {
            GroupFilter::Equal => is_constant(group),
            GroupFilter::AllWrongOrAllRight => is_constant(group) && (group[0] == 0.0 || group[0] == 1.0),
        })
        .collect())
}

fn is_constant(group: &[f32]) -> bool {
    group.iter().all(|reward| *reward == group[0])
}

/// A weight for each group (row) of rewards that keeps the gradient's scale when uninformative groups drop out:
/// `min(groups / groups with differing rewards, clip)`, and `lambda` for a group of equal rewards.
///
/// All weights are 1 when every group has equal rewards. CPGD (arXiv 2505.12504) calls it the clip-filter-like weight.
pub fn clip_filter_weights(rewards: Matrix<'_>, clip: f64, lambda: f64) -> Vec<f32> {
    let constant: Vec<bool> = rewards.iter_rows().map(is_constant).collect();
    let informative = constant.iter().filter(|constant| !**constant).count();
    if informative == 0 {
        return vec![1.0; rewards.rows()];
    }
    let weight = (rewards.rows() as f64 / informative as f64).min(clip);
    constant.into_iter().map(|constant| if constant { lambda } else { weight } as f32).collect()
}

/// Token rewards: `-kl_coef * kl` at every token, plus the sample's reward at its last unmasked token.
///
/// `rewards` has one element per row of `kl`; `clip` holds it within `(min, max)` first. A coefficient below 0 counts
/// as 0. In a row that is masked throughout the reward falls on the last column, as in LightRFT. For an unpadded
/// sequence pass a single row and no mask.
///
/// # Errors
/// [`Error::Count`] unless there is one reward per row, [`Error::Shape`] when the mask has another shape,
/// [`Error::Range`] for rows without columns or a clip whose minimum is above its maximum.
pub fn token_rewards(
    rewards: &[f32],
    kl: Matrix<'_>,
    mask: Option<Mask<'_>>,
    kl_coef: f64,
    clip: Option<(f32, f32)>,
) -> Result<Vec<f32>> {
    expect_len("rewards", rewards.len(), kl.rows())?;
    expect_mask(mask, &kl)?;
    let cols = kl.cols();
    if cols == 0 && kl.rows() > 0 {
        return Err(Error::Range { what: "kl.cols", got: 0.0, want: "at least 1" });
    }
    let (min, max) = clip.unwrap_or((f32::NEG_INFINITY, f32::INFINITY));
    if min.is_nan() || max.is_nan() || min > max {
        return Err(Error::Range { what: "clip.min", got: f64::from(min), want: "at most clip.max" });
    }
    let kl_coef = kl_coef.max(0.0);
    // A coefficient of 0 must switch the penalty off even where the estimate is infinite.
    let penalty = |kl: &f32| if kl_coef == 0.0 { 0.0 } else { -kl_coef * f64::from(*kl) };
    let mut out: Vec<f32> = kl.as_slice().iter().map(|kl| penalty(kl) as f32).collect();
    for (row, reward) in rewards.iter().enumerate() {
        let keep = row_mask(mask, row);
        let last = (0..cols).rev().find(|col| keep.keeps(*col)).unwrap_or(cols - 1);
        let at = row * cols + last;
        out[at] = (penalty(&kl.as_slice()[at]) + f64::from(reward.clamp(min, max))) as f32;
    }
    Ok(out)
}

/// The KL coefficient over time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum KlController {
    /// The same for ever.
    Fixed(f64),
    /// Steered towards a target.
    Adaptive(AdaptiveKl),
}

impl KlController {
    /// The coefficient now.
    pub fn value(&self) -> f64 {
        match self {
            Self::Fixed(value) => *value,
            Self::Adaptive(controller) => controller.value(),
        }
    }

    /// Tells the controller the mean KL of the last `n_steps` samples.
    pub fn update(&mut self, current_kl: f64, n_steps: usize) {
        if let Self::Adaptive(controller) = self {
            controller.update(current_kl, n_steps);
        }
    }
}

/// The adaptive controller of arXiv 1909.08593, 2.2: `value *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdaptiveKl {
    value: f64,
    target: f64,
    horizon: f64,
}

impl AdaptiveKl {
    /// Starts at `init_kl_coef` and steers the KL to `target` nats over about `horizon` samples.
    ///
    /// # Errors
    /// [`Error::Range`] unless `target` and `horizon` are positive and `init_kl_coef` is not negative.
    pub fn new(init_kl_coef: f64, target: f64, horizon: f64) -> Result<Self> {
        if init_kl_coef.is_nan() || init_kl_coef < 0.0 {
            return Err(Error::Range { what: "init_kl_coef", got: init_kl_coef, want: "at least 0" });
        }
        for (what, got) in [("target", target), ("horizon", horizon)] {
            if got.is_nan() || got <= 0.0 {
                return Err(Error::Range { what, got, want: "more than 0" });
            }
        }
        Ok(Self { value: init_kl_coef, target, horizon })
    }

    /// The coefficient now.
    pub fn value(&self) -> f64 {
        self.value
    }

    /// Takes in the mean KL of the last `n_steps` samples. A KL that is NaN changes nothing.
    pub fn update(&mut self, current_kl: f64, n_steps: usize) {
        if current_kl.is_nan() {
            return;
        }
        let error = (current_kl / self.target - 1.0).clamp(-0.2, 0.2);
        self.value *= 1.0 + error * n_steps as f64 / self.horizon;
    }
}
