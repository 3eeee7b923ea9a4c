//! The losses of the actor (PPO, CPGD) and of the critic, each with its gradient.

use super::{
    error::{Error, Result},
    matrix::{Mask, Matrix, expect_mask, row_mask},
    numeric::exp_capped,
    reduce::{LossAndGrad, Reduction},
};

/// How far the probability ratio may move before a token stops pulling: `1 - low ..= 1 + high`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClipRange {
    /// Allowed decrease of the ratio, in `0..1`.
    pub low: f64,
    /// Allowed increase of the ratio, at least 0.
    pub high: f64,
}

impl ClipRange {
    /// `1 - eps ..= 1 + eps`, PPO's.
    pub fn symmetric(eps: f64) -> Self {
        Self { low: eps, high: eps }
    }

    fn check(self) -> Result<()> {
        let refuse = |what, got, want| Err(Error::Range { what, got, want });
        if !(0.0..1.0).contains(&self.low) {
            return refuse("clip.low", self.low, "0 <= low < 1");
        }
        if !(self.high >= 0.0 && self.high.is_finite()) {
            return refuse("clip.high", self.high, "0 <= high, finite");
        }
        Ok(())
    }
}

impl Default for ClipRange {
    /// LightRFT's 0.2 on both sides.
    fn default() -> Self {
        Self::symmetric(0.2)
    }
}

/// Which surrogate the policy descends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PolicyKind {
    /// `-min(r A, clamp(r, 1 - low, 1 + high) A)` with `r = p / p_old` (PPO, arXiv 1707.06347, eq. 7).
    #[default]
    Ppo,
    /// `-A` times the log-probability, held at the clip boundary once past it, without a ratio (CPGD, arXiv
    /// 2505.12504).
    Cpgd,
}

/// Options of [`policy_loss`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PolicyLoss {
    /// The surrogate.
    pub kind: PolicyKind,
    /// Where it is clipped.
    pub clip: ClipRange,
    /// How tokens become one number.
    pub reduction: Reduction,
}

/// What [`policy_loss`] is computed from: natural logarithms, one row per sequence, one column per generated token.
#[derive(Clone, Copy, Debug)]
pub struct PolicyLossInput<'a> {
    /// Log-probabilities under the policy that trains.
    pub log_probs: Matrix<'a>,
    /// Log-probabilities under the policy that generated.
    pub old_log_probs: Matrix<'a>,
    /// Advantages: of the same shape, or with one column that serves every token of its row.
    pub advantages: Matrix<'a>,
    /// Which tokens count; `None` for all.
    pub mask: Option<Mask<'a>>,
}

/// What [`policy_loss`] saw, as means over this call's unmasked tokens (0 when there are none).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PolicyStats {
    /// Share of tokens that the clip cut off from the gradient.
    pub clip_fraction: f64,
    /// `KL(p_old || p)` by the k3 estimator.
    pub approx_kl: f64,
    /// Mean ratio `p / p_old`.
    pub ratio: f64,
    /// Unmasked tokens: the weight of these means when micro-batches are joined.
    pub tokens: usize,
}

/// The policy loss and its gradient by `log_probs`.
///
/// It differs from LightRFT in two cases, in which LightRFT's loss or gradient is NaN:
/// - a row that is masked throughout adds 0 to the loss and to the gradient;
/// - above a log-ratio of 20 the ratio continues along its tangent, so that it cannot overflow. There a clipped token
///   has gradient 0 and an unclipped one a gradient that still points the right way.
///
/// # Errors
/// [`Error::Shape`] when inputs differ in shape, [`Error::Range`] for a clip outside its range or a global
/// denominator of 0.
pub fn policy_loss(input: &PolicyLossInput<'_>, options: &PolicyLoss) -> Result<LossAndGrad<PolicyStats>> {
    let PolicyLossInput { log_probs, old_log_probs, advantages, mask } = *input;
    let (rows, cols) = (log_probs.rows(), log_probs.cols());
    old_log_probs.expect_like("old_log_probs", &log_probs)?;
    if advantages.cols() != 1 {
        advantages.expect_like("advantages", &log_probs)?;
    }
    advantages.expect_shape("advantages", rows, advantages.cols())?;
    expect_mask(mask, &log_probs)?;
    options.clip.check()?;
    let weights = options.reduction.row_weights(rows, cols, mask)?;

    let mut loss = 0.0;
    let mut grad = vec![0.0; rows * cols];
    let (mut clipped, mut kl, mut ratio, mut tokens) = (0_usize, 0.0, 0.0, 0_usize);
    for (row, weight) in weights.into_iter().enumerate() {
        let keep = row_mask(mask, row);
        let (old_row, advantage_row) = (old_log_probs.row(row), advantages.row(row));
        for (col, new) in log_probs.row(row).iter().enumerate() {
            if !keep.keeps(col) {
                continue;
            }
            let advantage = f64::from(advantage_row[if advantages.cols() == 1 { 0 } else { col }]);
            let token = surrogate(options, f64::from(*new), f64::from(old_row[col]), advantage);
            loss += weight * token.loss;
            grad[row * cols + col] = (weight * token.slope) as f32;
            clipped += usize::from(token.clipped);
            kl += token.ratio - 1.0 - token.log_ratio;
            ratio += token.ratio;
            tokens += 1;
        }
    }
    let per_token = 1.0 / tokens.max(1) as f64;
    let stats = PolicyStats {
        clip_fraction: clipped as f64 * per_token,
        approx_kl: kl * per_token,
        ratio: ratio * per_token,
        tokens,
    };
    Ok(LossAndGrad { loss, grad, stats })
}

