"""What Python users have instead of lightrft-engine's embedded engine on a GPU: `transformers`' generate, in bf16.

Prints tokens a second for random models of the shapes that `tests/gpu_embedded/speed.rs` measures, with as many prompts,
prompt tokens and new tokens, at temperature 1 without filters: the first call of each size is not counted.
"""

import time
import warnings

warnings.filterwarnings("ignore")

import torch
import transformers

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

LENGTH, NEW = 128, 128


def models():
    smol = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100_000.0, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
    yield "SmolLM2-135M", transformers.LlamaForCausalLM(smol)
    qwen = transformers.Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32768, rope_theta=1_000_000.0, rms_norm_eps=1e-6,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
    yield "Qwen2.5-0.5B", transformers.Qwen2ForCausalLM(qwen)


def main():
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.cuda.get_device_name(0)}", flush=True)
    torch.manual_seed(0)
    for name, net in models():
        net = net.to("cuda", torch.bfloat16).eval()
        net.generation_config.eos_token_id = None
        vocabulary = net.config.vocab_size
        for sequences in (1, 32, 256):
            ids = torch.randint(1, vocabulary, (sequences, LENGTH), device="cuda")

            def draw(new):
                with torch.inference_mode():
                    out = net.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0,
                                       top_k=0, top_p=1.0, max_new_tokens=new, pad_token_id=0)
                assert out.shape == (sequences, LENGTH + new)
                torch.cuda.synchronize()

            draw(8)
            begin = time.perf_counter()
            draw(NEW)
            seconds = time.perf_counter() - begin
            print(f"| {name} (transformers) | {sequences} | {LENGTH} | {NEW} | {sequences * NEW / seconds:.0f} | {NEW / seconds:.0f} |",
                  flush=True)
        del net
        torch.cuda.empty_cache()


main()
