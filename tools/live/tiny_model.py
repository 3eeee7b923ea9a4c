"""Write a tiny checkpoint with random weights, its tokenizer and, for vision, its image processor.

usage: tiny_model.py text|vision DIR [--seed N]     (Qwen2, or Qwen2.5-VL whose pads are the tokens 5 and 6)
"""
import argparse

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration,
                          Qwen2_5_VLProcessor, Qwen2Config, Qwen2ForCausalLM, Qwen2VLImageProcessor,
                          Qwen2VLVideoProcessor)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>"]
# vLLM lets a processor find out how its template places images.
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
            "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% else %}"
            "<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# The CPU's attention takes heads of 32, but not smaller ones.
SHAPE = dict(vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1)


def tokenizer():
    """Bytes, and nothing merged."""
    vocabulary = {token: at for at, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   additional_special_tokens=SPECIAL[3:])
    fast.chat_template = TEMPLATE
    return fast


def main():
    args = argparse.ArgumentParser()
    args.add_argument("kind", choices=["text", "vision"])
    args.add_argument("dir")
    args.add_argument("--seed", type=int, default=0)
    args = args.parse_args()
    tokens = tokenizer()
    ids = dict(bos_token_id=0, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(args.seed)
    if args.kind == "text":
        Qwen2ForCausalLM(Qwen2Config(**SHAPE, **ids, tie_word_embeddings=False)).float().save_pretrained(args.dir)
        tokens.save_pretrained(args.dir)
        return
    pixels = dict(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
    processor = Qwen2_5_VLProcessor(image_processor=Qwen2VLImageProcessor(**pixels), tokenizer=tokens,
                                    video_processor=Qwen2VLVideoProcessor(**pixels), chat_template=TEMPLATE)
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6])
    config = Qwen2_5_VLConfig(
        text_config=dict(**SHAPE, **ids, rope_parameters=rope, tie_word_embeddings=False),
        vision_config=dict(depth=2, hidden_size=64, num_heads=2, intermediate_size=128, out_hidden_size=128,
                           fullatt_block_indexes=[1], initializer_range=0.1),
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4,
        tie_word_embeddings=False)
    Qwen2_5_VLForConditionalGeneration(config).float().save_pretrained(args.dir)
    processor.save_pretrained(args.dir)


main()
