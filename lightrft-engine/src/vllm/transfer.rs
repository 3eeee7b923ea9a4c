//! How weights reach the server: a folder that it loads, or files in shared memory behind its update routes.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

use super::control::Control;
use super::settings::Transfer;
use super::staging::{StagingFolder, default_parent};
#[cfg(feature = "cuda")]
use crate::cuda::{GpuBucket, GpuBuckets};
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
            parent: folder.clone().unwrap_or_else(|| PathBuf::from("/dev/shm")),
            staged: None,
            files: 0,
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

/// A file in shared memory for each bucket, read by the plug-in of the server's workers.
#[derive(Debug)]
struct SharedMemory {
    parent: PathBuf,
    staged: Option<StagingFolder>,
    files: usize,
    /// The workers' plug-in has been found, in this or in a former update.
    greeted: bool,
}

/// Of each tensor in a file: any element type may begin there.
const ALIGNMENT: usize = 64;

impl Transport for SharedMemory {
    fn begin(&mut self, control: &Control) -> Result<()> {
        if self.staged.is_none() {
            let named = |source: io::Error| {
                let what = format!("{}: {source}", self.parent.display());
                failed("make a folder for weights", io::Error::new(source.kind(), what))
            };
            self.staged = Some(StagingFolder::new(&self.parent).map_err(named)?);
        }
        if !self.greeted {
            control.post_json("/init_weight_transfer_engine", &json!({"init_info": {"protocol": 1}}))?;
            // A trainer that was here before may have left an update open, or parts of layers.
            clear(control)?;
            self.greeted = true;
        }
        control.post("/start_weight_update")?;
        Ok(())
    }

    fn send(&mut self, control: &Control, bucket: &[NamedTensor<'_>]) -> Result<()> {
        let Some(folder) = &self.staged else { return Err(failed("stage weights", "no update was begun")) };
        if bucket.is_empty() {
            return Ok(());
        }
        let path = folder.path().join(format!("bucket-{:06}", self.files));
        self.files += 1;
        let (offsets, bytes) = layout(bucket);
        let named = |source: io::Error| {
            let what = format!("{}: {source}", path.display());
            failed("stage weights", io::Error::new(source.kind(), what))
        };
        let sent = write(&path, bucket, &offsets, bytes).map_err(named).and_then(|()| {
            let info = update_info(&path.to_string_lossy(), bucket, &offsets, bytes)?;
            Ok(control.post_json("/update_weights", &json!({ "update_info": info }))?)
        });
        // The workers have mapped it, or never will.
        let _ = fs::remove_file(&path);
        sent
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

/// Where each tensor begins in a file, and the file's length.
fn layout(bucket: &[NamedTensor<'_>]) -> (Vec<usize>, usize) {
    let mut offsets = Vec::with_capacity(bucket.len());
    let mut end = 0_usize;
    for tensor in bucket {
        let begin = end.next_multiple_of(ALIGNMENT);
        offsets.push(begin);
        end = begin + tensor.bytes().len();
    }
    // An empty file cannot be mapped.
    (offsets, end.max(1))
}

fn write(
    path: &std::path::Path,
    bucket: &[NamedTensor<'_>],
    offsets: &[usize],
    bytes: usize,
) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    let mut at = 0;
    for (tensor, offset) in bucket.iter().zip(offsets) {
        file.write_all(&[0; ALIGNMENT][..offset - at])?;
        file.write_all(tensor.bytes())?;
        at = offset + tensor.bytes().len();
    }
    file.set_len(bytes as u64)
}

/// What the plug-in is told of a file.
fn update_info(
    file: &str,
    bucket: &[NamedTensor<'_>],
    offsets: &[usize],
    bytes: usize,
) -> Result<serde_json::Value> {
    let names: Vec<&str> = bucket.iter().map(NamedTensor::name).collect();
    let dtype_names = bucket.iter().map(torch_name).collect::<Result<Vec<_>>>()?;
    let shapes: Vec<&[usize]> = bucket.iter().map(NamedTensor::shape).collect();
    Ok(json!({
        "file": file,
        "bytes": bytes,
        "names": names,
        "dtype_names": dtype_names,
        "shapes": shapes,
        "offsets": offsets,
    }))
}

/// Element types that are taken.
pub(super) const TYPES: &str = "F32, BF16 or F16";

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
    fn a_file_holds_every_tensor_where_the_worker_is_told() {
        let (a, b, c) = ([1_u8; 12], [2_u8; 130], [3_u8; 2]);
        let bucket = [
            NamedTensor::new("a", Dtype::F32, &[3], &a).unwrap(),
            NamedTensor::new("b", Dtype::BF16, &[5, 13], &b).unwrap(),
            NamedTensor::new("c", Dtype::F16, &[1], &c).unwrap(),
        ];
        let (offsets, bytes) = layout(&bucket);
        assert_eq!((offsets.as_slice(), bytes), (&[0, 64, 256][..], 258));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        write(&path, &bucket, &offsets, bytes).unwrap();
        let written = fs::read(&path).unwrap();
        assert_eq!(written.len(), bytes);
        for (tensor, offset) in bucket.iter().zip(&offsets) {
            assert_eq!(&written[*offset..offset + tensor.bytes().len()], tensor.bytes());
        }
        assert_eq!(
            update_info("/dev/shm/f", &bucket, &offsets, bytes).unwrap().to_string(),
            concat!(
                r#"{"bytes":258,"dtype_names":["float32","bfloat16","float16"],"file":"/dev/shm/f","#,
                r#""names":["a","b","c"],"offsets":[0,64,256],"shapes":[[3],[5,13],[1]]}"#
            )
        );
        assert_eq!(layout(&[]), (vec![], 1));
    }
}
