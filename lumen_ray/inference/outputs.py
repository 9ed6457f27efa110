"""The records between the halves of the engine: the trunk's output, and answers assembled from the decoders' results.

Plain tensors and records, ready for the wire; no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from lumen_ray.answer import Answer, AnswerPart, TokenUsage
from lumen_ray.decoders.base import PredictSettings, PromptSpec
from lumen_ray.inference.request import Request
from lumen_ray.inference.semantic import class_regions
from lumen_ray.structures import Prediction, Size
from lumen_ray.superlink import SuperLink, concat
from lumen_ray.targets import Frame
from lumen_ray.tasks import TASKS

#: A decoder's result for one link: instances, pictures (uint8 [h, w, 3]), or None for a keypoint prompt.
DecoderResult = Prediction | list[np.ndarray] | None


@dataclass
class RequestPlan:
    """Where one request's answer comes from: `links` are indices into the super link of its `decoder`, `text` is what
    the LLM wrote; `log_probs`, `tokens`, `top_tokens`, `is_cut` and `usage` are as in `Answer`. `parts`: as there,
    with an entry without prediction for each link, in the order of `links`."""

    task: str
    size: Size
    links: list[int] = field(default_factory=list)
    decoder: str | None = None
    route: str | None = None
    text: str | None = None
    log_probs: list[float] | None = None
    tokens: list[str] | None = None
    top_tokens: list[list[tuple[str, float]]] | None = None
    is_cut: bool = False
    usage: TokenUsage | None = None
    parts: list[AnswerPart] | None = None


@dataclass
class DecoderInput:
    """The input of one decoder: its super link, and a `PromptSpec` per link, None for keypoint prompts.

    `pixels`: for a decoder that reads images, the image of each link at the decoder's input size, uint8 [3, h, w] on
    the CPU; links about the same image share a tensor. Empty for others.
    """

    link: SuperLink
    prompts: list[PromptSpec | None]
    pixels: list[Tensor] = field(default_factory=list)

    def select(self, members: Tensor) -> DecoderInput:
        """The input of the links at `members`, int64 [M]."""
        chosen = members.tolist()
        pixels = [self.pixels[i] for i in chosen] if self.pixels else []
        return DecoderInput(self.link.select(members), [self.prompts[i] for i in chosen], pixels)


@dataclass
class TrunkOutput:
    """The trunk's output for a batch of images. Tensors are contiguous and on the CPU, ready for the wire.

    `decoder_inputs`: by decoder, those with at least one link; `dense`: float32 [B, C, H/4, W/4] of inputs of one
    bucket (H, W), where one of these decoders reads it; `frames`: of those inputs; `plans`: per image, one per request.
    """

    decoder_inputs: dict[str, DecoderInput]
    dense: Tensor | None
    frames: list[Frame]
    plans: list[list[RequestPlan]]

    def select(self, image: int) -> TrunkOutput:
        """The output for one image of the batch."""
        inputs: dict[str, DecoderInput] = {}
        places: dict[str | None, dict[int, int]] = {}
        for name, decoder in self.decoder_inputs.items():
            members = torch.nonzero(decoder.link.image_index == image).flatten()
            if len(members):
                inputs[name] = decoder.select(members)
                inputs[name].link.image_index = torch.zeros_like(members)
                places[name] = {int(old): new for new, old in enumerate(members)}
        plans = [
            replace(plan, links=[places[plan.decoder][i] for i in plan.links]) if plan.links else plan
            for plan in self.plans[image]
        ]
        index = torch.tensor([image])  # indexing by a tensor copies, so that not the whole batch travels
        dense = None if self.dense is None else self.dense[index]
        return TrunkOutput(inputs, dense, [self.frames[image]], [plans])

    @property
    def input_size(self) -> Size:
        """(height, width) of the trunk's input."""
        return self.frames[0].input_size


def merge(outputs: Sequence[TrunkOutput]) -> TrunkOutput:
    """Joins outputs of passes over inputs of one size into one batch, in order: the inverse of `TrunkOutput.select`."""
    if len(outputs) == 1:
        return outputs[0]
    collected: dict[str, list[tuple[DecoderInput, int]]] = {}  # each with the index of its first image
    frames: list[Frame] = []
    plans: list[list[RequestPlan]] = []
    for output in outputs:
        first: dict[str | None, int] = {
            name: sum(len(item.link) for item, _ in items) for name, items in collected.items()
        }
        plans += [
            [replace(p, links=[i + first.get(p.decoder, 0) for i in p.links]) for p in row] for row in output.plans
        ]
        for name, decoder in output.decoder_inputs.items():
            collected.setdefault(name, []).append((decoder, len(frames)))
        frames += output.frames
    inputs = {
        name: DecoderInput(
            concat([item.link for item, _ in items], [image for _, image in items]),
            [prompt for item, _ in items for prompt in item.prompts],
            [image for item, _ in items for image in item.pixels],
        )
        for name, items in collected.items()
    }
    dense = [output.dense for output in outputs if output.dense is not None]
    return TrunkOutput(inputs, torch.cat(dense) if len(dense) == len(outputs) else None, frames, plans)


def assemble(
    plans: Sequence[Sequence[RequestPlan]], results: Mapping[str, Sequence[DecoderResult]]
) -> list[list[Answer | None]]:
    """Answers per image and request from the trunk's plans and each decoder's results; None where `results` lacks the
    request's decoder."""
    return [[_answer(plan, results) for plan in row] for row in plans]


def _answer(plan: RequestPlan, results: Mapping[str, Sequence[DecoderResult]]) -> Answer | None:
    written = Answer(
        plan.task,
        plan.size,
        text=plan.text,
        route=plan.route,
        log_probs=plan.log_probs,
        tokens=plan.tokens,
        top_tokens=plan.top_tokens,
        is_cut=plan.is_cut,
        usage=plan.usage,
    )
    if not plan.links:
        return written
    assert plan.decoder is not None, "links belong to a decoder"
    if plan.decoder not in results:
        return None
    found = [results[plan.decoder][i] for i in plan.links]
    pictures = [picture for result in found if isinstance(result, list) for picture in result]
    if isinstance(found[0], list):
        size = plan.size if TASKS[plan.task].sees_image else (pictures[0].shape[0], pictures[0].shape[1])
        return replace(written, size=size, images=pictures)
    predictions = [result for result in found if isinstance(result, Prediction)]
    return replace(written, parts=plan.parts).with_predictions(predictions)


def request_limits(request: Request, default: PredictSettings) -> PredictSettings:
    """The limits of one request; `default` fills in those it leaves out."""
    return PredictSettings(
        default.score_threshold if request.score_threshold is None else request.score_threshold,
        default.max_per_phrase if request.max_per_phrase is None else request.max_per_phrase,
    )


def loosest(requests: Iterable[Request], default: PredictSettings) -> PredictSettings:
    """The limits of a pass that serves all these requests: lowest score threshold, most instances per phrase."""
    limits = [request_limits(request, default) for request in requests] or [default]
    return PredictSettings(
        min(limit.score_threshold for limit in limits), max(limit.max_per_phrase for limit in limits)
    )


def finish(answer: Answer, limits: PredictSettings, used: PredictSettings) -> Answer:
    """Cuts an answer to its request's `limits`, where the pass `used` looser ones, then merges the instances of tasks
    whose answer depends on all of them together."""
    predictions = answer.predictions
    if limits != used:
        predictions = [p.above(limits.score_threshold)[: limits.max_per_phrase] for p in predictions]
    if TASKS[answer.task].joins_objects:
        predictions = class_regions(predictions)
    return answer.with_predictions(predictions)
