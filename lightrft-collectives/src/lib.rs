//! Process groups, device meshes and collectives between the ranks of a training job
//!
//! ```
//! use lightrft_collectives::{CommunicatorExt, ReduceOp, local::World};
//!
//! // Two ranks, each a thread. Between processes only the first line changes.
//! let sums = World::run(2, |comm| {
//!     let mut data = [comm.rank() as f32 + 1.0; 4];
//!     comm.all_reduce(&mut data, ReduceOp::Sum)?;
//!     Ok(data)
//! })?;
//! assert_eq!(sums, [[3.0; 4], [3.0; 4]]);
//! # Ok::<_, lightrft_collectives::Error>(())
//! ```
//!
//! | you want | take |
//! |---|---|
//! | the group of all ranks of this job | [`Rendezvous::from_env`]`()?.`[`init`](Rendezvous::init)`()` |
//! | ranks as threads, for a test | [`local::World::run`] |
//! | collectives on slices and objects | [`CommunicatorExt`] |
//! | calls that run beside other work | [`Queue`], [`Pending`] |
//! | ranks named by axis, and their groups | [`DeviceMesh`], [`MeshGroups`], [`sub_groups`] |
//! | N processes on this machine | [`launch::Launcher`] |
//! | to write a backend | [`Communicator`], and the suite in `testing` |
//!
//! Calls block, but for those on a [`Queue`]. They are collective: every member of a group makes the same call, in the same order.
//!
//! Not here: tensors and layouts, see `lightrft-sharding`.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod acceptor;
mod auth;
mod buffer;
mod communicator;
mod device;
mod error;
pub mod flight;
mod fused;
#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod fuzzing;
mod group;
mod host;
pub mod launch;
mod live;
pub mod local;
mod memory;
mod mesh;
#[cfg(feature = "nccl")]
pub mod nccl;
mod object;
mod op;
mod operation;
mod pending;
mod preamble;
mod queue;
mod reduce;
mod rendezvous;
mod single;
mod site;
pub mod store;
#[cfg(feature = "testing")]
#[allow(clippy::panic)] // A broken promise fails the caller's test.
pub mod testing;
mod within;

pub use auth::Token;
pub use buffer::{Buffer, BufferMut, Elements, Host, HostMut};
pub use communicator::{Communicator, CommunicatorExt, GroupOptions, Sharing};
pub use device::{Device, DeviceMut, StreamHandle};
pub use error::{Differing, Error, Loss, Result};
pub use fused::Values;
pub use group::{MeshGroups, SubGroups, axis_group, sub_groups};
pub use host::Transport;
pub use memory::{GroupBuffer, GroupMemory};
pub use mesh::DeviceMesh;
pub use op::{Dtype, Element, ReduceOp};
pub use operation::{Call, DeviceOperation, HostOperation, Operation, Signature};
pub use pending::Pending;
pub use queue::Queue;
pub use rendezvous::{Rendezvous, Source};
pub use single::Single;
pub use within::Within;

/// How long a rank waits for a slow one unless told otherwise: 60 minutes, as LightRFT's process groups.
pub const DEFAULT_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(60 * 60);

/// The README's examples, compiled and run with the others.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
