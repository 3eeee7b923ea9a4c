"""Reference vectors for the decoder of `lightrft-engine`, computed by Hugging Face `transformers` on a CPU.

Run from the root of the repository:

    python tools/make_decoder_vectors.py            # writes lightrft-engine/tests/data/decoder/<case>/

The committed files were made with Python 3.11, torch 2.13.0, transformers 5.19.0 and safetensors 0.8.0. Seeds are
fixed, so a second run with the same versions writes the same bytes; another version of torch may change last bits.

Each case is a tiny random model (vocabulary 48, hidden 32, 2 layers, 4 heads, 2 key-value heads) in four files:

    config.json         the model's configuration with Hugging Face's names. `rope_style` says in which of the two ways
                        found in published models the rotary embedding is written: "flat" (`rope_theta` and
                        `rope_scaling` at the top level) or "nested" (`rope_parameters`, from transformers 5 on)
    model.safetensors   the weights, f32; a tied head is absent, as in published models
    grads.safetensors   d loss / d parameter for every tensor of model.safetensors, f32
    vectors.json        input_ids [batch][seq], logits [batch][seq][vocab], loss (mean cross-entropy of the next token
                        over all batch * (seq - 1) predictions), and greedy generation: for each prompt, run alone and
                        without padding, `new_tokens` and the logits [step][vocab] each of them was taken from

Weights, norm weights and biases are all random and non-zero, so a forgotten one shows. Every greedy choice leads its
runner-up by more than 1e-3, so a tolerance of 1e-5 on logits can never flip a token, and logits and gradients differ
by less than 2e-6 from the same computation in f64: what a test may ask is 1e-5.
"""

import argparse
import copy
import hashlib
import json
import pathlib

import safetensors
import safetensors.torch
import torch
import transformers

VOCAB, HIDDEN, INTER, LAYERS, HEADS, KV_HEADS = 48, 32, 64, 2, 4, 2
BATCH, SEQ, PROMPT_LENGTHS, NEW_TOKENS = 2, 9, (5, 3), 8
MIN_MARGIN, MAX_ERROR = 1e-3, 2e-6

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Wavelengths of the four frequencies are 6.3, 63, 628 and 6283 positions: one is kept, one is blended
    # (between 128 / 4 and 128), two are divided by the factor.
    "original_max_position_embeddings": 128,
}

