//! `SGLang`'s weight messages (0.5): tensors by value, a bucket in GPU memory, and its NCCL group: the store's keys and the
//! JSON.

use std::borrow::Cow;
use std::io::Write;

use base64::engine::general_purpose::STANDARD;
use base64::write::EncoderStringWriter;
use serde::Serialize;

use super::CudaIpcBuffer;
use super::pickle::Value;
use super::torch::{self, back_to_back, dtype, tensor_by_value, torch_type};
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

/// Body of `/init_weights_update_group`: the server's workers join a group of torch whose rank 0 is the trainer.
///
/// The trainer serves the store that all meet in; the workers look for the NCCL id there, under [`nccl_id_key`], when
/// the first tensor comes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NcclInit {
    /// Host of the trainer's store.
    pub master_address: String,
    /// Its port.
    pub master_port: u16,
    /// Rank of the server's first worker.
    pub rank_offset: usize,
    /// The trainer's rank 0 and all workers.
    pub world_size: usize,
    /// The group's name, which later messages repeat. Not empty.
    pub group_name: String,
    /// `nccl`.
    pub backend: &'static str,
}

impl NcclInit {
    /// A group of the trainer's rank 0, which serves a store at `address` and `port`, and `workers` workers.
    pub fn new(address: impl Into<String>, port: u16, workers: usize, group: impl Into<String>) -> Self {
        Self {
            master_address: address.into(),
            master_port: port,
            rank_offset: 1,
            world_size: workers.saturating_add(1),
            group_name: group.into(),
            backend: "nccl",
        }
    }
}

/// Body of `/update_weights_from_distributed`: the tensors that are about to come through a group, in order.
///
/// It is posted between `/begin_weight_update` and `/end_weight_update`, and answered once the tensors are there: rank 0
/// broadcasts meanwhile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DistributedUpdate {
    /// Names as in the model's files.
    pub names: Vec<String>,
    /// torch's names of their element types.
    pub dtypes: Vec<&'static str>,
    /// Their whole shapes.
    pub shapes: Vec<Vec<usize>>,
    /// The group's name.
    pub group_name: String,
    /// Whether the server forgets its prefixes afterwards. It refuses to while requests run: for the last bucket only.
    pub flush_cache: bool,
    /// `flattened_bucket`, or a broadcast for each tensor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_format: Option<&'static str>,
    /// What the server calls its weights from now on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_version: Option<String>,
}

impl DistributedUpdate {
    /// A broadcast for each tensor, of its own elements. The cache is left alone, and the version.
    ///
    /// # Errors
    /// [`Error::Dtype`] for elements that torch's plain types do not have.
    pub fn one_by_one(tensors: &[TensorInfo], group: impl Into<String>) -> Result<Self> {
        Ok(Self {
            names: tensors.iter().map(|t| t.name.clone()).collect(),
            dtypes: tensors.iter().map(|t| Ok(torch_type(t)?.name)).collect::<Result<_>>()?,
            shapes: tensors.iter().map(|t| t.shape.clone()).collect(),
            group_name: group.into(),
            flush_cache: false,
            load_format: None,
            weight_version: None,
        })
    }

    /// One broadcast of all bytes, as `uint8`, one tensor after the other without gaps: unlike in [`flattened_bucket`],
    /// which says where each lies.
    ///
    /// # Errors
    /// [`Error::Dtype`] as above; [`Error::Source`] for no tensors at all, and for one that would not begin at a multiple of
    /// its elements' size, which `SGLang` refuses. With the widest elements first all do.
    pub fn bucket(tensors: &[TensorInfo], group: impl Into<String>) -> Result<Self> {
        check_some(tensors)?;
        back_to_back(tensors)?;
        Ok(Self { load_format: Some("flattened_bucket"), ..Self::one_by_one(tensors, group)? })
    }
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
        check_some(tensors)?;
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

fn check_some(tensors: &[TensorInfo]) -> Result<()> {
    match tensors {
        [] => Err(Error::Source("a bucket without tensors, which SGLang refuses".into())),
        _ => Ok(()),
    }
}

/// The pickle in base64, encoded as it is written: a bucket is in memory once more, not twice.
fn base64_pickle(value: &Value<'_>) -> String {
    let mut out = EncoderStringWriter::new(&STANDARD);
    // Writing to memory does not fail.
    value.dump(4, &mut out as &mut dyn Write).ok();
    out.into_inner()
}
