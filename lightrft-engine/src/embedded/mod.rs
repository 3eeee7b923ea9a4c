//! An engine in this process: Llama, Qwen2 and Qwen3 folders, continuous batching over a paged cache, on the CPU or a GPU.
//!
//! ```
//! use candle_core::Device;
//! use lightrft_engine::embedded::{DecoderConfig, EmbeddedEngine, Settings, Weights};
//! use lightrft_engine::{EngineExt, Request, Sampling};
//!
//! let config = DecoderConfig::from_json(
//!     r#"{"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
//!         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
//!         "max_position_embeddings": 128}"#,
//! )?;
//! let weights = Weights::random(&config, 1, 0.1, &Device::Cpu)?;
//! let mut engine = EmbeddedEngine::new(config, weights, Settings::default())?;
//!
//! let request = Request::new([3, 1, 4, 1, 5], Sampling { max_new_tokens: 8, ..Sampling::default() });
//! let completions = engine.complete(&[request.samples(4)])?;
//! assert_eq!(completions.len(), 4);
//! assert_eq!(completions[3].tokens.len(), completions[3].log_probs.len());
//! # Ok::<_, lightrft_engine::Error>(())
//! ```
//!
//! [`Settings::device`] puts weights, cache and arithmetic on a GPU (feature `cuda`). The driver, NVRTC and cuBLAS are looked
//! for when such an engine is made: `libcuda.so.1`, `$NVRTC_LIB` or `libnvrtc.so.13`, `libnvrtc.so.12`, and `$CUBLAS_LIB`
//! or `libcublas.so.13`, `libcublas.so.12`; those of the driver's version of CUDA first.
//!
//! [`EmbeddedEngine`] is the engine; [`Weights`] and [`DecoderConfig`] are its model, and [`Decoder`] the same forward pass
//! on candle, with gradients, for a trainer. [`draw`] is the sampling of one token, with [`uniform`] for its random
//! number.

mod config;
mod cpu;
mod decoder;
mod drive;
mod engine;
mod error;
#[cfg(feature = "cuda")]
mod gpu;
mod graft;
mod held;
mod host;
mod pages;
mod place;
mod sampling;
mod schedule;
mod step;
mod stop;
mod update;
mod weights;

pub use config::{DecoderConfig, Family, Parameter, ParameterGroup, RopeScaling};
pub use decoder::{Decoder, Frame};
pub use engine::{Device, EmbeddedEngine, Settings};
pub use error::{ModelError, ModelResult};
pub use sampling::{Draw, DrawKey, Past, Unusable, draw, uniform};
pub use stop::Detokenize;
pub use weights::Weights;
