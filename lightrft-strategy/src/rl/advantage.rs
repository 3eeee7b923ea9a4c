//! Advantages: from the rewards of a group of samples, or from token rewards through time.

use super::{
    error::{Error, Result},
    matrix::{Mask, Matrix, expect_mask, row_mask},
};

/// Added to a group's standard deviation, as LightRFT does.
const GROUP_EPS: f64 = 1e-9;

/// Per-token advantages and the returns that a critic regresses to, both `rows x cols`.
#[derive(Clone, Debug, PartialEq)]
pub struct Advantages {
    /// How much better than expected each token was.
    pub advantages: Vec<f32>,
    /// Discounted reward from each token on.
    pub returns: Vec<f32>,
}

/// GRPO's advantage (arXiv 2402.03300, 4.1.2): `(r - mean) / (std + 1e-9)` within each group, std with Bessel's
/// correction.
///
/// `rewards` holds the samples of the first prompt, then those of the second, and so on. Means are taken in `f64`, so
/// equal rewards give exactly 0; in `f32` the rounding of the mean is larger than the epsilon, and eight equal rewards
/// of 0.1 come out as -0.83 each.
///
/// # Errors
/// [`Error::GroupTooSmall`] for groups of one (LightRFT: NaN), [`Error::Ungrouped`] when the rewards do not divide.
pub fn group_norm(rewards: &[f32], group_size: usize) -> Result<Vec<f32>> {
    by_group("group_norm", rewards, group_size, 2, |group, out| {
        let mean = mean(group);
        let squares: f64 = group.iter().map(|r| (f64::from(*r) - mean).powi(2)).sum();
        let std = (squares / (group.len() - 1) as f64).sqrt();
        out.extend(group.iter().map(|r| ((f64::from(*r) - mean) / (std + GROUP_EPS)) as f32));
    })
}

/// REINFORCE leave-one-out (arXiv 2402.14740): each reward less the mean of the others in its group. Equal rewards
/// give exactly 0.
///
/// # Errors
/// As [`group_norm`].
pub fn rloo(rewards: &[f32], group_size: usize) -> Result<Vec<f32>> {
    by_group("rloo", rewards, group_size, 2, |group, out| {
        let sum: f64 = group.iter().map(|r| f64::from(*r)).sum();
        let others = (group.len() - 1) as f64;
        out.extend(group.iter().map(|r| (f64::from(*r) - (sum - f64::from(*r)) / others) as f32));
    })
}

/// Each reward less the mean of its group; 0 in groups of one. Equal rewards give exactly 0.
///
/// # Errors
/// [`Error::Ungrouped`] when the rewards do not divide into groups.
pub fn group_baseline(rewards: &[f32], group_size: usize) -> Result<Vec<f32>> {
    by_group("reinforce_baseline", rewards, group_size, 1, |group, out| {
        let mean = mean(group);
        out.extend(group.iter().map(|r| (f64::from(*r) - mean) as f32));
    })
}

fn by_group(
    estimator: &'static str,
    rewards: &[f32],
    group_size: usize,
    at_least: usize,
    mut shape: impl FnMut(&[f32], &mut Vec<f32>),
) -> Result<Vec<f32>> {
    if group_size < at_least {
        return Err(Error::GroupTooSmall { estimator, at_least, group_size });
    }
    if !rewards.len().is_multiple_of(group_size) {
        return Err(Error::Ungrouped { rewards: rewards.len(), group_size });
    }
    let mut out = Vec::with_capacity(rewards.len());
    for group in rewards.chunks_exact(group_size) {
        shape(group, &mut out);
    }
    Ok(out)
}

/// The mean in `f64`: exact for equal `f32` values, whose sum fits in 53 bits.
fn mean(values: &[f32]) -> f64 {
    values.iter().map(|x| f64::from(*x)).sum::<f64>() / values.len() as f64
}

