"""The message from the ingress to the model: one image and the requests about it. No HTTP, no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lumen_ray.inference.request import Request


@dataclass(frozen=True)
class TrunkJob:
    """One image (uint8 [H, W, 3] RGB, EXIF-rotated, read-only), None for text alone, and the requests about it.

    Every request carries its score threshold and number of instances.
    """

    image: np.ndarray | None
    requests: tuple[Request, ...]
    max_new_tokens: int
