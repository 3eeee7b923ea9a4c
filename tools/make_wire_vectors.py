"""Reference bytes for the weight messages of `lightrft-engine`, each read back by what an engine reads it with.

Run from the root of the repository:

    python tools/make_wire_vectors.py               # writes lightrft-engine/tests/data/wire_vectors.json

The committed file was made with Python 3.11 and torch 2.13.0; the bytes depend on neither. What is written here is
assembled opcode by opcode from the names in Python's `pickle` module, without its pickler, and then proved:

    named_tensors, flattened_bucket    unpickled with torch, and compared tensor by tensor
    cuda_bucket, ipc_handles           unpickled with `rebuild_cuda_tensor` replaced, and compared argument by argument
    nccl_id                            equal to what Python's own pickler writes of such a ctypes structure
"""

import base64
import ctypes
import io
import json
import pathlib
import pickle
import struct
import sys
import types

import torch

UUID = "00112233-4455-6677-8899-aabbccddeeff"
HANDLE = bytes(range(64))
NCCL_ID = bytes(range(128))


def text(value):
    raw = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw


def raw(value):
    return pickle.BINBYTES + struct.pack("<I", len(value)) + value


def number(n):
    if -(2**31) <= n < 2**31:
        return pickle.BININT + struct.pack("<i", n)
    size = (n if n >= 0 else ~n).bit_length() // 8 + 1
    return pickle.LONG1 + bytes([size]) + n.to_bytes(size, "little", signed=True)


def name(module, attribute):
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


def several(*items):
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def sequence(*items):
    return pickle.EMPTY_LIST + pickle.MARK + b"".join(items) + pickle.APPENDS


def mapping(*pairs):
    return pickle.EMPTY_DICT + pickle.MARK + b"".join(k + v for k, v in pairs) + pickle.SETITEMS


def named(**items):
    return mapping(*((text(k), v) for k, v in items.items()))


def call(function, *arguments):
    return function + several(*arguments) + pickle.REDUCE


def whole(value, protocol=4):
    return pickle.PROTO + bytes([protocol]) + value + pickle.STOP


def numbers(values):
    return several(*map(number, values))


def torch_size(shape):
    return call(name("torch", "Size"), numbers(shape))


def contiguous(shape):
    steps, step = [], 1
    for dim in reversed(shape):
        steps.insert(0, step)
        step *= dim
    return numbers(steps)


