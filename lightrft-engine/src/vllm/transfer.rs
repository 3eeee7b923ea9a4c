//! How weights reach the server: a folder that it loads, or files in shared memory behind its update routes.

use std::fmt;
use std::io;
use std::path::PathBuf;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

use super::control::Control;
use super::settings::Transfer;
#[cfg(feature = "cuda")]
use crate::cuda::{GpuBucket, GpuBuckets};
use crate::server::TYPES;
use crate::shared::{Lying, SharedBuckets, StagingFolder, default_parent};
use crate::{Error, NamedTensor, Result};

/// One way for weights. Its calls come in the order `begin`, any number of `send`, `finish`; or `abandon` at any point
/// after `begin`, and then `begin` again.
pub(super) trait Transport: fmt::Debug + Send {
    /// Learns what the server is, and refuses one that this way does not reach.
    fn meet(&mut self, _: &Control, _version: &str) -> Result<()> {
        Ok(())
    }

    /// Prepares the server, which is paused.
    fn begin(&mut self, control: &Control) -> Result<()>;

    /// Hands over a bucket. After an error the update cannot be finished.
    fn send(&mut self, control: &Control, bucket: &[NamedTensor<'_>]) -> Result<()>;

    /// The GPU on which it takes buckets, if it does.
    #[cfg(feature = "cuda")]
    fn buckets(&self) -> Option<GpuBuckets> {
        None
    }

    /// Memory that the server's workers see too, if it has any.
    fn shared_buckets(&self) -> Option<SharedBuckets> {
        None
    }

    /// Hands over a bucket that lies on that GPU, and gives it back once the server has it.
    #[cfg(feature = "cuda")]
    fn send_gpu(&mut self, _: &Control, bucket: GpuBucket) -> Result<GpuBucket> {
        Err(failed("send weights", format!("{bucket:?} where weights were expected on the host")))
    }

    /// Makes the server use what was sent.
    fn finish(&mut self, control: &Control) -> Result<()>;

    /// Forgets what was sent. The server's weights are worth nothing then.
    fn abandon(&mut self, control: &Control);
}

/// The transport that the settings ask for.
pub(super) fn transport(transfer: &Transfer) -> Result<Box<dyn Transport>> {
    Ok(match transfer {
        Transfer::Folder { staging } => Box::new(Folder {
            parent: staging.clone().unwrap_or_else(default_parent),
            staged: None,
            files: 0,
        }),
        Transfer::SharedMemory { folder } => Box::new(SharedMemory {
            buckets: SharedBuckets::within(folder.clone().unwrap_or_else(|| PathBuf::from("/dev/shm"))),
            greeted: false,
        }),
        #[cfg(feature = "cuda")]
        Transfer::CudaIpc { gpu } => Box::new(super::ipc::CudaIpc::new(GpuBuckets::on(*gpu)?)),
    })
}

pub(super) fn failed(
    operation: &'static str,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> Error {
    Error::Backend { engine: "vLLM", operation, source: source.into() }
}

/// A folder of safetensors files, one for each bucket, which the server then loads as it loads a model.
#[derive(Debug)]
struct Folder {
    parent: PathBuf,
    staged: Option<StagingFolder>,
    files: usize,
}

impl Transport for Folder {
    fn begin(&mut self, _: &Control) -> Result<()> {
        let named = |source: io::Error| {
            let what = format!("{}: {source}", self.parent.display());
            failed("make a folder for weights", io::Error::new(source.kind(), what))
        };
        self.staged = Some(StagingFolder::new(&self.parent).map_err(named)?);
        self.files = 0;
        Ok(())
    }

    fn send(&mut self, _: &Control, bucket: &[NamedTensor<'_>]) -> Result<()> {
        let Some(folder) = &self.staged else { return Err(failed("stage weights", "no update was begun")) };
        if bucket.is_empty() {
            return Ok(());
        }
        let mut views = Vec::with_capacity(bucket.len());
        for tensor in bucket {
            let view = TensorView::new(tensor.dtype(), tensor.shape().to_vec(), tensor.bytes());
            views.push((tensor.name(), view.map_err(|error| failed("stage weights", error))?));
        }
        let file = folder.path().join(format!("bucket-{:06}.safetensors", self.files));
        safetensors::serialize_to_file(views, None, &file).map_err(|error| failed("stage weights", error))?;
        self.files += 1;
        Ok(())
    }

    fn finish(&mut self, control: &Control) -> Result<()> {
        let Some(folder) = self.staged.take() else {
            return Err(failed("load weights", "no update was begun"));
        };
        let Some(path) = folder.path().to_str() else {
            return Err(failed("load weights", format!("{} is not UTF-8", folder.path().display())));
        };
        control.post_json(
            "/collective_rpc",
            &json!({"method": "reload_weights", "kwargs": {"weights_path": path}}),
        )?;
        Ok(())
    }

    fn abandon(&mut self, _: &Control) {
        self.staged = None;
    }
}

/// Files in shared memory, read by the plug-in of the server's workers.
#[derive(Debug)]
struct SharedMemory {
    buckets: SharedBuckets,
    /// The workers' plug-in has been found, in this or in a former update.
    greeted: bool,
}

/// Told to the plug-in, so that neither misreads the other: files are written to again once a bucket was sent, so what
/// workers still need of them then they must have copied.
const PROTOCOL: u32 = 2;

/// Of each tensor in a file: any element type may begin there.
const ALIGNMENT: usize = 64;

impl Transport for SharedMemory {
    fn shared_buckets(&self) -> Option<SharedBuckets> {
        Some(self.buckets.clone())
    }

    fn begin(&mut self, control: &Control) -> Result<()> {
        self.buckets.prepare().map_err(|error| failed("stage weights", error))?;
        if !self.greeted {
            let hello = json!({"init_info": {"protocol": PROTOCOL}});
            control.post_json("/init_weight_transfer_engine", &hello)?;
            // A trainer that was here before may have left an update open, or parts of layers.
            clear(control)?;
            self.greeted = true;
        }
        control.post("/start_weight_update")?;
        Ok(())
    }

    fn send(&mut self, control: &Control, bucket: &[NamedTensor<'_>]) -> Result<()> {
        if bucket.is_empty() {
            return Ok(());
        }
        // Held until the workers have what is in it, where it is memory of the caller's own.
        let mut copy = None;
        let lying = match self.buckets.find(bucket) {
            Some(lying) => lying,
            None => {
                let (offsets, end) = layout(bucket);
                let memory = self.buckets.take(end).map_err(|error| failed("stage weights", error))?;
                let memory = copy.insert(memory);
                for (tensor, offset) in bucket.iter().zip(&offsets) {
                    memory[*offset..offset + tensor.bytes().len()].copy_from_slice(tensor.bytes());
                }
                Lying { file: memory.path().to_owned(), offsets, end }
            }
        };
        let info = update_info(&lying, bucket)?;
        Ok(control.post_json("/update_weights", &json!({ "update_info": info }))?)
    }

    fn finish(&mut self, control: &Control) -> Result<()> {
        control.post("/finish_weight_update")?;
        Ok(())
    }

    fn abandon(&mut self, control: &Control) {
        if let Err(error) = clear(control) {
            tracing::warn!(%error, "could not end the server's weight update");
            self.greeted = false;
        }
    }
}

/// Ends whatever update the server has open. Layers that have not got all of their parts hold on to those that came, and
/// would take them for parts of the next update; the end of an update clears that. One that failed is over already, and
/// takes another one to clear.
pub(super) fn clear(control: &Control) -> Result<()> {
    if control.post("/finish_weight_update").is_err() {
        control.post("/start_weight_update")?;
        control.post("/finish_weight_update")?;
    }
    Ok(())
}

/// Where each tensor begins in a file, and where the last one ends.
fn layout(bucket: &[NamedTensor<'_>]) -> (Vec<usize>, usize) {
    let mut offsets = Vec::with_capacity(bucket.len());
    let mut end = 0_usize;
    for tensor in bucket {
        let begin = end.next_multiple_of(ALIGNMENT);
        offsets.push(begin);
        end = begin + tensor.bytes().len();
    }
    // Nothing cannot be mapped.
    (offsets, end.max(1))
}

/// What the plug-in is told of a file.
fn update_info(lying: &Lying, bucket: &[NamedTensor<'_>]) -> Result<serde_json::Value> {
    let Some(file) = lying.file.to_str() else {
        return Err(failed("send weights", format!("{} is not UTF-8", lying.file.display())));
    };
    let names: Vec<&str> = bucket.iter().map(NamedTensor::name).collect();
    let dtype_names = bucket.iter().map(torch_name).collect::<Result<Vec<_>>>()?;
    let shapes: Vec<&[usize]> = bucket.iter().map(NamedTensor::shape).collect();
    Ok(json!({
        "file": file,
        "bytes": lying.end,
        "names": names,
        "dtype_names": dtype_names,
        "shapes": shapes,
        "offsets": lying.offsets,
    }))
}

fn torch_name(tensor: &NamedTensor<'_>) -> Result<&'static str> {
    match tensor.dtype() {
        Dtype::F32 => Ok("float32"),
        Dtype::BF16 => Ok("bfloat16"),
        Dtype::F16 => Ok("float16"),
        got => Err(Error::Dtype { name: tensor.name().to_owned(), got, expected: TYPES }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_told_where_every_tensor_lies() {
        let (a, b, c) = ([1_u8; 12], [2_u8; 130], [3_u8; 2]);
        let bucket = [
            NamedTensor::new("a", Dtype::F32, &[3], &a).unwrap(),
            NamedTensor::new("b", Dtype::BF16, &[5, 13], &b).unwrap(),
            NamedTensor::new("c", Dtype::F16, &[1], &c).unwrap(),
        ];
        let (offsets, end) = layout(&bucket);
        assert_eq!((offsets.as_slice(), end), (&[0, 64, 256][..], 258));
        let lying = Lying { file: "/dev/shm/f".into(), offsets, end };
        assert_eq!(
            update_info(&lying, &bucket).unwrap().to_string(),
            concat!(
                r#"{"bytes":258,"dtype_names":["float32","bfloat16","float16"],"file":"/dev/shm/f","#,
                r#""names":["a","b","c"],"offsets":[0,64,256],"shapes":[[3],[5,13],[1]]}"#
            )
        );
        assert_eq!(layout(&[]), (vec![], 1));
    }
}
