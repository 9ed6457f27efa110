"""The engine: trunk -> super links -> decoders -> answers. Label, evaluate and serve share it.

It is two halves, so that serving can deploy them apart: `TrunkStage` turns images and requests into a `TrunkOutput`
(links, dense features, texts), `DecoderStage` turns links and dense features into predictions, and `assemble` puts
answers together. `Engine` runs both in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lumen_ray.data.buckets import choose
from lumen_ray.data.transforms import fit
from lumen_ray.decoders.base import Frame, PredictSettings, PromptSpec
from lumen_ray.errors import UserError
from lumen_ray.inference.request import Request
from lumen_ray.model.build import LoadedModel, load_model
from lumen_ray.model.prompts import Branch, build_layout
from lumen_ray.model.regions import region_mask
from lumen_ray.model.superlink import SuperLink
from lumen_ray.model.tokenizer import EOS
from lumen_ray.structures import Answer, Prediction, Region, Size
from lumen_ray.tasks import ROUTING_TOKENS, TASKS, task_of_prompt

FAMILY = "perception"
DEFAULTS = PredictSettings()
#: Object prompts times cells of the dense features that are decoded at once: 512 prompts at 128 pixels, 128 at 256.
MAX_DECODER_CELLS = 1 << 19


@dataclass
class RequestPlan:
    """Where one request's answer comes from: `links` are indices into the super link, `text` what the LLM wrote."""

    task: str
    size: Size
    links: list[int] = field(default_factory=list)
    route: str | None = None
    text: str | None = None


@dataclass
class TrunkOutput:
    """What leaves the trunk for a batch of images. Tensors are contiguous and on the CPU, ready for the wire.

    `dense`: float32 [B, C, H/4, W/4] of inputs of one bucket (H, W); `prompts`: one `PromptSpec` per link, None for
    keypoint prompts; `plans`: per image, one per request.
    """

    link: SuperLink
    dense: Tensor
    frames: list[Frame]
    prompts: list[PromptSpec | None]
    plans: list[list[RequestPlan]]

    @property
    def needs_decoder(self) -> bool:
        return len(self.link) > 0

    def select(self, image: int) -> TrunkOutput:
        """The part of the output about one image of the batch."""
        members = torch.nonzero(self.link.image_index == image).flatten()
        place = {int(old): new for new, old in enumerate(members)}
        link, _ = self.link.take(members)
        plans = [replace(plan, links=[place[i] for i in plan.links]) for plan in self.plans[image]]
        return TrunkOutput(
            link,
            self.dense[image : image + 1].clone(),
            [self.frames[image]],
            [self.prompts[int(m)] for m in members],
            [plans],
        )


@dataclass
class _Ask:
    """A branch still to be run and what it is for."""

    branch: Branch
    spec: PromptSpec | None
    image: int
    request: int


