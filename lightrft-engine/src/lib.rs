//! An inference engine as a trainer sees it: generate, sleep, wake, take new weights.
//!
//! ```
//! use lightrft_engine::testing::{ScriptedEngine, TensorBytes};
//! use lightrft_engine::{EngineExt, Engine, Level, Parts, Request, Sampling, State, Version};
//!
//! // An engine of few lines, with a vocabulary of 32 tokens; the others are used the same way.
//! let mut engine = ScriptedEngine::new(32);
//! let prompt = Request::new([5, 6, 7], Sampling { max_new_tokens: 4, ..Sampling::default() }).samples(2);
//! assert_eq!(engine.complete(&[prompt.clone()])?.len(), 2);
//!
//! // The trainer needs the memory. Weights dropped at level 2 do not come back by waking.
//! engine.sleep(Level::Two)?;
//! engine.wake(Parts::All)?;
//! let refused = engine.complete(&[prompt.clone()]).unwrap_err();
//! assert_eq!(refused.to_string(), "cannot generate while stale: update its weights first");
//!
//! // New weights are a transaction, and every completion says which weights drew it.
//! let weights = engine.example_weights(1);
//! let tensors = weights.iter().map(TensorBytes::view).collect::<Result<Vec<_>, _>>()?;
//! engine.replace_weights(Version(1), &tensors, 1 << 20)?;
//! assert_eq!(engine.state(), State::READY);
//! assert_eq!(engine.complete(&[prompt])?[1].version, Version(1));
//! # Ok::<_, lightrft_engine::Error>(())
//! ```
//!
//! [`Engine`] is what an engine implements, [`EngineExt`] what callers use besides. Every call blocks; a caller's
//! deadline and progress listener are a [`Watch`]. Which call is allowed when is one table: [`State::after`].
//!
//! | feature | what it adds |
//! |---|---|
//! | `embedded` | `embedded::EmbeddedEngine`: Llama, Qwen2 and Qwen3 folders, in this process |
//! | `vllm` | `vllm::VllmEngine`: drives a vLLM server that it starts or is pointed at |
//! | `sglang` | `sglang::SglangEngine`: drives an `SGLang` server that it starts or is pointed at |
//! | `cuda` | weights from GPU memory; with `vllm` or `sglang`, into a server on the same GPU without the host; with `embedded`, that engine on a GPU |
//! | `testing` | `testing::ScriptedEngine`, and `testing::conformance` for any engine |
//! | `wire` | `wire`: the bytes of vLLM's and `SGLang`'s weight messages, without torch |
//!
//! Not here: gathering prompts of many ranks, and gathering sharded parameters for an update (`lightrft-strategy`).

#[cfg(feature = "cuda")]
pub mod cuda;
mod engine;
mod error;
mod fleet;
#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod fuzzing;
mod generate;
mod lifecycle;
mod media;
mod names;
#[cfg(any(feature = "sglang", feature = "vllm"))]
mod server;
#[cfg(feature = "vllm")]
pub mod shared;
mod transfer;
mod update;
#[cfg(feature = "vllm")]
pub mod vllm;

#[cfg(feature = "embedded")]
pub mod embedded;
#[cfg(feature = "sglang")]
pub mod sglang;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(feature = "wire")]
pub mod wire;

pub use engine::{Engine, EngineExt, MemoryBytes, Progress, Watch};
pub use error::{Error, Result};
pub use fleet::{DataParallel, Replica, ReplicaEvent, Restarts, Service};
pub use generate::{
    Completion, FinishReason, Limits, LogProbs, Request, Sampling, check_requests, refuse_stop_strings,
};
pub use lifecycle::{Cache, Event, Level, Parts, Refusal, State};
pub use media::{Media, MediaKind};
pub use names::{Identity, NameMap, Prefixes, Table, engine_names};
pub use safetensors::Dtype;
#[cfg(any(feature = "sglang", feature = "vllm"))]
pub use server::{ApiKey, Call, Metrics, ServerError, StartProgress};
pub use transfer::{HfFolder, Staging, TensorSlice, UpdateReport, WeightSource};
pub use update::{NamedTensor, TensorInfo, Update, Version};

/// The README's example compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
