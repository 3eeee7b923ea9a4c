"""One rank of torch.distributed over Gloo, measured by the bench of lightrft-collectives beside our own ranks.

The bench starts this with torchrun's variables and the path of a Unix socket. A rank says who it is, then answers one
line per order, `OP DTYPE COUNT WARMUP ITERATIONS`, by the nanoseconds of each iteration. Statistics are the bench's.
"""

import os
import socket
import sys
import time
from datetime import timedelta

# Without it Gloo looks the host's name up and may take another interface than loopback.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

try:
    import torch
    import torch.distributed as dist
except ImportError as error:
    sys.exit(f"no torch: {error}")

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def written(count, dtype):
    """Zeros in memory that has been written: untouched pages of zeros are all the same page, and always in cache."""
    return torch.empty(count, dtype=dtype).fill_(0)


def prepare(op, dtype, count, ranks):
    """The call to time, and what to do untimed after each. Buffers are as nccl-tests counts them."""
    part = count // ranks
    nothing = lambda result: None
    if op == "all_reduce":
        data = written(count, dtype)
        return lambda: dist.all_reduce(data), nothing
    if op == "all_gather":
        data, output = written(part, dtype), written(count, dtype)
        return lambda: dist.all_gather_into_tensor(output, data), nothing
    if op == "reduce_scatter":
        data, output = written(count, dtype), written(part, dtype)
        return lambda: dist.reduce_scatter_tensor(output, data), nothing
    if op == "broadcast":
        data = written(count, dtype)
        return lambda: dist.broadcast(data, 0), nothing
    if op == "all_to_all":
        data, output = written(count, dtype), written(count, dtype)
        return lambda: dist.all_to_all_single(output, data), nothing
    if op == "barrier":
        return dist.barrier, nothing
    if op == "subgroup":

        def leave(group):
            # A rank that leaves while another still connects fails that one.
            dist.barrier()
            dist.destroy_process_group(group)

        return lambda: dist.new_group(list(range(ranks))), leave
    if op == "all_gather_object":
        tokens = [[row * 31 + i for i in range(1024)] for row in range(count)]

        def gather():
            everyone = [None] * ranks
            dist.all_gather_object(everyone, tokens)

        return gather, nothing
    if op == "status_dict":
        # A call per key, which is what trainers written for torch do.
        status = {f"loss/{i:02}": float(i) for i in range(count)}

        def per_key():
            for value in status.values():
                scalar = torch.tensor([value])
                dist.all_reduce(scalar)
                scalar.item()

        return per_key, nothing
    if op == "status_dict_fused":
        status = {f"loss/{i:02}": float(i) for i in range(count)}

        def fused():
            keys = sorted(status)
            values = torch.tensor([status[key] for key in keys])
            dist.all_reduce(values)
            status.update(zip(keys, (values / ranks).tolist()))

        return fused, nothing
    raise NotImplementedError(op)


def measure(call, after, warmup, iterations):
    dist.barrier()
    for _ in range(warmup):
        after(call())
    dist.barrier()
    times = []
    for _ in range(iterations):
        begin = time.perf_counter_ns()
        result = call()
        times.append(time.perf_counter_ns() - begin)
        after(result)
    return times


def fail(report):
    """All-reduces until a rank is lost, and then says so. Gloo's error names a port, not a rank."""
    data = torch.ones(1 << 18)
    try:
        while True:
            dist.all_reduce(data)
            data.fill_(1)
    except RuntimeError as error:
        report(f"lost - {' '.join(str(error).split())}")


def main():
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    core = os.environ.get("LIGHTRFT_BENCH_PIN")
    if core == "cores":
        # This thread only: Gloo's own threads go where there is room, which suits it best.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    link = socket.socket(socket.AF_UNIX)
    link.connect(os.environ["LIGHTRFT_BENCH_SOCKET"])

    def report(line):
        link.sendall(f"{line}\n".encode())

    report(f"hello {rank} {os.getpid()} torch {torch.__version__}")
    prepared = None
    for line in link.makefile():
        op, dtype, count, warmup, iterations = line.split()
        if op == "failure":
            fail(report)
            os._exit(0)
        try:
            if prepared is None or prepared[0] != (op, dtype, count):
                prepared = None  # frees the old buffers first
                prepared = (op, dtype, count), prepare(op, DTYPES[dtype], int(count), ranks)
            times = measure(*prepared[1], int(warmup), int(iterations))
            report("ok " + " ".join(map(str, times)))
        except NotImplementedError as error:
            report(f"unsupported {error}")
    dist.destroy_process_group()


main()
