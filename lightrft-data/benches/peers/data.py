"""What Python users have instead, measured by the bench of lightrft-data beside our own.

`data.py CASE ARGUMENT` does one thing once and prints the nanoseconds it took and the KiB by which it raised this
process's peak of memory. Statistics are the bench's.

- `lightrft N`: the first index of a rank in the middle of an epoch of N samples, with the steps of LightRFT's
  `DistributedSampler`: a permutation, made a list, cut to a multiple of 8 ranks, every eighth of it, the consumed dropped.
- `randperm N`: only torch.randperm, as a tensor.
- `index FILE`: where each line of a file begins.
- `check FILE`: every line parsed, its prompt and label looked at.
- `loader0 FILE`, `loader2 FILE`: an epoch of torch's DataLoader over the lines of a file, shuffled, with no and with two
  worker processes. The lines are found before; that is not counted.
"""

import json
import mmap
import resource
import sys
import time

import torch

RANKS = 8
RANK = 3


def permutation(samples):
    generator = torch.Generator()
    generator.manual_seed(42)
    return torch.randperm(samples, generator=generator)


def lightrft(samples):
    indices = permutation(samples).tolist()
    indices = indices[: samples // RANKS * RANKS]
    indices = indices[RANK::RANKS]
    indices = indices[samples // 2 // RANKS :]
    return next(iter(indices))


def index(path):
    begins, at = [], 0
    with open(path, "rb") as lines:
        for line in lines:
            begins.append(at)
            at += len(line)
    return begins


def check(path):
    begins, at = [], 0
    with open(path, "rb") as lines:
        for line in lines:
            begins.append(at)
            at += len(line)
            sample = json.loads(line)
            assert isinstance(sample["prompt"], str) and isinstance(sample["label"], str)
    return begins


class Lines(torch.utils.data.Dataset):
    def __init__(self, path):
        self.begins = index(path)
        with open(path, "rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self.begins.append(len(self.bytes))

    def __len__(self):
        return len(self.begins) - 1

    def __getitem__(self, i):
        sample = json.loads(self.bytes[self.begins[i] : self.begins[i + 1]])
        return sample["prompt"], sample["label"]


def load(lines, workers):
    generator = torch.Generator()
    generator.manual_seed(42)
    loader = torch.utils.data.DataLoader(
        lines, batch_size=32, shuffle=True, generator=generator, num_workers=workers, collate_fn=list
    )
    assert sum(len(batch) for batch in loader) == len(lines)


def peak_kib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main():
    if sys.argv[1] == "versions":
        print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")
        return
    cases = {
        "lightrft": (lightrft, int),
        "randperm": (permutation, int),
        "index": (index, str),
        "check": (check, str),
        "loader0": (lambda lines: load(lines, 0), Lines),
        "loader2": (lambda lines: load(lines, 2), Lines),
    }
    case, kind = cases[sys.argv[1]]
    argument = kind(sys.argv[2])
    permutation(10)  # what torch does once is not counted
    before, begin = peak_kib(), time.perf_counter_ns()
    result = case(argument)
    taken = time.perf_counter_ns() - begin
    print(taken, peak_kib() - before)
    del result


main()
