//! Models that can be sharded: the engine's decoder, cut into stages.

mod batch;
mod bound;
mod causal_lm;

pub use batch::{Sequence, TokenBatch};
pub use bound::BoundUnit;
pub use causal_lm::{CausalLm, SavedStage};
