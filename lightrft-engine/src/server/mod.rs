//! What all drivers of inference servers share: HTTP calls, the server's process, requests sent side by side.

// Until both drivers are built on it.
#![allow(dead_code, unused_imports)]

mod error;
mod http;
mod parallel;
mod process;

pub use error::{Call, ServerError};
pub use http::ApiKey;
pub(crate) use http::{Http, Reply};
pub(crate) use parallel::in_parallel;
pub use process::StartProgress;
pub(crate) use process::{ServerCommand, ServerProcess, free_port};
