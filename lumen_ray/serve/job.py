"""The messages between the ingress and the trunk: what is shown and the requests about it, and the reply. No HTTP, no
torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lumen_ray.answer import Answer
from lumen_ray.inference.request import Request, Shown
from lumen_ray.serve.image_cache import KeyedImage
from lumen_ray.wire.limits import cost_of

if TYPE_CHECKING:
    from ray import ObjectRef

    from lumen_ray.inference.outputs import TrunkOutput

#: Who has sent the HTTP request that is answered in this context: its API key, or the request itself.
sender: ContextVar[str] = ContextVar("sender", default="")
#: The version of the model that this HTTP request names; empty for the one that is served.
pinned: ContextVar[str] = ContextVar("pinned", default="")


def owner_of(sender: str) -> Hashable:
    """Whom turns of the model are counted to; a job without a sender is for itself."""
    return sender or object()


@dataclass(frozen=True)
class TrunkJob:
    """An image, those of a conversation (read-only), or None for text alone, and the requests about it. A single image
    has its id where trunks hold images.

    Every request carries its score threshold and number of instances. `sender`: whom its turns of the model are counted
    to, so that all get it in turn. `version`: of the model that is to answer, where the replica holds it; with
    `is_pinned` no other one may.
    """

    image: Shown | KeyedImage
    requests: tuple[Request, ...]
    max_new_tokens: int
    sender: str = ""
    version: str = ""
    is_pinned: bool = False

    @property
    def cost(self) -> int:
        return cost_of(self.requests, self.max_new_tokens)

    @property
    def branches(self) -> int:
        """Names that the trunk makes links of, without keypoints that only the model knows."""
        return sum(len(request.phrases) * (1 + len(request.keypoints or ())) for request in self.requests)

    @property
    def for_decoders(self) -> tuple[Request, ...]:
        """The requests as decoders get them, which read no images of examples."""
        return tuple(replace(request, examples={}) for request in self.requests)


@dataclass(frozen=True)
class TrunkReply:
    """The answers to the requests of a job, None for those that the `decoders` give.

    `output`: what these decoders read, or the reference to it; None without any. Tensors lie behind a reference, so
    that they go from the trunk to the decoders and not through the ingress. `is_held`: whether the replica holds the
    job's image now. `version`: of the model that made it; `model`: its preset@version.
    """

    answers: tuple[Answer | None, ...]
    decoders: tuple[str, ...] = ()
    output: ObjectRef[TrunkOutput] | TrunkOutput | None = None
    is_held: bool = False
    version: str = ""
    model: str | None = None

    def completed(self, found: Sequence[Sequence[Answer | None]]) -> list[Answer]:
        """The answers to all requests, with those that each of the `decoders` has `found`."""
        rows = zip(self.answers, *found, strict=True)
        answers = [next(answer for answer in answers if answer is not None) for answers in rows]
        return answers if self.model is None else [replace(answer, model=self.model) for answer in answers]
