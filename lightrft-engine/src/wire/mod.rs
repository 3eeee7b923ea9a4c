//! Bytes that stock engines expect of a trainer that is not written in Python.
//!
//! vLLM and `SGLang` take weights as pickles of torch's own calls, as packed buffers cut by a rule that both sides must know,
//! and as keys of torch's store. These are their exact forms, made without torch, pickle or a GPU; nothing is ever read
//! back. [`sglang`] and [`vllm`] hold one function for each message.
//!
//! ```
//! use lightrft_engine::{Dtype, NamedTensor, wire};
//!
//! let norm = NamedTensor::new("model.norm.weight", Dtype::BF16, &[2], &[0x80, 0x3f, 0x80, 0x3f])?;
//! let payload = wire::sglang::flattened_bucket(&[norm])?; // an entry of `serialized_named_tensors`
//! assert!(payload.starts_with("gAR9K")); // base64 of a pickle of protocol 4
//! # Ok::<_, lightrft_engine::Error>(())
//! ```

mod cuda_ipc;
mod pickle;
mod torch;

pub mod sglang;
pub mod vllm;

pub use cuda_ipc::{CudaIpcBuffer, GpuUuid};

/// ncclGetUniqueId's bytes, which every rank of a group gets before it joins.
pub type NcclUniqueId = [u8; 128];
