//! The facade that composes the LightRFT crates into an RL training strategy.
mod checkpoint;
mod config;
mod error;
mod export;
mod grpo;
mod metrics;
pub mod model;
mod plot;
mod prepare;
pub mod rl;
mod rollout;
pub mod schedule;
mod step;
mod strategy;
mod supervised;
mod text;
mod weight_sync;

pub use checkpoint::{Loaded, RunState};
pub use config::{EngineType, OldLogProbs, StrategyConfig};
pub use error::{Error, Result};
pub use export::write_model;
pub use grpo::{Grpo, GrpoParts, RewardFn, Score, StepMetrics};
pub use metrics::{MetricsLog, read_lines};
pub use plot::{Series, Stroke, line_chart};
pub use prepare::{Actor, Reference};
pub use strategy::Strategy;
pub use text::Text;
