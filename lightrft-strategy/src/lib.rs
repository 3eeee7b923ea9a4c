//! One RL training strategy over ranks: [`Strategy`] composes process groups, sharded training, an inference engine,
//! checkpoints and data; [`Grpo`] is the loop on top of it.
//!
//! ```
//! use lightrft_collectives::Rendezvous;
//! use lightrft_engine::embedded::{DecoderConfig, Weights};
//! use lightrft_strategy::model::Sequence;
//! use lightrft_strategy::{Strategy, StrategyConfig, write_model};
//!
//! // A Hugging Face model folder: here a random one.
//! let folder = std::env::temp_dir().join(format!("lightrft-front-page-{}", std::process::id()));
//! let config = DecoderConfig::from_json(
//!     r#"{"model_type": "qwen2", "vocab_size": 16, "hidden_size": 16, "intermediate_size": 32,
//!         "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}"#,
//! )?;
//! write_model(&folder, &config, &Weights::random(&config, 1, 0.1, &candle_core::Device::Cpu)?)?;
//!
//! // The ranks that torchrun or our launcher started; without them a world of one. Nothing else changes.
//! let settings = StrategyConfig { train_batch_size: 1, rollout_batch_size: 1, ..StrategyConfig::default() };
//! let strategy = Strategy::with_world(settings, Rendezvous::from_env()?.init()?)?;
//! let mut actor = strategy.prepare_actor(&folder)?;
//!
//! let batch = [Sequence { prompt: &[3, 4, 5], answer: &[6, 7, 1] }];
//! let (before, _) = strategy.supervised_step(&mut actor, &batch, 1e-2)?;
//! let (after, _) = strategy.supervised_step(&mut actor, &batch, 1e-2)?;
//! assert!(after < before, "the answer has become more likely");
//! # std::fs::remove_dir_all(&folder)?;
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```
//!
//! The whole of a run is the example `grpo_arithmetic`. Not here: servers as engines, GPUs, critics.

mod actor_saver;
mod agree;
mod checkpoint;
mod config;
mod cores;
mod engine_group;
mod error;
mod export;
mod grpo;
mod metrics;
pub mod model;
mod offload;
pub mod plot;
mod prepare;
pub mod rl;
pub mod schedule;
mod step;
mod strategy;
mod supervised;
mod text;
mod weight_sync;

pub use actor_saver::ActorSaver;
pub use checkpoint::{LoadOptions, Loaded, RunState};
pub use config::{EngineType, OldLogProbs, StrategyConfig};
pub use error::{Error, Result};
pub use export::write_model;
pub use grpo::{Answer, Grpo, GrpoParts, RewardFn, Score, StepMetrics, check_prompts};
pub use metrics::MetricsLog;
pub use offload::OffloadMetrics;
pub use prepare::{Actor, Reference};
pub use strategy::Strategy;
pub use text::Text;

// How an export is written, which checkpoint to load, and what a save tells.
#[doc(no_inline)]
pub use lightrft_ckpt::{Floats, HfOptions, Phase, Progress, SaveReport, Which};
// Types of the settings.
#[doc(no_inline)]
pub use lightrft_sharding::{GatherFrom, Precision, ShardSize};
