"""The engine: trunk -> super links -> decoders -> answers. Label, evaluate and serve share it.

It is two halves, so that serving can deploy them apart: `TrunkStage` turns images and requests into a `TrunkOutput`
(links, dense features, texts), `DecoderStage` turns its decoder's part of that into predictions, and `assemble` puts
answers together (see `outputs`). `Engine` runs both in one process.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lumen_ray.decoders.base import PredictSettings
from lumen_ray.inference.decoder_stage import DecoderStages
from lumen_ray.inference.outputs import assemble, finished
from lumen_ray.inference.request import Request
from lumen_ray.inference.trunk_stage import FromFolder, TrunkStage
from lumen_ray.model.build import LoadedModel
from lumen_ray.structures import Answer, Size


class Engine(FromFolder):
    """Trunk and decoders in one process."""

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
        """Task -> decoder, where another than the model folder says serves it."""
        return self.loaded.chosen

    @property
    def dtype(self) -> str:
        return self.loaded.dtype

    @property
    def image_size(self) -> int:
        return self.loaded.settings.image_size

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that the model can serve."""
        return self.trunk.tasks

    @property
    def serving(self) -> dict[str, str]:
        """Task -> the decoder that serves it, of every task that the model has one for."""
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

        images: uint8 [h, w, 3] RGB in the EXIF-rotated frame, None for words alone; requests: per image (see
        `make_request`). Images that share a size bucket pass together. With `route_only` no decoder is called: an
        answer has what the LLM wrote or the routing token, which of free chat says what the LLM would have called.
        """
        if len(images) == 0:
            return []
        settings = PredictSettings(score_threshold, max_per_phrase)
        groups: dict[Size, list[int]] = {}
        for i, (image, _) in enumerate(zip(images, requests, strict=True)):
            groups.setdefault(self.trunk.bucket_of(image), []).append(i)
        answers: dict[int, list[Answer]] = {}
        for members in groups.values():
            out = self.trunk.run(
                [images[i] for i in members],
                [requests[i] for i in members],
                max_new_tokens=max_new_tokens,
                class_chunk=class_chunk,
                route_only=route_only,
            )
            predictions = {name: self.decoders[name].run(out, settings) for name in out.parts}
            found = [[finished(answer) for answer in row] for row in assemble(out.plans, predictions)]
            answers.update(zip(members, found, strict=True))
        return [answers[i] for i in range(len(images))]
