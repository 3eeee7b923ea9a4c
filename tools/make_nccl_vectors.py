"""What vLLM and SGLang themselves say and send where weights come by NCCL, recorded for `lightrft-engine`.

Run from the root of the repository, with a Python that has both (`tools/live/setup.sh sglang DIR` makes one):

    PYTHONPATH=DIR/sg DIR/venv/bin/python tools/make_nccl_vectors.py   # writes lightrft-engine/tests/data/nccl_vectors.json

The committed file was made with vLLM 0.32.0 and SGLang 0.5.23 on a CPU. No GPU is needed:

    packed           the chunks that vLLM's own producer broadcasts, through a group that notes the bytes. Streams of CUDA
                     are replaced by ones that do nothing. vLLM's own consumer then reads the chunks back, or cannot.
    vllm bodies      written by vLLM's own classes, as its own trainer sends them
    sglang bodies    every field is one of SGLang's class for that request, and its HTTP server's reader gives it back.
                     A bucket's tensors are laid out by SGLang's own code.
"""

import base64
import contextlib
import dataclasses
import itertools
import json
import pathlib

import torch
from pydantic import TypeAdapter
from sglang.srt.managers.io_struct import InitWeightsUpdateGroupReqInput, UpdateWeightsFromDistributedReqInput
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket
from vllm.distributed.weight_transfer import packed_tensor
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo

# What is sent, as pairs of type and shape, and the limit of a chunk.
PACKED = {
    "the sum is the limit, and more follows": (8, [("uint8", [4]), ("uint8", [4]), ("uint8", [1]), ("uint8", [2])]),
    "the sum is the limit at the end": (8, [("uint8", [5]), ("uint8", [3])]),
    "nothing is left over": (8, [("uint8", [4]), ("uint8", [5])]),
    "one tensor is over the limit": (8, [("float16", [2]), ("float32", [2, 3]), ("uint8", [1])]),
    "each is over the limit": (4, [("float32", [2]), ("float32", [3]), ("int64", [1])]),
    "types are mixed": (24, [("int64", []), ("float32", [2, 3]), ("float32", [1]), ("float16", [2, 1]), ("bfloat16", [3]),
                             ("uint8", [5]), ("uint8", [6])]),
    "six bytes come before one of four": (24, [("bfloat16", [3]), ("float32", [2, 3])]),
    "six bytes end the chunk before": (4, [("bfloat16", [3]), ("float32", [2, 3])]),
    "one in the middle is empty": (8, [("uint8", [4]), ("float32", [0, 4]), ("uint8", [5]), ("uint8", [1])]),
    "only an empty one is left over": (8, [("uint8", [9]), ("float32", [0, 4])]),
    "a limit of nothing": (0, [("uint8", [2]), ("float32", [0]), ("uint8", [1])]),
    "nothing at all": (8, []),
}


class Stream:
    def synchronize(self):
        pass


class Recorder:
    """Stands where the trainer has its communicator."""

    def __init__(self):
        self.chunks = []

    def broadcast(self, tensor, src):
        assert (src, tensor.dtype, tensor.dim()) == (0, torch.uint8, 1)
        self.chunks.append(bytes(tensor.tolist()))


class Player:
    """Stands where a worker has it."""

    def __init__(self, chunks):
        self.chunks = list(chunks)

    def broadcast(self, tensor, src):
        chunk = self.chunks.pop(0)
        assert tensor.numel() == len(chunk), (tensor.numel(), len(chunk))
        tensor.copy_(torch.tensor(list(chunk), dtype=torch.uint8))


def tensors(kinds):
    """Bytes that count up through all of them."""
    counter = itertools.count()
    for index, (dtype, shape) in enumerate(kinds):
        dtype = getattr(torch, dtype)
        size = torch.Size(shape).numel() * dtype.itemsize
        data = torch.tensor([next(counter) % 251 for _ in range(size)], dtype=torch.uint8)
        yield f"t{index}", data.view(dtype).reshape(shape)


