//! Means and variances: of masked tokens shared between ranks, and of a stream of rewards.

use super::{
    error::Result,
    matrix::{Mask, Matrix, expect_len, expect_mask},
};

/// Count, sum and sum of squares of unmasked values.
///
/// Sums of micro-batches add up with [`MaskedSums::merge`]; those of ranks by an all-reduce (sum) over
/// [`MaskedSums::to_array`]. Every rank then standardizes with the same mean and variance.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MaskedSums {
    /// Number of unmasked values.
    pub count: f64,
    /// Their sum.
    pub sum: f64,
    /// The sum of their squares.
    pub sum_sq: f64,
}

impl MaskedSums {
    /// The sums over the unmasked values of `values`.
    ///
    /// LightRFT's replay buffer adds masked values to the sum but not to the count; these stay out of both.
    ///
    /// # Errors
    /// [`Error::Shape`](super::Error::Shape) when the mask has another shape.
    pub fn of(values: Matrix<'_>, mask: Option<Mask<'_>>) -> Result<Self> {
        expect_mask(mask, &values)?;
        let mut sums = Self::default();
        for (at, value) in values.as_slice().iter().enumerate() {
            if mask.is_none_or(|mask| mask.as_slice()[at]) {
                let value = f64::from(*value);
                sums.count += 1.0;
                sums.sum += value;
                sums.sum_sq += value * value;
            }
        }
        Ok(sums)
    }

    /// Adds the values that `other` counted.
    pub fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.sum += other.sum;
        self.sum_sq += other.sum_sq;
    }

    /// Count, sum, sum of squares: what an all-reduce adds.
    pub fn to_array(self) -> [f64; 3] {
        [self.count, self.sum, self.sum_sq]
    }

    /// The sums that [`MaskedSums::to_array`] gave, after an all-reduce.
    pub fn from_array([count, sum, sum_sq]: [f64; 3]) -> Self {
        Self { count, sum, sum_sq }
    }

    /// The mean; 0 of nothing.
    pub fn mean(&self) -> f64 {
        if self.count > 0.0 { self.sum / self.count } else { 0.0 }
    }

    /// The mean squared deviation; 0 of nothing.
    pub fn biased_variance(&self) -> f64 {
        if self.count > 0.0 { (self.sum_sq / self.count - self.mean().powi(2)).max(0.0) } else { 0.0 }
    }

    /// The variance with Bessel's correction; 0 of fewer than two values.
    pub fn unbiased_variance(&self) -> f64 {
        if self.count > 1.0 { self.biased_variance() * self.count / (self.count - 1.0) } else { 0.0 }
    }
}

/// What a centred value is divided by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale {
    /// Nothing: only the mean is taken away.
    None,
    /// `sqrt(unbiased variance) + eps`.
    Unbiased {
        /// Added to the deviation.
        eps: f64,
    },
    /// `sqrt(max(biased variance, min_variance))`.
    Biased {
        /// Lower bound of the variance.
        min_variance: f64,
    },
}

impl Scale {
    /// What LightRFT divides by across a batch and in its replay buffer.
    pub const ACROSS_BATCH: Self = Self::Biased { min_variance: 1e-8 };

    fn factor(self, sums: &MaskedSums) -> f64 {
        match self {
            Self::None => 1.0,
            Self::Unbiased { eps } => 1.0 / (sums.unbiased_variance().sqrt() + eps),
            Self::Biased { min_variance } => 1.0 / sums.biased_variance().max(min_variance).sqrt(),
        }
    }
}

/// Shifts and scales the unmasked values to the mean and variance in `sums`; masked values stay as they are.
///
/// Two differences from LightRFT: it also shifts masked values, so that padding gets an advantage; and for a single
/// unmasked value its unbiased deviation is NaN, where this gives 0, the value less its own mean.
///
/// # Errors
/// [`Error::Count`](super::Error::Count) when the mask has another length.
pub fn standardize(values: &mut [f32], mask: Option<&[bool]>, sums: &MaskedSums, scale: Scale) -> Result<()> {
    if let Some(mask) = mask {
        expect_len("mask", mask.len(), values.len())?;
    }
    let (mean, factor) = (sums.mean(), scale.factor(sums));
    for (at, value) in values.iter_mut().enumerate() {
        if mask.is_none_or(|mask| mask[at]) {
            *value = ((f64::from(*value) - mean) * factor) as f32;
        }
    }
    Ok(())
}

/// The share of values strictly outside `min..=max`; 0 of nothing.
pub fn clip_fraction(values: &[f32], min: f32, max: f32) -> f64 {
    let outside = values.iter().filter(|value| **value < min || **value > max).count();
    outside as f64 / values.len().max(1) as f64
}

/// Holds each value within `-limit..=limit`; a NaN stays.
pub fn clip(values: &mut [f32], limit: f32) {
    for value in values {
        // Not `clamp`, which panics on a limit that is negative or NaN.
        *value = if *value > limit {
            limit
        } else if *value < -limit {
            -limit
        } else {
            *value
        };
    }
}

/// Mean and variance of a stream of batches (T. Chan et al., "Updating Formulae", 1979), for reward scaling.
///
/// ```
/// use lightrft_strategy::rl::RunningMoments;
///
/// let mut moments = RunningMoments::default();
/// moments.update(&[1.0, 3.0]);
/// moments.update(&[2.0]);
/// assert_eq!(moments.mean(), 2.0);
/// assert_eq!(moments.std(), Some(1.0));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RunningMoments {
    count: u64,
    mean: f64,
    /// Sum of squared deviations from the mean.
    deviations: f64,
}

impl RunningMoments {
    /// Takes in a batch.
    pub fn update(&mut self, batch: &[f32]) {
        if batch.is_empty() {
            return;
        }
        let added = batch.len() as f64;
        let mean = batch.iter().map(|x| f64::from(*x)).sum::<f64>() / added;
        let deviations: f64 = batch.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum();
        let (before, delta) = (self.count as f64, mean - self.mean);
        self.count += batch.len() as u64;
        let total = self.count as f64;
        self.mean += delta * added / total;
        self.deviations += deviations + delta * delta * before * added / total;
    }

    /// Values seen.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Their mean; 0 of nothing.
    pub fn mean(&self) -> f64 {
        self.mean
    }

    /// Their mean squared deviation; 0 of nothing.
    pub fn variance(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.deviations / self.count as f64 }
    }

    /// The deviation with Bessel's correction; `None` for fewer than two values.
    pub fn std(&self) -> Option<f64> {
        (self.count > 1).then(|| (self.deviations / (self.count - 1) as f64).sqrt())
    }

    /// Divides `rewards` by the running deviation, after taking away the running mean if `center` says so.
    ///
    /// While the deviation is unknown or 0 the rewards are not divided. LightRFT's is infinite after a first batch of
    /// one reward, which turns the reward into 0, and `1e-12` after equal ones.
    pub fn normalize(&self, rewards: &mut [f32], center: Center) {
        let std = self.std().filter(|std| *std > 0.0).unwrap_or(1.0);
        let mean = match center {
            Center::Keep => 0.0,
            Center::Subtract => self.mean,
        };
        for reward in rewards {
            *reward = ((f64::from(*reward) - mean) / std) as f32;
        }
    }
}

/// Whether [`RunningMoments::normalize`] moves the rewards' mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Center {
    /// Only scale (`reward_running_norm`).
    #[default]
    Keep,
    /// Take the running mean away first (`reward_running_norm_minus_mean`).
    Subtract,
}
