"""Plug-in of vLLM's workers: weights from files that the trainer writes into shared memory.

vLLM loads this module because `--worker-extension-cls` names it. It registers the weight-transfer
backend "lightrft" behind vLLM's own update routes; everything but where the bytes come from is vLLM's.
"""
import mmap
import os
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.platforms import current_platform


@dataclass
class Init(WeightTransferInitInfo):
    """Nothing needs to be agreed on."""

    protocol: int


@dataclass
class Update(WeightTransferUpdateInfo):
    """A file of whole tensors, and where each begins in it."""

    file: str
    bytes: int
    names: list
    dtype_names: list
    shapes: list
    offsets: list


class SharedMemoryEngine(NCCLWeightTransferEngine):
    """Reloads layers as vLLM's NCCL backend does, without NCCL."""

    init_info_cls = Init
    update_info_cls = Update

    def init_transfer_engine(self, init_info):
        if init_info.protocol != 1:
            raise ValueError(f"this plug-in speaks protocol 1, the trainer {init_info.protocol}")

    def update_weights(self, update_info):
        self.receive_weights(self.parse_update_info(update_info))
        if not current_platform.is_cpu():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info, load_weights=None):
        descriptor = os.open(update_info.file, os.O_RDONLY)
        try:
            # vLLM holds tensors until their layer is whole, longer than this call: they keep the mapping, and so
            # the memory, when the trainer removes the file. Copy on write, since torch wants to be allowed to write.
            memory = mmap.mmap(descriptor, update_info.bytes, access=mmap.ACCESS_COPY)
        finally:
            os.close(descriptor)
        weights = []
        tensors = zip(update_info.names, update_info.dtype_names, update_info.shapes, update_info.offsets)
        for name, dtype_name, shape, offset in tensors:
            dtype, count = getattr(torch, dtype_name), 1
            for dim in shape:
                count *= dim
            if count == 0:
                weight = torch.empty(shape, dtype=dtype)
            else:
                weight = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
            weights.append((name, weight))
        # Older ones say who is to load them.
        (load_weights or self.model.load_weights)(weights)

    def shutdown(self):
        pass


WeightTransferEngineFactory.register_engine("lightrft", SharedMemoryEngine)

if current_platform.is_cpu():
    # oneDNN keeps packed copies of the weights. A head that is tied to the embedding would go on with the old ones
    # after an update, silently.
    from vllm import _custom_ops

    _custom_ops._supports_onednn = False


class Extension:
    """Importing this module is what counts; besides, the worker says where it is."""

    def lightrft_gpu(self):
        """The GPU's own number, the same in every process."""
        return "none" if current_platform.is_cpu() else str(torch.cuda.get_device_properties(self.device).uuid)
