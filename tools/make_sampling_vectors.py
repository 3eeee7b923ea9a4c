"""Reference vectors for the sampling filters of `lightrft-engine`, computed by `transformers`' logits processors.

Run from the root of the repository:

    python tools/make_sampling_vectors.py           # writes lightrft-engine/tests/data/sampling/vectors.json

The committed file was made with Python 3.11, torch 2.13.0 and transformers 5.19.0; seeds are fixed.

Each case has `logits` [vocab], the `prompt` and the `completion` so far, the settings, and `probabilities` [vocab]: the
distribution that the next token is drawn from, 0 for tokens that were filtered out. The processors run in vLLM's order
(repetition penalty, temperature, min-p, top-k, top-p), which is not the order of `transformers`' own `generate`: there,
min-p comes last. Cases in which a filter's edge lies within 1e-4 of a token are drawn again.
"""

import json
import pathlib

import torch
import transformers
from transformers.generation import logits_process as lp

VOCAB = 40
OUT = pathlib.Path("lightrft-engine/tests/data/sampling/vectors.json")

SETTINGS = [
    {},
    {"temperature": 0.6},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "temperature": 1.5},
    {"min_p": 0.1},
    {"min_p": 0.05, "temperature": 2.0},
    {"top_k": 7, "min_p": 0.2},
    {"top_p": 0.7, "min_p": 0.08},
    {"top_k": 12, "top_p": 0.8},
    {"repetition_penalty": 1.2, "temperature": 0.9, "min_p": 0.03, "top_k": 15, "top_p": 0.9},
]


def distribution(logits, past, s):
    """The distribution of the next token, and how far the nearest edge of a filter is from any token."""
    scores, ids, edge = logits[None].clone(), torch.tensor([past]), 1.0
    if s.get("repetition_penalty", 1.0) != 1.0:
        scores = lp.RepetitionPenaltyLogitsProcessor(s["repetition_penalty"])(ids, scores)
    scores = lp.TemperatureLogitsWarper(s.get("temperature", 1.0))(ids, scores)
    if s.get("min_p", 0.0) > 0:
        probabilities = scores.softmax(-1)
        edge = min(edge, (probabilities / probabilities.max() - s["min_p"]).abs().min().item())
        scores = lp.MinPLogitsWarper(s["min_p"])(ids, scores)
    if s.get("top_k", 0):
        scores = lp.TopKLogitsWarper(s["top_k"])(ids, scores)
    if s.get("top_p", 1.0) < 1:
        cumulative = scores.softmax(-1).sort(descending=True).values.cumsum(-1)
        edge = min(edge, (cumulative - s["top_p"]).abs().min().item())
        scores = lp.TopPLogitsWarper(s["top_p"])(ids, scores)
    return scores.softmax(-1)[0], edge


def main():
    generator = torch.Generator().manual_seed(20)
    cases = []
    for settings in SETTINGS:
        while True:
            logits = torch.randn(VOCAB, generator=generator) * 2
            prompt = torch.randint(0, VOCAB, (6,), generator=generator).tolist()
            completion = torch.randint(0, VOCAB, (5,), generator=generator).tolist()
            probabilities, edge = distribution(logits, prompt + completion, settings)
            if edge > 1e-4:
                break
        nine = lambda t: [float(f"{x:.9g}") for x in t.tolist()]
        cases.append({"sampling": settings, "prompt": prompt, "completion": completion, "logits": nine(logits),
                      "probabilities": nine(probabilities)})
        print(settings, "keeps", int((probabilities > 0).sum()))
    made_by = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, f32, CPU"
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"made_by": made_by, "cases": cases}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
