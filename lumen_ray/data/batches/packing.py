"""Packing: samples share rows of the LLM's batch, so that little of it is padding.

A sample is the tokens of its images (none for a text) and of its branches. Samples are distributed over rows of at most
`tokens` tokens; attention is masked between them and positions restart with each, so their results are independent.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import Layout, branch_tokens
from lumen_ray.trunk.tokenizer import LumenTokenizer

#: tokens that a row must have beside those of the largest image; the routed prompts of all tasks are shorter
MIN_BRANCH_TOKENS = 64


@dataclass(frozen=True)
class Packing:
    """`tokens`: limit of a row; `image_tokens`: of each image of the batch."""

    tokens: int
    image_tokens: int


def pack_lengths(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Distributes the indices of `lengths` over rows whose sums are at most `most`: few rows, of similar sums.

    Longest first, each into the row with the smallest sum, with one row more until all fit. Rows are padded to the
    longest, so rows of similar length waste least. Raises `ValueError` for a length above `most`.
    """
    if max(lengths, default=0) > most:
        raise ValueError(f"a sample of {max(lengths)} tokens fits no row of {most}")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = max(1, -(-sum(lengths) // most))
    while True:
        rows: list[list[int]] = [[] for _ in range(count)]
        heap = [(0, row) for row in range(count)]
        for i in order:
            used, row = heap[0]
            if used + lengths[i] > most:
                break
            rows[row].append(i)
            heapq.heapreplace(heap, (used + lengths[i], row))
        else:
            return rows
        count += 1


def fit_branches(
    branches: Sequence[Branch], image_tokens: Sequence[int], most: int, tokenizer: LumenTokenizer
) -> tuple[list[Branch | None], dict[str, int]]:
    """Cuts samples to at most `most` tokens. Returns the branches, None for dropped ones, and the numbers of `branches`
    dropped and of response `tokens` cut off.

    A long sample keeps its branches in their drawn order while they fit; others are dropped, a pose with all its
    keypoints. If none fits, the first text branch keeps the beginning of its response. `image_tokens`: of each sample.
    """
    lengths = [len(branch_tokens(branch, tokenizer)[0]) for branch in branches]
    room = [most - tokens for tokens in image_tokens]
    kept: list[Branch | None] = list(branches)
    need = list(lengths)
    for index, branch in enumerate(branches):
        if branch.parent >= 0:
            need[branch.parent] += lengths[index]
    totals = [0] * len(room)
    for branch, length in zip(branches, lengths, strict=True):
        totals[branch.image] += length
    long = {image for image, total in enumerate(totals) if total > room[image]}
    lost = {"branches": 0, "tokens": 0}
    empty = set(long)
    for index, branch in enumerate(branches):
        if branch.image not in long:
            continue
        if branch.parent >= 0:
            fits = kept[branch.parent] is not None
        elif fits := need[index] <= room[branch.image]:
            room[branch.image] -= need[index]
            empty.discard(branch.image)
        if not fits:
            kept[index] = None
    for index, branch in enumerate(branches):
        if branch.image in empty and branch.response is not None:
            prompt = len(branch_tokens(replace(branch, response=None), tokenizer)[0])
            if prompt < room[branch.image]:
                kept[index] = replace(branch, limit=room[branch.image])
                lost["tokens"] += lengths[index] - len(
                    branch_tokens(replace(branch, limit=room[branch.image]), tokenizer)[0]
                )
                empty.discard(branch.image)
    lost["branches"] = sum(branch is None for branch in kept)
    return kept, lost


def num_images(has_image: Tensor, further_rows: Tensor) -> Tensor:
    """int64 [B]: images of each row of a batch, of which `further_rows` lists the rows of those beyond the first."""
    return has_image.long() + torch.bincount(further_rows, minlength=len(has_image))


def sample_lengths(layout: Layout, images: Tensor, image_tokens: int) -> Tensor:
    """int64 [B]: tokens of each sample, those of its `images` (how many, [B]) included."""
    return images.long() * image_tokens + (layout.branch_ids >= 0).sum(1)


def pack(layout: Layout, images: Tensor, packing: Packing) -> Tensor:
    """`Layout.pack` of a layout whose samples all fit: int64 [R, L]. L is at most `packing.tokens`.

    `images`: how many each sample has, int64 [B]. The prefix of the flattened grid has room for the most images of any
    sample, and for one at least; the image tokens of a sample are the first columns of it.
    """
    lengths = sample_lengths(layout, images, packing.image_tokens).tolist()
    members = [i for i, length in enumerate(lengths) if length]
    rows = pack_lengths([lengths[i] for i in members], packing.tokens)
    prefixes = (images.long() * packing.image_tokens).tolist()
    prefix = max([packing.image_tokens, *prefixes])
    width = prefix + layout.branch_ids.shape[1]
    slots = torch.full((len(rows), max([sum(lengths[members[m]] for m in row) for row in rows] + [1])), -1)
    for r, row in enumerate(rows):
        start = 0
        for sample in (members[m] for m in row):
            first, middle, end = sample * width, start + prefixes[sample], start + lengths[sample]
            slots[r, start:middle] = torch.arange(first, first + prefixes[sample])
            slots[r, middle:end] = torch.arange(first + prefix, first + prefix + end - middle)
            start = end
    return slots