class TrunkStage:
    """The trunk's half: holds vision, LLM, link heads and dense features of a model."""

    def __init__(self, loaded: LoadedModel, device: str = "cpu"):
        self.loaded = loaded
        self.device = torch.device(device)
        self.trunk = loaded.model.trunk.to(self.device)
        self.tokenizer = loaded.tokenizer
        self.skeletons = {name: tuple(names) for name, names in loaded.meta.skeletons.items()}
        square = (loaded.settings.image_size,) * 2
        self.buckets = tuple((int(h), int(w)) for h, w in loaded.meta.buckets) or (square,)

    @classmethod
    def load(cls, model: str | Path, device: str = "cpu") -> TrunkStage:
        return cls(load_model(model), device)

    def bucket(self, size: Size) -> Size:
        """(height, width) of the model input for an image of (height, width) `size`."""
        return choose((max(1, size[0]), max(1, size[1])), self.buckets)

    @torch.inference_mode()
    def run(
        self,
        images: Sequence[np.ndarray],
        requests: Sequence[Sequence[Request]],
        *,
        max_new_tokens: int = 48,
        class_chunk: int = 64,
    ) -> TrunkOutput:
        """One prefix per image, then all branches of all requests against it.

        images: uint8 [h, w, 3] RGB, EXIF-rotated, all of one `bucket`; requests: per image. `class_chunk` bounds the
        branches per image and pass; it does not change results.
        """
        if len(images) != len(requests):
            raise ValueError(f"{len(images)} images but {len(requests)} lists of requests")
        for image, asked in zip(images, requests, strict=True):
            _check_regions(image.shape[:2], asked)
        buckets = {self.bucket(image.shape[:2]) for image in images}
        if len(buckets) > 1:
            raise ValueError(f"images of one pass must share a bucket, got {sorted(buckets)}")
        fitted = [fit(image, next(iter(buckets))) for image in images]
        pixels = torch.from_numpy(np.stack([image for image, _ in fitted])).permute(0, 3, 1, 2)
        frames = [frame for _, frame in fitted]
        prefix = self.trunk.encode(pixels.to(self.device))
        plans = [[RequestPlan(r.task, frames[b].size) for r in rs] for b, rs in enumerate(requests)]
        asks = [
            ask for b, rs in enumerate(requests) for r, request in enumerate(rs) for ask in self._asks(request, b, r)
        ]
        self._write_texts(prefix, requests, plans, asks, max_new_tokens)
        link, prompts = self._links(prefix, asks, plans, class_chunk)
        return TrunkOutput(link, prefix.dense.float().cpu().contiguous(), frames, prompts, plans)

    def _asks(self, request: Request, image: int, index: int) -> list[_Ask]:
        """The routed branches of a structured request; its routing token is forced, so nothing is sampled."""
        task = TASKS[request.task]
        if task.is_text:
            return []
        asks = []
        for phrase in request.phrases:
            names = self._keypoints(request, phrase) if task.name == "pose" else ()
            spec = PromptSpec(phrase, masks=task.result == "masks", keypoints=names)
            text = task.prompt(phrase, request.template)
            asks.append(_Ask(Branch(image, text, route=task.routing_token), spec, image, index))
            for name in names:
                text = task.keypoint_template.replace("{keypoint}", name).replace("{}", phrase)
                asks.append(_Ask(Branch(image, text, route=task.routing_token, parent=0), None, image, index))
        return asks

    def _keypoints(self, request: Request, phrase: str) -> tuple[str, ...]:
        names = request.keypoints or self.skeletons.get(phrase)
        if not names:
            known = ", ".join(sorted(self.skeletons)) or "none"
            raise UserError(
                f"the model knows no keypoints of '{phrase}'; name them in 'keypoints' or ask for: {known}",
                "unknown_skeleton",
            )
        return tuple(names)

    def _write_texts(
        self,
        prefix,
        requests: Sequence[Sequence[Request]],
        plans: list[list[RequestPlan]],
        asks: list[_Ask],
        limit: int,
    ) -> None:
        """Greedy answers of all text requests; a chat answer that routes becomes a routed branch in `asks`."""
        rows, branches, regions = [], [], []
        for b, rs in enumerate(requests):
            for r, request in enumerate(rs):
                task = TASKS[request.task]
                if not task.is_text:
                    continue
                where = (len(regions),) if request.region is not None else ()
                regions += [request.region] if request.region is not None else []
                branches.append(Branch(len(rows), task.prompt(request.text, request.template), regions=where))
                rows.append((b, r))
        if not rows:
            return
        layout = build_layout(branches, len(rows), self.tokenizer).to(self.device)
        masks = torch.from_numpy(np.stack([self._region(x) for x in regions])) if regions else torch.zeros(0)
        owners = torch.tensor([i for i, branch in enumerate(branches) if branch.regions], dtype=torch.int64)
        routing = {self.tokenizer.ids[token]: token for token in ROUTING_TOKENS}
        images = torch.tensor([b for b, _ in rows], device=self.device)
        written = self.trunk.generate(
            prefix, layout, images, masks.to(self.device), owners.to(self.device),
            self.tokenizer.ids[EOS], limit, frozenset(routing),
        )  # fmt: skip
        for (b, r), tokens in zip(rows, written, strict=True):
            plan, request = plans[b][r], requests[b][r]
            if tokens and tokens[-1] in routing and request.task == "chat":
                plan.route = routing[tokens[-1]]
                asks += self._routed(request, plan.route, b, r)
            else:
                plan.text = self.tokenizer.decode(t for t in tokens if t not in routing)

    def _routed(self, request: Request, route: str, image: int, index: int) -> list[_Ask]:
        """Free chat in which the LLM chose a routing token: one more branch, with the queries behind the token."""
        named = task_of_prompt(request.text)
        phrase = named[1] if named else request.text
        spec = PromptSpec(phrase, masks=route == "[SEG]")
        if route == "[POSE]" and phrase in self.skeletons:
            return self._asks(Request("pose", (phrase,)), image, index)
        return [_Ask(Branch(image, request.text, route=route), spec, image, index)]

    def _region(self, region: Region) -> np.ndarray:
        return region_mask(region, self.bucket(region.size))

    def _links(
        self, prefix, asks: list[_Ask], plans: list[list[RequestPlan]], chunk: int
    ) -> tuple[SuperLink, list[PromptSpec | None]]:
        """Runs the routed branches in chunks per image; the super link of all of them, in the order of `asks`."""
        per_image: dict[int, list[int]] = {}
        for i, ask in enumerate(asks):
            per_image.setdefault(ask.image, []).append(i)
        channels = self.loaded.settings.link_channels
        embeddings = torch.zeros(len(asks), channels, device=self.device)
        none = torch.zeros(0, device=self.device)
        longest = max([len(members) for members in per_image.values()] + [0])
        for start in range(0, longest, chunk):
            members = [i for ms in per_image.values() for i in ms[start : start + chunk]]
            layout = build_layout(
                [replace(asks[i].branch, parent=-1) for i in members], len(prefix.valid), self.tokenizer
            )
            layout = layout.to(self.device)
            hidden, _ = self.trunk.run_branches(prefix, layout, none, none)
            link = self.trunk.links(hidden, layout)[FAMILY]
            embeddings[torch.tensor(members)[layout.link_branches[FAMILY].cpu()]] = link.embeddings
        parents, last = [], -1
        for i, ask in enumerate(asks):
            if ask.spec is not None:
                last = i
                plan = plans[ask.image][ask.request]
                plan.links.append(i)
                plan.route = ask.branch.route
            parents.append(-1 if ask.spec is not None else last)
        image_index = torch.tensor([ask.image for ask in asks], dtype=torch.int64)
        parent = torch.tensor(parents, dtype=torch.int64)
        link = SuperLink(FAMILY, embeddings.float().cpu().contiguous(), image_index, parent)
        return link, [ask.spec for ask in asks]


