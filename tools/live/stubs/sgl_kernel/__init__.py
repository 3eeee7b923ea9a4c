"""Stands where SGLang looks for its kernels, whose package on the registry is made for GPUs alone.

Without a GPU, SGLang 0.5 computes with torch (`--attention-backend torch_native`) and wants from here no more than names
to import. Whatever is called all the same says so and fails.
"""
import torch

if not torch.cuda.is_available():
    # SGLang synchronises whatever torch's default device is; that is the CPU here.
    torch.get_device_module = lambda device=None: torch.cpu

# Operators that some of its models look up when they are imported.
_library = torch.library.Library("sgl_kernel", "FRAGMENT")
for _operator in (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
):
    _library.define(f"{_operator}(Tensor x) -> Tensor")


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU")

    return absent
