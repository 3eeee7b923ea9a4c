//! Estimators of the KL divergence from a reference policy, per token and as a loss.
//!
//! With `d = log p(token) - log p_ref(token)`, from samples of `p` (J. Schulman, "Approximating KL Divergence", 2020):
//! `k1 = d`, `k2 = d^2 / 2`, `k3 = exp(-d) - 1 + d`.

use std::str::FromStr;

use super::{
    error::{Error, Result},
    matrix::{Mask, Matrix, expect_mask, row_mask},
    numeric::exp_capped,
    reduce::{LossAndGrad, Reduction},
};

/// Which estimator of `KL(p || p_ref)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlEstimator {
    /// `d`: unbiased, of either sign. As a loss its gradient has mean zero: use it in the reward.
    K1,
    /// `d^2 / 2`: biased, never negative; its gradient is that of the KL.
    K2,
    /// `exp(-d) - 1 + d`: unbiased, never negative. Continued along its tangent below `d = -20`.
    #[default]
    K3,
}

impl KlEstimator {
    /// The estimate at log-ratio `d`, and its derivative by `d`.
    pub fn at(self, d: f64) -> (f64, f64) {
        match self {
            Self::K1 => (d, 1.0),
            Self::K2 => (0.5 * d * d, d),
            Self::K3 => {
                let (exp, slope) = exp_capped(-d);
                (exp - 1.0 + d, 1.0 - slope)
            }
        }
    }
}

impl FromStr for KlEstimator {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "k1" => Ok(Self::K1),
            "k2" => Ok(Self::K2),
            "k3" => Ok(Self::K3),
            _ => Err(Error::UnknownName { what: "KL estimator", name: name.to_owned(), known: "k1, k2, k3" }),
        }
    }
}

/// The estimate of every token, 0 where masked.
///
/// A masked position is 0 whatever it holds; LightRFT multiplies by the mask, so that an infinite log-probability
/// under it becomes NaN.
///
/// # Errors
/// [`Error::Shape`] when the inputs differ in shape.
pub fn approx_kl(
    log_probs: Matrix<'_>,
    base_log_probs: Matrix<'_>,
    mask: Option<Mask<'_>>,
    estimator: KlEstimator,
) -> Result<Vec<f32>> {
    base_log_probs.expect_like("base_log_probs", &log_probs)?;
    expect_mask(mask, &log_probs)?;
    let mut out = Vec::with_capacity(log_probs.as_slice().len());
    for row in 0..log_probs.rows() {
        let keep = row_mask(mask, row);
        let pairs = log_probs.row(row).iter().zip(base_log_probs.row(row));
        out.extend(pairs.enumerate().map(|(col, (p, base))| {
            if keep.keeps(col) { estimator.at(f64::from(*p) - f64::from(*base)).0 as f32 } else { 0.0 }
        }));
    }
    Ok(out)
}

/// The KL term of the actor's loss and its gradient by `log_probs`. The caller multiplies both by its coefficient.
///
/// A row that is masked throughout adds 0 to the loss and to the gradient (LightRFT: NaN).
///
/// # Errors
/// [`Error::Shape`] when the inputs differ in shape, [`Error::Range`] for a global denominator of 0.
pub fn kl_loss(
    log_probs: Matrix<'_>,
    base_log_probs: Matrix<'_>,
    mask: Option<Mask<'_>>,
    estimator: KlEstimator,
    reduction: Reduction,
) -> Result<LossAndGrad> {
    base_log_probs.expect_like("base_log_probs", &log_probs)?;
    expect_mask(mask, &log_probs)?;
    let weights = reduction.row_weights(log_probs.rows(), log_probs.cols(), mask)?;
    let mut loss = 0.0;
    let mut grad = vec![0.0; log_probs.as_slice().len()];
    for (row, weight) in weights.into_iter().enumerate() {
        let keep = row_mask(mask, row);
        let base = base_log_probs.row(row);
        for (col, p) in log_probs.row(row).iter().enumerate() {
            if keep.keeps(col) {
                let (kl, slope) = estimator.at(f64::from(*p) - f64::from(base[col]));
                loss += weight * kl;
                grad[row * log_probs.cols() + col] = (weight * slope) as f32;
            }
        }
    }
    Ok(LossAndGrad { loss, grad, stats: () })
}
