//! One training step: forward, the caller's loss, backward, and the optimizer when enough has accumulated.

use candle_core::Tensor;
use lightrft_sharding::{ShardedModel, StepReport};

use crate::error::{Error, Result};
use crate::model::{CausalLm, TokenBatch};
use crate::prepare::Actor;

/// Log-probabilities `[rows, cols]` without a gradient.
pub(crate) fn log_probs(model: &mut ShardedModel<CausalLm>, batch: &TokenBatch) -> Result<Vec<f32>> {
    Ok(model.evaluate(batch)?.flatten_all()?.to_vec1::<f32>()?)
}

/// One pass of `passes` before the next step, whose loss is multiplied by `scale`; see
/// [`Strategy::backward`](crate::Strategy::backward).
pub(crate) fn backward<R>(
    actor: &mut Actor,
    batch: &TokenBatch,
    passes: usize,
    scale: f32,
    loss: impl FnOnce(&[f32]) -> Result<(R, Vec<f32>)>,
) -> Result<R> {
    let (output, tape) = actor.model.forward(batch)?;
    let (result, mut gradient) = loss(&output.flatten_all()?.to_vec1::<f32>()?)?;
    let expected = batch.rows() * batch.cols();
    if gradient.len() != expected {
        return Err(Error::config(
            format!("gradient of {} elements", gradient.len()),
            format!("the loss must return one by each log-probability, {expected}"),
        ));
    }
    gradient.iter_mut().for_each(|element| *element *= scale);
    let gradient = Tensor::from_vec(gradient, output.shape(), output.device())?;
    drop(output);
    // What ranks sum once a step is summed in its last pass, beside computing where that is asked for.
    if actor.accumulated + 1 == passes {
        actor.model.backward_last(tape, gradient)?;
    } else {
        actor.model.backward(tape, gradient)?;
    }
    actor.accumulated += 1;
    Ok(result)
}

/// Steps once `accumulate` passes have been made; `None` before that.
pub(crate) fn optimizer_step(actor: &mut Actor, accumulate: usize, lr: f64) -> Result<Option<StepReport>> {
    if actor.accumulated < accumulate {
        return Ok(None);
    }
    // A step that is refused has changed nothing, and can be asked for again.
    let report = actor.optimizer.step(actor.model.units_mut(), lr)?;
    actor.accumulated = 0;
    Ok(Some(report))
}
