//! What one step did: sums of a rank, and the numbers that all ranks make of them.

use lightrft_collectives::{Communicator, CommunicatorExt, ReduceOp};
use serde::Serialize;

use crate::error::Result;
use crate::offload::{OffloadMetrics, OffloadTally};
use crate::rl::{KlEstimator, PolicyStats};

/// What one step did, over all ranks; the same on each of them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepMetrics {
    /// Rollouts done, this one included.
    pub step: u64,
    /// The pass over the prompts that the rollout belongs to, from 0.
    pub epoch: u64,
    /// Mean reward.
    pub reward: f64,
    /// Share of right answers.
    pub accuracy: f64,
    /// Estimated KL divergence from the reference, mean over tokens, each taken when the loss first saw it. `None`
    /// without a reference.
    pub kl: Option<f64>,
    /// Mean answer length, in tokens, the one that ended it included.
    pub length: f64,
    /// Mean loss of the step's updates.
    pub loss: f64,
    /// Share of tokens whose ratio was clipped.
    pub clip_fraction: f64,
    /// Largest difference between the engine's log-probability of a token and the trainer's, over the tokens of the
    /// first update, when both have the same weights. Infinite if either is NaN.
    pub log_prob_gap: f64,
    /// Global gradient norm before clipping, of the last update.
    pub grad_norm: f64,
    /// Learning rate of the last update.
    pub lr: f64,
    /// Updates skipped since the run began, for a gradient that was not finite.
    pub skipped_updates: u64,
    /// Answer tokens.
    pub tokens: u64,
    /// Answer tokens per second of the whole step, by the slowest rank's clock.
    pub tokens_per_s: f64,
    /// Seconds in generation, mean over ranks.
    pub generate_s: f64,
    /// Seconds in forward passes for log-probabilities to compare with, mean over ranks.
    pub score_s: f64,
    /// Seconds in training passes and the optimizer, mean over ranks.
    pub train_s: f64,
    /// Seconds in weight updates of the engine, mean over ranks.
    pub update_s: f64,
    /// What giving memory up around generation came to, where a setting asks for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offload: Option<OffloadMetrics>,
    /// Hash over every rank's parameters after the step, where
    /// [`log_parameters_hash`](crate::StrategyConfig::log_parameters_hash) asks for it. Runs on as many ranks have the
    /// same hash when their parameters are the same, bit for bit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parameters_hash: Option<String>,
}

/// Sums of one rank over a step.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) reward: f64,
    pub(super) correct: usize,
    pub(super) answers: usize,
    pub(super) tokens: usize,
    /// This rank's part of the losses of all updates.
    pub(super) loss: f64,
    kl: f64,
    kl_tokens: usize,
    clipped: f64,
    trained_tokens: usize,
    gap: f64,
    pub(super) seconds: Seconds,
    pub(super) offloads: OffloadTally,
}

/// Where the time of a step went, on one rank.
#[derive(Debug, Default)]
pub(super) struct Seconds {
    pub(super) generate: f64,
    pub(super) score: f64,
    pub(super) train: f64,
    pub(super) update: f64,
    pub(super) all: f64,
}

/// The tally of all ranks.
pub(super) struct Totals {
    pub(super) reward: f64,
    pub(super) accuracy: f64,
    pub(super) kl: Option<f64>,
    pub(super) length: f64,
    pub(super) loss: f64,
    pub(super) clip_fraction: f64,
    pub(super) log_prob_gap: f64,
    pub(super) tokens: f64,
    pub(super) seconds: Seconds,
    pub(super) offload: OffloadMetrics,
}

impl Tally {
    /// Adds the KL estimates of the tokens that `mask` keeps.
    pub(super) fn add_kl(&mut self, new: &[f32], reference: &[f32], mask: &[bool], estimator: KlEstimator) {
        for ((n, r), _) in new.iter().zip(reference).zip(mask).filter(|(_, keep)| **keep) {
            self.kl += estimator.at(f64::from(*n) - f64::from(*r)).0;
            self.kl_tokens += 1;
        }
    }

