"""torch's AdamW in its three ways and DeepSpeedCPUAdam, measured by the bench of lightrft-sharding beside our own.

The bench starts this and gives one order a line, `PEER CASE ELEMS`, answered by the nanoseconds of one call, or by
`without REASON` where there is no such peer here. What a peer needs is made at its first call, which the bench does not
count. Statistics are the bench's.
"""

import os
import sys
import time

try:
    import torch
except ImportError as error:
    sys.exit(f"no torch: {error}")

# Arrays are as long as ours; parameters and gradients are shared by all optimizers, each has its own state.
SETTINGS = dict(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
tensors = {}
optimizers = {}
names = []


def tensor(name, elems, dtype=torch.float32):
    if (name, elems) not in tensors:
        tensors[name, elems] = (torch.rand(elems) - 0.5).mul_(1e-3).to(dtype)
    return tensors[name, elems]


def optimizer(peer, elems):
    if (peer, elems) not in optimizers:
        parameter = torch.nn.Parameter(tensor("parameter", elems))
        parameter.grad = tensor("gradient", elems)
        if peer == "deepspeed":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            import deepspeed
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            names.append(f"deepspeed {deepspeed.__version__}")
            made = DeepSpeedCPUAdam([parameter], adamw_mode=True, **SETTINGS)
        else:
            how = {"for-loop": dict(foreach=False, fused=False), "foreach": dict(foreach=True), "fused": dict(fused=True)}
            made = torch.optim.AdamW([parameter], **how[peer], **SETTINGS)
        optimizers[peer, elems] = made, parameter
    return optimizers[peer, elems]


def call(peer, case, elems):
    if case == "adamw":
        return optimizer(peer, elems)[0].step
    if case == "adamw+bf16":
        made, parameter = optimizer(peer, elems)
        half = tensor("half", elems, torch.bfloat16)

        def step_and_copy():
            made.step()
            half.copy_(parameter.data)

        return step_and_copy
    if case == "norm":
        return lambda gradient=tensor("gradient", elems): torch.linalg.vector_norm(gradient).item()
    if case == "ema":
        return lambda: tensor("average", elems).lerp_(tensor("parameter", elems), 0.008)
    raise NotImplementedError(case)


def main():
    torch.set_num_threads(int(os.environ["LIGHTRFT_BENCH_THREADS"]))
    # A library that prints while it loads must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    print("torch", torch.__version__, file=answers)
    for line in sys.stdin:
        if line.strip() == "versions":
            print(", ".join(names), file=answers)
            continue
        peer, case, elems = line.split()
        try:
            with torch.no_grad():
                run = call(peer, case, int(elems))
                begin = time.perf_counter_ns()
                run()
                end = time.perf_counter_ns()
            print(end - begin, file=answers)
        except Exception as error:  # whatever a peer cannot do is left out of the table, aloud
            print("without", " ".join(f"{type(error).__name__}: {error}".split())[:300], file=answers)


main()
