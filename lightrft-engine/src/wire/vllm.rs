//! vLLM's weight messages (0.32): packed chunks, an NCCL id, a buffer in GPU memory, and their JSON.

use std::ops::Range;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;

use super::pickle::Value;
use super::torch::{back_to_back, rebuild_cuda_arguments, torch_type};
use super::{CudaIpcBuffer, NcclUniqueId};
use crate::{Error, Result, TensorInfo};

/// `init_info` of the `nccl` backend: which ranks of the trainer's group are the engine's workers.
///
/// Rank 0 is the trainer. The call that carries this returns once the group is up, so the trainer joins meanwhile: with
/// `ncclCommInitRank` and then at once an all-reduce (sum) of one f32, which the workers wait for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NcclInit {
    /// Rank of the engine's first worker.
    pub rank_offset: usize,
    /// The trainer's rank 0 and all workers.
    pub world_size: usize,
    /// The id in base64; see [`NcclInit::new`].
    pub nccl_unique_id_b64: String,
    /// Chunks of many tensors, by [`packed_chunks`], instead of a broadcast for each.
    pub packed: bool,
    /// The limit of [`packed_chunks`].
    pub packed_buffer_size_bytes: usize,
    /// Buffers that a worker alternates between.
    pub packed_num_buffers: usize,
}

impl NcclInit {
    /// A group of the trainer's rank 0 and `workers` workers, which receive chunks by [`packed_chunks`].
    pub fn new(id: &NcclUniqueId, workers: usize, buffer_bytes: usize) -> Self {
        Self {
            rank_offset: 1,
            world_size: workers.saturating_add(1),
            nccl_unique_id_b64: STANDARD.encode(id),
            packed: true,
            packed_buffer_size_bytes: buffer_bytes,
            packed_num_buffers: 2,
        }
    }
}

/// `update_info` of `/update_weights`: the tensors that are about to come, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct UpdateInfo {
    /// Names as in the model's files.
    pub names: Vec<String>,
    /// torch's names of their element types.
    pub dtype_names: Vec<&'static str>,
    /// Their whole shapes.
    pub shapes: Vec<Vec<usize>>,
    /// Of the `ipc` backend only: bytes of each tensor in the buffer, one after the other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tensor_sizes: Option<Vec<usize>>,
    /// Of the `ipc` backend only: where the buffer is, as a pickle in base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipc_handles_pickled: Option<String>,
}

impl UpdateInfo {
    /// Of the `nccl` backend and those built like it.
    ///
    /// # Errors
    /// [`Error::Dtype`] for elements that torch's plain types do not have.
    pub fn broadcast(tensors: &[TensorInfo]) -> Result<Self> {
        Ok(Self {
            names: tensors.iter().map(|t| t.name.clone()).collect(),
            dtype_names: tensors.iter().map(|t| Ok(torch_type(t)?.name)).collect::<Result<_>>()?,
            shapes: tensors.iter().map(|t| t.shape.clone()).collect(),
            tensor_sizes: None,
            ipc_handles_pickled: None,
        })
    }

    /// Of the `ipc` backend, packed: the tensors lie in `buffer` back to back. The worker has copied them when it
    /// answers, so the buffer can then be filled anew.
    ///
    /// # Errors
    /// [`Error::Dtype`] as above; [`Error::Source`] if the buffer is smaller than its tensors, or if one of them does not
    /// begin at a multiple of its elements' size, where a worker cannot read it.
    pub fn cuda_ipc(tensors: &[TensorInfo], buffer: &CudaIpcBuffer) -> Result<Self> {
        let sizes = tensors.iter().map(TensorInfo::bytes).collect::<Result<Vec<_>>>()?;
        let needed = back_to_back(tensors)?;
        if buffer.bytes < needed {
            let what = format!("a buffer of {} bytes for tensors of {needed}", buffer.bytes);
            return Err(Error::Source(what.into()));
        }
        Ok(Self {
            tensor_sizes: Some(sizes),
            ipc_handles_pickled: Some(STANDARD.encode(ipc_handles(buffer))),
            ..Self::broadcast(tensors)?
        })
    }
}

/// The pickle of `{gpu uuid: arguments of rebuild_cuda_tensor}`. The worker puts its own ordinal in place of the
/// device.
fn ipc_handles(buffer: &CudaIpcBuffer) -> Vec<u8> {
    let arguments = rebuild_cuda_arguments(buffer.memory(Value::Int(0)));
    Value::Dict(vec![(Value::str(buffer.gpu.to_string()), Value::Tuple(arguments))]).dumped(4)
}

/// How `tensors` of these many bytes are cut into chunks, which both sides must do alike: tensors are appended until
/// their sum is *greater* than `buffer_bytes`, so a chunk may exceed it by its last tensor. One broadcast of exactly a
/// chunk's bytes each, as `uint8`.
///
/// In its chunk every tensor must begin at a multiple of its elements' size, or the worker fails. Tensors that are sent
/// with the widest elements first all do.
///
/// ```
/// let chunks = lightrft_engine::wire::vllm::packed_chunks(&[4, 4, 4, 9, 1], 8);
/// assert_eq!(chunks, [0..3, 3..4, 4..5]); // 8 bytes are not more than 8: the third tensor goes along
/// ```
pub fn packed_chunks(sizes: &[usize], buffer_bytes: usize) -> Vec<Range<usize>> {
    let mut chunks = Vec::new();
    let (mut start, mut sum) = (0, 0_usize);
    for (at, size) in sizes.iter().enumerate() {
        sum = sum.saturating_add(*size);
        if sum > buffer_bytes {
            chunks.push(start..at + 1);
            (start, sum) = (at + 1, 0);
        }
    }
    if start < sizes.len() {
        chunks.push(start..sizes.len());
    }
    chunks
}

/// What the trainer's store holds under [`NCCL_ID_KEY`] where the group meets in a store instead of by
/// [`NcclInit`]: 247 bytes, the pickle of a ctypes structure.
pub fn pickled_nccl_id(id: &NcclUniqueId) -> Vec<u8> {
    // A frame of protocol 4 and its length; `_ctypes._unpickle(ncclUniqueId, ({}, bytes))`, with memo marks as
    // Python's own pickler leaves them.
    let mut out = b"\x80\x04\x95\xec\0\0\0\0\0\0\0".to_vec();
    out.extend(b"\x8c\x07_ctypes\x94\x8c\x09_unpickle\x94\x93\x94");
    out.extend(b"\x8c\x34vllm.distributed.device_communicators.pynccl_wrapper\x94");
    out.extend(b"\x8c\x0cncclUniqueId\x94\x93\x94}\x94\x43\x80");
    out.extend(id);
    out.extend(b"\x94\x86\x94\x86\x94R\x94.");
    out
}

/// The key of [`pickled_nccl_id`] in the trainer's store.
pub const NCCL_ID_KEY: &str = "/broadcast_from/0/0";
