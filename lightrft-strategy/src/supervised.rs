//! Supervised steps: next-token loss over the answers, through the same shards and optimizer as RL.

use lightrft_collectives::CommunicatorExt;
use lightrft_sharding::StepReport;

use crate::error::{Error, Result};
use crate::model::{Sequence, TokenBatch};
use crate::prepare::Actor;
use crate::rl::{Matrix, Reduction};
use crate::step;
use crate::strategy::Strategy;

impl Strategy {
    /// One optimizer step on this rank's `sequences`, of which every rank has as many: the mean over all ranks'
    /// sequences of the mean negative log-probability of the answer's tokens, which is returned. *Collective.*
    ///
    /// # Errors
    /// [`Error::Model`](crate::Error::Model) for sequences that do not fit the model, and those of the step.
    pub fn supervised_step(
        &self,
        actor: &mut Actor,
        sequences: &[Sequence<'_>],
        lr: f64,
    ) -> Result<(f64, StepReport)> {
        let mut counts = vec![0i64; self.world_size()];
        self.world().all_gather(&[sequences.len() as i64], &mut counts)?;
        if counts[0] == 0 || counts.iter().any(|n| *n != counts[0]) {
            let fields = format!("sequences of the ranks = {counts:?}");
            return Err(Error::config(fields, "every rank must have as many, and at least one"));
        }
        let reduction = Reduction::sequences_of(sequences.len() * self.world_size());
        let mut loss = 0.0;
        let size = self.config().micro_train_batch_size;
        let passes = sequences.len().div_ceil(size);
        actor.discard_gradients();
        for micro in sequences.chunks(size) {
            let batch = TokenBatch::new(actor.model.model().decoder(), micro)?;
            loss += step::backward(actor, &batch, passes, 1.0, |log_probs| {
                let (rows, cols) = (batch.rows(), batch.cols());
                let mask = Matrix::new(batch.mask(), rows, cols)?;
                let weights = reduction.row_weights(rows, cols, Some(mask))?;
                let mut grad = vec![0.0; rows * cols];
                let mut loss = 0.0;
                for (row, weight) in weights.into_iter().enumerate() {
                    for col in batch.answer(row) {
                        loss -= weight * f64::from(log_probs[row * cols + col]);
                        grad[row * cols + col] = -weight as f32;
                    }
                }
                Ok((loss, grad))
            })?;
        }
        actor.accumulated = 0;
        self.maybe_load_optimizer(actor)?;
        let report = actor.optimizer.step(actor.model.units_mut(), lr)?;
        self.maybe_offload_optimizer(actor)?;
        self.moving_average(actor)?;
        let mut total = [loss];
        self.all_reduce_mean(&mut total)?;
        Ok((total[0] * self.world_size() as f64, report))
    }
}
