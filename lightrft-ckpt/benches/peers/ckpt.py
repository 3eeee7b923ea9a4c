"""torch.save, DCP and safetensors, measured by the bench of lightrft-ckpt beside our own.

The bench starts this and gives one order a line: `save KIND DIR`, `load KIND DIR`, `async DIR`, `check` (whether the last
load brought what was saved) or `versions`. The answer to the first three is the nanoseconds of one call, or `without REASON`
where there is no such peer here. Statistics, empty directories and dropped caches are the bench's.
"""

import os
import sys
import time
import warnings

try:
    import torch
    import torch.distributed.checkpoint as dcp
except ImportError as error:
    sys.exit(f"no torch: {error}")

warnings.filterwarnings("ignore")

TENSORS = 64
COLUMNS = 1024


def tensors(make):
    rows = int(os.environ["LIGHTRFT_BENCH_MIB"]) * (1 << 20) // 4 // TENSORS // COLUMNS
    return {f"layers.{i}.weight": make(rows, COLUMNS) for i in range(TENSORS)}


STATE = tensors(torch.randn)
# Where loads end: a model's parameters, which are there before anything is loaded.
INTO = tensors(torch.zeros)
loaded = INTO


def durable(path):
    for folder, _, files in os.walk(path):
        for name in files + ["."]:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def copied(source):
    for name, tensor in INTO.items():
        tensor.copy_(source[name] if isinstance(source, dict) else source.get_tensor(name))
    return INTO


def dcp_writer(kind, path):
    if kind == "dcp-hf":
        return dcp.HuggingFaceStorageWriter(path)
    return dcp.FileSystemWriter(path, thread_count=2 if kind == "dcp-2" else 1)


def saves(kind, path):
    if kind == "torch":
        return lambda: torch.save(STATE, f"{path}/state.pt")
    if kind == "safetensors":
        import safetensors.torch

        return lambda: safetensors.torch.save_file(STATE, f"{path}/state.safetensors")
    return lambda: dcp.save(STATE, storage_writer=dcp_writer(kind, path), no_dist=True)


def in_place(path, reader):
    dcp.load(INTO, storage_reader=reader(path), no_dist=True)
    return INTO


def loads(kind, path):
    """What ends in memory of this process. Mapped files are copied; new memory, as torch.load returns it, counts as it is."""
    if kind == "torch":
        return lambda: torch.load(f"{path}/state.pt", weights_only=True)
    if kind == "torch-mmap":
        return lambda: copied(torch.load(f"{path}/state.pt", weights_only=True, mmap=True))
    if kind == "dcp":
        return lambda: in_place(path, dcp.FileSystemReader)
    if kind == "dcp-hf":
        return lambda: in_place(path, dcp.HuggingFaceStorageReader)
    import safetensors
    import safetensors.torch

    if kind == "safetensors":
        return lambda: copied(safetensors.torch.load_file(f"{path}/state.safetensors"))

    def opened():
        with safetensors.safe_open(f"{path}/state.safetensors", "pt") as file:
            return copied(file)

    return opened


stager = None


def blocked_by_async_save(path):
    """Nanoseconds until DCP gives control back, with memory to copy into that is kept between saves where it offers that."""
    global stager
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    if stager is None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        # Pinned memory and copies beside the device's work are for states on a GPU.
        options = dict(use_pinned_memory=False, use_async_staging=False, use_non_blocking_copy=False)
        stager = DefaultStager(StagingOptions(use_shared_memory=False, **options))
    begin = time.perf_counter_ns()
    future = dcp.async_save(STATE, storage_writer=dcp.FileSystemWriter(path), async_stager=stager)
    blocked = time.perf_counter_ns() - begin
    future.result()
    return blocked


def obey(order, kind, path):
    global loaded
    if order == "async":
        return blocked_by_async_save(path)
    if order == "save":
        call = saves(kind, path)
        begin = time.perf_counter_ns()
        call()
        durable(path)
        return time.perf_counter_ns() - begin
    # Memory of the load before is given back outside of the time, and nothing of it can pass for this load's.
    loaded = None
    for tensor in INTO.values():
        tensor.zero_()
    call = loads(kind, path)
    begin = time.perf_counter_ns()
    loaded = call()
    return time.perf_counter_ns() - begin


def versions():
    said = [f"torch {torch.__version__}"]
    if "safetensors" in sys.modules:
        said.append(f"safetensors {sys.modules['safetensors'].__version__}")
    return ", ".join(said)


def main():
    torch.set_num_threads(int(os.environ["LIGHTRFT_BENCH_THREADS"]))
    # A library that prints while it works must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    print("ready", file=answers)
    for line in sys.stdin:
        order, kind, path = (line.rstrip("\n").split(" ", 2) + ["", ""])[:3]
        try:
            if order == "versions":
                answer = versions()
            elif order == "check":
                same = loaded and all(torch.equal(tensor, loaded[name]) for name, tensor in STATE.items())
                answer = "same" if same else "different"
            else:
                answer = obey(order, kind, path)
        except Exception as error:
            answer = f"without {type(error).__name__}: {error}".replace("\n", " ")
        print(answer, file=answers)


main()
