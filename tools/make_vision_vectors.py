"""Writes vision_tokens.json and images.json: what transformers' Qwen2-VL processor and Pillow make of images.

usage: make_vision_vectors.py FOLDER (lightrft-data/tests/data; needs transformers, torchvision and Pillow)
"""
import json, random, sys, warnings
warnings.filterwarnings("ignore")
import numpy, transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

random.seed(6)
D = (28, 56 * 56, 28 * 28 * 1280)
resize = []
def add(h, w, f, lo, hi):
    try: out = list(smart_resize(h, w, f, lo, hi))
    except ValueError: out = "aspect ratio"
    resize.append([h, w, f, lo, hi, out])
for h in (1, 13, 14, 27, 28, 42, 43, 70, 98, 126, 224, 700, 1000, 4001):   # halves: 14, 42, 70, 98, 126
    for w in (1, 14, 42, 70, 98, 199, 200, 201, 333, 1080, 2801, 65535):
        add(h, w, *D)
for _ in range(500):
    lim = random.choice([60, 300, 2000, 20000])
    f = random.choice([28, 32, 14, 7])
    lo = random.choice([1, 56 * 56, 256 * 28 * 28, 128 * 28 * 28])
    hi = random.choice([28 * 28 * 16, 28 * 28 * 768, 28 * 28 * 1280, 14 * 14 * 4 * 16384, lo])
    add(random.randint(1, lim), random.randint(1, lim), f, lo, hi)

ip, vp = Qwen2VLImageProcessor(), Qwen2VLVideoProcessor()
counts = []
for _ in range(150):
    h, w, n = random.randint(20, 3000), random.randint(20, 3000), random.randint(1, 40)
    counts.append([n, h, w, ip.get_number_of_image_patches(h, w, {}) // 4, vp.get_num_of_video_patches(n, h, w, {}) // 4])

SPECIAL = ["<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
vocab = {t: i for i, t in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
bpe.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
tok = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|endoftext|>")
proc = Qwen2VLProcessor(image_processor=ip, tokenizer=tok, video_processor=vp)
IMG, VID = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
whole = []
for text, images, videos in [
    (IMG + "one", [(40, 60)], []),
    ("two " + IMG + IMG + " é", [(28, 28), (300, 200)], []),
    ("v " + VID, [], [(3, 60, 90)]),
    (VID + " mixed " + IMG + " and " + VID, [(84, 112)], [(2, 30, 30), (5, 100, 120)]),
]:
    pics = [Image.new("RGB", (w, h)) for h, w in images]
    vids = [numpy.zeros((n, h, w, 3), dtype=numpy.uint8) for n, h, w in videos]
    out = proc(text=[text], images=pics or None, videos=vids or None, return_tensors="pt")
    whole.append(dict(text=text, images=images, videos=videos,
        image_grid_thw=out["image_grid_thw"].tolist() if images else [],
        video_grid_thw=out["video_grid_thw"].tolist() if videos else [],
        expanded=tok.decode(out["input_ids"][0], clean_up_tokenization_spaces=False)))
head = dict(source=f"transformers {transformers.__version__}: smart_resize, Qwen2VLImageProcessor, Qwen2VLVideoProcessor, Qwen2VLProcessor",
            resize="[height, width, factor, min_pixels, max_pixels, [height, width] | error]", tokens="[frames, height, width, image tokens, video tokens]")
with open(sys.argv[1] + "/vision_tokens.json", "w") as f:
    f.write('{"format": %s,\n"resize": [\n%s\n],\n"tokens": [\n%s\n],\n"prompts": [\n%s\n]}\n' % (json.dumps(head),
        ",\n".join(map(json.dumps, resize)), ",\n".join(map(json.dumps, counts)), ",\n".join(json.dumps(w, ensure_ascii=False) for w in whole)))

# ---- images.json
import base64, io, struct, zlib
import numpy as np
def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
b64 = lambda b: base64.b64encode(b).decode()
rng = np.random.default_rng(6)
h, w = 9, 13
rgb = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
ys, xs = np.mgrid[0:h, 0:w]
smooth = Image.fromarray(np.stack([xs * 18, ys * 27, (xs + ys) * 11], -1).astype(np.uint8))
rgba = rgb.copy(); rgba.putalpha(Image.fromarray(rng.integers(0, 256, (h, w), dtype=np.uint8)))
grey = rgb.convert("L")
la = grey.copy(); la.putalpha(128)
pal = rgb.quantize(7)
cases = [
    ("png rgb", encoded(rgb, "PNG"), 0), ("png rgba", encoded(rgba, "PNG"), 0), ("png grey", encoded(grey, "PNG"), 0),
    ("png grey alpha", encoded(la, "PNG"), 0), ("png palette", encoded(pal, "PNG"), 0),
    ("png palette with transparency", encoded(pal, "PNG", transparency=2), 0), ("png 1 bit", encoded(grey.convert("1"), "PNG"), 0),
    ("jpeg", encoded(smooth, "JPEG", quality=90, subsampling=0), 3), ("jpeg progressive", encoded(smooth, "JPEG", quality=90, subsampling=0, progressive=True), 3),
    ("jpeg grey", encoded(smooth.convert("L"), "JPEG", quality=90), 3), ("jpeg 4:2:0", encoded(smooth, "JPEG", quality=90), 12),
    ("webp lossless", encoded(rgb, "WEBP", lossless=True), 0), ("webp lossless alpha", encoded(rgba, "WEBP", lossless=True, exact=True), 0),
    ("webp lossy", encoded(smooth, "WEBP", quality=90), 12),
]
images = [dict(name=n, file=b64(f), height=h, width=w, off=o, rgb=b64(Image.open(io.BytesIO(f)).convert("RGB").tobytes())) for n, f, o in cases]
# Files that say of themselves that they have 60,000 x 60,000 pixels (WebP: 16,383 x 16,383, its most).
png = bytearray(encoded(rgb, "PNG"))
png[16:24] = struct.pack(">II", 60000, 60000)
png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
jpeg = bytearray(encoded(smooth, "JPEG"))
sof = jpeg.index(b"\xff\xc0")
jpeg[sof + 5:sof + 9] = struct.pack(">HH", 60000, 60000)
webp = bytearray(encoded(rgb, "WEBP", lossless=True))
at = webp.index(b"VP8L") + 9
webp[at:at + 4] = struct.pack("<I", 16382 | 16382 << 14)
bombs = [dict(name=n, file=b64(bytes(f))) for n, f in (("png", png), ("jpeg", jpeg), ("webp", webp))]
import PIL
with open(sys.argv[1] + "/images.json", "w") as f:
    f.write('{"format": %s,\n"images": [\n%s\n],\n"bombs": [\n%s\n]}\n' % (
        json.dumps(f"Pillow {PIL.__version__}: file and convert('RGB') in base64; `off`: how far a value may be off, since decoders of lossy formats differ"),
        ",\n".join(map(json.dumps, images)), ",\n".join(map(json.dumps, bombs))))
dot = Image.new("RGB", (1, 1), (255, 0, 0))
print(b64(encoded(dot, "PNG")))
