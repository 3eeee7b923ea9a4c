"""What Python users have instead of lightrft-engine's embedded engine, measured by its bench: `transformers`' generate.

`generate.py versions` prints versions. `generate.py generate PROMPTS TOKENS SAMPLES NEW THREADS` builds a random
SmolLM2-135M in f32, generates a few tokens that do not count, and prints the nanoseconds of one call that draws NEW tokens
for each of SAMPLES completions of each of PROMPTS prompts of TOKENS tokens, at temperature 1 without filters.
"""

import sys
import time
import warnings

warnings.filterwarnings("ignore")

import torch
import transformers

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


def model():
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100_000.0, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
    made = transformers.LlamaForCausalLM(config).eval()
    # It runs to its full length.
    made.generation_config.eos_token_id = None
    return made


def main():
    if sys.argv[1] == "versions":
        print(f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}")
        return
    prompts, tokens, samples, new, threads = map(int, sys.argv[2:])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = model()

    def draw(count, length, times, more):
        ids = torch.randint(1, 49152, (count, length))
        out = net.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0,
                           top_p=1.0, num_return_sequences=times, max_new_tokens=more, pad_token_id=0)
        assert out.shape == (count * times, length + more)

    draw(prompts, min(tokens, 16), samples, 2)
    begin = time.perf_counter_ns()
    draw(prompts, tokens, samples, new)
    print(time.perf_counter_ns() - begin)


main()
