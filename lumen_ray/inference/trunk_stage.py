"""The trunk's half of the engine: images and requests -> super links, dense features and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, zip_longest
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from lumen_ray.data.batches.buckets import choose
from lumen_ray.data.batches.transforms import PAD_VALUE, fit
from lumen_ray.decoders.base import PromptSpec
from lumen_ray.errors import UserError
from lumen_ray.inference.decoder_inputs import looked_at
from lumen_ray.inference.outputs import LinkPart, RequestPlan, TrunkOutput
from lumen_ray.inference.request import Request, check_asked, no_decoder
from lumen_ray.model.build import LoadedModel, load_model
from lumen_ray.precision import in_own_dtype
from lumen_ray.structures import Region, SampleSettings, Size
from lumen_ray.superlink import SuperLink
from lumen_ray.tasks import DECODERS, ROUTING_TOKENS, TASKS, Task, decoder_class, task_of_prompt
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import build_layout
from lumen_ray.trunk.regions import region_mask
from lumen_ray.trunk.tokenizer import EOS
from lumen_ray.trunk.trunk import Prefix

#: What stands for a region prompt among an answer's phrases.
REGION_PHRASE = "region"


@dataclass
class _Ask:
    """A branch still to be run and what it is for."""

    branch: Branch
    spec: PromptSpec | None
    image: int
    request: int
    decoder: str
    region: Region | None = None


class FromFolder:
    """What is made of a model and a device, and reads decoders when they are first needed, if ever."""

    @classmethod
    def load(
        cls,
        model: str | Path,
        device: str = "cpu",
        decoders: Mapping[str, str] | None = None,
        dtype: str = "float32",
    ) -> Self:
        """That of a model folder; `UserError` when the folder holds none.

        `decoders` (task -> decoder) says who serves a task that several can, instead of the folder's settings; `dtype`:
        'float32', or 'bfloat16' for half the memory and, on GPUs, the faster arithmetic (see `lumen_ray.precision`).
        Only the trunk is read at once."""
        return cls(load_model(model, decoders, device, ("trunk",), dtype), device)


class TrunkStage(FromFolder):
    """The trunk's half: holds vision, LLM, link heads and dense features of a model."""

    def __init__(self, loaded: LoadedModel, device: str = "cpu"):
        self.loaded = loaded
        self.device, self.dtype = torch.device(device), loaded.dtype
        self.trunk = loaded.trunk(self.device)
        self.tokenizer = loaded.tokenizer
        self.prompt_layout = loaded.settings.prompt_layout
        self.serving = loaded.settings.serving
        self.own_sizes = loaded.settings.own_sizes
        self.skeletons = {name: tuple(names) for name, names in loaded.meta.skeletons.items()}
        square = (loaded.settings.image_size,) * 2
        self.buckets = tuple((int(h), int(w)) for h, w in loaded.meta.buckets) or (square,)

    def bucket(self, size: Size) -> Size:
        """(height, width) of the model input for an image of (height, width) `size`."""
        return choose((max(1, size[0]), max(1, size[1])), self.buckets)

    def bucket_of(self, image: np.ndarray | None) -> Size:
        """(height, width) of the model input for an image, or for words alone."""
        return self.buckets[0] if image is None else self.bucket(image.shape[:2])

    @in_own_dtype
    def run(
        self,
        images: Sequence[np.ndarray | None],
        requests: Sequence[Sequence[Request]],
        *,
        max_new_tokens: int = 48,
        class_chunk: int = 64,
        route_only: bool = False,
    ) -> TrunkOutput:
        """One prefix per image, then all branches of all requests against it.

        images: uint8 [h, w, 3] RGB, EXIF-rotated, all of one `bucket`, None for words alone; requests: per image.
        `class_chunk` bounds the branches per image and pass; it does not change results. In the sequential layout,
        where the prompts of a request are one text, those are never cut apart, however many.
        With `route_only` nothing is asked of a decoder: the plans say what the LLM wrote or the route it chose.
        """
        if len(images) != len(requests):
            raise ValueError(f"{len(images)} images but {len(requests)} lists of requests")
        for image, asked in zip(images, requests, strict=True):
            check_asked(None if image is None else image.shape[:2], asked)
        buckets = {self.bucket_of(image) for image in images}
        if len(buckets) > 1:
            raise ValueError(f"images of one pass must share a bucket, got {sorted(buckets)}")
        (bucket,) = buckets
        stored = [np.full((*bucket, 3), PAD_VALUE, np.uint8) if image is None else image for image in images]
        fitted = [fit(image, bucket) for image in stored]
        pixels = torch.from_numpy(np.stack([image for image, _ in fitted])).permute(0, 3, 1, 2)
        frames = [frame for _, frame in fitted]
        valid = torch.tensor([image is not None for image in images])
        prefix = self.trunk.encode(pixels.to(self.device), valid.to(self.device))
        plans = [
            [
                RequestPlan(r.task, frames[b].size, decoder=self._decoder(r), route=TASKS[r.task].routing_token)
                for r in rs
            ]
            for b, rs in enumerate(requests)
        ]
        asks = [
            ask for b, rs in enumerate(requests) for r, request in enumerate(rs) for ask in self._asks(request, b, r)
        ]
        chosen = self._write_texts(prefix, requests, plans, max_new_tokens)
        if route_only:
            asks = []
        else:
            for b, r in chosen:
                task = next(task for task in TASKS.values() if task.routing_token == plans[b][r].route)
                if images[b] is not None or not task.sees_image:  # else there is no place in words alone
                    asks += self._routed(requests[b][r], task, b, r)
        parts = self._links(prefix, asks, plans, class_chunk)
        reads = {name: decoder_class(name).reads for name in parts}
        dense = prefix.dense.float().cpu().contiguous() if "dense" in reads.values() else None
        for name, part in parts.items():
            if reads[name] == "pixels":
                rule, about = self.own_sizes.get(name), part.link.image_index.tolist()
                part.pixels = looked_at(about, part.prompts, rule, stored, pixels)
        return TrunkOutput(parts, dense, frames, plans)

    def _decoder(self, request: Request) -> str | None:
        """The decoder that serves a request; None for text."""
        task = TASKS[request.task]
        if task.is_text:
            return None
        if (name := self.serving.get(request.task)) is None:
            raise no_decoder(task.name, self.tasks)
        return name

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that this model has a decoder for, where needed, and was trained for as far as it says."""
        trained = set(self.loaded.meta.tasks or TASKS)
        can = (t for t in TASKS.values() if t.is_text or t.name in self.serving)
        return tuple(t.name for t in can if (t.made_of or t.name) in trained)

    def _asks(self, request: Request, image: int, index: int) -> list[_Ask]:
        """The routed branches of a structured request; its routing token is forced, so nothing is sampled."""
        task = TASKS[request.task]
        if task.is_text:
            return []
        decoder, asks = self._decoder(request), []
        if request.region is not None:
            text = task.prompt(template=request.template)
            branch = Branch(image, text, route=task.routing_token, regions=(0,), group=index)
            return [_Ask(branch, PromptSpec(REGION_PHRASE, masks=True), image, index, decoder, request.region)]
        for phrase in request.phrases:
            names = self._keypoints(request, phrase) if task.name == "pose" else ()
            spec = PromptSpec(phrase, masks=task.result == "masks", keypoints=names, sample=request.sample)
            text = task.prompt(phrase, request.template)
            branch = Branch(image, text, route=task.routing_token, phrase=phrase, group=index)
            asks.append(_Ask(branch, spec, image, index, decoder))
            for name in names:
                text = task.keypoint_template.replace("{keypoint}", name).replace("{}", phrase)
                branch = Branch(image, text, route=task.routing_token, parent=0, phrase=name, group=index)
                asks.append(_Ask(branch, None, image, index, decoder))
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
        limit: int,
    ) -> list[tuple[int, int]]:
        """Enters greedy answers of all text requests, or the routes they chose, in the plans; returns (image, request)
        of every chat that chose one."""
        rows, branches, regions, chosen = [], [], [], []
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
            return []
        layout = build_layout(branches, len(rows), self.tokenizer, self.prompt_layout).to(self.device)
        owners = [i for i, branch in enumerate(branches) if branch.regions]
        routing = {i: token for token, i in self.tokenizer.ids.items() if token in ROUTING_TOKENS}
        images = torch.tensor([b for b, _ in rows], device=self.device)
        written = self.trunk.generate(
            prefix, layout, images, *self._regions(regions, owners), self.tokenizer.ids[EOS], limit, frozenset(routing),
        )  # fmt: skip
        for (b, r), tokens in zip(rows, written, strict=True):
            plan, request = plans[b][r], requests[b][r]
            if tokens and tokens[-1] in routing and request.task == "chat":
                plan.route = routing[tokens[-1]]
                chosen.append((b, r))
            else:
                plan.text = self.tokenizer.decode(t for t in tokens if t not in routing)
        return chosen

    def _routed(self, request: Request, task: Task, image: int, index: int) -> list[_Ask]:
        """Free chat in which the LLM chose a task's routing token: one more branch, with the queries behind it."""
        named = task_of_prompt(request.text)
        phrase = named[1] if named else request.text
        if task.name == "pose" and phrase in self.skeletons:
            return self._asks(Request("pose", (phrase,)), image, index)
        sample = SampleSettings() if task.result == "image" else None
        spec = PromptSpec(phrase, masks=task.result == "masks", sample=sample)
        decoder = self._decoder(Request(task.name))
        return [_Ask(Branch(image, request.text, route=task.routing_token, group=index), spec, image, index, decoder)]

    def _regions(self, regions: list[Region], images: list[int]) -> tuple[Tensor, Tensor]:
        """Masks of the model input [R, H, W] and the images they lie in, int64 [R]."""
        masks = [region_mask(region, self.bucket(region.size)) for region in regions]
        stack = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0)
        return stack.to(self.device), torch.tensor(images, dtype=torch.int64, device=self.device)

    def _links(
        self, prefix: Prefix, asks: list[_Ask], plans: list[list[RequestPlan]], chunk: int
    ) -> dict[str, LinkPart]:
        """Runs the routed branches in chunks per image; the super link of each decoder, in the order of `asks`."""
        embeddings: dict[int, Tensor] = {}  # by number of the ask
        for members in self._passes(asks, chunk):
            branches, regions, owners = [], [], []
            for ask in (asks[i] for i in members):
                branches.append(ask.branch)
                if ask.region is not None:
                    branches[-1] = replace(branches[-1], regions=(len(regions),))
                    regions.append(ask.region)
                    owners.append(ask.image)
            layout = build_layout(branches, len(prefix.valid), self.tokenizer, self.prompt_layout)
            for family, numbers in layout.link_branches.items():  # a keypoint's object may be in another chunk
                keypoints = [asks[members[number]].spec is None for number in numbers.tolist()]
                layout.link_parents[family] = torch.tensor(keypoints).long() - 1
            layout = layout.to(self.device)
            links = self.trunk.ask(prefix, layout, *self._regions(regions, owners))
            for name, link in links.items():
                numbers = layout.link_branches[DECODERS[name].family].tolist()
                for number, embedding in zip(numbers, link.embeddings.float().cpu(), strict=True):
                    if asks[members[number]].decoder == name:
                        embeddings[members[number]] = embedding
        parts = {}
        for name in dict.fromkeys(ask.decoder for ask in asks):
            mine = [i for i, ask in enumerate(asks) if ask.decoder == name]
            parts[name] = self._part(name, [asks[i] for i in mine], torch.stack([embeddings[i] for i in mine]), plans)
        return parts

    def _passes(self, asks: list[_Ask], chunk: int) -> list[list[int]]:
        """Numbers of the asks of each pass: `chunk` at most of an image, but for requests that are one text."""
        one_text = self.prompt_layout == "sequential"
        per_image: dict[int, list[list[int]]] = {}
        for _, run in groupby(range(len(asks)), lambda i: (asks[i].image, asks[i].request) if one_text else i):
            numbers = list(run)
            chunks = per_image.setdefault(asks[numbers[0]].image, [[]])
            if chunks[-1] and len(chunks[-1]) + len(numbers) > chunk:
                chunks.append([])
            chunks[-1] += numbers
        return [list(chain.from_iterable(parts)) for parts in zip_longest(*per_image.values(), fillvalue=())]

    @staticmethod
    def _part(name: str, asks: list[_Ask], embeddings: Tensor, plans: list[list[RequestPlan]]) -> LinkPart:
        """A decoder's super link; the prompts of one request are a group. Enters its prompts in the plans."""
        parents, groups, last = [], {}, -1
        for i, ask in enumerate(asks):
            if ask.spec is not None:
                last = i
                plan = plans[ask.image][ask.request]
                plan.links.append(i)
                plan.decoder = name
            parents.append(-1 if ask.spec is not None else last)
            groups.setdefault((ask.image, ask.request), len(groups))
        columns = (
            [ask.image for ask in asks],
            parents,
            [groups[ask.image, ask.request] for ask in asks],
        )
        return LinkPart(SuperLink(name, embeddings, *map(torch.tensor, columns)), [ask.spec for ask in asks])
