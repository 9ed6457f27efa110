"""The engine: trunk -> super links -> decoders -> answers. Label, evaluate and serve share it.

It has two halves, so that serving can deploy them separately: `TrunkStage` turns images and requests into a
`TrunkOutput` (links, dense features, texts), `DecoderStage` turns its decoder's input from there into predictions, and
`assemble` builds the answers (see `outputs`). `Engine` runs both in one process.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lumen_ray.decoders.base import PredictSettings
from lumen_ray.inference.decoder_stage import DecoderStages
from lumen_ray.inference.outputs import assemble, finish, loosest, request_limits
from lumen_ray.inference.request import Request, check_call
from lumen_ray.inference.trunk_stage import FromFolder, TrunkStage
from lumen_ray.model.build import LoadedModel
from lumen_ray.structures import Answer, Size


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
        """First 12 hex digits of the weights' sha256."""
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

    def run(
        self,
        images: Sequence[np.ndarray | None],
        requests: Sequence[Sequence[Request]],
        *,
        score_threshold: float = 0.05,
        max_per_phrase: int = 300,
        max_new_tokens: int = 48,
        class_chunk: int = 64,
        route_only: bool = False,
    ) -> list[list[Answer]]:
        """An `Answer` per request of each image, predictions best first.

        images: uint8 [h, w, 3] RGB in the EXIF-rotated frame, None for text alone; requests: per image (see
        `make_request`). Images that share a size bucket share a pass. `score_threshold` and `max_per_phrase` apply to
        requests without their own. With `route_only` no decoder is called: an answer holds the LLM's text or the
        routing token, which in free chat names the decoder that the LLM would have called.
        """
        check_call(images, requests, score_threshold)
        if len(images) == 0:
            return []
        default = PredictSettings(score_threshold, max_per_phrase)
        # `max_per_phrase` bounds the instances before overlaps are merged, so images of one pass must agree on it
        groups: dict[tuple[Size, bool, int], list[int]] = {}
        for i, (image, row) in enumerate(zip(images, requests, strict=True)):
            key = self.trunk.bucket_of(image), image is None, loosest(row, default).max_per_phrase
            groups.setdefault(key, []).append(i)
        answers: dict[int, list[Answer]] = {}
        for members in groups.values():
            rows = [requests[i] for i in members]
            used = loosest((request for row in rows for request in row), default)
            output = self.trunk.links(
                [images[i] for i in members],
                rows,
                max_new_tokens=max_new_tokens,
                class_chunk=class_chunk,
                route_only=route_only,
            )
            results = {name: self.decoders[name].predict(output, used) for name in output.decoder_inputs}
            for i, found in zip(members, assemble(output.plans, results), strict=True):
                answers[i] = []
                for request, answer in zip(requests[i], found, strict=True):
                    assert answer is not None, "every decoder of the pass has answered"
                    answers[i].append(finish(answer, request_limits(request, default), used))
        return [answers[i] for i in range(len(images))]
