//! The arithmetic of one AdamW step: one pass over parameter, gradient and both means, on all threads.

use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use super::decay::Decay;
use super::narrow::{CopyOut, Narrow};
use super::simd::{self, Vectors, prefetch};
use crate::host::HostMemory;
use crate::memory::AdamWork;

/// Elements that one thread handles without looking up. Work is shared out in these, whatever the number of threads.
pub(super) const PIECE: usize = 1 << 16;

/// Below this, threads cost more than they save. Ranks that share a machine set `RAYON_NUM_THREADS=1` and never
/// thread at all.
pub(super) const PARALLEL: usize = 1 << 18;

/// Elements of one turn of the loops: two cache lines of f32, one of the half-precision formats.
pub(super) const BLOCK: usize = 32;

/// The scalars of one step, computed once in f64 and rounded once.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Scalars {
    /// `min(1, max_norm / (norm + 1e-6))`, on the gradient as it is read.
    pub clip: f32,
    /// `1 - lr * weight_decay`
    pub keep: f32,
    /// `1 - beta1`
    pub weight1: f32,
    /// As configured.
    pub beta2: f32,
    /// `1 - beta2`
    pub weight2: f32,
    /// `1 / sqrt(1 - beta2^t)`
    pub scale2: f32,
    /// As configured.
    pub eps: f32,
    /// `lr / (1 - beta1^t)`
    pub step_size: f32,
}

/// The arrays of one AdamW step, all of one length.
#[derive(Debug)]
pub(super) struct Arrays<'a> {
    pub(super) param: &'a mut [f32],
    pub(super) grad: &'a [f32],
    pub(super) exp_avg: &'a mut [f32],
    pub(super) exp_avg_sq: &'a mut [f32],
}

impl Arrays<'_> {
    fn split_at(self, at: usize) -> (Self, Self) {
        let (param, params) = self.param.split_at_mut(at);
        let (grad, grads) = self.grad.split_at(at);
        let (exp_avg, exp_avgs) = self.exp_avg.split_at_mut(at);
        let (exp_avg_sq, exp_avg_sqs) = self.exp_avg_sq.split_at_mut(at);
        (
            Self { param, grad, exp_avg, exp_avg_sq },
            Self { param: params, grad: grads, exp_avg: exp_avgs, exp_avg_sq: exp_avg_sqs },
        )
    }
}

/// One step's work on a shard, or on an interval of it.
#[derive(Debug)]
pub(super) struct Work<'a> {
    pub(super) arrays: Arrays<'a>,
    pub(super) copy: CopyOut<'a>,
    /// What is updated, in intervals of the shard, ascending. What lies between them is padding, and only copied.
    pub(super) runs: &'a [(Range<usize>, Decay)],
    /// Where in the shard the interval begins.
    pub(super) start: usize,
}

/// One step over units in host memory; the new parameters of each are also rounded into its copy.
pub(crate) fn step_on_host(units: Vec<(AdamWork<'_, HostMemory>, CopyOut<'_>)>, scalars: Scalars) {
    let work = units.into_iter().map(|(unit, copy)| {
        let AdamWork { param, grad, own, exp_avg, exp_avg_sq, runs, .. } = unit;
        let param = &mut param.f32_mut()[..own.len()];
        let (exp_avg, exp_avg_sq) = (exp_avg.f32_mut(), exp_avg_sq.f32_mut());
        Work { arrays: Arrays { param, grad: &grad.f32()[own], exp_avg, exp_avg_sq }, copy, runs, start: 0 }
    });
    step_all(work.collect(), scalars);
}

/// Does all the work, on rayon's threads where there is enough of both. Elements do not depend on each other, so who
/// does which changes no bit.
pub(super) fn step_all(work: Vec<Work<'_>>, scalars: Scalars) {
    let elems: usize = work.iter().map(|work| work.arrays.param.len()).sum();
    if elems < PARALLEL || rayon::current_num_threads() == 1 {
        work.into_iter().for_each(|work| work.step(scalars));
    } else {
        work.into_par_iter().for_each(|work| work.step_in_parallel(scalars));
    }
}