def packed(limit, kinds):
    sent = Recorder()
    packed_tensor.packed_nccl_broadcast_producer(tensors(kinds), sent, 0, lambda item: item[1], limit)
    return {"buffer_bytes": limit, "tensors": [{"dtype": dtype, "shape": shape} for dtype, shape in kinds],
            "chunks": [chunk.hex() for chunk in sent.chunks], "readable": is_readable(limit, kinds, sent.chunks)}


def is_readable(limit, kinds, chunks):
    """Whether a worker finds the tensors in these chunks. It cannot where elements do not lie as their type asks for."""
    received, left = [], Player(chunks)
    described = ((name, (list(tensor.shape), tensor.dtype)) for name, tensor in tensors(kinds))
    try:
        packed_tensor.packed_nccl_broadcast_consumer(described, left, 0, received.extend, limit, device="cpu")
    except RuntimeError as error:
        assert "must be divisible" in str(error), error
        return False
    assert not left.chunks and len(received) == len(kinds)
    for (name, tensor), (read_name, read) in zip(tensors(kinds), received):
        assert name == read_name and tensor.dtype == read.dtype and tensor.shape == read.shape
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), read.reshape(-1).view(torch.uint8))
    return True


def known_to(kind, body):
    """The body, proved to be read by `kind` as SGLang's HTTP server reads it, which ignores what it does not know."""
    unknown = set(body) - set(kind.__struct_fields__)
    assert not unknown, f"{kind.__name__} has no {unknown}"
    read = TypeAdapter(kind).validate_json(json.dumps(body))
    assert all(getattr(read, field) == value for field, value in body.items()), read
    return body


packed_tensor._get_streams = lambda device, count: (Stream(),) * count
torch.accelerator.current_device_index = lambda: 0
torch.cuda.stream = lambda stream: contextlib.nullcontext()

TWO = [("model.embed.weight", "float32", [2, 3]), ("model.norm.weight", "bfloat16", [3])]
names, dtypes, shapes = (list(column) for column in zip(*TWO))

init = NCCLWeightTransferInitInfo(rank_offset=1, world_size=5, packed=True, packed_buffer_size_bytes=1 << 30,
                                  nccl_unique_id_b64=base64.b64encode(bytes(range(128))).decode())
assert init.nccl_unique_id_bytes == bytes(range(128))
update = NCCLWeightTransferUpdateInfo(names=names, dtype_names=dtypes, shapes=shapes)

group = known_to(InitWeightsUpdateGroupReqInput, {
    "master_address": "10.0.0.1", "master_port": 29500, "rank_offset": 1, "world_size": 5, "group_name": "weights",
    "backend": "nccl"})
plain = known_to(UpdateWeightsFromDistributedReqInput, {
    "names": names, "dtypes": dtypes, "shapes": shapes, "group_name": "weights", "flush_cache": False})
bucket = known_to(UpdateWeightsFromDistributedReqInput, {
    **plain, "load_format": "flattened_bucket", "flush_cache": True, "weight_version": "7"})
places = [(m.start_idx, m.end_idx) for m in FlattenedTensorBucket.empty(names, dtypes, shapes, "cpu").get_metadata()]
assert places == [(0, 24), (24, 30)]
try:
    FlattenedTensorBucket.empty(names[::-1], dtypes[::-1], shapes[::-1], "cpu")
    raise AssertionError("six bytes before a tensor of f32 were taken")
except ValueError as refusal:
    assert "Unaligned" in str(refusal)

vectors = {
    "packed": {what: packed(*case) for what, case in PACKED.items()},
    "vllm_init_info": worker_init_payload(init),
    "vllm_update_info": dataclasses.asdict(update),
    "sglang_init_weights_update_group": group,
    "sglang_update_weights_from_distributed": plain,
    "sglang_update_weights_from_distributed_bucket": bucket,
}
path = pathlib.Path("lightrft-engine/tests/data/nccl_vectors.json")
path.write_text(json.dumps(vectors, indent=1) + "\n")
print(f"{path}: {', '.join(vectors)}")
