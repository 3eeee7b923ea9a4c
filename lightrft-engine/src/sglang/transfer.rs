//! How weights reach the server: in the calls themselves, or through memory of a GPU that both sides see.

#[cfg(feature = "cuda")]
use std::time::Duration;

use super::control::{Control, ServerInfo};
use super::settings::Transfer;
#[cfg(feature = "cuda")]
use super::settings::bad;
#[cfg(feature = "cuda")]
use crate::cuda::{GpuBucket, GpuBuckets, Relay};
use crate::wire::sglang::flattened_bucket;
#[cfg(feature = "cuda")]
use crate::wire::{CudaIpcBuffer, GpuUuid, sglang::cuda_bucket};
use crate::{NamedTensor, Result};

/// How long the bucket may take that an update which came to nothing has left under way.
#[cfg(feature = "cuda")]
const ABANDON: Duration = Duration::from_secs(30);

/// One way for weights.
#[derive(Debug)]
pub(super) enum Transport {
    ByValue,
    #[cfg(feature = "cuda")]
    CudaIpc(Relay),
}

impl Transport {
    pub(super) fn new(transfer: &Transfer) -> Result<Self> {
        Ok(match transfer {
            Transfer::ByValue => Self::ByValue,
            #[cfg(feature = "cuda")]
            Transfer::CudaIpc { gpu } => Self::on(GpuBuckets::on(*gpu)?),
        })
    }

    #[cfg(feature = "cuda")]
    pub(super) fn on(buckets: GpuBuckets) -> Self {
        Self::CudaIpc(Relay::new("SGLang", buckets))
    }

    /// Refuses a server that this way does not reach: it would die of the first bucket.
    pub(super) fn meet(&self, info: &ServerInfo) -> Result<()> {
        match self {
            Self::ByValue => Ok(()),
            #[cfg(feature = "cuda")]
            Self::CudaIpc(_) => {
                let (shards, device) = (info.shards(), info.device.as_deref().unwrap_or("?"));
                if (shards, device) == (1, "cuda") {
                    return Ok(());
                }
                let value = format!("CudaIpc, to a server on {shards} x {device}");
                bad("transfer", value, "a server of one shard, on a GPU that both sides see, was expected")
            }
        }
    }

    /// Before the session of an update: what a leaked one has left under way comes to its end.
    pub(super) fn begin(&mut self, control: &Control) {
        match self {
            Self::ByValue => {}
            #[cfg(feature = "cuda")]
            Self::CudaIpc(relay) => drop(relay.land(control.patience())),
        }
    }

    /// The server has opened the session of an update.
    pub(super) fn begun(&mut self) {
        match self {
            Self::ByValue => {}
            #[cfg(feature = "cuda")]
            Self::CudaIpc(relay) => relay.answered(),
        }
    }

    /// Hands over a bucket that is not empty, to each of `shards` workers.
    pub(super) fn send(
        &mut self,
        control: &Control,
        shards: usize,
        bucket: &[NamedTensor<'_>],
    ) -> Result<()> {
        match self {
            Self::ByValue => Ok(control.update_from_tensor(&flattened_bucket(bucket)?, shards)?),
            #[cfg(feature = "cuda")]
            Self::CudaIpc(relay) => {
                let filled = relay.fill(bucket)?;
                let message = message(&filled)?;
                let server = control.clone();
                let post = move || server.update_from_tensor(&message, shards);
                relay.launch(filled, control.patience(), post)
            }
        }
    }

    /// The GPU on which it takes buckets, if it does.
    #[cfg(feature = "cuda")]
    pub(super) fn buckets(&self) -> Option<GpuBuckets> {
        match self {
            Self::ByValue => None,
            Self::CudaIpc(relay) => Some(relay.buckets().clone()),
        }
    }

    /// Hands over a bucket that lies on that GPU, and gives it back once the server has it.
    #[cfg(feature = "cuda")]
    pub(super) fn send_gpu(&mut self, control: &Control, mut bucket: GpuBucket) -> Result<GpuBucket> {
        match self {
            Self::ByValue => Err(crate::Error::Backend {
                engine: "SGLang",
                operation: "send weights",
                source: format!("{bucket:?} where weights were expected on the host").into(),
            }),
            Self::CudaIpc(relay) => {
                bucket.settle()?;
                let message = message(&bucket)?;
                relay.send(bucket, control.patience(), || control.update_from_tensor(&message, 1))
            }
        }
    }

    /// Waits until the server has taken all that was sent.
    pub(super) fn finish(&mut self, control: &Control) -> Result<()> {
        match self {
            Self::ByValue => Ok(()),
            #[cfg(feature = "cuda")]
            Self::CudaIpc(relay) => relay.land(control.patience()),
        }
    }

    /// The update has ended well.
    pub(super) fn ended(&mut self) {
        match self {
            Self::ByValue => {}
            #[cfg(feature = "cuda")]
            Self::CudaIpc(relay) => relay.ended(),
        }
    }

    /// Forgets what was sent. Memory that the server may still read is kept until it answers another update.
    pub(super) fn abandon(&mut self, control: &Control) {
        match self {
            Self::ByValue => {}
            #[cfg(feature = "cuda")]
            Self::CudaIpc(relay) => {
                if relay.land(control.patience().min(ABANDON)).is_ok() {
                    relay.ended();
                }
            }
        }
    }
}

/// Where the server finds the tensors of a bucket.
#[cfg(feature = "cuda")]
fn message(bucket: &GpuBucket) -> Result<String> {
    let (gpu, handle) = (GpuUuid(bucket.uuid()), bucket.handle());
    let offsets: Vec<usize> = bucket.places().iter().map(|place| place.start).collect();
    let bytes = bucket.places().last().map_or(0, |place| place.end);
    let buffer = CudaIpcBuffer { gpu, handle, bytes, offset_in_allocation: 0 };
    cuda_bucket(bucket.tensors(), &offsets, &buffer)
}

#[cfg(test)]
#[cfg(feature = "cuda")]
#[path = "ipc_tests.rs"]
mod tests;
