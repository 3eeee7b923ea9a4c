//! Optimizers over flat shards: AdamW, which parameters decay, the global norm, averages of parameters.

mod adamw;
mod decay;
mod ema;
mod kernel;
mod narrow;
mod norm;
mod simd;

pub use adamw::{AdamW, AdamWConfig, AdamWCounters, StepReport, Update};
pub use decay::{Decay, decay_by_name};
pub use ema::{Ema, EmaConfig, EmaCounters, EmaUpdate};
pub use narrow::CopyOut;
pub(crate) use narrow::Narrow;
pub use norm::{GradNorm, grad_norm, loss_scale};
