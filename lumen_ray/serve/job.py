"""The messages between the ingress and the trunk: what is shown and the requests about it, and the reply. No HTTP, no
torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lumen_ray.answer import Answer
from lumen_ray.inference.request import Request, Shown
from lumen_ray.serve.image_cache import KeyedImage
from lumen_ray.tasks import TASKS

if TYPE_CHECKING:
    from ray import ObjectRef

    from lumen_ray.inference.outputs import TrunkOutput

#: bytes of a name that counts once
LONG_NAME = 256


@dataclass(frozen=True)
class TrunkJob:
    """An image, those of a conversation (read-only), or None for text alone, and the requests about it. A single image
    has its id where trunks hold images.

    Every request carries its score threshold and number of instances.
    """

    image: Shown | KeyedImage
    requests: tuple[Request, ...]
    max_new_tokens: int

    @property
    def cost(self) -> int:
        return cost_of(self.requests, self.max_new_tokens)


@dataclass(frozen=True)
class TrunkReply:
    """The answers to the requests of a job, None for those that the `decoders` give.

    `output`: the reference to what these decoders read; None without any. Tensors lie behind it, so that they go from
    the trunk to the decoders and not through the ingress.
    """

    answers: tuple[Answer | None, ...]
    decoders: tuple[str, ...] = ()
    output: ObjectRef[TrunkOutput] | None = None


def cost_of(requests: Iterable[Request], max_new_tokens: int) -> int:
    """The tokens that requests may cost, at most: their classes, phrases, keypoints and questions have at most a token
    for each byte in UTF-8, and an answer in text has `max_new_tokens`. Without earlier turns of conversations.

    The time for a name grows with the square of its length, so a long one counts several times.
    """
    return sum(_prompt_cost(r) + max_new_tokens * TASKS[r.task].is_text for r in requests)


def _prompt_cost(request: Request) -> int:
    """A keypoint is asked for with the name of its class."""
    if not request.phrases:
        return len(request.text.encode())
    phrases = [len(phrase.encode()) for phrase in request.phrases]
    keypoints = [len(name.encode()) for name in request.keypoints or ()]
    names = [*phrases, *(phrase + keypoint for phrase in phrases for keypoint in keypoints)]
    return sum(length * math.ceil(length / LONG_NAME) for length in names)
