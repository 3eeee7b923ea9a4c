"""Write what `transformers` says of a model folder's greedy completion into its expected.json.

usage: expected.py MODEL...     (text models, or Qwen2.5-VL with one image, and one film)
"""
import base64
import io
import json
import sys
from pathlib import Path

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


def encoded(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def vision(folder, config):
    net = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    image = Image.new("RGB", (56, 56))
    image.putdata([(x * 4, y * 4, (x * y) % 256) for y in range(56) for x in range(56)])
    features = AutoProcessor.from_pretrained(folder).image_processor(images=[image], return_tensors="pt")
    grid = features["image_grid_thw"]
    pads = int(grid.prod()) // config.vision_config.spatial_merge_size**2
    start, pad, end = config.vision_start_token_id, config.image_token_id, config.vision_end_token_id
    before, after = [1, 40, 41], [42, 2, 1]
    expanded = before + [start] + [pad] * pads + [end] + after
    found = {"tokens": [], "log_probs": []}
    for _ in range(LENGTH):
        ids = expanded + found["tokens"]
        with torch.no_grad():
            out = net(input_ids=torch.tensor([ids]), pixel_values=features["pixel_values"], image_grid_thw=grid,
                      mm_token_type_ids=torch.tensor([[int(t == pad) for t in ids]]))
        p = out.logits[0, -1].log_softmax(-1)
        found["log_probs"].append(p.max().item())
        found["tokens"].append(p.argmax().item())
    url = "data:image/png;base64," + encoded(image, "PNG")
    return {"prompt": before + [start, pad, end] + after, "image": url, "video": film(config), **found}


def film(config):
    """A prompt with a film of four frames as JPEG, which vLLM takes without a decoder, and the pads it makes of it."""
    frames = []
    for at in range(4):
        frame = Image.new("RGB", (56, 56))
        frame.putdata([(x * 4, y * 4, 60 * at) for y in range(56) for x in range(56)])
        frames.append(encoded(frame, "JPEG"))
    start, end = config.vision_start_token_id, config.vision_end_token_id
    patches = (4 // config.vision_config.temporal_patch_size) * (56 // config.vision_config.patch_size) ** 2
    return {"prompt": [1, 40, 41, start, config.video_token_id, end, 42, 2, 1],
            "pads": patches // config.vision_config.spatial_merge_size**2,
            "url": "data:video/jpeg;base64," + ",".join(frames)}


for folder in map(Path, sys.argv[1:]):
    config = AutoConfig.from_pretrained(folder)
    expected = vision(folder, config) if hasattr(config, "vision_config") else text(folder)
    (folder / "expected.json").write_text(json.dumps(expected))
    print(folder.name, expected["tokens"])