class DecoderStage:
    """A decoder's half: links and dense features -> predictions in stored-image pixels."""

    def __init__(self, loaded: LoadedModel, name: str = "lumen", device: str = "cpu"):
        if name not in loaded.model.decoders:
            have = ", ".join(loaded.model.decoders)
            raise UserError(f"the model has no decoder '{name}'; decoders: {have}", "unknown_decoder")
        self.decoder = loaded.model.decoders[name].to(device)
        self.device = torch.device(device)

    @classmethod
    def load(cls, model: str | Path, name: str = "lumen", device: str = "cpu") -> DecoderStage:
        return cls(load_model(model), name, device)

    @torch.inference_mode()
    def run(
        self,
        link: SuperLink,
        dense: Tensor,
        frames: list[Frame],
        prompts: list[PromptSpec | None],
        settings: PredictSettings = DEFAULTS,
    ) -> list[Prediction | None]:
        """One Prediction per link, None for keypoint prompts. Received tensors are only read.

        The prompts are decoded in chunks of what `MAX_DECODER_CELLS` allows, so that memory does not grow with their
        number; prompts do not see each other, so the results do not depend on it.
        """
        out: list[Prediction | None] = [None] * len(link)
        height, width = dense.shape[-2:]
        for members in link.chunks(max(1, MAX_DECODER_CELLS // (height * width))):
            part, images = link.take(members)
            moved = part.to(self.device)
            raw = self.decoder(moved, dense[images].to(self.device))
            specs = [prompts[i] for i in members.tolist()]
            found = self.decoder.predict(raw, [frames[i] for i in images.tolist()], specs, settings)
            for i, prediction in zip(members.tolist(), found, strict=True):
                out[i] = prediction
        return out


def _check_regions(size: Size, requests: Sequence[Request]) -> None:
    """A region's coordinates mean nothing in an image of another size."""
    for request in requests:
        if request.region is not None and tuple(request.region.size) != tuple(size):
            theirs, ours = (f"{width}x{height}" for height, width in (request.region.size, size))
            raise UserError(
                f"the region is for an image of {theirs} but the image is {ours} pixels; "
                "make the region with the image's own (height, width)",
                "invalid_region",
            )


def assemble(plans: Sequence[Sequence[RequestPlan]], predictions: Sequence[Prediction | None]) -> list[list[Answer]]:
    """Answers per image and request from what the trunk planned and the decoder found."""
    return [
        [
            Answer(plan.task, plan.size, [predictions[i] for i in plan.links], text=plan.text, route=plan.route)
            for plan in row
        ]
        for row in plans
    ]


class Engine:
    """Trunk and decoders in one process."""

    def __init__(self, loaded: LoadedModel, device: str = "cpu"):
        self.loaded = loaded
        self.trunk = TrunkStage(loaded, device)
        self.decoders = {name: DecoderStage(loaded, name, device) for name in loaded.model.decoders}

    @classmethod
    def load(cls, model: str | Path, device: str = "cpu") -> Engine:
        """The engine of a model folder; `UserError` when the folder holds none."""
        return cls(load_model(model), device)

    @property
    def preset(self) -> str:
        return self.loaded.settings.name

    @property
    def version(self) -> str:
        """First 12 hex digits of the weights' sha256."""
        return self.loaded.version

    @property
    def image_size(self) -> int:
        return self.loaded.settings.image_size

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
        images: Sequence[np.ndarray],
        requests: Sequence[Sequence[Request]],
        *,
        score_threshold: float = 0.05,
        max_per_phrase: int = 100,
        max_new_tokens: int = 48,
        class_chunk: int = 64,
    ) -> list[list[Answer]]:
        """An `Answer` per request of each image, predictions best first.

        images: uint8 [h, w, 3] RGB in the EXIF-rotated frame; requests: per image (see `make_request`). Images that
        share a size bucket pass together.
        """
        if len(images) == 0:
            return []
        settings = PredictSettings(score_threshold, max_per_phrase)
        groups: dict[Size, list[int]] = {}
        for i, (image, _) in enumerate(zip(images, requests, strict=True)):
            groups.setdefault(self.trunk.bucket(image.shape[:2]), []).append(i)
        answers: dict[int, list[Answer]] = {}
        for members in groups.values():
            out = self.trunk.run(
                [images[i] for i in members],
                [requests[i] for i in members],
                max_new_tokens=max_new_tokens,
                class_chunk=class_chunk,
            )
            predictions = self.decoders["lumen"].run(out.link, out.dense, out.frames, out.prompts, settings)
            answers.update(zip(members, assemble(out.plans, predictions), strict=True))
        return [answers[i] for i in range(len(images))]
