//! torch's own names and objects: types, tensors by value, tensors in another process's GPU memory.

use std::borrow::Cow;

use safetensors::Dtype;

use super::pickle::Value;
use crate::{Error, NamedTensor, Result, TensorInfo};

/// torch's name of an element type, its storage class and its size in bytes.
pub(super) struct TorchType {
    pub(super) name: &'static str,
    storage: &'static str,
    pub(super) size: usize,
}

/// The types that both engines' messages can carry.
pub(super) fn torch_type(tensor: &TensorInfo) -> Result<TorchType> {
    let (name, storage, size) = match tensor.dtype {
        Dtype::F64 => ("float64", "DoubleStorage", 8),
        Dtype::F32 => ("float32", "FloatStorage", 4),
        Dtype::BF16 => ("bfloat16", "BFloat16Storage", 2),
        Dtype::F16 => ("float16", "HalfStorage", 2),
        Dtype::I64 => ("int64", "LongStorage", 8),
        Dtype::I32 => ("int32", "IntStorage", 4),
        Dtype::I16 => ("int16", "ShortStorage", 2),
        Dtype::I8 => ("int8", "CharStorage", 1),
        Dtype::U8 => ("uint8", "ByteStorage", 1),
        Dtype::BOOL => ("bool", "BoolStorage", 1),
        got => {
            let expected = "F64, F32, BF16, F16, I64, I32, I16, I8, U8 or BOOL";
            return Err(Error::Dtype { name: tensor.name.clone(), got, expected });
        }
    };
    Ok(TorchType { name, storage, size })
}

/// Bytes of tensors that lie one after the other without gaps, which torch cannot take apart unless each begins at a
/// multiple of its elements' size.
pub(super) fn back_to_back(tensors: &[TensorInfo]) -> Result<usize> {
    let mut end = 0_usize;
    for tensor in tensors {
        let size = torch_type(tensor)?.size;
        if !end.is_multiple_of(size) {
            let what = format!("`{}` would begin at byte {end}, its elements have {size}", tensor.name);
            return Err(Error::Source(format!("{what}: widest elements first was expected").into()));
        }
        end = end.saturating_add(tensor.bytes()?);
    }
    Ok(end)
}

pub(super) fn dtype(name: &'static str) -> Value<'static> {
    Value::Global("torch", name.into())
}

pub(super) fn size(shape: &[usize]) -> Value<'static> {
    Value::call(Value::Global("torch", "Size".into()), [Value::counts(shape.iter().copied())])
}

/// Elements from one index to the next, of a row-major tensor.
fn strides(shape: &[usize]) -> Value<'static> {
    let mut step = 1_usize;
    let inner_first = shape.iter().rev().map(|dim| {
        let this = step;
        step = step.saturating_mul(*dim);
        this
    });
    let mut strides: Vec<usize> = inner_first.collect();
    strides.reverse();
    Value::counts(strides)
}

/// A tensor with its elements, as torch pickles one that lies in host memory.
pub(super) fn tensor_by_value<'a>(tensor: &NamedTensor<'a>) -> Result<Value<'a>> {
    let kind = torch_type(&tensor.info())?;
    Ok(rebuilt(vec![Cow::Borrowed(tensor.bytes())], tensor.shape(), kind.storage, kind.size))
}

/// Bytes, as a one-dimensional tensor of `torch.uint8`.
pub(super) fn bytes_by_value(pieces: Vec<Cow<'_, [u8]>>) -> Value<'_> {
    let length = pieces.iter().map(|piece| piece.len()).sum();
    rebuilt(pieces, &[length], "ByteStorage", 1)
}

fn rebuilt<'a>(
    pieces: Vec<Cow<'a, [u8]>>,
    shape: &[usize],
    storage: &'static str,
    item_bytes: usize,
) -> Value<'a> {
    let arguments = [
        saved_storage(pieces, storage, item_bytes),
        Value::Int(0),
        Value::counts(shape.iter().copied()),
        strides(shape),
        Value::Bool(false),
        Value::call(Value::Global("collections", "OrderedDict".into()), []),
    ];
    Value::call(Value::Global("torch._utils", "_rebuild_tensor_v2".into()), arguments)
}

/// One storage in the format of `torch.save` before it wrote zip files, which is the one that torch's pickles embed:
/// magic number, format version, the writer's machine, the storage's type, its key, its length and its bytes.
fn saved_storage<'a>(pieces: Vec<Cow<'a, [u8]>>, storage: &'static str, item_bytes: usize) -> Value<'a> {
    const FORMAT: i64 = 1001;
    let bytes: usize = pieces.iter().map(|piece| piece.len()).sum();
    let items = bytes / item_bytes;
    let sizes = Value::Dict(Value::named([
        ("short", Value::Int(2)),
        ("int", Value::Int(4)),
        ("long", Value::Int(4)),
    ]));
    let machine = Value::Dict(Value::named([
        ("protocol_version", Value::Int(FORMAT)),
        ("little_endian", Value::Bool(true)),
        ("type_sizes", sizes),
    ]));
    let key = || Value::str("0");
    let place = vec![
        Value::str("storage"),
        Value::Global("torch", storage.into()),
        key(),
        Value::str("cpu"),
        Value::count(items),
        Value::None,
    ];
    // The magic number 0x1950a86a20f9469cfc6c as a LONG1 of ten bytes.
    let mut head = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.".to_vec();
    head.extend(Value::Int(FORMAT).dumped(2));
    head.extend(machine.dumped(2));
    head.extend(Value::Persistent(Box::new(Value::Tuple(place))).dumped(2));
    head.extend(Value::List(vec![key()]).dumped(2));
    head.extend((items as u64).to_le_bytes());
    let all = std::iter::once(Cow::Owned(head)).chain(pieces).collect();
    Value::call(Value::Global("torch.storage", "_load_from_bytes".into()), [Value::Bytes(all)])
}

/// What tells torch which memory of which GPU to open: the arguments after a tensor's own of
/// `torch.multiprocessing.reductions.rebuild_cuda_tensor`.
pub(super) struct CudaMemory<'a> {
    /// An ordinal, which the reader replaces, or a text that it looks up.
    pub(super) device: Value<'a>,
    pub(super) handle: &'a [u8; 64],
    pub(super) storage_bytes: usize,
    pub(super) offset_in_allocation: usize,
}

/// The fifteen arguments of `rebuild_cuda_tensor` for a one-dimensional tensor of `torch.uint8`.
///
/// No counter of references is kept (`/none` is a file that does not exist, which the reader accepts) and no event is
/// waited for: the sender synchronises its stream before it posts, and keeps the memory until the reply.
pub(super) fn rebuild_cuda_arguments(memory: CudaMemory<'_>) -> Vec<Value<'_>> {
    let shape = [memory.storage_bytes];
    vec![
        Value::Global("torch", "Tensor".into()),
        size(&shape),
        strides(&shape),
        Value::Int(0),
        Value::Global("torch.storage", "TypedStorage".into()),
        dtype("uint8"),
        memory.device,
        Value::bytes(memory.handle.as_slice()),
        Value::count(memory.storage_bytes),
        Value::count(memory.offset_in_allocation),
        Value::Bool(false),
        Value::bytes(b"/none".as_slice()),
        Value::Int(0),
        Value::bytes(b"".as_slice()),
        Value::Bool(false),
    ]
}
