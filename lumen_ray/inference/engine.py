"""The engine: trunk -> super links -> decoders -> answers. Label, evaluate and serve share it.

It has two halves, so that serving can deploy them separately: `TrunkStage` turns images and requests into a
`TrunkOutput` (links, dense features, texts), `DecoderStage` turns its decoder's input from there into predictions, and
`assemble` builds the answers (see `outputs`). `Engine` runs both in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import cast

from lumen_ray.answer import Answer
from lumen_ray.decoders.base import PredictSettings
from lumen_ray.errors import UserError
from lumen_ray.inference.conversation import Conversation
from lumen_ray.inference.decoder_stage import DecoderStages
from lumen_ray.inference.encoded_images import EncodedImages
from lumen_ray.inference.outputs import assemble, finish, loosest, request_limits
from lumen_ray.inference.request import RegionQuestion, Request, Shown, check_call
from lumen_ray.inference.sampling import GREEDY, Sampling
from lumen_ray.inference.trunk_stage import FromFolder, OnText, TrunkStage
from lumen_ray.model.build import LoadedModel
from lumen_ray.structures import Size


class Engine(FromFolder):
    """Trunk and decoders of a model in one process; implements `EngineProtocol`."""

    def __init__(self, loaded: LoadedModel, device: str = "cpu"):
        self.loaded = loaded
        self.trunk = TrunkStage(loaded, device)
        self.decoders = DecoderStages(loaded, device)

    @property
    def preset(self) -> str:
        return self.loaded.settings.name

    @property
    def version(self) -> str:
        """The first 12 hex digits of the weights' sha256; others for a calibrated model."""
        return self.loaded.version

    @property
    def chosen_decoders(self) -> dict[str, str]:
        """Task -> decoder, for tasks whose decoder differs from the model folder's choice."""
        return self.loaded.chosen

    @property
    def dtype(self) -> str:
        return self.loaded.dtype

    @property
    def image_size(self) -> int:
        return self.loaded.settings.image_size

    @property
    def largest_side(self) -> int:
        """The longest side in pixels of any input of trunk or decoders."""
        return self.trunk.largest_side

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that the model serves."""
        return self.trunk.tasks

    @property
    def serving(self) -> dict[str, str]:
        """Task -> the decoder that serves it, for every task that the model has one for."""
        return self.trunk.serving

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.loaded.meta.classes)

    @property
    def skeletons(self) -> dict[str, tuple[str, ...]]:
        return self.trunk.skeletons

    @property
    def edges(self) -> dict[str, list[list[int]]]:
        return self.loaded.meta.edges

    def input_size(self, shown: Shown) -> Size:
        """(height, width) in pixels of the trunk's input for an image."""
        return self.trunk.bucket_of(shown)

    def encode(self, images: Sequence[Shown]) -> EncodedImages:
        """Encodes images that share a size bucket, so that several calls of `run` about them pay for it once.

        images: as of `run`. Raises `UserError` if they are none, or in several buckets (`mixed_sizes`).
        """
        check_call(images, [[] for _ in images], 0.0)
        if len(buckets := {self.trunk.bucket_of(image) for image in images}) != 1:
            sizes = ", ".join(f"{height}x{width}" for height, width in sorted(buckets)) or "none"
            raise UserError(f"images that are encoded together need one input size, got {sizes}", "mixed_sizes")
        return self.trunk.encode(images)

    def run(
        self,
        images: Sequence[Shown] | EncodedImages,
        requests: Sequence[Sequence[Request]],
        *,
        score_threshold: float = 0.05,
        max_per_phrase: int = 300,
        max_new_tokens: int = 48,
        class_chunk: int = 64,
        route_only: bool = False,
        on_text: OnText | None = None,
    ) -> list[list[Answer]]:
        """An `Answer` per request of each image, predictions best first.

        images: uint8 [h, w, 3] RGB in the EXIF-rotated frame, or a `Picture` of one decoded at reduced scale (see
        `largest_side`), None for text alone, a list for the images of a conversation; or the result of `encode`.
        requests: per entry of `images` (see `make_request`). Decoders that a conversation calls look at its last image.
        Images that share a size bucket share a pass. `score_threshold` and `max_per_phrase` apply to requests without
        their own. With `route_only` no decoder is called: an answer holds the LLM's text or the routing token, which in
        free chat names the decoder that the LLM would have called. `on_text` is called with (index of the image, index
        of the request, new text) for every token that is written; the text may be empty.

        Several threads may call this at once: their text answers are written together.
        """
        encoded = images if isinstance(images, EncodedImages) else None
        stored = encoded.inputs.images if encoded else cast("Sequence[Shown]", images)
        check_call(stored, requests, score_threshold, max_new_tokens)
        if len(stored) == 0:
            return []
        default = PredictSettings(score_threshold, max_per_phrase)
        # `max_per_phrase` bounds the instances before overlaps are merged, so images of one pass must agree on it
        groups: dict[tuple[Size, bool, int], list[int]] = {}
        for i, (image, row) in enumerate(zip(stored, requests, strict=True)):
            key = self.trunk.bucket_of(image), image is None, loosest(row, default).max_per_phrase
            groups.setdefault(key, []).append(i)
        answers: dict[int, list[Answer]] = {}
        for members in groups.values():
            rows = [requests[i] for i in members]
            used = loosest((request for row in rows for request in row), default)
            # images that are encoded are one batch, of which a pass may have some without requests
            batch = range(len(stored)) if encoded else members
            output = self.trunk.links(
                encoded or [stored[i] for i in members],
                [requests[i] if i in members else [] for i in batch],
                max_new_tokens=max_new_tokens,
                class_chunk=class_chunk,
                route_only=route_only,
                on_text=None if on_text is None else _numbered(on_text, batch),
            )
            results = {name: self.decoders[name].predict(output, used) for name in output.decoder_inputs}
            for i, found in zip(batch, assemble(output.plans, results), strict=True):
                if i not in members:
                    continue
                answers[i] = []
                for request, answer in zip(requests[i], found, strict=True):
                    assert answer is not None, "every decoder of the pass has answered"
                    answers[i].append(finish(answer, request_limits(request, default), used))
        return [answers[i] for i in range(len(stored))]

    def beside(self, decoder: str, tasks: Sequence[str]) -> Engine:
        """An engine over the same modules, whose `decoder` serves those of `tasks` that it can and that another one
        serves here; it takes what this engine has encoded. Raises `UserError` if there is no such decoder or task."""
        other = copy(self)
        other.trunk = self.trunk.serving_by(self.loaded.settings.beside(decoder, tasks).serving)
        return other

    def ask_regions(self, images: EncodedImages, questions: Sequence[RegionQuestion]) -> list[float]:
        """The probability of "yes" against "no", 0..1, of each question about a region of an encoded image. Raises
        `UserError` (`cannot_verify`) if the tokenizer begins both words alike."""
        return self.trunk.region_questions.probabilities(images, questions)

    def conversation(self, image: Shown = None, system: str = "", sampling: Sampling = GREEDY) -> Conversation:
        """Several questions in a row about an image, several (as of `run`), or none; questions may bring more.

        `system`: what the LLM is told beforehand."""
        return Conversation(self, image, system, sampling)


def _numbered(on_text: OnText, batch: Sequence[int]) -> OnText:
    """`on_text` called with the numbers of a batch's images."""
    return lambda image, request, text: on_text(batch[image], request, text)
