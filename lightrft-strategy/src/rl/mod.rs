//! The mathematics of RL fine-tuning, over host slices: no tensors, no devices, no state beyond what is passed in.
//!
//! Every function that trains returns its gradient with its value, so that a trainer hands the gradient to whatever
//! computes the model's backward pass. Values agree with LightRFT (commit 49e62cb) to float precision, except where
//! LightRFT gives NaN or noise; each function says where it differs, and why.
//!
//! | step | functions |
//! |---|---|
//! | rollout | [`process_sequences`], [`log_probs_from_logits`], [`fused_linear_log_probs`], [`entropy_from_logits`] |
//! | reward | [`Overlong`], [`shape_rewards`], [`uninformative_groups`], [`RunningMoments`], [`token_rewards`] |
//! | advantage | [`estimate_advantages`], [`gae`], [`cumulative_returns`], [`standardize`] |
//! | loss | [`policy_loss`], [`value_loss`], [`kl_loss`], [`pairwise_loss`], [`dpo_loss`], [`next_token_loss`] |
//!
//! ```
//! use lightrft_strategy::rl::{Matrix, PolicyLoss, PolicyLossInput, policy_loss, shape_rewards, AdvantageEstimator};
//!
//! // One prompt, two answers of three tokens; the second one was right.
//! let advantages = shape_rewards(AdvantageEstimator::GroupNorm, &[0.0, 1.0], 2)?;
//! let log_probs = [-1.0_f32; 6];
//! let mask = [true, true, true, true, true, false];
//! let out = policy_loss(
//!     &PolicyLossInput {
//!         log_probs: Matrix::new(&log_probs, 2, 3)?,
//!         old_log_probs: Matrix::new(&log_probs, 2, 3)?,
//!         advantages: Matrix::new(&advantages, 2, 1)?,
//!         mask: Some(Matrix::new(&mask, 2, 3)?),
//!     },
//!     &PolicyLoss::default(),
//! )?;
//! assert!(out.grad[0] > 0.0 && out.grad[3] < 0.0, "less of the first answer, more of the second");
//! assert_eq!(out.grad[5], 0.0, "padding trains nothing");
//! # Ok::<_, lightrft_strategy::rl::Error>(())
//! ```

mod advantage;
mod error;
mod estimator;
mod kl;
mod language;
mod logprob;
mod loss;
mod matrix;
mod moments;
mod numeric;
mod preference;
mod reduce;
mod reward;
mod sequence;

pub use advantage::{
    Advantages, CpgdWeight, cpgd_advantages, cumulative_returns, gae, group_baseline, group_norm, rloo,
};
pub use error::{Error, Result};
pub use estimator::{
    AdvantageConfig, AdvantageEstimator, AdvantageInput, Whitening, estimate_advantages, shape_rewards,
};
pub use kl::{KlEstimator, approx_kl, kl_loss};
pub use language::{IGNORE_INDEX, distill_loss, next_token_loss};
pub use logprob::{
    FusedLinear, FusedLinearGrad, entropy_from_logits, fused_linear_log_probs,
    fused_linear_log_probs_backward, high_entropy_mask, log_probs_from_logits,
    log_probs_from_logits_backward,
};
pub use loss::{
    ClipRange, PolicyKind, PolicyLoss, PolicyLossInput, PolicyStats, ValueLoss, ValueLossInput, ValueStats,
    policy_loss, value_loss,
};
pub use matrix::{Mask, Matrix};
pub use moments::{Center, MaskedSums, RunningMoments, Scale, clip, clip_fraction, standardize};
pub use preference::{Dpo, DpoInput, DpoKind, DpoOutput, PairwiseOutput, dpo_loss, pairwise_loss};
pub use reduce::{
    Aggregation, Denominator, LossAndGrad, Reduction, masked_mean, masked_mean_cols, masked_mean_rows,
};
pub use reward::{
    AdaptiveKl, GroupFilter, KlController, Overlong, clip_filter_weights, token_rewards, uninformative_groups,
};
pub use sequence::{ProcessedSequences, process_sequences};
