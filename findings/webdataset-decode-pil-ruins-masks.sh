#!/usr/bin/env bash
# webdataset 1.0.2 with Pillow 12.3.0
#
# Guess:  .decode("pil") hands back what Image.open would: a palette mask with its
#         class numbers, a 16-bit depth map with its depths.
# Seen:   every picture is converted to RGB. A palette mask becomes colours, and a
#         16-bit map is clipped at 255 on all three channels. There is no warning,
#         and the image size is still right.
# Output: mask: Image.open mode P, class 2; webdataset RGB (0, 128, 0).
#         depth: Image.open mode I;16, 1000 and 300; webdataset RGB, 255 and 255.
# Why it matters: class numbers and millimetres in a tar of training data turn into
#         colours and a constant. Read such members as bytes (no decoder for their
#         extension) and open them with Image.open.
source "$(dirname "$0")/lib.sh"

install "webdataset==1.0.2" "pillow==12.3.0" "numpy==2.2.6"

probe <<'PY'
import io
import numpy as np
import webdataset as wds
from PIL import Image

mask = Image.new("P", (4, 4), 2)
mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
depth = Image.fromarray(np.array([[1000, 300], [1000, 300]], np.uint16))


def png(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


with wds.TarWriter("a.tar") as tar:
    tar.write({"__key__": "a", "mask.png": png(mask), "depth.png": png(depth)})

raw = next(iter(wds.WebDataset("a.tar", shardshuffle=False)))
pil = next(iter(wds.WebDataset("a.tar", shardshuffle=False).decode("pil")))
for name in ("mask.png", "depth.png"):
    for how, image in (("Image.open", Image.open(io.BytesIO(raw[name]))), ('decode("pil")', pil[name])):
        print(name, how, image.size, image.mode, [image.getpixel((x, 0)) for x in (0, 1)])
PY

expect <<'TXT'
mask.png Image.open (4, 4) P [2, 2]
mask.png decode("pil") (4, 4) RGB [(0, 128, 0), (0, 128, 0)]
depth.png Image.open (2, 2) I;16 [1000, 300]
depth.png decode("pil") (2, 2) RGB [(255, 255, 255), (255, 255, 255)]
TXT
