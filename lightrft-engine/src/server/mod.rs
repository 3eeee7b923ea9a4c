//! What all drivers of inference servers share: HTTP calls, the server's process, requests sent side by side.

mod args;
mod autopsy;
mod complete;
mod error;
mod flight;
mod folder;
#[cfg(feature = "testing")]
pub(crate) mod fuzzing;
mod http;
mod jobs;
mod metrics;
mod model;
mod parallel;
mod process;
mod pushed;
#[cfg(feature = "vllm")]
mod scan;
mod verify;

pub(crate) use args::{Flags, Names, refuse};
#[cfg(feature = "sglang")]
pub(crate) use autopsy::PROBE;
pub(crate) use autopsy::autopsy;
pub use error::{Call, ServerError};
pub(crate) use flight::Flight;
pub(crate) use folder::OwnedFolder;
pub use http::ApiKey;
pub(crate) use http::{Http, Reply, without_secrets};
pub(crate) use jobs::{Ask, Job, jobs};
pub(crate) use metrics::MetricNames;
pub use metrics::Metrics;
pub(crate) use model::{MediaLimits, Model};
pub(crate) use parallel::in_parallel;
pub use process::StartProgress;
pub(crate) use process::{ServerCommand, ServerProcess, on_port};
#[cfg(feature = "cuda")]
pub(crate) use pushed::Described;
#[cfg(feature = "vllm")]
pub(crate) use pushed::TYPES;
pub(crate) use pushed::{Pushed, described};
#[cfg(feature = "vllm")]
pub(crate) use scan::{Keys, Malformed, Read, Scan};
pub use verify::Verify;
