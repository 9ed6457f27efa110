#!/usr/bin/env bash
# diffusers 0.42.1
#
# Guess:  VaeImageProcessor.preprocess gives the same tensor for a PIL image and
#         for the uint8 array of that image: values from -1 to 1.
# Seen:   only PIL images are divided by 255. A uint8 array or tensor is taken as
#         if it were 0..1 already and goes through 2x - 1: values up to 509.
# Output: range -1..1 for PIL and for a float array of 0..1; -1..509 for the uint8
#         array and for the uint8 tensor. All four have the same shape; no warning.
# Why it matters: frames from OpenCV, a video reader or an Arrow table are uint8
#         arrays. Encoded this way they give latents far out of distribution, and a
#         fine-tune learns from noise without any error. Divide by 255 first or
#         wrap the array with Image.fromarray.
source "$(dirname "$0")/lib.sh"

install "torch==2.13.0" "diffusers==0.42.1" "pillow==12.3.0" "numpy==2.2.6"

probe <<'PY'
import numpy as np
import torch
from PIL import Image
from diffusers.image_processor import VaeImageProcessor

array = np.zeros((16, 16, 3), np.uint8)
array[8:] = 255
processor = VaeImageProcessor(vae_scale_factor=8)
for name, value in {
    "PIL image": Image.fromarray(array),
    "float array 0..1": (array / 255).astype(np.float32),
    "uint8 array": array,
    "uint8 tensor": torch.from_numpy(array).permute(2, 0, 1),
}.items():
    out = processor.preprocess(value)
    print(f"{name}: {tuple(out.shape)} {out.dtype}, {out.min():.0f} to {out.max():.0f}")
PY

expect <<'TXT'
PIL image: (1, 3, 16, 16) torch.float32, -1 to 1
float array 0..1: (1, 3, 16, 16) torch.float32, -1 to 1
uint8 array: (1, 3, 16, 16) torch.float32, -1 to 509
uint8 tensor: (1, 3, 16, 16) torch.float32, -1 to 509
TXT
