//! How weights reach the server: in the calls themselves, or through memory of a GPU that both sides see.

use std::fmt;

use super::control::{Control, ServerInfo};
use super::settings::Transfer;
#[cfg(feature = "cuda")]
use crate::cuda::{GpuBucket, GpuBuckets};
use crate::wire::sglang::flattened_bucket;
use crate::{NamedTensor, Result};

/// One way for weights. Its calls come in the order `begin`, `begun`, any number of `send`, `finish`, `ended`; or `abandon` at
/// any point after `begin`, and then `begin` again.
pub(super) trait Transport: fmt::Debug + Send {
    /// Refuses a server that this way does not reach.
    fn meet(&self, _: &ServerInfo) -> Result<()> {
        Ok(())
    }

    /// Before the session of an update: what a leaked one has left under way comes to its end.
    fn begin(&mut self, _: &Control) {}

    /// The server has opened the session of an update.
    fn begun(&mut self) {}

    /// Hands over a bucket that is not empty, to each of `shards` workers.
    fn send(&mut self, control: &Control, shards: usize, bucket: &[NamedTensor<'_>]) -> Result<()>;

    /// The GPU on which it takes buckets, if it does.
    #[cfg(feature = "cuda")]
    fn buckets(&self) -> Option<GpuBuckets> {
        None
    }

    /// Hands over a bucket that lies on that GPU, and gives it back once the server has it.
    #[cfg(feature = "cuda")]
    fn send_gpu(&mut self, _: &Control, bucket: GpuBucket) -> Result<GpuBucket> {
        Err(crate::Error::Backend {
            engine: "SGLang",
            operation: "send weights",
            source: format!("{bucket:?} where weights were expected on the host").into(),
        })
    }

    /// Waits until the server has taken all that was sent.
    fn finish(&mut self, _: &Control) -> Result<()> {
        Ok(())
    }

    /// The session has ended well.
    fn ended(&mut self) {}

    /// Forgets what was sent.
    fn abandon(&mut self, _: &Control) {}
}

/// The transport that the settings ask for.
pub(super) fn transport(transfer: &Transfer) -> Result<Box<dyn Transport>> {
    Ok(match transfer {
        Transfer::ByValue => Box::new(ByValue),
        #[cfg(feature = "cuda")]
        Transfer::CudaIpc { gpu } => Box::new(super::ipc::CudaIpc::new(GpuBuckets::on(*gpu)?)),
    })
}

/// Each bucket is the body of a call.
#[derive(Debug)]
struct ByValue;

impl Transport for ByValue {
    fn send(&mut self, control: &Control, shards: usize, bucket: &[NamedTensor<'_>]) -> Result<()> {
        Ok(control.update_from_tensor(&flattened_bucket(bucket)?, shards)?)
    }
}
