//! `SGLang`'s weight messages (0.5): tensors by value, a bucket in GPU memory, the store's keys of its NCCL group.

use std::borrow::Cow;
use std::io::Write;

use base64::engine::general_purpose::STANDARD;
use base64::write::EncoderStringWriter;

use super::CudaIpcBuffer;
use super::pickle::Value;
use super::torch::{self, dtype, tensor_by_value, torch_type};
use crate::{Error, NamedTensor, Result, TensorInfo};

/// An entry of `serialized_named_tensors` for `/update_weights_from_tensor`, without `load_format`: a list of
/// (name, tensor), every tensor with its own storage. In base64.
///
/// # Errors
/// [`Error::Dtype`] for elements that torch's plain storages do not have.
pub fn named_tensors(tensors: &[NamedTensor<'_>]) -> Result<String> {
    Ok(base64_pickle(&Value::List(tensors.iter().map(named_tensor).collect::<Result<_>>()?)))
}

fn named_tensor<'a>(tensor: &NamedTensor<'a>) -> Result<Value<'a>> {
    Ok(Value::Tuple(vec![Value::str(tensor.name()), tensor_by_value(tensor)?]))
}

/// An entry of `serialized_named_tensors` for `/update_weights_from_tensor` with `load_format` `flattened_bucket`: all
/// bytes as one tensor of `torch.uint8`, and where each parameter lies in it. In base64.
///
/// # Errors
/// [`Error::Dtype`] as above; [`Error::Source`] for no tensors at all, which `SGLang` does not take.
pub fn flattened_bucket(tensors: &[NamedTensor<'_>]) -> Result<String> {
    let infos: Vec<TensorInfo> = tensors.iter().map(NamedTensor::info).collect();
    let layout = BucketLayout::new(&infos)?;
    let mut pieces: Vec<Cow<'_, [u8]>> = Vec::with_capacity(tensors.len());
    let mut end = 0;
    for (tensor, (start, stop)) in tensors.iter().zip(&layout.places) {
        if *start > end {
            pieces.push(Cow::Owned(vec![0; start - end]));
        }
        pieces.push(Cow::Borrowed(tensor.bytes()));
        end = *stop;
    }
    Ok(base64_pickle(&layout.message(torch::bytes_by_value(pieces))))
}

/// As [`flattened_bucket`], with the bytes in GPU memory that the engine opens, those of each tensor at its offset: one of
/// [`bucket_offsets`], or any other that is a multiple of its elements' size.
///
/// The buffer must keep its contents until the engine has answered.
///
/// # Errors
/// As there; [`Error::Source`] for an offset that does not suit its tensor's elements, and if the buffer is smaller than
/// its tensors.
pub fn cuda_bucket(tensors: &[TensorInfo], offsets: &[usize], buffer: &CudaIpcBuffer) -> Result<String> {
    let layout = BucketLayout::at(tensors, offsets)?;
    let needed = layout.places.iter().map(|(_, end)| *end).max().unwrap_or(0);
    if buffer.bytes < needed {
        let what = format!("a buffer of {} bytes for tensors of {needed}", buffer.bytes);
        return Err(Error::Source(what.into()));
    }
    // SGLang looks a text up among its own devices; an ordinal would be this process's.
    let memory = buffer.memory(Value::str(buffer.gpu.to_string()));
    let rebuild = Value::Global("torch.multiprocessing.reductions", "rebuild_cuda_tensor".into());
    let flat = Value::call(rebuild, torch::rebuild_cuda_arguments(memory));
    Ok(base64_pickle(&layout.message(flat)))
}

/// Where each tensor of a bucket begins if they lie one after the other, at multiples of their elements' size.
///
/// # Errors
/// As [`flattened_bucket`].
pub fn bucket_offsets(tensors: &[TensorInfo]) -> Result<Vec<usize>> {
    Ok(BucketLayout::new(tensors)?.places.into_iter().map(|(start, _)| start).collect())
}

/// The key under which the group's rank 0 leaves an NCCL id for its `communicator`th communicator (the first is 0) in
/// the store that it serves: 128 raw bytes. `SGLang` puts the group's name before its keys twice.
pub fn nccl_id_key(group: &str, communicator: usize) -> String {
    format!("/{group}/{group}//cuda//{communicator}")
}

struct BucketLayout<'a> {
    tensors: &'a [TensorInfo],
    types: Vec<&'static str>,
    places: Vec<(usize, usize)>,
}

impl<'a> BucketLayout<'a> {
    /// One after the other.
    fn new(tensors: &'a [TensorInfo]) -> Result<Self> {
        Self::placed(tensors, |_, end, size| Ok(end.next_multiple_of(size)))
    }

    fn at(tensors: &'a [TensorInfo], offsets: &[usize]) -> Result<Self> {
        if offsets.len() != tensors.len() {
            let what = format!("{} offsets for {} tensors", offsets.len(), tensors.len());
            return Err(Error::Source(what.into()));
        }
        Self::placed(tensors, |at, _, size| {
            let (tensor, offset) = (&tensors[at].name, offsets[at]);
            match offset.is_multiple_of(size) {
                true => Ok(offset),
                false => {
                    let what = format!("`{tensor}` at offset {offset}, for elements of {size} bytes");
                    Err(Error::Source(what.into()))
                }
            }
        })
    }

    /// Each tensor where `place` puts it, given which it is, where the one before ends and its elements' size.
    fn placed(
        tensors: &'a [TensorInfo],
        place: impl Fn(usize, usize, usize) -> Result<usize>,
    ) -> Result<Self> {
        if tensors.is_empty() {
            return Err(Error::Source("a bucket without tensors, which SGLang refuses".into()));
        }
        let mut this = Self { tensors, types: Vec::new(), places: Vec::new() };
        let mut end = 0_usize;
        for (at, tensor) in tensors.iter().enumerate() {
            let kind = torch_type(tensor)?;
            let start = place(at, end, kind.size)?;
            end = start.saturating_add(tensor.bytes()?);
            this.types.push(kind.name);
            this.places.push((start, end));
        }
        Ok(this)
    }

    /// The dictionary that `SGLang` unpickles, around `flat`.
    fn message<'v>(&'v self, flat: Value<'v>) -> Value<'v> {
        let class =
            || Value::Global("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata".into());
        let metadata =
            self.tensors.iter().zip(&self.types).zip(&self.places).map(|((t, kind), (start, end))| {
                let attributes = Value::named([
                    ("name", Value::str(t.name.as_str())),
                    ("shape", torch::size(&t.shape)),
                    ("dtype", dtype(kind)),
                    ("start_idx", Value::count(*start)),
                    ("end_idx", Value::count(*end)),
                    ("numel", Value::count(end - start)),
                ]);
                Value::Object(Box::new(class()), attributes)
            });
        let metadata = Value::List(metadata.collect());
        Value::Dict(Value::named([("flattened_tensor", flat), ("metadata", metadata)]))
    }
}

/// The pickle in base64, encoded as it is written: a bucket is in memory once more, not twice.
fn base64_pickle(value: &Value<'_>) -> String {
    let mut out = EncoderStringWriter::new(&STANDARD);
    // Writing to memory does not fail.
    value.dump(4, &mut out as &mut dyn Write).ok();
    out.into_inner()
}
