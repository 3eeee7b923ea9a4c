//! Generation on a CPU: the arithmetic of a step, on host memory, without a tensor library.
//!
//! A column's results are the same bits in any company: whichever other tokens are computed in the step, however many
//! threads share it, and whether its past was computed at once, in pieces, or again.

mod attention;
mod cache;
mod columns;
mod forward;
mod lanes;
mod linear;
mod simd;
mod team;

pub(super) use attention::PageLayout;
pub(super) use cache::Cache;
pub(super) use forward::{CpuForward, Layer, Model, Work};
pub(super) use lanes::BLOCK;
pub(super) use linear::{Linear, Matrix};
pub(super) use simd::{Vectors, greatest, sum_exp, weigh};
pub(super) use team::Team;
