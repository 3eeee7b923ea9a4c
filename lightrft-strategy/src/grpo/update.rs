//! The updates on one rollout: micro-batches, what their loss compares with, backward passes, optimizer steps.

use super::Grpo;
use super::report::Tally;
use super::rollout::Rollout;
use crate::config::OldLogProbs;
use crate::error::Result;
use crate::model::{Sequence, TokenBatch};
use crate::rl::{ClipRange, Matrix, PolicyLoss, PolicyLossInput, Reduction, kl_loss, policy_loss};

/// One micro-batch with the log-probabilities that its loss compares with, each `[rows, cols]`.
pub(super) struct Micro {
    /// Index of its first completion.
    first: usize,
    batch: TokenBatch,
    engine: Vec<f32>,
    old: Option<Vec<f32>>,
    reference: Option<Vec<f32>>,
}

/// The last optimizer step of a rollout.
pub(super) struct LastUpdate {
    pub(super) grad_norm: f64,
    pub(super) lr: f64,
}

impl Grpo<'_> {
    /// Cuts a rollout into micro-batches, with log-probabilities under the reference, and under the policy before its
    /// first update where they are asked for. *Collective.*
    pub(super) fn micro_batches(&mut self, rollout: &Rollout) -> Result<Vec<Micro>> {
        let config = self.strategy.config();
        let size = config.micro_train_batch_size;
        if let Some(reference) = self.parts.reference.as_mut().filter(|_| config.reference_offload) {
            self.offloads.reload(&mut reference.model)?;
        }
        let mut micros = Vec::new();
        for (at, chunk) in rollout.completions.chunks(size).enumerate() {
            let sequences: Vec<Sequence<'_>> = chunk
                .iter()
                .map(|c| Sequence { prompt: &rollout.prompts[c.request], answer: &c.tokens })
                .collect();
            let batch = TokenBatch::new(self.parts.actor.model.model().decoder(), &sequences)?;
            let engine = batch.scatter(|row| &chunk[row].log_probs);
            let reference = match self.parts.reference.as_mut() {
                Some(reference) => Some(self.strategy.reference_log_probs(reference, &batch)?),
                None => None,
            };
            let old = match config.old_log_probs {
                OldLogProbs::Engine => None,
                OldLogProbs::Policy => Some(self.strategy.policy_log_probs(&mut self.parts.actor, &batch)?),
            };
            micros.push(Micro { first: at * size, batch, engine, old, reference });
        }
        if let Some(reference) = self.parts.reference.as_mut().filter(|_| config.reference_offload) {
            self.offloads.offload(&mut reference.model)?;
        }
        Ok(micros)
    }

    /// Every optimizer step that the rollout gives. *Collective.*
    pub(super) fn train(
        &mut self,
        advantages: &[f32],
        micros: &[Micro],
        tally: &mut Tally,
    ) -> Result<LastUpdate> {
        let config = self.strategy.config();
        // Of the micro-batch: the strategy divides by their number, on all ranks.
        let reduction = Reduction::sequences_of(config.micro_train_batch_size);
        let scale = f64::from(self.strategy.loss_scale());
        let options =
            PolicyLoss { clip: ClipRange::symmetric(config.eps_clip), reduction, ..PolicyLoss::default() };
        if config.adam_offload {
            self.offloads.reload(&mut self.parts.actor.optimizer)?;
        }
        // What a rollout before this one left unfinished is not of this one.
        self.parts.actor.discard_gradients();
        let first_update = self.updates;
        let mut last = LastUpdate { grad_norm: 0.0, lr: 0.0 };
        for epoch in 0..config.max_epochs {
            for micro in micros {
                let (rows, cols) = (micro.batch.rows(), micro.batch.cols());
                let engine_has_these_weights = self.updates == first_update;
                self.strategy.backward(&mut self.parts.actor, &micro.batch, |log_probs| {
                    let new = Matrix::new(log_probs, rows, cols)?;
                    let mask = Matrix::new(micro.batch.mask(), rows, cols)?;
                    let old = micro.old.as_deref().unwrap_or(&micro.engine);
                    let input = PolicyLossInput {
                        log_probs: new,
                        old_log_probs: Matrix::new(old, rows, cols)?,
                        advantages: Matrix::new(&advantages[micro.first..micro.first + rows], rows, 1)?,
                        mask: Some(mask),
                    };
                    let mut out = policy_loss(&input, &options)?;
                    tally.loss += scale * out.loss;
                    tally.add_policy(&out.stats);
                    if let Some(reference) = &micro.reference {
                        if epoch == 0 {
                            tally.add_kl(log_probs, reference, micro.batch.mask(), config.kl_estimator);
                        }
                        if config.use_kl_loss {
                            let base = Matrix::new(reference, rows, cols)?;
                            let kl = kl_loss(new, base, Some(mask), config.kl_estimator, reduction)?;
                            tally.loss += scale * config.init_kl_coef * kl.loss;
                            for (g, k) in out.grad.iter_mut().zip(&kl.grad) {
                                *g += config.init_kl_coef as f32 * k;
                            }
                        }
                    }
                    if engine_has_these_weights {
                        tally.compare(log_probs, &micro.engine, micro.batch.mask());
                    }
                    Ok(((), out.grad))
                })?;
                let lr = self.schedule.lr(self.updates as usize);
                if let Some(report) = self.strategy.optimizer_step(&mut self.parts.actor, lr)? {
                    self.strategy.moving_average(&mut self.parts.actor)?;
                    self.updates += 1;
                    last = LastUpdate { grad_norm: f64::from(report.grad_norm), lr };
                }
            }
        }
        if config.adam_offload {
            self.offloads.offload(&mut self.parts.actor.optimizer)?;
        }
        Ok(last)
    }
}
