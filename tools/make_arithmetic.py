"""The prompts of the demo: small sums as text, with the answer as the label. Needs only Python's standard library.

    python tools/make_arithmetic.py                 # writes lightrft-strategy/examples/data/arithmetic_*.jsonl

Every question of the chosen kind is listed once, shuffled by a fixed seed, and cut into a training and a held-out
part, so the two are disjoint. A line reads {"prompt": "12+7=", "label": "19"}. The same arguments write the same
bytes with every release of Python 3: the order comes from SHA-256, not from a random generator.
"""

import argparse
import hashlib
import json
import pathlib


def questions(ops, low, high, second_high):
    """All questions with numbers in low..=high and low..=second_high; differences only where the result is not
    negative."""
    for a in range(low, high + 1):
        for b in range(low, second_high + 1):
            if "+" in ops:
                yield f"{a}+{b}=", str(a + b)
            if "-" in ops and a >= b:
                yield f"{a}-{b}=", str(a - b)


def shuffled(items, seed):
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed}:{item[0]}".encode()).digest())


def write(path, items):
    lines = (json.dumps({"prompt": prompt, "label": label}) + "\n" for prompt, label in items)
    path.write_text("".join(lines), encoding="ascii", newline="\n")
    print(f"{path}: {len(items)} lines")


def main():
    parser = argparse.ArgumentParser(description="Writes arithmetic prompts with exact answers as lines of JSON.")
    parser.add_argument("--ops", default="+", choices=["+", "-", "+-"], help="which operations (default: +)")
    parser.add_argument("--low", type=int, default=0, help="smallest number (default: 0)")
    parser.add_argument("--high", type=int, default=99, help="largest first number (default: 99)")
    parser.add_argument("--second-high", type=int, default=19, help="largest second number (default: 19)")
    parser.add_argument("--train", type=int, default=1750, help="training lines (default: 1750)")
    parser.add_argument("--held-out", type=int, default=250, help="held-out lines (default: 250)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffle (default: 0)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("lightrft-strategy/examples/data"))
    args = parser.parse_args()

    items = shuffled(questions(args.ops, args.low, args.high, args.second_high), args.seed)
    if not (0 <= args.low <= min(args.high, args.second_high)) or min(args.train, args.held_out) < 0:
        parser.error("need 0 <= low <= high and second high, and no negative number of lines")
    if len(items) < args.train + args.held_out:
        parser.error(f"only {len(items)} questions, but {args.train} + {args.held_out} lines were asked for")
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "arithmetic_train.jsonl", items[: args.train])
    write(args.out / "arithmetic_heldout.jsonl", items[args.train : args.train + args.held_out])


if __name__ == "__main__":
    main()
