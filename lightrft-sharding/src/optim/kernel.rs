//! The arithmetic of one AdamW step: one pass over parameter, gradient and both means.

use rayon::prelude::*;

use super::decay::Decay;

/// Elements handled as one piece, small enough that the four arrays of a piece stay in a core's cache.
pub(super) const PIECE: usize = 1 << 14;

/// Below this, threads cost more than they save. Ranks that share a machine set `RAYON_NUM_THREADS=1` and never
/// thread at all.
pub(super) const PARALLEL: usize = 1 << 20;

/// The scalars of one step, computed once in f64 and rounded once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scalars {
    /// `min(1, max_norm / (norm + 1e-6))`, on the gradient as it is read.
    pub(super) clip: f32,
    /// `1 - lr * weight_decay`
    pub(super) keep: f32,
    /// `1 - beta1`
    pub(super) weight1: f32,
    pub(super) beta2: f32,
    /// `1 - beta2`
    pub(super) weight2: f32,
    /// `1 / sqrt(1 - beta2^t)`
    pub(super) scale2: f32,
    pub(super) eps: f32,
    /// `lr / (1 - beta1^t)`
    pub(super) step_size: f32,
}

/// The arrays of one AdamW step, all of one length.
pub(super) struct Arrays<'a> {
    pub(super) param: &'a mut [f32],
    pub(super) grad: &'a [f32],
    pub(super) exp_avg: &'a mut [f32],
    pub(super) exp_avg_sq: &'a mut [f32],
}

/// Steps every element, on rayon's threads where there are enough of both.
pub(super) fn step(arrays: Arrays<'_>, decay: Decay, scalars: Scalars) {
    let scalars = match decay {
        Decay::Yes => scalars,
        Decay::No => Scalars { keep: 1.0, ..scalars },
    };
    let Arrays { param, grad, exp_avg, exp_avg_sq } = arrays;
    if param.len() < PARALLEL || rayon::current_num_threads() == 1 {
        return piece(param, grad, exp_avg, exp_avg_sq, scalars);
    }
    param
        .par_chunks_mut(PIECE)
        .zip(grad.par_chunks(PIECE))
        .zip(exp_avg.par_chunks_mut(PIECE))
        .zip(exp_avg_sq.par_chunks_mut(PIECE))
        .for_each(|(((param, grad), exp_avg), exp_avg_sq)| piece(param, grad, exp_avg, exp_avg_sq, scalars));
}

/// torch's `AdamW`, element by element (so a shard's step is the shard of the whole's step, bit for bit):
///
/// ```text
/// g <- clip g
/// p <- p (1 - lr wd)
/// m <- m + (1 - beta1) (g - m)
/// v <- beta2 v + (1 - beta2) g^2
/// p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
/// ```
///
/// No branch and no dependency between elements: the compiler turns it into vector code.
fn piece(param: &mut [f32], grad: &[f32], exp_avg: &mut [f32], exp_avg_sq: &mut [f32], scalars: Scalars) {
    let Scalars { clip, keep, weight1, beta2, weight2, scale2, eps, step_size } = scalars;
    for (((p, &g), m), v) in param.iter_mut().zip(grad).zip(exp_avg).zip(exp_avg_sq) {
        let g = g * clip;
        *m += weight1 * (g - *m);
        *v = beta2 * *v + weight2 * (g * g);
        *p = *p * keep - step_size * *m / (v.sqrt() * scale2 + eps);
    }
}
