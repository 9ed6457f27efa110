"""Perceptual hashes: 64 bits that images which look alike have almost in common."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.fft import dctn

_SIDE, _KEPT = 32, 8


def perceptual_hash(pixels: np.ndarray) -> str:
    """The pHash of an image, uint8 [h, w, 3] at any scale, as 16 hexadecimal digits.

    Which of the 8 x 8 lowest frequencies of the grey image, scaled to 32 x 32, are above their median; rows first, the
    first bit is the highest. These are the bits of `imagehash.phash` of the ImageHash library, which would add
    PyWavelets to the dependencies for hashes that are not used here.
    """
    grey = Image.fromarray(pixels).convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    low = dctn(np.asarray(grey, np.float64))[:_KEPT, :_KEPT]
    return np.packbits(low > np.median(low)).tobytes().hex()
