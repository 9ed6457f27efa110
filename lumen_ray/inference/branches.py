"""From requests to the branches that the trunk runs, and from their embeddings to the input of a decoder."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, zip_longest
from typing import TypeVar

import torch
from torch import Tensor

from lumen_ray.decoders.base import PromptSpec
from lumen_ray.errors import UserError
from lumen_ray.exemplars import Example
from lumen_ray.inference.outputs import DecoderInput, RequestPlan
from lumen_ray.inference.request import ANY_ROUTE, Request, Routing, no_decoder
from lumen_ray.structures import Region, SampleSettings
from lumen_ray.superlink import SuperLink
from lumen_ray.tasks import (
    REGION_TOKEN,
    ROUTING_TOKENS,
    TASKS,
    TEXT_ROUTES,
    Task,
    split_phrases,
    task_of_prompt,
    task_of_route,
)
from lumen_ray.trunk.branch import Branch

R = TypeVar("R")

#: The phrase of an answer to a region prompt.
REGION_PHRASE = "region"


@dataclass
class PendingBranch:
    """A branch with a routing token that has not run yet.

    `prompt`: how its predictions enter the answer, None for a keypoint branch. `branch.group` is the index of the
    request among those of its image. `regions`: the visual prompts that fill the branch's `<region>`s in order, on its
    image or, of an example, on another. `embedding`: of a link in a text, which the LLM has read while it wrote; such a
    branch does not run.
    """

    branch: Branch
    prompt: PromptSpec | None
    decoder: str
    regions: tuple[Region | Example, ...] = ()
    embedding: Tensor | None = None

    @property
    def is_same_for_every_image(self) -> bool:
        """Whether its link depends on nothing but its words and on examples on images of their own."""
        here = any(isinstance(region, Region) or region.image is None for region in self.regions)
        return not (self.branch.reads_image or here or self.embedding is not None)

    @property
    def key(self) -> tuple[int, int]:
        """(image, request), both as indices into the batch."""
        return self.branch.image, self.branch.group


class BranchPlanner:
    """Turns requests into branches for one model.

    serving: task -> decoder; skeletons: class -> keypoint names; trained: the tasks that the model was trained on;
    links_see_image: as in its settings.
    """

    def __init__(
        self,
        serving: Mapping[str, str],
        skeletons: Mapping[str, tuple[str, ...]],
        trained: Collection[str],
        links_see_image: bool = True,
    ):
        self.serving = serving
        self.skeletons = skeletons
        self.links_see_image = links_see_image
        served = (t for t in TASKS.values() if t.is_text or t.name in serving)
        self.tasks = tuple(t.name for t in served if (t.derived_from or t.name) in trained)

    def decoder(self, task: Task) -> str:
        """The decoder that serves a task; raises `UserError` if the model has none."""
        if (name := self.serving.get(task.name)) is None:
            raise no_decoder(task.name, self.tasks)
        return name

    def plan(self, request: Request, size: tuple[int, int]) -> RequestPlan:
        """The plan of an answer before anything has run; `size`: (height, width) of the image."""
        task = TASKS[request.task]
        return RequestPlan(
            task.name, size, decoder=None if task.is_text else self.decoder(task), route=task.routing_token
        )

    def branches(self, request: Request, image: int, index: int, looks: bool = False) -> list[PendingBranch]:
        """The branches of request `index` of `image`; none for text tasks. `looks`: see the image in any case.

        The routing token is given, so nothing is sampled.
        """
        task = TASKS[request.task]
        if task.is_text:
            return []
        decoder = self.decoder(task)
        if request.region is not None:
            text = task.prompt(template=request.template)
            branch = Branch(image, text, route=task.routing_token, regions=(0,), group=index)
            return [
                PendingBranch(branch, PromptSpec(REGION_PHRASE, masks=True, task=task.name), decoder, (request.region,))
            ]
        pending, reads = [], looks or task.link_reads_image(self.links_see_image)
        for phrase in request.phrases:
            names = self._keypoints(request, phrase) if task.name == "pose" else ()
            masks = task.result == "masks"
            prompt = PromptSpec(phrase, masks=masks, keypoints=names, sample=request.sample, task=task.name)
            shown = request.examples.get(phrase)
            text = task.prompt(shown.phrase if shown else phrase, request.template)
            regions = tuple(shown.examples) if shown else ()
            branch = Branch(
                image, text, route=task.routing_token, phrase=phrase, group=index, reads_image=reads,
                regions=tuple(range(len(regions))),
            )  # fmt: skip
            pending.append(PendingBranch(branch, prompt, decoder, regions))
            for name in names:
                text = task.keypoint_prompt(name, phrase)
                branch = Branch(
                    image, text, route=task.routing_token, parent=0, phrase=name, group=index, reads_image=reads
                )
                pending.append(PendingBranch(branch, None, decoder))
        return pending

    def routed_branches(self, request: Request, task: Task, image: int, index: int) -> list[PendingBranch]:
        """The branches of a free chat in which the LLM chose the routing token of `task`, with the image before its
        eyes: its text, with queries, which see the image as well."""
        named = task_of_prompt(request.text)
        phrase = named[1] if named else request.text
        if task.name == "pose" and phrase in self.skeletons:
            return self.branches(Request("pose", (phrase,)), image, index, looks=True)
        sample = SampleSettings() if task.result == "image" else None
        prompt = PromptSpec(phrase, masks=task.result == "masks", sample=sample, task=task.name)
        branch = Branch(image, request.text, route=task.routing_token, group=index)
        return [PendingBranch(branch, prompt, self.decoder(task))]

    def text_routes(self, text_task: Task) -> dict[str, str]:
        """Routing tokens behind which a text of this task may go on -> the decoder that serves them all: an answer has
        one decoder."""
        if not text_task.is_conversation:
            return {}
        found = {token: self.serving.get(task_of_route(token).name) for token in TEXT_ROUTES}
        decoder = next((name for name in found.values() if name), None)
        return {token: name for token, name in found.items() if name and name == decoder}

    def useless_tokens(self, text_task: Task, has_image: bool, routing: Routing = ANY_ROUTE) -> list[str]:
        """Tokens of ours that mean nothing in a conversation's answer: those of regions, and routing tokens that it
        cannot follow, without a decoder for them, or without an image where they need one, or which `routing` excludes.
        The LLM writes none of them, so that text alone is answered as if they were not in its vocabulary."""
        if not text_task.is_conversation:
            return []

        def is_useless(token: str) -> bool:
            task = task_of_route(token)
            is_excluded = routing.tokens is not None and token not in routing.tokens
            return is_excluded or task.name not in self.serving or (task.sees_image and not has_image)

        return [REGION_TOKEN, *filter(is_useless, ROUTING_TOKENS)]

    def text_link(self, token: str, words: str, image: int, index: int, embedding: Tensor) -> PendingBranch:
        """The link of a routing token in a text: the last noun phrase of the `words` before it names its objects."""
        task = task_of_route(token)
        prompt = PromptSpec(last_phrase(words), masks=task.result == "masks", task=task.name)
        branch = Branch(image, words, route=token, group=index)
        return PendingBranch(branch, prompt, self.decoder(task), embedding=embedding)

    def _keypoints(self, request: Request, phrase: str) -> tuple[str, ...]:
        names = request.keypoints or self.skeletons.get(phrase)
        if not names:
            known = ", ".join(sorted(self.skeletons)) or "none"
            raise UserError(
                f"the model has no keypoints for '{phrase}'; name them in 'keypoints' or use one of: {known}",
                "unknown_skeleton",
            )
        return tuple(names)


def last_phrase(words: str) -> str:
    """The last noun phrase of a text, the text itself if it has none."""
    try:
        phrases = split_phrases(words)
    except UserError:
        return words.strip()
    lower = words.lower()
    return max(phrases, key=lambda phrase: (lower.rfind(phrase) + len(phrase), len(phrase)))


def split_passes(pending: Sequence[PendingBranch], most: int, whole_requests: bool) -> list[list[int]]:
    """Indices of the branches of each pass: at most `most` of an image.

    With `whole_requests` those of one request, which share one text, stay together, however many.
    """
    per_image: dict[int, list[list[int]]] = {}
    for _, run in groupby(range(len(pending)), lambda i: pending[i].key if whole_requests else i):
        numbers = list(run)
        chunks = per_image.setdefault(pending[numbers[0]].branch.image, [[]])
        if chunks[-1] and len(chunks[-1]) + len(numbers) > most:
            chunks.append([])
        chunks[-1] += numbers
    return [list(chain.from_iterable(chunks)) for chunks in zip_longest(*per_image.values(), fillvalue=())]


def with_regions(items: Iterable[tuple[Branch, Sequence[R]]]) -> tuple[list[Branch], list[R], list[int]]:
    """(branches of one pass, their regions, the image of each region's branch), from each branch and its
    regions."""
    branches: list[Branch] = []
    regions: list[R] = []
    images: list[int] = []
    for branch, own in items:
        if own:
            branch = replace(branch, regions=tuple(range(len(regions), len(regions) + len(own))))
            regions += own
            images += [branch.image] * len(own)
        branches.append(branch)
    return branches, regions, images


def decoder_input(
    name: str, pending: Sequence[PendingBranch], embeddings: Tensor, plans: Sequence[Sequence[RequestPlan]]
) -> DecoderInput:
    """The super link of a decoder from its branches and their embeddings [P, C] or [P, T, C]; each request is a group.

    Enters the decoder and the indices of its object prompts in `plans`.
    """
    parents, last = [], -1
    groups: dict[tuple[int, int], int] = {}
    for i, item in enumerate(pending):
        image, request = item.key
        if item.prompt is not None:
            last = i
            plans[image][request].links.append(i)
            plans[image][request].decoder = name
        parents.append(-1 if item.prompt is not None else last)
        groups.setdefault(item.key, len(groups))
    link = SuperLink(
        name,
        embeddings,
        image_index=torch.tensor([item.branch.image for item in pending]),
        parent=torch.tensor(parents),
        group=torch.tensor([groups[item.key] for item in pending]),
    )
    return DecoderInput(link, [item.prompt for item in pending])
