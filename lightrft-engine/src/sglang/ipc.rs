//! Weights through GPU memory that the server's worker opens (CUDA IPC): a flattened bucket whose bytes lie there.

use std::time::Duration;

use super::control::{Control, ServerInfo};
use super::settings::bad;
use super::transfer::Transport;
use crate::cuda::{GpuBucket, GpuBuckets, Relay};
use crate::wire::sglang::cuda_bucket;
use crate::wire::{CudaIpcBuffer, GpuUuid};
use crate::{NamedTensor, Result};

/// How long the bucket may take that an update which came to nothing has left under way.
const ABANDON: Duration = Duration::from_secs(30);

/// Two buffers in turns: while the server takes one, the other is filled.
#[derive(Debug)]
pub(super) struct CudaIpc(Relay);

impl CudaIpc {
    pub(super) fn new(buckets: GpuBuckets) -> Self {
        Self(Relay::new("SGLang", buckets))
    }
}

impl Transport for CudaIpc {
    fn meet(&self, info: &ServerInfo) -> Result<()> {
        // It would die of the first bucket.
        let (shards, device) = (info.shards(), info.device.as_deref().unwrap_or("?"));
        if (shards, device) == (1, "cuda") {
            return Ok(());
        }
        let value = format!("CudaIpc, to a server on {shards} x {device}");
        bad("transfer", value, "a server of one shard, on a GPU that both sides see, was expected")
    }

    fn begin(&mut self, control: &Control) {
        self.0.land(control.patience()).ok();
    }

    fn begun(&mut self) {
        self.0.answered();
    }

    fn send(&mut self, control: &Control, shards: usize, bucket: &[NamedTensor<'_>]) -> Result<()> {
        let filled = self.0.fill(bucket)?;
        let message = message(&filled)?;
        let server = control.clone();
        let post = move || server.update_from_tensor(&message, shards);
        self.0.launch(filled, control.patience(), post)
    }

    fn buckets(&self) -> Option<GpuBuckets> {
        Some(self.0.buckets().clone())
    }

    fn send_gpu(&mut self, control: &Control, mut bucket: GpuBucket) -> Result<GpuBucket> {
        bucket.settle()?;
        let message = message(&bucket)?;
        self.0.send(bucket, control.patience(), || control.update_from_tensor(&message, 1))
    }

    fn finish(&mut self, control: &Control) -> Result<()> {
        self.0.land(control.patience())
    }

    fn ended(&mut self) {
        self.0.ended();
    }

    /// Memory that the server may still read is kept until it answers another update.
    fn abandon(&mut self, control: &Control) {
        // What a bucket that failed has to say is known already.
        self.0.land(control.patience().min(ABANDON)).ok();
        if !self.0.is_in_flight() {
            self.0.ended();
        }
    }
}

/// Where the server finds the tensors of a bucket.
fn message(bucket: &GpuBucket) -> Result<String> {
    let (gpu, handle) = (GpuUuid(bucket.uuid()), bucket.handle());
    let offsets: Vec<usize> = bucket.places().iter().map(|place| place.start).collect();
    let bytes = bucket.places().last().map_or(0, |place| place.end);
    let buffer = CudaIpcBuffer { gpu, handle, bytes, offset_in_allocation: 0 };
    cuda_bucket(bucket.tensors(), &offsets, &buffer)
}

#[cfg(test)]
#[path = "ipc_tests.rs"]
mod tests;
