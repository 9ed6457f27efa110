"""What travels between the halves of the engine: what the trunk gives to decoders, and answers out of what they found.

Plain tensors and records, ready for the wire; no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from lumen_ray.decoders.base import PromptSpec
from lumen_ray.inference.semantic import class_regions
from lumen_ray.structures import Answer, Prediction, Size
from lumen_ray.superlink import SuperLink, concat
from lumen_ray.targets import Frame
from lumen_ray.tasks import TASKS

#: What a decoder makes of one link: instances, pictures (uint8 [h, w, 3]), or nothing of its own.
Found = Prediction | list[np.ndarray] | None


@dataclass
class RequestPlan:
    """Where one request's answer comes from: `links` are indices into the super link of its `decoder`, `text` is what
    the LLM wrote."""

    task: str
    size: Size
    links: list[int] = field(default_factory=list)
    decoder: str | None = None
    route: str | None = None
    text: str | None = None


@dataclass
class LinkPart:
    """What one decoder is asked: its super link, and a `PromptSpec` per link, None for keypoint prompts.

    `pixels`: for a decoder that looks at images itself, the image of each link as it gets it, uint8 [3, h, w] on the
    CPU; links about the same image share a tensor. Empty for others.
    """

    link: SuperLink
    prompts: list[PromptSpec | None]
    pixels: list[Tensor] = field(default_factory=list)

    def select(self, members: Tensor) -> LinkPart:
        chosen = members.tolist()
        pixels = [self.pixels[i] for i in chosen] if self.pixels else []
        return LinkPart(self.link.select(members), [self.prompts[i] for i in chosen], pixels)


@dataclass
class TrunkOutput:
    """What leaves the trunk for a batch of images. Tensors are contiguous and on the CPU, ready for the wire.

    `parts`: by decoder, those that are asked something; `dense`: float32 [B, C, H/4, W/4] of inputs of one bucket
    (H, W), where a decoder of `parts` reads it; `frames`: of those inputs; `plans`: per image, one per request.
    """

    parts: dict[str, LinkPart]
    dense: Tensor | None
    frames: list[Frame]
    plans: list[list[RequestPlan]]

    def select(self, image: int) -> TrunkOutput:
        """The part of the output about one image of the batch."""
        parts, places = {}, {}
        for name, part in self.parts.items():
            members = torch.nonzero(part.link.image_index == image).flatten()
            if len(members):
                parts[name] = part.select(members)
                parts[name].link.image_index = torch.zeros_like(members)
                places[name] = {int(old): new for new, old in enumerate(members)}
        plans = [
            replace(plan, links=[places[plan.decoder][i] for i in plan.links]) if plan.links else plan
            for plan in self.plans[image]
        ]
        own = torch.tensor([image])  # as an index it copies, so that not the whole batch travels
        dense = None if self.dense is None else self.dense[own]
        return TrunkOutput(parts, dense, [self.frames[image]], [plans])

    @property
    def input_size(self) -> Size:
        return self.frames[0].input_size


def merge(outputs: Sequence[TrunkOutput]) -> TrunkOutput:
    """Outputs of several passes over inputs of one size as one batch, in order: the inverse of `TrunkOutput.select`."""
    if len(outputs) == 1:
        return outputs[0]
    collected: dict[str, list[tuple[LinkPart, int]]] = {}  # each with its first image
    frames: list[Frame] = []
    plans: list[list[RequestPlan]] = []
    for output in outputs:
        first = {name: sum(len(part.link) for part, _ in parts) for name, parts in collected.items()}
        plans += [
            [replace(p, links=[i + first.get(p.decoder, 0) for i in p.links]) for p in row] for row in output.plans
        ]
        for name, part in output.parts.items():
            collected.setdefault(name, []).append((part, len(frames)))
        frames += output.frames
    parts = {
        name: LinkPart(
            concat([part.link for part, _ in found], [image for _, image in found]),
            [prompt for part, _ in found for prompt in part.prompts],
            [image for part, _ in found for image in part.pixels],
        )
        for name, found in collected.items()
    }
    dense = [output.dense for output in outputs]
    return TrunkOutput(parts, None if any(x is None for x in dense) else torch.cat(dense), frames, plans)


def assemble(
    plans: Sequence[Sequence[RequestPlan]], predictions: Mapping[str, Sequence[Found]]
) -> list[list[Answer | None]]:
    """Answers per image and request from what the trunk planned and what each decoder found; None where the request's
    decoder is not among them."""
    return [[_answer(plan, predictions) for plan in row] for row in plans]


def _answer(plan: RequestPlan, predictions: Mapping[str, Sequence[Found]]) -> Answer | None:
    if plan.links and plan.decoder not in predictions:
        return None
    found = [predictions[plan.decoder][i] for i in plan.links]
    if found and isinstance(found[0], list):
        images = [picture for pictures in found for picture in pictures]
        size = plan.size if TASKS[plan.task].sees_image else images[0].shape[:2]
        return Answer(plan.task, size, text=plan.text, route=plan.route, images=images)
    return Answer(plan.task, plan.size, found, text=plan.text, route=plan.route)


def finished(answer: Answer | None) -> Answer | None:
    """What is made of all instances of an answer together, once those below its score threshold are gone."""
    if answer is None or answer.task != "semantic":
        return answer
    return replace(answer, predictions=class_regions(answer.predictions))
