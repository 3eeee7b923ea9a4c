//! Models that can be sharded: the engine's decoder, cut into stages.

mod batch;
mod causal_lm;

pub use batch::{Sequence, TokenBatch};
pub use causal_lm::{BoundUnit, CausalLm};