impl Work<'_> {
    fn step_in_parallel(self, scalars: Scalars) {
        let pieces = self.arrays.param.len().div_ceil(PIECE);
        if pieces <= 1 {
            return self.step(scalars);
        }
        let (left, right) = self.split_at(pieces / 2 * PIECE);
        rayon::join(|| left.step_in_parallel(scalars), || right.step_in_parallel(scalars));
    }

    fn split_at(self, at: usize) -> (Self, Self) {
        let Self { arrays, copy, runs, start } = self;
        let (left, right) = arrays.split_at(at);
        let (copy_left, copy_right) = copy.split_at(at);
        (
            Self { arrays: left, copy: copy_left, runs, start },
            Self { arrays: right, copy: copy_right, runs, start: start + at },
        )
    }

    /// Goes through the intervals that overlap this one.
    fn step(mut self, scalars: Scalars) {
        let end = self.start + self.arrays.param.len();
        let first = self.runs.partition_point(|(run, _)| run.end <= self.start);
        for (run, decay) in &self.runs[first..] {
            if run.start >= end {
                break;
            }
            let (padding, rest) = self.split_to(run.start);
            padding.copy_only();
            let (now, rest) = rest.split_to(run.end.min(end));
            now.update(match decay {
                Decay::Yes => scalars,
                Decay::No => Scalars { keep: 1.0, ..scalars },
            });
            self = rest;
        }
        self.copy_only();
    }

    /// As [`split_at`](Self::split_at), at a place of the shard.
    fn split_to(self, place: usize) -> (Self, Self) {
        let at = place.saturating_sub(self.start);
        self.split_at(at)
    }

    fn update(self, scalars: Scalars) {
        let vectors = Vectors::widest();
        match self.copy {
            // No bytes: this allocates nothing.
            CopyOut::None => {
                let nothing = &mut vec![(); self.arrays.param.len()];
                simd::step::<()>(vectors, self.arrays, nothing, scalars);
            }
            CopyOut::Bf16(out) => simd::step::<bf16>(vectors, self.arrays, out, scalars),
            CopyOut::F16(out) => simd::step::<f16>(vectors, self.arrays, out, scalars),
        }
    }

    fn copy_only(self) {
        let vectors = Vectors::widest();
        match self.copy {
            CopyOut::None => {}
            CopyOut::Bf16(out) => simd::copy::<bf16>(vectors, self.arrays.param, out),
            CopyOut::F16(out) => simd::copy::<f16>(vectors, self.arrays.param, out),
        }
    }
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
#[inline(always)]
fn element(p: &mut f32, g: f32, m: &mut f32, v: &mut f32, scalars: &Scalars) {
    let g = g * scalars.clip;
    *m += scalars.weight1 * (g - *m);
    *v = scalars.beta2 * *v + scalars.weight2 * (g * g);
    *p = *p * scalars.keep - scalars.step_size * *m / (v.sqrt() * scalars.scale2 + scalars.eps);
}

/// [`element`] on all; the new parameters are also rounded into `copy`, which is as long.
///
/// No branch and no dependency between elements: the compiler turns it into vector code. Stores go through the cache:
/// what is written has just been read, and past the cache (measured, for the copy) they are slower.
#[inline(always)]
pub(super) fn step_slices<C: Narrow>(arrays: Arrays<'_>, copy: &mut [C], scalars: Scalars) {
    let (p, p_rest) = arrays.param.as_chunks_mut::<BLOCK>();
    let (g, g_rest) = arrays.grad.as_chunks::<BLOCK>();
    let (m, m_rest) = arrays.exp_avg.as_chunks_mut::<BLOCK>();
    let (v, v_rest) = arrays.exp_avg_sq.as_chunks_mut::<BLOCK>();
    let (c, c_rest) = copy.as_chunks_mut::<BLOCK>();
    for ((((p, g), m), v), c) in p.iter_mut().zip(g).zip(m).zip(v).zip(c) {
        prefetch(p);
        prefetch(g);
        prefetch(m);
        prefetch(v);
        prefetch(c);
        for i in 0..BLOCK {
            element(&mut p[i], g[i], &mut m[i], &mut v[i], &scalars);
            c[i] = C::narrow(p[i]);
        }
    }
    for ((((p, &g), m), v), c) in p_rest.iter_mut().zip(g_rest).zip(m_rest).zip(v_rest).zip(c_rest) {
        element(p, g, m, v, &scalars);
        *c = C::narrow(*p);
    }
}

/// Rounds `from` into `to`, which is as long.
#[inline(always)]
pub(super) fn copy_slices<C: Narrow>(from: &[f32], to: &mut [C]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = C::narrow(from);
    }
}

/// `average <- average + weight (value - average)`
#[inline(always)]
pub(super) fn blend_slices(average: &mut [f32], value: &[f32], weight: f32) {
    let (a, a_rest) = average.as_chunks_mut::<BLOCK>();
    let (v, v_rest) = value.as_chunks::<BLOCK>();
    for (a, v) in a.iter_mut().zip(v) {
        prefetch(a);
        prefetch(v);
        for i in 0..BLOCK {
            a[i] += weight * (v[i] - a[i]);
        }
    }
    for (a, &v) in a_rest.iter_mut().zip(v_rest) {
        *a += weight * (v - *a);
    }
}

/// [`blend_slices`], on rayon's threads where there is enough of both.
pub(crate) fn blend(average: &mut [f32], value: &[f32], weight: f32) {
    let vectors = Vectors::widest();
    if average.len() < PARALLEL || rayon::current_num_threads() == 1 {
        return simd::blend(vectors, average, value, weight);
    }
    let pieces = average.par_chunks_mut(PIECE).zip(value.par_chunks(PIECE));
    pieces.for_each(|(average, value)| simd::blend(vectors, average, value, weight));
}

#[cfg(test)]
mod tests;
