//! Generation on a CPU: the arithmetic of a step, on host memory, without a tensor library.
//!
//! A column's results are the same bits in any company: whichever other tokens are computed in the step, however many
//! threads share it, and whether its past was computed at once, in pieces, or again.

mod attention;
mod columns;
mod forward;
mod lanes;
mod linear;
mod pool;
mod simd;
mod team;

pub(super) use attention::{PAGE_TOKENS, PageLayout};
pub(super) use forward::{Column, Layer, Model, Work};
pub(super) use lanes::BLOCK;
pub(super) use linear::{Linear, Logits, Matrix};
pub(super) use pool::{PageId, Pool};
pub(super) use simd::{Vectors, greatest, sum_exp, weigh};
pub(super) use team::Team;
