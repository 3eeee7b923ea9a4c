//! The global gradient norm: one number for all units and ranks, by one all-reduce.

use lightrft_collectives::{CommunicatorExt as _, ReduceOp};
use rayon::prelude::*;

use super::kernel::{PARALLEL, PIECE};
use crate::error::{Error, Result};
use crate::unit::ShardedUnits;

/// Added to the norm before dividing by it, as torch does.
const CLIP_EPS: f32 = 1e-6;

/// The 2-norm of all gradients of all ranks, the same on every rank; not finite when any gradient is not.
///
/// Squares are summed in f64, in an order that depends on the lengths of the shards but not on the number of threads;
/// the result is rounded to f32, which hides the order for all but one sum in some ten million.
pub(super) fn global(units: &ShardedUnits) -> Result<f32> {
    let mut sum = [units.grads().map(sum_of_squares).sum::<f64>()];
    if units.plan().world_size() > 1 {
        units
            .communicator()
            .all_reduce(&mut sum, ReduceOp::Sum)
            .map_err(Error::collective("gradient norm", "all units"))?;
    }
    Ok(sum[0].sqrt() as f32)
}

/// `min(1, max_norm / (norm + 1e-6))`; 1 when `max_norm` is 0, which means no clipping.
pub(super) fn clip_factor(norm: f32, max_norm: f32) -> f32 {
    if max_norm > 0.0 { (max_norm / (norm + CLIP_EPS)).min(1.0) } else { 1.0 }
}

fn sum_of_squares(values: &[f32]) -> f64 {
    if values.len() < PARALLEL || rayon::current_num_threads() == 1 {
        return values.chunks(PIECE).map(piece).sum();
    }
    let sums: Vec<f64> = values.par_chunks(PIECE).map(piece).collect();
    sums.into_iter().sum()
}

/// Eight running sums, which is what vector units want.
fn piece(values: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut sums = [0.0f64; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (sum, &value) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(value) * f64::from(value);
        }
    }
    let rest: f64 = rest.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipping_never_enlarges_and_zero_turns_it_off() {
        assert_eq!(clip_factor(0.5, 1.0), 1.0);
        assert_eq!(clip_factor(1e9, 0.0), 1.0);
        assert!((clip_factor(4.0, 1.0) - 0.25).abs() < 1e-6);
        assert_eq!(clip_factor(0.0, 1.0), 1.0);
    }

    #[test]
    fn the_sum_does_not_depend_on_threads() {
        let values: Vec<f32> = (0..PARALLEL + 13).map(|i| (i as f32 * 0.37).sin()).collect();
        let sequential: f64 = values.chunks(PIECE).map(piece).sum();
        assert_eq!(sum_of_squares(&values).to_bits(), sequential.to_bits());
    }
}
