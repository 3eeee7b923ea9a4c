//! A driver of vLLM servers, started by it or attached to by their address.
//!
//! ```no_run
//! use lightrft_engine::vllm::{Start, VllmEngine};
//! use lightrft_engine::{Engine, EngineExt, Level, Parts, Request, Sampling};
//!
//! let mut start = Start::new("/models/Qwen2.5-0.5B-Instruct");
//! start.gpus = vec![0];
//! let mut engine = VllmEngine::start(&start, &mut |progress| println!("{}", progress.last_line))?;
//! let completions = engine.complete(&[Request::new([1, 2, 3], Sampling::default()).samples(8)])?;
//! engine.sleep(Level::One)?; // the memory is the trainer's
//! engine.wake(Parts::All)?;
//! # Ok::<_, lightrft_engine::Error>(())
//! ```
//!
//! A server that was started here ends with this process, however that ends. Its weights are replaced through
//! [`Engine::begin_update`](crate::Engine::begin_update), by a [`Transfer`].
//!
//! [`EngineExt::update_from`](crate::EngineExt::update_from) compares names and shapes with those of the model's
//! safetensors files before the server is asked for anything, as far as they are on this machine ([`Attach::model`] says
//! where, if the server's own folder is not). Names are those of the files: a trainer that calls the parts of a
//! Qwen2.5-VL as `transformers` does maps them to an older folder's by
//! [`Prefixes::qwen2_5_vl_to_sglang`](crate::Prefixes::qwen2_5_vl_to_sglang). A head that is tied to the embedding is
//! not sent. With [`Verify::Checksums`] the server's weights are compared with what was sent before they are used.
//!
//! vLLM 0.23 to 0.32 are supported: the oldest was run on a GPU, the newest on a CPU. The log warns of newer ones, older
//! ones are refused. Sleeping, waking, updates and aborting need its development routes (`VLLM_SERVER_DEV_MODE=1`), and
//! generating needs `--enable-scale-out` where there is such a flag: a server started here has both, one that is attached
//! to must have been given them.
//!
//! What 0.23 lacks: pictures and films with a prompt's tokens (refused), the version of the weights that drew a completion
//! (the driver's own count stands for it), which of several stop texts ended one (an error, if there are several), and a
//! route to abort single requests (all of the server's are aborted).
//!
//! Where vLLM differs from the contract of [`Sampling`](crate::Sampling): with `min_new_tokens`, it does not draw the
//! model's own end-of-text token before that many tokens either, be it a stop token or not.

mod control;
mod engine;
mod flight;
#[cfg(feature = "testing")]
pub(crate) mod fuzzing;
#[cfg(feature = "cuda")]
mod ipc;
mod reply;
mod settings;
mod transfer;
mod update;
mod verify;
mod wire;

pub use crate::server::Verify;
pub use engine::VllmEngine;
pub use flight::Requests;
pub use settings::{Attach, Driver, Start, Transfer};
