//! Losses over pairs of a chosen and a rejected answer: reward-model ranking and DPO.

use super::{
    error::{Error, Result},
    matrix::expect_len,
    numeric::{sigmoid, softplus},
};

/// A loss over pairs, and its gradients.
#[derive(Clone, Debug, PartialEq)]
pub struct PairwiseOutput {
    /// The mean over pairs; 0 for none.
    pub loss: f64,
    /// `d loss / d chosen`, one per pair.
    pub grad_chosen: Vec<f32>,
    /// `d loss / d rejected`, one per pair.
    pub grad_rejected: Vec<f32>,
    /// Share of pairs whose chosen answer scores higher.
    pub accuracy: f64,
}

/// The Bradley-Terry ranking loss `-ln sigmoid(chosen - rejected - margin)`, averaged over pairs.
///
/// LightRFT has it under four names. `PairWiseLoss` and `LogSigmoidLoss` are this. `HPSLoss`, a two-way cross entropy,
/// and `LogExpLoss`, `ln(1 + exp(rejected - chosen))`, are this without a margin: they take one and ignore it. The last
/// overflows past a difference of 88; this does not.
///
/// # Errors
/// [`Error::Count`] when the slices differ in length.
pub fn pairwise_loss(chosen: &[f32], rejected: &[f32], margin: Option<&[f32]>) -> Result<PairwiseOutput> {
    let pairs = chosen.len();
    expect_len("rejected", rejected.len(), pairs)?;
    if let Some(margin) = margin {
        expect_len("margin", margin.len(), pairs)?;
    }
    let weight = 1.0 / pairs.max(1) as f64;
    let mut out = PairwiseOutput {
        loss: 0.0,
        grad_chosen: Vec::with_capacity(pairs),
        grad_rejected: Vec::with_capacity(pairs),
        accuracy: 0.0,
    };
    for (pair, (chosen, rejected)) in chosen.iter().zip(rejected).enumerate() {
        let ahead =
            f64::from(*chosen) - f64::from(*rejected) - margin.map_or(0.0, |margin| f64::from(margin[pair]));
        out.loss += weight * softplus(-ahead);
        let slope = (weight * sigmoid(-ahead)) as f32;
        out.grad_chosen.push(-slope);
        out.grad_rejected.push(slope);
        out.accuracy += if chosen > rejected { weight } else { 0.0 };
    }
    Ok(out)
}

/// Which preference objective over log-ratios.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DpoKind {
    /// `-ln sigmoid(beta x)` (arXiv 2305.18290, eq. 7), with label smoothing as conservative DPO.
    #[default]
    Sigmoid,
    /// `(x - 1 / (2 beta))^2` (IPO, arXiv 2310.12036, eq. 17). Label smoothing does not enter.
    Ipo,
}

/// Options of [`dpo_loss`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dpo {
    /// Strength of the pull towards the reference, positive.
    pub beta: f64,
    /// Probability that a label is wrong, in `0..=0.5`.
    pub label_smoothing: f64,
    /// The objective.
    pub kind: DpoKind,
}

impl Default for Dpo {
    fn default() -> Self {
        Self { beta: 0.1, label_smoothing: 0.0, kind: DpoKind::Sigmoid }
    }
}

/// Summed log-probabilities of whole answers, one per pair.
#[derive(Clone, Copy, Debug)]
pub struct DpoInput<'a> {
    /// Chosen answers under the policy.
    pub policy_chosen: &'a [f32],
    /// Rejected answers under the policy.
    pub policy_rejected: &'a [f32],
    /// Chosen answers under the reference.
    pub reference_chosen: &'a [f32],
    /// Rejected answers under the reference.
    pub reference_rejected: &'a [f32],
}

/// What [`dpo_loss`] returns.
#[derive(Clone, Debug, PartialEq)]
pub struct DpoOutput {
    /// The mean over pairs; 0 for none.
    pub loss: f64,
    /// `d loss / d policy_chosen`, one per pair.
    pub grad_chosen: Vec<f32>,
    /// `d loss / d policy_rejected`, one per pair.
    pub grad_rejected: Vec<f32>,
    /// Implicit rewards of the chosen answers: `beta (policy - reference)`.
    pub chosen_rewards: Vec<f32>,
    /// Implicit rewards of the rejected answers.
    pub rejected_rewards: Vec<f32>,
}

/// Direct preference optimisation: the loss, its gradients and the implicit rewards.
///
/// With `x = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)`.
///
/// # Errors
/// [`Error::Count`] when the slices differ in length, [`Error::Range`] unless `beta > 0` and
/// `0 <= label_smoothing <= 0.5`.
pub fn dpo_loss(input: &DpoInput<'_>, options: &Dpo) -> Result<DpoOutput> {
    let pairs = input.policy_chosen.len();
    expect_len("policy_rejected", input.policy_rejected.len(), pairs)?;
    expect_len("reference_chosen", input.reference_chosen.len(), pairs)?;
    expect_len("reference_rejected", input.reference_rejected.len(), pairs)?;
    let Dpo { beta, label_smoothing: smoothing, kind } = *options;
    if !(beta > 0.0 && beta.is_finite()) {
        return Err(Error::Range { what: "beta", got: beta, want: "positive and finite" });
    }
    if !(0.0..=0.5).contains(&smoothing) {
        return Err(Error::Range { what: "label_smoothing", got: smoothing, want: "0 to 0.5" });
    }
    let weight = 1.0 / pairs.max(1) as f64;
    let mut out = DpoOutput {
        loss: 0.0,
        grad_chosen: Vec::with_capacity(pairs),
        grad_rejected: Vec::with_capacity(pairs),
        chosen_rewards: Vec::with_capacity(pairs),
        rejected_rewards: Vec::with_capacity(pairs),
    };
    for pair in 0..pairs {
        let chosen = f64::from(input.policy_chosen[pair]) - f64::from(input.reference_chosen[pair]);
        let rejected = f64::from(input.policy_rejected[pair]) - f64::from(input.reference_rejected[pair]);
        let x = chosen - rejected;
        let (loss, slope) = match kind {
            DpoKind::Sigmoid => (
                (1.0 - smoothing) * softplus(-beta * x) + smoothing * softplus(beta * x),
                beta * (smoothing * sigmoid(beta * x) - (1.0 - smoothing) * sigmoid(-beta * x)),
            ),
            DpoKind::Ipo => {
                let gap = x - 0.5 / beta;
                (gap * gap, 2.0 * gap)
            }
        };
        out.loss += weight * loss;
        out.grad_chosen.push((weight * slope) as f32);
        out.grad_rejected.push((-weight * slope) as f32);
        out.chosen_rewards.push((beta * chosen) as f32);
        out.rejected_rewards.push((beta * rejected) as f32);
    }
    Ok(out)
}