# name: (family, rope style of config.json, rope parameters, other fields)
CASES = {
    "qwen2_tied": ("qwen2", "flat", {"rope_type": "default", "rope_theta": 1_000_000.0},
                   {"tie_word_embeddings": True, "rms_norm_eps": 1e-6}),
    "qwen2_untied": ("qwen2", "nested", {"rope_type": "default", "rope_theta": 10_000.0},
                     {"tie_word_embeddings": False, "rms_norm_eps": 1e-6}),
    "qwen3_tied": ("qwen3", "flat", {"rope_type": "default", "rope_theta": 1_000_000.0},
                   {"tie_word_embeddings": True, "rms_norm_eps": 1e-6, "head_dim": 16}),
    "qwen3_untied": ("qwen3", "nested", {"rope_type": "default", "rope_theta": 10_000.0},
                     {"tie_word_embeddings": False, "rms_norm_eps": 1e-5, "attention_bias": True, "head_dim": 8}),
    "llama_tied": ("llama", "flat", {"rope_type": "default", "rope_theta": 10_000.0},
                   {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama_untied": ("llama", "nested", {"rope_type": "default", "rope_theta": 500_000.0},
                     {"tie_word_embeddings": False, "rms_norm_eps": 1e-4, "attention_bias": True, "mlp_bias": True,
                      "head_dim": 16}),
    "llama3_rope": ("llama", "flat", {"rope_theta": 10_000.0, **LLAMA3_ROPE},
                    {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "max_position_embeddings": 1024,
                     "head_dim": 8}),
}


def build(family, rope, fields):
    """The configuration and an uninitialised model of one case."""
    common = dict(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTER, num_hidden_layers=LAYERS,
                  num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=64,
                  bos_token_id=1, eos_token_id=2, pad_token_id=None, rope_parameters=dict(rope))
    common.update(fields)
    make = {"qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
            "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
            "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM)}[family]
    config = make[0](**common)
    config._attn_implementation = "eager"
    model = make[1](config).to(torch.float32).eval()
    config.architectures = [make[1].__name__]
    return config, model


def randomise(model, generator):
    """Random values for every parameter; the scales keep logits near 1, so that f32 resolves 1e-6."""
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif "norm" in name:
                p.copy_(1.0 + 0.3 * noise)
            else:
                p.copy_(0.2 * noise)


def next_token_loss(model, input_ids):
    logits = model(input_ids=input_ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), input_ids[:, 1:].reshape(-1))
    return logits, loss


def error_of_f32(model, input_ids, logits):
    """How far logits and gradients in f32 are from f64 (in both, norms and rotary angles are computed in f32)."""
    wide = copy.deepcopy(model).double()
    wide.zero_grad()
    wide_logits, wide_loss = next_token_loss(wide, input_ids)
    wide_loss.backward()
    grads = [(a.grad - b.grad.double()).abs().max().item() for a, b in zip(wide.parameters(), model.parameters())]
    return max((wide_logits - logits.double()).abs().max().item(), *grads)


@torch.no_grad()
def greedy(model, prompt):
    """Greedy tokens and their logits, by full recomputation at each step: no cache takes part in the oracle."""
    ids, steps, margin = list(prompt), [], float("inf")
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        best = torch.topk(logits, 2).values
        margin = min(margin, (best[0] - best[1]).item())
        ids.append(int(torch.argmax(logits)))
        steps.append(logits)
    return ids[len(prompt):], steps, margin


def numbers(tensor):
    """Nested lists of floats with nine significant digits, which carry an f32 exactly."""
    if tensor.dim() > 1:
        return [numbers(t) for t in tensor]
    return [float(f"{x:.9g}") for x in tensor.tolist()]


def config_json(config, style, rope, fields):
    """`config.json` as published models have it, in the chosen style of the rotary embedding's fields."""
    out = json.loads(config.to_json_string(use_diff=False))
    keep = {"architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings",
            "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias", "attention_dropout",
            "initializer_range", "use_cache", "use_sliding_window", "sliding_window", "max_window_layers",
            "bos_token_id", "eos_token_id", "rope_parameters"}
    if "head_dim" not in fields:  # most published models leave it to be hidden_size / num_attention_heads
        keep.remove("head_dim")
    out = {k: v for k, v in out.items() if k in keep}
    if style == "flat":
        del out["rope_parameters"]
        out["rope_theta"] = rope["rope_theta"]
        out["rope_scaling"] = None if rope["rope_type"] == "default" else {
            k: v for k, v in rope.items() if k != "rope_theta"}
        out["torch_dtype"] = "float32"
    else:
        out["dtype"] = "float32"
    return out


def make_case(name, root):
    family, style, rope, fields = CASES[name]
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    for attempt in range(100):  # another seed when the case would be ill-conditioned or a greedy choice too close
        generator = torch.Generator().manual_seed(seed + attempt)
        config, model = build(family, rope, fields)
        randomise(model, generator)
        input_ids = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
        prompts = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
        runs = [greedy(model, p) for p in prompts]
        logits, loss = next_token_loss(model, input_ids)
        loss.backward()
        params = dict(model.named_parameters())  # names a tied head once, by its embedding
        margin = min(m for _, _, m in runs)
        error = error_of_f32(model, input_ids, logits)
        # Generation that repeats one token would not notice a broken cache.
        if margin > MIN_MARGIN and error < MAX_ERROR and all(len(set(tokens)) >= 3 for tokens, _, _ in runs):
            break
    else:
        raise SystemExit(f"{name}: no seed gives well-conditioned logits and a clear greedy path")

    weights = {k: p.detach().contiguous() for k, p in params.items()}
    grads = {k: p.grad.contiguous() for k, p in params.items()}
    for k in weights:
        # Without rotation a key's bias would move all scores of a query alike and have no gradient; with slow
        # rotation it has a small one.
        assert grads[k].abs().max() > (1e-7 if k.endswith("k_proj.bias") else 1e-4), f"{name}: {k} has no gradient"

    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    written_config = json.dumps(config_json(config, style, rope, fields), indent=2, sort_keys=True)
    (folder / "config.json").write_text(written_config + "\n")
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    safetensors.torch.save_file(grads, folder / "grads.safetensors", metadata={"format": "pt"})
    for file in ("model", "grads"):
        (folder / f"{file}.safetensors").chmod(0o644)
    vectors = {
        "case": name,
        "rope_style": style,
        "made_by": f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, f32, CPU",
        "seed": seed + attempt,
        "input_ids": input_ids.tolist(),
        "logits": numbers(logits.detach()),
        "loss": float(f"{loss.item():.9g}"),
        "generations": [{"prompt": p, "new_tokens": tokens, "logits": numbers(torch.stack(steps))}
                        for p, (tokens, steps, _) in zip(prompts, runs)],
    }
    (folder / "vectors.json").write_text(json.dumps(vectors, separators=(",", ":")) + "\n")
    check_case(folder, vectors, rope)
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name}: {sum(w.numel() for w in weights.values())} parameters in {len(weights)} tensors, "
          f"loss {loss.item():.6f}, |logit| <= {logits.abs().max().item():.2f}, "
          f"|grad| <= {max(g.abs().max().item() for g in grads.values()):.3f}, margin {margin:.4f}, "
          f"error of f32 {error:.1e}, {size} bytes")
    return size


def check_case(folder, vectors, rope):
    """What was written must give the same logits when `transformers` reads it back, and each trap must matter."""
    input_ids = torch.tensor(vectors["input_ids"])
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    again.generation_config.eos_token_id = None  # generation always runs to its full length
    with torch.no_grad():
        read_back = again(input_ids=input_ids, use_cache=False).logits
        written = torch.tensor(vectors["logits"])
        assert torch.equal(read_back, written), f"{folder.name}: reading back gives other logits"
        for prompt in vectors["generations"]:
            # Generation with a cache must agree with the full recomputation.
            ids = torch.tensor([prompt["prompt"]])
            out = again.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                 max_new_tokens=NEW_TOKENS, pad_token_id=0)
            assert out[0, len(prompt["prompt"]):].tolist() == prompt["new_tokens"], folder.name
        if rope["rope_type"] == "llama3":
            config, plain = build("llama", {"rope_type": "default", "rope_theta": rope["rope_theta"]},
                                  CASES[folder.name][3])
            plain.load_state_dict(again.state_dict())
            other = plain(input_ids=input_ids, use_cache=False).logits
            assert (other - written).abs().max() > 1e-2, "the scaling of the rotary embedding does not show"


def main():
    parser = argparse.ArgumentParser(description="Writes the reference vectors of the decoder's tests.")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("lightrft-engine/tests/data/decoder"))
    parser.add_argument("cases", nargs="*", default=list(CASES), help="which cases (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    torch.use_deterministic_algorithms(True)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, safetensors {safetensors.__version__}")
    total = sum(make_case(name, args.out) for name in args.cases)
    print(f"{total} bytes in {args.out}")


if __name__ == "__main__":
    main()