    /// Adds what a policy loss saw.
    pub(super) fn add_policy(&mut self, stats: &PolicyStats) {
        self.clipped += stats.clip_fraction * stats.tokens as f64;
        self.trained_tokens += stats.tokens;
    }

    /// Notes how far the trainer's log-probabilities are from the engine's.
    pub(super) fn compare(&mut self, new: &[f32], engine: &[f32], mask: &[bool]) {
        for ((n, e), _) in new.iter().zip(engine).zip(mask).filter(|(_, keep)| **keep) {
            let gap = f64::from((n - e).abs());
            // `f64::max` would lose a NaN, which is the largest gap of all.
            self.gap = self.gap.max(if gap.is_nan() { f64::INFINITY } else { gap });
        }
    }

    /// The sums of all ranks. *Collective.*
    pub(super) fn total(&self, world: &dyn Communicator, updates: usize) -> Result<Totals> {
        let Seconds { generate, score, train, update, all } = self.seconds;
        let mut sums = [
            self.reward,
            self.correct as f64,
            self.answers as f64,
            self.tokens as f64,
            self.loss,
            self.kl,
            self.kl_tokens as f64,
            self.clipped,
            self.trained_tokens as f64,
            generate,
            score,
            train,
            update,
            self.offloads.bytes as f64,
            self.offloads.kept_bytes as f64,
            self.offloads.elapsed.as_secs_f64(),
        ];
        world.all_reduce(&mut sums, ReduceOp::Sum)?;
        let mut most = [self.gap, all];
        world.all_reduce(&mut most, ReduceOp::Max)?;
        let [
            reward,
            correct,
            answers,
            tokens,
            loss,
            kl,
            kl_tokens,
            clipped,
            trained,
            generate,
            score,
            train,
            update,
            offloaded,
            kept,
            offload_seconds,
        ] = sums;
        let [log_prob_gap, all] = most;
        let ranks = world.world_size() as f64;
        Ok(Totals {
            reward: reward / answers.max(1.0),
            accuracy: correct / answers.max(1.0),
            kl: (kl_tokens > 0.0).then(|| kl / kl_tokens),
            length: tokens / answers.max(1.0),
            // Each rank's loss is its part of the global mean.
            loss: loss / updates.max(1) as f64,
            clip_fraction: clipped / trained.max(1.0),
            log_prob_gap,
            tokens,
            seconds: Seconds {
                generate: generate / ranks,
                score: score / ranks,
                train: train / ranks,
                update: update / ranks,
                all,
            },
            offload: OffloadMetrics {
                bytes: offloaded as u64,
                kept_bytes: kept as u64,
                seconds: offload_seconds / ranks,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use lightrft_collectives::local::World;

    #[test]
    fn ranks_with_different_answers_make_one_weighted_mean() {
        let of_rank = |world: Arc<dyn Communicator>| {
            let mut tally = Tally { reward: 3.0, answers: 4, tokens: 8, loss: 0.25, ..Tally::default() };
            if world.rank() == 1 {
                tally = Tally { reward: 0.0, answers: 2, tokens: 10, loss: 0.5, ..Tally::default() };
                tally.add_kl(&[-1.0, -2.0], &[-1.0, -1.0], &[false, true], KlEstimator::K1);
                tally.add_policy(&PolicyStats { clip_fraction: 0.5, tokens: 10, ..PolicyStats::default() });
            } else {
                tally.compare(&[1.0, f32::NAN, 1.0], &[1.0, 1.0, 3.0], &[true, false, true]);
            }
            tally
                .total(&*world, 1)
                .map(|t| (t.reward, t.kl, t.length, t.loss, t.clip_fraction, t.log_prob_gap))
        };
        let totals = World::new(2).launch(of_rank).unwrap();
        assert_eq!(totals[0], (0.5, Some(-1.0), 3.0, 0.75, 0.5, 2.0));
        assert_eq!(totals[0], totals[1]);
    }

    #[test]
    fn a_nan_log_probability_is_an_infinite_gap() {
        let mut tally = Tally::default();
        tally.compare(&[f32::NAN, 1.0], &[0.0, 1.5], &[true, true]);
        assert_eq!(tally.gap, f64::INFINITY);
    }
}
