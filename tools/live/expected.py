"""Write what `transformers` says of a model folder's greedy completion into its expected.json.

usage: expected.py MODEL...     (text models, or Qwen2.5-VL with one image, and with one film)
"""
import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

LENGTH = 8


def greedy(net, ids, **more):
    """Tokens and their log-probabilities, without a cache."""
    tokens, log_probs = [], []
    for _ in range(LENGTH):
        with torch.no_grad():
            p = net(input_ids=torch.tensor([ids + tokens]), **more).logits[0, -1].log_softmax(-1)
        log_probs.append(p.max().item())
        tokens.append(p.argmax().item())
    return {"tokens": tokens, "log_probs": log_probs}


def text(folder):
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = [5, 6, 7, 8]
    return {"prompt": prompt, **greedy(net, prompt)}


def seen(net, config, pad, grid, pixels, **more):
    """A prompt of one pad, and the greedy completion of what stands for it."""
    pads = int(grid.prod()) // config.vision_config.spatial_merge_size**2
    before, after = [1, 40, 41, config.vision_start_token_id], [config.vision_end_token_id, 42, 2, 1]
    expanded = before + [pad] * pads + after
    kind = 1 if pad == config.image_token_id else 2
    found = {"tokens": [], "log_probs": []}
    for _ in range(LENGTH):
        ids = expanded + found["tokens"]
        with torch.no_grad():
            out = net(input_ids=torch.tensor([ids]), **pixels, **more,
                      mm_token_type_ids=torch.tensor([[kind * int(t == pad) for t in ids]]))
        p = out.logits[0, -1].log_softmax(-1)
        found["log_probs"].append(p.max().item())
        found["tokens"].append(p.argmax().item())
    return {"prompt": before + [pad] + after, **found}


def encoded(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def vision(folder, config):
    net = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    image = Image.new("RGB", (56, 56))
    image.putdata([(x * 4, y * 4, (x * y) % 256) for y in range(56) for x in range(56)])
    features = processor.image_processor(images=[image], return_tensors="pt")
    found = seen(net, config, config.image_token_id, features["image_grid_thw"], features)
    return {**found, "image": "data:image/png;base64," + encoded(image, "PNG"), "video": film(net, processor, config)}


def film(net, processor, config):
    """Four frames, as JPEG: what vLLM takes without a decoder of films, for one frame a second."""
    frames = []
    for at in range(4):
        frame = Image.new("RGB", (56, 56))
        frame.putdata([(x * 4, y * 4, 60 * at) for y in range(56) for x in range(56)])
        frames.append(encoded(frame, "JPEG"))
    decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(frame))).convert("RGB")) for frame in frames]
    features = processor.video_processor(videos=[np.stack(decoded)], do_sample_frames=False, return_tensors="pt")
    seconds = torch.tensor([processor.video_processor.temporal_patch_size / 1.0])
    pixels = {name: features[name] for name in ("pixel_values_videos", "video_grid_thw")}
    found = seen(net, config, config.video_token_id, features["video_grid_thw"], pixels, second_per_grid_ts=seconds)
    return {**found, "url": "data:video/jpeg;base64," + ",".join(frames)}


for folder in map(Path, sys.argv[1:]):
    config = AutoConfig.from_pretrained(folder)
    expected = vision(folder, config) if hasattr(config, "vision_config") else text(folder)
    (folder / "expected.json").write_text(json.dumps(expected))
    print(folder.name, expected["tokens"])
