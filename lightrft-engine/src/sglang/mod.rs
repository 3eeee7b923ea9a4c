//! A driver of `SGLang` servers, started by it or attached to by their address.
//!
//! ```no_run
//! use lightrft_engine::sglang::{SglangEngine, Start};
//! use lightrft_engine::{Engine, EngineExt, HfFolder, Identity, Level, Parts, Request, Sampling, Version};
//!
//! let mut start = Start::new("/models/Qwen2.5-VL-7B-Instruct");
//! start.gpus = vec![0];
//! let mut engine = SglangEngine::start(&start, &mut |progress| println!("{}", progress.last_line))?;
//! let completions = engine.complete(&[Request::new([1, 2, 3], Sampling::default()).samples(8)])?;
//! engine.sleep(Level::Two)?; // the memory is the trainer's
//! engine.wake(Parts::Weights)?;
//! let mut weights = HfFolder::open("checkpoint-40".as_ref())?;
//! engine.update_from(Version(40), &mut weights, &Identity, 512 << 20)?;
//! engine.wake(Parts::Cache)?;
//! # Ok::<_, lightrft_engine::Error>(())
//! ```
//!
//! A server that was started here ends with this process, however that ends. `SGLang` 0.5 is known to work from 0.5.23 on:
//! earlier ones have no sessions of weight updates. Weights are sent by a [`Transfer`]: by value over HTTP, which any
//! server takes, on a GPU or not, or through GPU memory; [`SglangEngine::load_folder`] has the server read a folder instead.
//!
//! A server that is attached to must have been started with `SGLANG_VLM_CACHE_SIZE_MB=0` if its vision tower is updated:
//! else pictures that it has seen before are read with the former weights, since it cannot be told to forget them.
//!
//! A film is a file, such as an MP4, which the server reads by torchcodec or by decord: without either it answers a request with
//! status 500, and goes on. A row of pictures, which vLLM takes for one, it does not read.
//!
//! Where `SGLang` differs from the contract of [`Sampling`](crate::Sampling):
//! - With stop tokens, a completion also ends at the model's own end-of-text tokens; [`FinishReason::Stop`](crate::FinishReason::Stop) names which
//!   came. Without any, nothing but its length ends it.
//! - Seeds are honoured only by a server with `--enable-deterministic-inference` ([`Seeds`]), which needs a GPU.
//! - What `SGLang` cannot give as the contract says is refused: log-probabilities of the model's own distribution
//!   together with a ban on early stops or a repetition penalty, which it takes after those; log-probabilities of the
//!   draw with filters, which it takes before those.

mod control;
mod engine;
mod flight;
#[cfg(feature = "testing")]
pub(crate) mod fuzzing;
#[cfg(feature = "cuda")]
mod ipc;
mod settings;
mod transfer;
mod update;
mod wire;

pub use crate::server::Verify;
pub use engine::SglangEngine;
pub use flight::Requests;
pub use settings::{Attach, Driver, MemorySaver, Seeds, Start, Transfer};
