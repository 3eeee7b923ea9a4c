//! Collectives on GPU memory, through NCCL: one process per GPU
//!
//! An [`Nccl`] is a group on the host with a GPU in each rank's hand. Calls on host memory go to the group on the host; calls on
//! device memory are *enqueued* on the stream that their buffers name, and have not happened when they
//! return:
//!
//! ```no_run
//! use lightrft_collectives::nccl::{DeviceMemory, Nccl, Options, Stream};
//! use lightrft_collectives::{CommunicatorExt, Operation, ReduceOp, Rendezvous};
//! use std::time::Duration;
//!
//! let rendezvous = Rendezvous::from_env()?;
//! let comm = Nccl::new(rendezvous.init()?, rendezvous.local_rank(), &Options::default())?;
//! let stream = Stream::new(rendezvous.local_rank())?;
//! let mut data = DeviceMemory::upload(&stream, &[1f32; 1024])?;
//! comm.run(Operation::AllReduce { data: data.as_buffer_mut(), op: ReduceOp::Sum })?; // enqueued
//! let sums: Vec<f32> = data.download(Duration::from_secs(10))?; // waits for the stream
//! comm.health()?; // and only now it is known that the sums are right
//! # Ok::<_, lightrft_collectives::Error>(())
//! ```
//!
//! What differs from groups on the host:
//! - **Sums have NCCL's order.** It depends on the number of ranks, the size and the machine, and sums of `bf16` and `f16` are
//!   rounded at each step. They are the same on every rank, but not the same bits as on the host.
//! - **Errors come late.** A call that was enqueued fails, if it does, while the stream comes to it. The watchdog then ends the
//!   communicators of the process; streams go on, their results are not defined. Ask [`Nccl::health`] after waiting
//!   for a stream and before using what it has computed.
//! - **What ranks disagree in is found out beside the calls**, some milliseconds later: [`Error::Mismatch`](crate::Error::Mismatch)
//!   on all ranks, with both sides, and the kernels that wait for each other are ended. [`Check::Calls`] compares before
//!   anything is enqueued, and [`Check`] says at which price.
//! - **The flight recorder has a line of its own for them**, `world on GPUs`. A call there begins when it is enqueued and ends when the
//!   watchdog has seen that the stream has passed it: up to a millisecond late.
//!
//! libnccl and the CUDA driver are looked for when the first group is made: `$NCCL_LIB`, `libnccl.so.2`,
//! `libnccl.so`; `libcuda.so.1`. On a machine without them that is an [`Error::Library`](crate::Error::Library).

mod comm;
mod communicator;
mod cuda;
mod device;
mod enqueue;
mod exported;
mod library;
mod life;
mod program;
mod raw;
mod record;
mod watchdog;

/// The driver's functions, the loader of libraries and the compiler of kernels, for the other crates of this workspace that
/// work on GPUs. Not part of this crate's promises.
#[doc(hidden)]
pub mod driver {
    pub use super::cuda::{Current, Gpu};
    pub use super::exported::{ExportedMemory, download};
    pub use super::library::{Library, open, symbols, toolkit, why};
    pub use super::program::{Argument, Kernel, Program, compile};
}

pub use communicator::{Check, Nccl, Options};
pub use device::{DeviceMemory, Event, Stream, count};
pub use record::{Enqueued, EnqueuedState};

/// Waits, `limit` at most, until the communicators that were dropped are destroyed; returns whether they are.
///
/// Dropping never waits: a thread destroys what was dropped, in two seconds at most. The end of the process waits for it by
/// itself, three seconds at most; this is for programs that need the GPU's memory back before.
pub fn wait_until_destroyed(limit: std::time::Duration) -> bool {
    watchdog::settle(limit)
}