/// One token of the policy loss.
struct Surrogate {
    loss: f64,
    /// `d loss / d log_prob`.
    slope: f64,
    clipped: bool,
    log_ratio: f64,
    ratio: f64,
}

fn surrogate(options: &PolicyLoss, new: f64, old: f64, advantage: f64) -> Surrogate {
    let ClipRange { low, high } = options.clip;
    let log_ratio = new - old;
    let (ratio, ratio_slope) = exp_capped(log_ratio);
    let (loss, slope, clipped) = match options.kind {
        PolicyKind::Ppo => {
            let free = ratio * advantage;
            let held = ratio.clamp(1.0 - low, 1.0 + high) * advantage;
            if held < free { (-held, 0.0, true) } else { (-free, -advantage * ratio_slope, false) }
        }
        PolicyKind::Cpgd => {
            let (bound, past) = if advantage > 0.0 {
                let bound = old + high.ln_1p();
                (bound, new > bound)
            } else {
                let bound = old + (-low).ln_1p();
                (bound, new < bound)
            };
            if past { (-bound * advantage, 0.0, true) } else { (-new * advantage, -advantage, false) }
        }
    };
    Surrogate { loss, slope, clipped, log_ratio, ratio }
}

/// Options of [`value_loss`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ValueLoss {
    /// How far a value may move from the old one before it stops counting, in reward units; `None` for no clipping.
    pub clip_eps: Option<f64>,
    /// How tokens become one number.
    pub reduction: Reduction,
}

impl Default for ValueLoss {
    /// The 0.2 of LightRFT's trainers.
    fn default() -> Self {
        Self { clip_eps: Some(0.2), reduction: Reduction::default() }
    }
}

/// What [`value_loss`] is computed from, all of one shape.
#[derive(Clone, Copy, Debug)]
pub struct ValueLossInput<'a> {
    /// Values of the critic that trains.
    pub values: Matrix<'a>,
    /// Values at the time of the rollout.
    pub old_values: Matrix<'a>,
    /// Regression targets.
    pub returns: Matrix<'a>,
    /// Which tokens count; `None` for all.
    pub mask: Option<Mask<'a>>,
}

/// What [`value_loss`] saw.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ValueStats {
    /// Share of unmasked tokens that the clip cut off from the gradient.
    pub clip_fraction: f64,
    /// Unmasked tokens.
    pub tokens: usize,
}

/// Half the squared error of the critic, the larger of clipped and unclipped, and its gradient by `values`.
///
/// `0.5 max((v - R)^2, (v_c - R)^2)` with `v_c = v_old + clamp(v - v_old, -eps, eps)`. A row that is masked
/// throughout adds 0 (LightRFT: NaN).
///
/// # Errors
/// [`Error::Shape`] when inputs differ in shape, [`Error::Range`] for a negative clip or a global denominator of 0.
pub fn value_loss(input: &ValueLossInput<'_>, options: &ValueLoss) -> Result<LossAndGrad<ValueStats>> {
    let ValueLossInput { values, old_values, returns, mask } = *input;
    let (rows, cols) = (values.rows(), values.cols());
    old_values.expect_like("old_values", &values)?;
    returns.expect_like("returns", &values)?;
    expect_mask(mask, &values)?;
    if let Some(eps) = options.clip_eps.filter(|eps| eps.is_nan() || *eps < 0.0) {
        return Err(Error::Range { what: "clip_eps", got: eps, want: "at least 0" });
    }
    let weights = options.reduction.row_weights(rows, cols, mask)?;

    let mut loss = 0.0;
    let mut grad = vec![0.0; rows * cols];
    let (mut clipped, mut tokens) = (0_usize, 0_usize);
    for (row, weight) in weights.into_iter().enumerate() {
        let keep = row_mask(mask, row);
        let (old_row, target_row) = (old_values.row(row), returns.row(row));
        for (col, value) in values.row(row).iter().enumerate() {
            if !keep.keeps(col) {
                continue;
            }
            let (value, old, target) =
                (f64::from(*value), f64::from(old_row[col]), f64::from(target_row[col]));
            let error = value - target;
            let held = match options.clip_eps {
                Some(eps) if (value - old).abs() > eps => old + (value - old).clamp(-eps, eps) - target,
                _ => error,
            };
            tokens += 1;
            if held * held > error * error {
                loss += weight * 0.5 * held * held;
                clipped += 1;
            } else {
                loss += weight * 0.5 * error * error;
                grad[row * cols + col] = (weight * error) as f32;
            }
        }
    }
    let stats = ValueStats { clip_fraction: clipped as f64 / tokens.max(1) as f64, tokens };
    Ok(LossAndGrad { loss, grad, stats })
}
