//! Optimizers over flat shards: AdamW, which parameters decay, the global norm.

mod adamw;
mod decay;
mod kernel;
mod norm;

pub use adamw::{AdamW, AdamWConfig, AdamWCounters, StepReport, Update};
pub use decay::{Decay, decay_by_name};