def storage(data, kind, item):
    """The five pickles and the bytes that torch.save wrote before its zip format."""
    magic = 0x1950A86A20F9469CFC6C
    parts = [
        pickle.LONG1 + b"\x0a" + magic.to_bytes(10, "little"),
        number(1001),
        named(protocol_version=number(1001), little_endian=pickle.NEWTRUE,
              type_sizes=named(short=number(2), int=number(4), long=number(4))),
        several(text("storage"), name("torch", kind), text("0"), text("cpu"), number(len(data) // item),
                pickle.NONE) + pickle.BINPERSID,
        sequence(text("0")),
    ]
    body = b"".join(whole(part, 2) for part in parts) + struct.pack("<q", len(data) // item) + data
    return call(name("torch.storage", "_load_from_bytes"), raw(body))


def by_value(data, shape, kind, item):
    return call(name("torch._utils", "_rebuild_tensor_v2"), storage(data, kind, item), number(0), numbers(shape),
                contiguous(shape), pickle.NEWFALSE, call(name("collections", "OrderedDict")))


def cuda_arguments(size, device, offset):
    return [name("torch", "Tensor"), torch_size([size]), contiguous([size]), number(0),
            name("torch.storage", "TypedStorage"), name("torch", "uint8"), device, raw(HANDLE), number(size),
            number(offset), pickle.NEWFALSE, raw(b"/none"), number(0), raw(b""), pickle.NEWFALSE]


# The tensors that the test makes as well: every element type that trainers use, a scalar, an empty one, and a bf16
# tensor of six bytes before one of f32, so that a bucket needs two bytes of room between them.
TENSORS = {
    "model.norm.weight": torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16),
    "model.w": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "half": torch.tensor([[0.25], [65504.0]], dtype=torch.float16),
    "steps": torch.tensor(-7, dtype=torch.int64),
    "empty": torch.zeros(0, 4, dtype=torch.float32),
    "flags": torch.tensor([True, False, True]),
    "größe": torch.tensor([3, 250], dtype=torch.uint8),
}
KINDS = {torch.float32: "FloatStorage", torch.bfloat16: "BFloat16Storage", torch.float16: "HalfStorage",
         torch.int64: "LongStorage", torch.bool: "BoolStorage", torch.uint8: "ByteStorage"}


def data_of(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def named_tensors():
    pairs = (several(text(n), by_value(data_of(t), list(t.shape), KINDS[t.dtype], t.itemsize))
             for n, t in TENSORS.items())
    return whole(sequence(*pairs))


def layout():
    end, places = 0, []
    for tensor in TENSORS.values():
        start = -(-end // tensor.itemsize) * tensor.itemsize
        end = start + tensor.nbytes
        places.append((start, end))
    return places


def bucket(flat):
    metadata = (
        name("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata") + pickle.EMPTY_TUPLE + pickle.NEWOBJ
        + named(name=text(n), shape=torch_size(t.shape), dtype=name("torch", str(t.dtype).removeprefix("torch.")),
                start_idx=number(a), end_idx=number(b), numel=number(b - a)) + pickle.BUILD
        for (n, t), (a, b) in zip(TENSORS.items(), layout()))
    return whole(named(flattened_tensor=flat, metadata=sequence(*metadata)))


def flattened_bucket():
    data = bytearray(layout()[-1][1])
    for tensor, (a, b) in zip(TENSORS.values(), layout()):
        data[a:b] = data_of(tensor)
    return bucket(by_value(bytes(data), [len(data)], "ByteStorage", 1))


class Metadata:
    """Stands where SGLang has its dataclass."""


class Reader(pickle.Unpickler):
    """torch's own functions, except those that need a GPU or SGLang."""

    def find_class(self, module, attribute):
        if attribute == "FlattenedTensorMetadata":
            return Metadata
        if attribute == "rebuild_cuda_tensor":
            return lambda *arguments: arguments
        return super().find_class(module, attribute)


def read(data):
    return Reader(io.BytesIO(data)).load()


def prove_bucket(message, flat):
    assert [m.name for m in message["metadata"]] == list(TENSORS)
    for meta, (key, tensor) in zip(message["metadata"], TENSORS.items()):
        assert (meta.shape, meta.dtype) == (tensor.shape, tensor.dtype), key
        assert meta.numel == meta.end_idx - meta.start_idx == tensor.nbytes, key
        if flat is not None:
            assert torch.equal(flat[meta.start_idx:meta.end_idx].view(meta.dtype).reshape(meta.shape), tensor), key


def prove_cuda(arguments, size, device, offset):
    assert arguments == (torch.Tensor, torch.Size([size]), (1,), 0, torch.storage.TypedStorage, torch.uint8, device,
                         HANDLE, size, offset, False, b"/none", 0, b"", False), arguments


def nccl_id():
    """Python's own pickle of the structure, from a module of the name that vLLM's has."""
    module = types.ModuleType("vllm.distributed.device_communicators.pynccl_wrapper")
    kind = type("ncclUniqueId", (ctypes.Structure,),
                {"_fields_": [("internal", ctypes.c_byte * 128)], "__module__": module.__name__})
    module.ncclUniqueId = kind
    sys.modules[module.__name__] = module
    return pickle.dumps(kind.from_buffer_copy(NCCL_ID), protocol=4)


vectors = {
    "named_tensors": named_tensors(),
    "flattened_bucket": flattened_bucket(),
    "cuda_bucket": bucket(call(name("torch.multiprocessing.reductions", "rebuild_cuda_tensor"),
                               *cuda_arguments(layout()[-1][1], text(UUID), 512))),
    "ipc_handles": whole(mapping((text(UUID), several(*cuda_arguments(3 << 31, number(0), 1 << 31))))),
    "nccl_id": nccl_id(),
}

loaded = read(vectors["named_tensors"])
assert [k for k, _ in loaded] == list(TENSORS)
assert all(torch.equal(t, TENSORS[k]) and t.dtype == TENSORS[k].dtype for k, t in loaded)
message = read(vectors["flattened_bucket"])
prove_bucket(message, message["flattened_tensor"])
message = read(vectors["cuda_bucket"])
prove_bucket(message, None)
prove_cuda(message["flattened_tensor"], layout()[-1][1], UUID, 512)
((gpu, arguments),) = read(vectors["ipc_handles"]).items()
assert gpu == UUID
prove_cuda(arguments, 3 << 31, 0, 1 << 31)
assert len(vectors["nccl_id"]) == 247

path = pathlib.Path("lightrft-engine/tests/data/wire_vectors.json")
encoded = {key: base64.b64encode(value).decode() for key, value in vectors.items()}
path.write_text(json.dumps(encoded, indent=1) + "\n")
print(f"{path}: {', '.join(f'{k} {len(v)} bytes' for k, v in vectors.items())}")
