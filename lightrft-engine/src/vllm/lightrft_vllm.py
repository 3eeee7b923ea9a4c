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

# Told by the trainer, so that neither misreads the other: 2 writes into files again that it has sent before.
PROTOCOL = 2


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
    """Reloads layers as vLLM's NCCL backend does, without NCCL; on a CPU, only those that need it."""

    init_info_cls = Init
    update_info_cls = Update

    # Layers into whose parameters vLLM loads at once, and those that it reloads: all of them, if none are named. Whether
    # some of these wait for all of their weights.
    in_place, reloaded, holds = (), None, True

    def init_transfer_engine(self, init_info):
        if init_info.protocol != PROTOCOL:
            raise ValueError(f"this plug-in speaks protocol {PROTOCOL}, the trainer {init_info.protocol}")

    def start_weight_update(self):
        # Older workers do this and what ends it by themselves, for all layers.
        self.in_place, self.reloaded, self.holds = (), None, True
        if not current_platform.is_cpu() or self.model_config.quantization is not None:
            return super().start_weight_update()
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        # A reload makes a layer anew and copies it over the one that computes: twice the copies, one of them into memory
        # that nobody has touched yet.
        self.reloaded = [layer for layer in self.model.modules() if not loads_in_place(layer)]
        anew = {part for layer in self.reloaded for part in layer.modules()}
        self.in_place = [layer for layer in self.model.modules() if layer not in anew]
        self.holds = any(first_parameters(layer) for layer in anew)
        for layer in self.reloaded:
            initialize_layerwise_reload(layer)

    def finish_weight_update(self):
        if self.reloaded is None:
            return super().finish_weight_update()
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        for layer in self.in_place:
            # It may keep a packed copy of them besides.
            method = getattr(layer, "quant_method", None)
            if method is not None:
                method.process_weights_after_loading(layer)
        for layer in self.reloaded:
            finalize_layerwise_reload(layer, self.model_config)

    def update_weights(self, update_info):
        self.receive_weights(self.parse_update_info(update_info))
        if not current_platform.is_cpu():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info, load_weights=None):
        descriptor = os.open(update_info.file, os.O_RDONLY)
        try:
            # Copy on write, since torch wants to be allowed to write.
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
            # Held until their layer is whole, longer than the trainer leaves the file as it is.
            weights.append((name, weight.clone() if self.holds else weight))
        # Older ones say who is to load them.
        (load_weights or self.model.load_weights)(weights)

    def shutdown(self):
        pass


def first_parameters(layer):
    """A layer's own parameters as vLLM made them, before it loaded them for the first time: without their values."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    return get_layerwise_info(layer).restore_metadata[0]


def loads_in_place(layer):
    """Whether a layer's own parameters are still as vLLM made them, so that it can load them again just so.

    They are not where it keeps them in another form. Attention computes things from those of others, which a reload does.
    """
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    method = type(getattr(layer, "quant_method", None))
    if method not in (type(None), UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
        return False

    def as_made(now, first):
        return (
            type(now) is type(first)
            and not now.is_meta
            and (now.dtype, now.shape, now.stride()) == (first.dtype, first.shape, first.stride())
        )

    parameters = first_parameters(layer).items()
    return not is_deferred_attention_layer(layer) and all(
        as_made(getattr(layer, name, None), first) for name, first in parameters
    )


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
