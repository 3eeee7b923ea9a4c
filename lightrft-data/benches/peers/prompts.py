"""What Python users have instead of lightrft-data's builder of multimodal inputs, measured by its bench.

`prompts.py nested|flat N` deals images to N prompts once and prints the nanoseconds it took and 0. The steps are those of
LightRFT's `_build_multimodal_inputs`: a slice or a nested list for each prompt, and two regular expressions for those
without media. With LIGHTRFT_STRATEGY_BASE naming LightRFT's `strategy_base.py`, its own function is taken instead.
"""

import ast
import os
import re
import sys
import time

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
WORDS = "What do the pictures show, and how many of the things in them are red? " * 4


def prompt(i):
    return f"<|im_start|>user\n{IMAGE * [2, 1, 1][i % 3]}{i}: {WORDS}<|im_end|>\n<|im_start|>assistant\n"


def take(entries, i, start, count):
    if entries is None:
        return []
    if i < len(entries) and isinstance(entries[i], list) and len(entries[i]) == count:
        return entries[i]
    return entries[start : start + count]


def steps(prompts, images, images_num, videos, videos_num):
    inputs, image_start, video_start = [], 0, 0
    for i, text in enumerate(prompts):
        image_count = images_num[i] if images_num is not None else 0
        video_count = videos_num[i] if videos_num is not None else 0
        data = {}
        found = take(images, i, image_start, image_count)
        if found and found[0] is not None:
            data["image"] = found
        found = take(videos, i, video_start, video_count)
        if found and found[0] is not None:
            data["video"] = found
        if data:
            inputs.append({"prompt": text, "multi_modal_data": data})
        else:
            for kind in ("image", "video"):
                text = re.sub(rf"<\|vision_start\|>(<\|{kind}_pad\|>)+<\|vision_end\|>", "", text)
            inputs.append({"prompt": text})
        image_start += image_count
        video_start += video_count
    return inputs


def lightrfts_own(path):
    for node in ast.walk(ast.parse(open(path).read())):
        if isinstance(node, ast.FunctionDef) and node.name == "_build_multimodal_inputs":
            node.decorator_list = []
            names = {"re": re}
            exec(compile(ast.Module([node], []), path, "exec"), names)
            return lambda *args: names[node.name](None, *args)
    raise SystemExit(f"{path} has no _build_multimodal_inputs")


def main():
    count = int(sys.argv[2])
    path = os.environ.get("LIGHTRFT_STRATEGY_BASE")
    build = lightrfts_own(path) if path else steps
    prompts = [prompt(i) for i in range(count)]
    numbers = [[2, 1, 0][i % 3] for i in range(count)]
    images = [["image.png"] * n for n in numbers]
    if sys.argv[1] == "flat":
        images = sum(images, [])
    build(prompts[:10], None, None, None, None)  # regular expressions are compiled once
    begin = time.perf_counter_ns()
    build(prompts, images, numbers, None, None)
    print(time.perf_counter_ns() - begin, 0)


main()
