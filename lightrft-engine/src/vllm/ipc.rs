//! Weights through GPU memory that the server's worker opens (CUDA IPC): vLLM's own `ipc` backend, packed.

use std::ops::Range;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::control::{Control, knows_packed_init};
use super::transfer::{Transport, clear, failed};
use crate::cuda::{GpuBucket, GpuBuckets, GpuMemory};
use crate::wire::vllm::UpdateInfo;
use crate::wire::{CudaIpcBuffer, GpuUuid};
use crate::{Error, NamedTensor, Result, ServerError, TensorInfo};

/// Two buffers in turns: while the server takes one, the other is filled.
#[derive(Debug)]
pub(super) struct CudaIpc {
    buckets: GpuBuckets,
    packed: Packed,
    /// The server's backend is ready, and no other trainer's update is open.
    greeted: bool,
    /// Memory that nobody reads.
    free: Vec<Box<dyn GpuMemory>>,
    /// Memory that was too small for a later bucket. The server keeps what it has read open until the update ends.
    outgrown: Vec<Box<dyn GpuMemory>>,
    /// A bucket that the server is taking.
    flight: Option<Receiver<Landed>>,
    /// Memory of calls that failed: the server may still read it, until it has answered a later one.
    kept: Vec<GpuBucket>,
}

/// Where the server is told that many tensors share a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packed {
    AtInit,
    /// By older ones.
    InEachUpdate,
}

type Landed = (GpuBucket, Result<(), ServerError>);

/// Every tensor begins at a multiple of this in a buffer, as those of a [`GpuBucket`] do.
const ALIGNMENT: usize = 16;

impl CudaIpc {
    pub(super) fn new(buckets: GpuBuckets) -> Self {
        let (free, outgrown, kept) = (Vec::new(), Vec::new(), Vec::new());
        Self { buckets, packed: Packed::AtInit, greeted: false, free, outgrown, flight: None, kept }
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

    /// Waits until the server has taken the bucket before, if there is one.
    fn land(&mut self, within: Duration) -> Result<()> {
        let Some(flight) = &self.flight else { return Ok(()) };
        let landed = match flight.recv_timeout(within) {
            Ok(landed) => landed,
            Err(RecvTimeoutError::Timeout) => {
                return Err(failed("send weights", "the server has not answered to a bucket yet"));
            }
            Err(RecvTimeoutError::Disconnected) => {
                self.flight = None;
                return Err(failed("send weights", "the thread that sent a bucket is gone"));
            }
        };
        self.flight = None;
        let (bucket, result) = landed;
        match result {
            Ok(()) => self.free.push(bucket.into_memory()),
            Err(_) => self.kept.push(bucket),
        }
        Ok(result?)
    }

    /// Memory of at least `bytes` bytes that nobody reads.
    fn memory(&mut self, bytes: usize) -> Result<Box<dyn GpuMemory>> {
        let fits = self.free.iter().position(|memory| memory.bytes() >= bytes);
        if let Some(at) = fits {
            return Ok(self.free.swap_remove(at));
        }
        // What is there is too small for this one, and so for those that are like it.
        self.outgrown.append(&mut self.free);
        self.buckets.allocate(bytes)
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

/// Where tensors of these many bytes lie in a buffer, and its length.
fn layout(sizes: impl Iterator<Item = usize>) -> (Vec<Range<usize>>, usize) {
    let mut end = 0_usize;
    let place = |bytes: usize| {
        let begin = end.next_multiple_of(ALIGNMENT);
        end = begin + bytes;
        begin..end
    };
    let places = sizes.map(place).collect();
    (places, end)
}

impl Transport for CudaIpc {
    fn meet(&mut self, control: &Control, version: &str) -> Result<()> {
        if !knows_packed_init(version) {
            self.packed = Packed::InEachUpdate;
        }
        let ours = GpuUuid(self.buckets.uuid()).to_string();
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
        self.land(control.patience()).ok();
        if !self.greeted {
            self.greet(control)?;
        }
        control.post("/start_weight_update")?;
        self.kept.clear();
        self.outgrown.clear();
        Ok(())
    }

    fn send(&mut self, control: &Control, bucket: &[NamedTensor<'_>]) -> Result<()> {
        if bucket.is_empty() {
            return Ok(());
        }
        let (places, bytes) = layout(bucket.iter().map(|tensor| tensor.bytes().len()));
        let mut memory = self.memory(bytes)?;
        for (tensor, place) in bucket.iter().zip(&places) {
            memory.upload(place.start, tensor.bytes())?;
        }
        let infos: Vec<TensorInfo> = bucket.iter().map(NamedTensor::info).collect();
        let mut filled = GpuBucket::new(infos, places, memory);
        filled.settle()?;
        let messages = self.messages(&filled)?;
        self.land(control.patience())?;
        // The server takes it while the caller gathers the next.
        let (land, flight) = sync_channel(1);
        let control = control.clone();
        let fly = move || {
            let result = post(&control, &messages);
            // Where nobody waits any more, the memory goes now that there is a reply, or never will be.
            let _ = land.send((filled, result));
        };
        let started = thread::Builder::new().name("lightrft-vllm-weights".to_owned()).spawn(fly);
        started.map_err(|error| failed("send weights", error))?;
        self.flight = Some(flight);
        Ok(())
    }

    fn buckets(&self) -> Option<GpuBuckets> {
        Some(self.buckets.clone())
    }

    fn send_gpu(&mut self, control: &Control, mut bucket: GpuBucket) -> Result<GpuBucket> {
        bucket.settle()?;
        let messages = self.messages(&bucket)?;
        self.land(control.patience())?;
        match post(control, &messages) {
            Ok(()) => Ok(bucket),
            Err(error) => {
                self.kept.push(bucket);
                Err(error.into())
            }
        }
    }

    fn finish(&mut self, control: &Control) -> Result<()> {
        self.land(control.patience())?;
        control.post("/finish_weight_update")?;
        self.free.clear();
        self.outgrown.clear();
        Ok(())
    }

    fn abandon(&mut self, control: &Control) {
        // What a bucket that failed has to say is known already.
        let landed = self.land(control.patience()).err().filter(|_| self.flight.is_some());
        let cleared = match landed {
            Some(still_in_flight) => Err(still_in_flight),
            None => clear(control),
        };
        if let Err(error) = cleared {
            tracing::warn!(%error, "could not end the server's weight update");
            self.greeted = false;
            return;
        }
        // A worker that answers this has done with what came before.
        self.kept.clear();
        self.free.clear();
        self.outgrown.clear();
    }
}

#[cfg(test)]
#[path = "ipc_tests.rs"]
mod tests;