/// `G_t = m_t r_t + gamma G_{t+1}`, from the last token backwards.
///
/// A masked token adds no reward but still discounts, as in LightRFT.
///
/// # Errors
/// [`Error::Shape`] when the mask has another shape.
pub fn cumulative_returns(rewards: Matrix<'_>, mask: Option<Mask<'_>>, gamma: f64) -> Result<Vec<f32>> {
    expect_mask(mask, &rewards)?;
    let cols = rewards.cols();
    let mut returns = vec![0.0; rewards.as_slice().len()];
    for (row, rewards) in rewards.iter_rows().enumerate() {
        let keep = row_mask(mask, row);
        let mut ahead = 0.0;
        for col in (0..cols).rev() {
            let reward = if keep.keeps(col) { f64::from(rewards[col]) } else { 0.0 };
            ahead = reward + gamma * ahead;
            returns[row * cols + col] = ahead as f32;
        }
    }
    Ok(returns)
}

/// Generalised advantage estimation (arXiv 1506.02438, eq. 16), with a value of 0 after the last token.
///
/// Rewards and values count as 0 where masked, as in LightRFT. Returns are advantages plus values.
///
/// # Errors
/// [`Error::Shape`] when the inputs differ in shape.
pub fn gae(
    rewards: Matrix<'_>,
    values: Matrix<'_>,
    mask: Option<Mask<'_>>,
    gamma: f64,
    lambda: f64,
) -> Result<Advantages> {
    values.expect_like("values", &rewards)?;
    expect_mask(mask, &rewards)?;
    let (rows, cols) = (rewards.rows(), rewards.cols());
    let mut out = Advantages { advantages: vec![0.0; rows * cols], returns: vec![0.0; rows * cols] };
    for row in 0..rows {
        let keep = row_mask(mask, row);
        let (reward_row, value_row) = (rewards.row(row), values.row(row));
        let (mut next_value, mut ahead) = (0.0, 0.0);
        for col in (0..cols).rev() {
            let (reward, value) = if keep.keeps(col) {
                (f64::from(reward_row[col]), f64::from(value_row[col]))
            } else {
                (0.0, 0.0)
            };
            ahead = reward + gamma * next_value - value + gamma * lambda * ahead;
            next_value = value;
            out.advantages[row * cols + col] = ahead as f32;
            out.returns[row * cols + col] = (ahead + value) as f32;
        }
    }
    Ok(out)
}

/// How [`cpgd_advantages`] weighs the centred scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CpgdWeight {
    /// Divide by the biased standard deviation plus `1e-6`.
    #[default]
    Std,
    /// Multiply by `min(rows, 3)`: LightRFT's `clip_filter_like_weight` over a single group.
    ClipFilter,
    /// Leave them centred.
    Centered,
}

/// CPGD's advantages: each row's summed reward, centred over the rows and weighted, at every unmasked token.
///
/// The sum runs over the whole row, masked tokens included, as in LightRFT; [`token_rewards`](super::token_rewards)
/// leaves them at 0. Equal scores give exactly 0.
///
/// # Errors
/// [`Error::Shape`] when the mask has another shape.
pub fn cpgd_advantages(rewards: Matrix<'_>, mask: Option<Mask<'_>>, weight: CpgdWeight) -> Result<Vec<f32>> {
    expect_mask(mask, &rewards)?;
    let scores: Vec<f64> = rewards.iter_rows().map(|row| row.iter().map(|r| f64::from(*r)).sum()).collect();
    let rows = scores.len();
    // Not the plain mean: sums of rows need not fit in 53 bits, and equal scores must still cancel.
    let first = scores.first().copied().unwrap_or(0.0);
    let mean = first + scores.iter().map(|score| score - first).sum::<f64>() / rows.max(1) as f64;
    let variance = scores.iter().map(|score| (score - mean).powi(2)).sum::<f64>() / rows.max(1) as f64;
    let factor = match weight {
        CpgdWeight::Std => 1.0 / (variance.sqrt() + 1e-6),
        CpgdWeight::ClipFilter => rows.min(3) as f64,
        CpgdWeight::Centered => 1.0,
    };
    let mut out = Vec::with_capacity(rewards.as_slice().len());
    for (row, score) in scores.into_iter().enumerate() {
        let keep = row_mask(mask, row);
        let advantage = ((score - mean) * factor) as f32;
        out.extend((0..rewards.cols()).map(|col| if keep.keeps(col) { advantage } else { 0.0 }));
    }
    Ok(out)
}
