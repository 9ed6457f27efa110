"""The message from the ingress to the model: what is shown and the requests about it. No HTTP, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from lumen_ray.inference.request import Request, Shown


@dataclass(frozen=True)
class TrunkJob:
    """An image, those of a conversation (read-only), or None for text alone, and the requests about it.

    Every request carries its score threshold and number of instances.
    """

    image: Shown
    requests: tuple[Request, ...]
    max_new_tokens: int
