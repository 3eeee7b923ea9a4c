//! Generation on a CPU: the arithmetic of a step, on host memory, without a tensor library.

mod lanes;
mod simd;

pub(super) use lanes::BLOCK;
pub(super) use simd::{Vectors, greatest, sum_exp, weigh};
