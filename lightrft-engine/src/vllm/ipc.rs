//! Weights through GPU memory that the server's worker opens (CUDA IPC): vLLM's own `ipc` backend, packed.

use std::ops::Range;

use serde_json::{Value, json};

use super::control::{Control, knows_packed_init};
use super::transfer::{Transport, clear};
use crate::cuda::{GpuBucket, GpuBuckets, Relay};
use crate::wire::vllm::UpdateInfo;
use crate::wire::{CudaIpcBuffer, GpuUuid};
use crate::{Error, NamedTensor, Result, ServerError};

/// Two buffers in turns: while the server takes one, the other is filled.
#[derive(Debug)]
pub(super) struct CudaIpc {
    relay: Relay,
    packed: Packed,
    /// The server's backend is ready, and no other trainer's update is open.
    greeted: bool,
}

/// Where the server is told that many tensors share a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packed {
    AtInit,
    /// By older ones.
    InEachUpdate,
}

impl CudaIpc {
    pub(super) fn new(buckets: GpuBuckets) -> Self {
        Self { relay: Relay::new("vLLM", buckets), packed: Packed::AtInit, greeted: false }
    }

    fn greet(&mut self, control: &Control) -> Result<()> {
        let init =
            |info: Value| control.post_json("/init_weight_transfer_engine", &json!({"init_info": info}));
        match self.packed {
            Packed::InEachUpdate => init(json!({}))?,
            Packed::AtInit => match init(json!({"packed": true})) {
                Err(ServerError::Status { message, .. }) if message.contains("packed") => {
                    self.packed = Packed::InEachUpdate;
                    init(json!({}))?;
                }
                result => result?,
            },
        }
        // A trainer that was here before may have left an update open, or parts of layers.
        clear(control)?;
        self.greeted = true;
        Ok(())
    }

    /// The messages of a bucket: one, unless its tensors do not lie back to back, as the server takes them.
    fn messages(&self, bucket: &GpuBucket) -> Result<Vec<Value>> {
        let gpu = GpuUuid(bucket.uuid());
        let message = |run: Range<usize>| {
            let tensors = bucket.tensors().get(run.clone()).unwrap_or_default();
            let places = bucket.places().get(run).unwrap_or_default();
            let begin = places.first().map_or(0, |place| place.start);
            let end = places.last().map_or(0, |place| place.end);
            let handle = bucket.handle();
            let buffer = CudaIpcBuffer { gpu, handle, bytes: end - begin, offset_in_allocation: begin };
            let mut info = json!(UpdateInfo::cuda_ipc(tensors, &buffer)?);
            if self.packed == Packed::InEachUpdate {
                info["packed"] = json!(true);
            }
            Ok(json!({ "update_info": info }))
        };
        runs(bucket.places()).into_iter().map(message).collect()
    }
}

fn post(control: &Control, messages: &[Value]) -> Result<(), ServerError> {
    messages.iter().try_for_each(|message| control.post_json("/update_weights", message))
}

/// Runs of tensors without a gap between them.
fn runs(places: &[Range<usize>]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (at, place) in places.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if places.get(run.end - 1).is_some_and(|last| last.end == place.start) => {
                run.end = at + 1;
            }
            _ => runs.push(at..at + 1),
        }
    }
    runs
}

impl Transport for CudaIpc {
    fn meet(&mut self, control: &Control, version: &str) -> Result<()> {
        if !knows_packed_init(version) {
            self.packed = Packed::InEachUpdate;
        }
        let ours = GpuUuid(self.relay.buckets().uuid()).to_string();
        let theirs = match control.gpus_of_workers() {
            Ok(theirs) => theirs,
            Err(error) => {
                // It finds out by itself when the first bucket comes, and says so.
                tracing::debug!(%error, "this server does not say on which GPU it is");
                return Ok(());
            }
        };
        if theirs.iter().all(|gpu| *gpu == ours) {
            return Ok(());
        }
        Err(Error::Settings {
            engine: "vLLM",
            field: "transfer",
            value: format!("CudaIpc on GPU {ours}, and the server on {}", theirs.join(", ")),
            expected: "one GPU for both was expected: choose the GPU here, or `gpus` of the server",
        })
    }

    fn begin(&mut self, control: &Control) -> Result<()> {
        // An update that was leaked may have left one under way.
        self.relay.land(control.patience()).ok();
        if !self.greeted {
            self.greet(control)?;
        }
        control.post("/start_weight_update")?;
        self.relay.answered();
        Ok(())
    }

    fn send(&mut self, control: &Control, bucket: &[NamedTensor<'_>]) -> Result<()> {
        if bucket.is_empty() {
            return Ok(());
        }
        let filled = self.relay.fill(bucket)?;
        let messages = self.messages(&filled)?;
        let server = control.clone();
        self.relay.launch(filled, control.patience(), move || post(&server, &messages))
    }

    fn buckets(&self) -> Option<GpuBuckets> {
        Some(self.relay.buckets().clone())
    }

    fn send_gpu(&mut self, control: &Control, mut bucket: GpuBucket) -> Result<GpuBucket> {
        bucket.settle()?;
        let messages = self.messages(&bucket)?;
        self.relay.send(bucket, control.patience(), || post(control, &messages))
    }

    fn finish(&mut self, control: &Control) -> Result<()> {
        self.relay.land(control.patience())?;
        control.post("/finish_weight_update")?;
        self.relay.ended();
        Ok(())
    }

    fn abandon(&mut self, control: &Control) {
        // What a bucket that failed has to say is known already.
        let landed = self.relay.land(control.patience()).err().filter(|_| self.relay.is_in_flight());
        let cleared = match landed {
            Some(still_in_flight) => Err(still_in_flight),
            None => clear(control),
        };
        // The server may be another than the one that was greeted, started anew at its address.
        self.greeted = false;
        if let Err(error) = cleared {
            tracing::warn!(%error, "could not end the server's weight update");
            return;
        }
        // A worker that answers this has done with what came before.
        self.relay.answered();
        self.relay.ended();
    }
}

#[cfg(test)]
#[path = "ipc_tests.rs"]
mod tests;
