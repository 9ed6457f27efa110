"""The trunk's half of the engine: images and requests -> super links, dense features and texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from lumen_ray.data.batches.buckets import choose
from lumen_ray.data.batches.transforms import PAD_VALUE, fit
from lumen_ray.decoders.registry import DECODERS
from lumen_ray.errors import UserError
from lumen_ray.inference.branches import BranchPlanner, PendingBranch, decoder_input, split_passes, with_regions
from lumen_ray.inference.decoder_inputs import decoder_pixels
from lumen_ray.inference.outputs import DecoderInput, RequestPlan, TrunkOutput
from lumen_ray.inference.request import Request, check_requests
from lumen_ray.inference.sampling import Sampler, stop_at
from lumen_ray.model.build import LoadedModel, load_model
from lumen_ray.precision import in_model_dtype
from lumen_ray.structures import Region, Size
from lumen_ray.targets import Frame
from lumen_ray.tasks import ROUTING_TOKENS, TASKS
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import Layout, build_layout
from lumen_ray.trunk.regions import region_mask
from lumen_ray.trunk.trunk import Prefix


class FromFolder:
    """Loads itself from a model folder. Decoders are read when they are first used."""

    def __init__(self, loaded: LoadedModel, device: str = "cpu"):
        raise NotImplementedError

    @classmethod
    def load(
        cls,
        model: str | Path,
        device: str = "cpu",
        decoders: Mapping[str, str] | None = None,
        dtype: str = "float32",
    ) -> Self:
        """Reads the trunk of a model folder; raises `UserError` if it is not a model folder.

        `decoders` (task -> decoder) overrides the folder's choice for tasks that several decoders can serve; `dtype`:
        'float32', or 'bfloat16' for half the memory and, on GPUs, faster arithmetic (see `lumen_ray.precision`)."""
        return cls(load_model(model, decoders, device, ("trunk",), dtype), device)


def _text_branches(
    requests: Sequence[Sequence[Request]],
) -> tuple[list[tuple[int, int]], list[Branch], list[Region]]:
    """((image, request) of every text request, its branch in a batch of one branch per row, their regions)."""
    rows: list[tuple[int, int]] = []
    branches: list[Branch] = []
    regions: list[Region] = []
    for b, row in enumerate(requests):
        for r, request in enumerate(row):
            task = TASKS[request.task]
            if not task.is_text:
                continue
            where = (len(regions),) if request.region is not None else ()
            regions += [request.region] if request.region is not None else []
            prompt = task.prompt(request.text, request.template)
            branches.append(Branch(len(rows), prompt, regions=where, history=request.history, system=request.system))
            rows.append((b, r))
    return rows, branches, regions


@dataclass
class _Inputs:
    """The batch in the trunk's frame.

    `images`: uint8 [h, w, 3] as stored; `pixels`: uint8 [B, 3, H, W] on the CPU; `frames`: where each image lies in its
    input; `valid`: bool [B], False for text alone.
    """

    images: list[np.ndarray]
    pixels: Tensor
    frames: list[Frame]
    valid: Tensor


class TrunkStage(FromFolder):
    """Holds the vision encoders, LLM, link heads and dense features of a model."""

    def __init__(self, loaded: LoadedModel, device: str = "cpu"):
        self.loaded = loaded
        self.device, self.dtype = torch.device(device), loaded.dtype
        self.trunk = loaded.trunk(self.device)
        self.tokenizer = loaded.tokenizer
        self.prompt_layout = loaded.settings.prompt_layout
        self.serving = loaded.settings.serving
        self.input_rules = loaded.settings.input_rules
        self.skeletons = {name: tuple(names) for name, names in loaded.meta.skeletons.items()}
        self.planner = BranchPlanner(self.serving, self.skeletons, set(loaded.meta.tasks or TASKS))
        square = (loaded.settings.image_size,) * 2
        self.buckets = tuple((int(h), int(w)) for h, w in loaded.meta.buckets) or (square,)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that the model was trained on and, where they need a decoder, has one for."""
        return self.planner.tasks

    def bucket(self, size: Size) -> Size:
        """(height, width) of the model input for an image of (height, width) `size`."""
        return choose((max(1, size[0]), max(1, size[1])), self.buckets)

    def bucket_of(self, image: np.ndarray | None) -> Size:
        """(height, width) of the model input for an image, or for text alone."""
        return self.buckets[0] if image is None else self.bucket((image.shape[0], image.shape[1]))

    @in_model_dtype
    def links(
        self,
        images: Sequence[np.ndarray | None],
        requests: Sequence[Sequence[Request]],
        *,
        max_new_tokens: int = 48,
        class_chunk: int = 64,
        route_only: bool = False,
    ) -> TrunkOutput:
        """Encodes one prefix per image, then runs the branches of all requests against it.

        images: uint8 [h, w, 3] RGB, EXIF-rotated, all of one `bucket`, None for text alone; requests: per image.
        `class_chunk` bounds the branches per image and pass; results do not depend on it. In the sequential layout the
        prompts of a request are one text and are never split, however many.
        With `route_only` no decoder gets a link: the plans hold the text or the route that the LLM chose.
        """
        inputs = self._inputs(images, requests)
        prefix = self.trunk.encode(inputs.pixels.to(self.device), inputs.valid.to(self.device))
        plans = [
            [self.planner.plan(request, frame.size) for request in row]
            for row, frame in zip(requests, inputs.frames, strict=True)
        ]
        pending = [
            branch
            for b, row in enumerate(requests)
            for r, request in enumerate(row)
            for branch in self.planner.branches(request, b, r)
        ]
        routed = self._write_texts(prefix, requests, plans, max_new_tokens)
        if route_only:
            pending = []
        else:
            pending += self._routed_branches(routed, images, requests, plans)
        decoder_inputs = self._decoder_inputs(prefix, pending, plans, class_chunk)
        reads = {name: DECODERS[name].reads for name in decoder_inputs}
        for name, decoder in decoder_inputs.items():
            if reads[name] == "pixels":
                about, rule = decoder.link.image_index.tolist(), self.input_rules.get(name)
                decoder.pixels = decoder_pixels(about, decoder.prompts, rule, inputs.images, inputs.pixels)
        dense = None
        if "dense" in reads.values():
            assert prefix.dense is not None, "a decoder reads dense features, but the trunk makes none"
            dense = prefix.dense.float().cpu().contiguous()
        return TrunkOutput(decoder_inputs, dense, inputs.frames, plans)

    def _inputs(self, images: Sequence[np.ndarray | None], requests: Sequence[Sequence[Request]]) -> _Inputs:
        """Checks the batch and fits its images into the trunk's input, which they must share."""
        if len(images) != len(requests):
            raise ValueError(f"{len(images)} images but {len(requests)} lists of requests")
        for image, row in zip(images, requests, strict=True):
            check_requests(None if image is None else (image.shape[0], image.shape[1]), row)
        buckets = {self.bucket_of(image) for image in images}
        if len(buckets) > 1:
            raise ValueError(f"images of one pass must share a bucket, got {sorted(buckets)}")
        (bucket,) = buckets
        stored = [np.full((*bucket, 3), PAD_VALUE, np.uint8) if image is None else image for image in images]
        fitted = [fit(image, bucket) for image in stored]
        return _Inputs(
            stored,
            torch.from_numpy(np.stack([image for image, _ in fitted])).permute(0, 3, 1, 2),
            [frame for _, frame in fitted],
            torch.tensor([image is not None for image in images]),
        )

    def _write_texts(
        self,
        prefix: Prefix,
        requests: Sequence[Sequence[Request]],
        plans: list[list[RequestPlan]],
        limit: int,
    ) -> list[tuple[int, int]]:
        """Decodes all text requests and enters texts and chosen routes in the plans.

        Returns (image, request) of every free chat in which the LLM chose a route.
        """
        rows, branches, regions = _text_branches(requests)
        if not rows:
            return []
        images = torch.tensor([b for b, _ in rows], device=self.device)
        has_image = prefix.valid[images]
        layout = build_layout(branches, len(rows), self.tokenizer, self.prompt_layout, has_image).to(self.device)
        owners = [i for i, branch in enumerate(branches) if branch.regions]
        routing = {i: token for token, i in self.tokenizer.ids.items() if token in ROUTING_TOKENS}
        self._check_context(layout, prefix.length, limit)
        samplers = [
            Sampler(requests[b][r].sampling, layout.input_ids[n, : int(layout.last_slots[n, 1]) + 1].tolist())
            for n, (b, r) in enumerate(rows)
        ]
        written = self.trunk.generate(
            prefix, layout, images, *self._regions(regions, owners), self.tokenizer.end_ids, limit, frozenset(routing),
            samplers, self._stopped(samplers),
        )  # fmt: skip
        routed = []
        for (b, r), tokens, sampler in zip(rows, written, samplers, strict=True):
            plan, request = plans[b][r], requests[b][r]
            if tokens and tokens[-1] in routing and request.task == "chat":
                plan.route = routing[tokens[-1]]
                routed.append((b, r))
            else:
                text = self.tokenizer.decode(t for t in tokens if t not in routing)
                stopped = stop_at(text, request.sampling.stop)
                plan.text = text if stopped is None else stopped
                plan.log_probs = sampler.log_probs[: len(tokens)]
                plan.tokens = self.tokenizer.token_texts(tokens)
                plan.is_cut = len(tokens) == limit and stopped is None and tokens[-1] not in routing
        return routed

    def _check_context(self, layout: Layout, prefix: int, limit: int) -> None:
        """Raises `UserError` if a prompt and its answer are longer than the LLM's context."""
        most = getattr(self.trunk.llm.config, "max_position_embeddings", None)
        longest = int((torch.where(layout.alone, 0, prefix) + layout.last_slots[:, 1] + 1).max())
        if most is not None and longest + limit > most:
            raise UserError(
                f"the prompt has {longest} tokens and its answer may have {limit}, more than the LLM's context of "
                f"{most} tokens; shorten the conversation or lower the longest answer",
                "context_too_long",
            )

    def _stopped(self, samplers: Sequence[Sampler]) -> Callable[[int, list[int]], bool]:
        """Whether the answer of a row has reached one of its stop texts."""

        def stopped(row: int, tokens: list[int]) -> bool:
            stops = samplers[row].settings.stop
            return bool(stops) and stop_at(self.tokenizer.decode(tokens), stops) is not None

        return stopped

    def _routed_branches(
        self,
        routed: Sequence[tuple[int, int]],
        images: Sequence[np.ndarray | None],
        requests: Sequence[Sequence[Request]],
        plans: Sequence[Sequence[RequestPlan]],
    ) -> list[PendingBranch]:
        """The branches of free chats that chose a route. In text alone there is no place to find."""
        pending = []
        for b, r in routed:
            task = next(task for task in TASKS.values() if task.routing_token == plans[b][r].route)
            if images[b] is not None or not task.sees_image:
                pending += self.planner.routed_branches(requests[b][r], task, b, r)
        return pending

    def _regions(self, regions: list[Region], images: list[int]) -> tuple[Tensor, Tensor]:
        """Masks of the regions in the model input [R, H, W] and the index of each one's image, int64 [R]."""
        masks = [region_mask(region, self.bucket(region.size)) for region in regions]
        stack = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0)
        return stack.to(self.device), torch.tensor(images, dtype=torch.int64, device=self.device)

    def _decoder_inputs(
        self, prefix: Prefix, pending: list[PendingBranch], plans: list[list[RequestPlan]], chunk: int
    ) -> dict[str, DecoderInput]:
        """Runs the branches in chunks per image; the input of each decoder, in the order of `pending`."""
        embeddings: dict[int, Tensor] = {}  # by index into `pending`
        for members in split_passes(pending, chunk, self.prompt_layout == "sequential"):
            embeddings |= self._embeddings(prefix, pending, members)
        inputs = {}
        for name in dict.fromkeys(item.decoder for item in pending):
            members = [i for i, item in enumerate(pending) if item.decoder == name]
            stack = torch.stack([embeddings[i] for i in members])
            inputs[name] = decoder_input(name, [pending[i] for i in members], stack, plans)
        return inputs

    def _embeddings(self, prefix: Prefix, pending: list[PendingBranch], members: list[int]) -> dict[int, Tensor]:
        """The link embedding of each branch of one pass, float32 on the CPU, by index into `pending`."""
        branches, regions, owners = with_regions([pending[i] for i in members])
        layout = build_layout(branches, len(prefix.valid), self.tokenizer, self.prompt_layout, prefix.valid)
        for family, numbers in layout.link_branches.items():  # a keypoint's object may be in another pass
            keypoints = [pending[members[number]].prompt is None for number in numbers.tolist()]
            layout.link_parents[family] = torch.tensor(keypoints).long() - 1
        layout = layout.to(self.device)
        found: dict[int, Tensor] = {}
        for name, link in self.trunk.branch_links(prefix, layout, *self._regions(regions, owners)).items():
            order = layout.link_branches[DECODERS[name].family].tolist()
            for number, embedding in zip(order, link.embeddings.float().cpu(), strict=True):
                if pending[members[number]].decoder == name:
                    found[members[number]] = embedding
        return found
