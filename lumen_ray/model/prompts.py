"""The prefix-and-branches prompt layout, for training and inference alike.

One image is a *prefix*: its image tokens, encoded once. Each prompt about it is a *branch*:

    <user> instruction <assistant> response <eos>               text, written by the LLM
    <user> instruction <assistant> [DET] q1 .. qN               routing token and super-link queries

A branch sees the prefix and itself, never another branch: a 4-D mask, and position ids that restart where the prefix
ends. So a prompt's result depends neither on the prompts asked with it, nor on their order, nor on the batch.

Legend: B images, P prefix tokens, T branch tokens per image (padded), S = P + T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lumen_ray.model.tokenizer import ASSISTANT, EOS, PAD, USER, LumenTokenizer
from lumen_ray.tasks import REGION_TOKEN, family_of

IGNORE = -100  # label of tokens that the LM loss does not see


@dataclass(frozen=True)
class Branch:
    """One prompt about image `image` of the batch.

    `route`: the routing token that is the response; or None for text, with `response` the text to learn (training) or
    None (inference: the LLM writes it). `regions`: for every <region> in `prompt`, its index in the batch's regions.
    `parent`: for a keypoint prompt the index (in the list of branches) of its object's prompt, else -1.
    """

    image: int
    prompt: str
    route: str | None = None
    response: str | None = None
    regions: tuple[int, ...] = ()
    parent: int = -1


@dataclass
class Layout:
    """Branches as tensors. Positions are (image, token) pairs into the [B, T] grids."""

    input_ids: Tensor  # int64 [B, T]
    labels: Tensor  # int64 [B, T], IGNORE where the LM loss does not look
    branch_ids: Tensor  # int64 [B, T], -1 at padding; index into the list of branches
    offsets: Tensor  # int64 [B, T], position within the branch, added to the prefix length for position ids
    query_slots: dict[str, Tensor]  # family -> int64 [Q, N, 2], where the queries stand
    link_branches: dict[str, Tensor]  # family -> int64 [Q], the branch of each link
    link_images: dict[str, Tensor]  # family -> int64 [Q]
    link_parents: dict[str, Tensor]  # family -> int64 [Q], index among the links of that family or -1
    region_slots: Tensor  # int64 [R, 2]
    region_index: Tensor  # int64 [R], which region fills the slot
    last_slots: Tensor  # int64 [number of branches, 2], each branch's last token

    def to(self, device: torch.device | str) -> Layout:
        def move(value):
            return {k: v.to(device) for k, v in value.items()} if isinstance(value, dict) else value.to(device)

        return Layout(**{name: move(value) for name, value in self.__dict__.items()})


def branch_tokens(branch: Branch, tokenizer: LumenTokenizer) -> tuple[list[int], list[int], int]:
    """(token ids, labels, number of trailing query slots) of one branch. Queries hold the pad id until they are filled.

    The routing token and the response are supervised, the instruction and the queries are not.
    """
    ids = tokenizer.ids
    tokens = [ids[USER], *tokenizer.encode(branch.prompt), ids[ASSISTANT]]
    labels = [IGNORE] * len(tokens)
    if branch.route is not None:
        num_queries = family_of(branch.route).num_queries
        tokens += [ids[branch.route]] + [ids[PAD]] * num_queries
        labels += [ids[branch.route]] + [IGNORE] * num_queries
        return tokens, labels, num_queries
    if branch.response is not None:
        response = [*tokenizer.encode(branch.response), ids[EOS]]
        tokens, labels = tokens + response, labels + response
    return tokens, labels, 0


def build_layout(branches: Sequence[Branch], num_images: int, tokenizer: LumenTokenizer) -> Layout:
    """All tensors of the layout from a list of branches, packed one after the other behind each image's prefix."""
    rows: list[list[tuple[int, list[int], list[int], int]]] = [[] for _ in range(num_images)]
    for index, branch in enumerate(branches):
        rows[branch.image].append((index, *branch_tokens(branch, tokenizer)))
    length = max([sum(len(tokens) for _, tokens, _, _ in row) for row in rows] + [1])
    input_ids = torch.full((num_images, length), tokenizer.ids[PAD])
    labels = torch.full((num_images, length), IGNORE)
    branch_ids = torch.full((num_images, length), -1)
    offsets = torch.zeros((num_images, length), dtype=torch.int64)
    last_slots = torch.zeros((len(branches), 2), dtype=torch.int64)
    slots: dict[str, list] = {}
    links: dict[str, list[int]] = {}
    region_slots, region_index = [], []
    for image, row in enumerate(rows):
        start = 0
        for index, tokens, targets, num_queries in row:
            end = start + len(tokens)
            input_ids[image, start:end] = torch.tensor(tokens)
            labels[image, start:end] = torch.tensor(targets)
            branch_ids[image, start:end] = index
            offsets[image, start:end] = torch.arange(len(tokens))
            last_slots[index] = torch.tensor([image, end - 1])
            if num_queries:
                family = family_of(branches[index].route).name
                links.setdefault(family, []).append(index)
                slots.setdefault(family, []).append([[image, t] for t in range(end - num_queries, end)])
            regions = [start + t for t, token in enumerate(tokens) if token == tokenizer.ids[REGION_TOKEN]]
            if len(regions) != len(branches[index].regions):
                raise ValueError(
                    f"the prompt {branches[index].prompt!r} has {len(regions)} {REGION_TOKEN} but "
                    f"{len(branches[index].regions)} regions"
                )
            region_slots += [[image, t] for t in regions]
            region_index += list(branches[index].regions)
            start = end
    link_parents = {}
    for family, members in links.items():
        place = {branch: i for i, branch in enumerate(members)}
        link_parents[family] = torch.tensor([place.get(branches[b].parent, -1) for b in members])
    return Layout(
        input_ids=input_ids,
        labels=labels,
        branch_ids=branch_ids,
        offsets=offsets,
        query_slots={family: torch.tensor(s) for family, s in slots.items()},
        link_branches={family: torch.tensor(b) for family, b in links.items()},
        link_images={family: torch.tensor([branches[b].image for b in m]) for family, m in links.items()},
        link_parents=link_parents,
        region_slots=torch.tensor(region_slots, dtype=torch.int64).reshape(-1, 2),
        region_index=torch.tensor(region_index, dtype=torch.int64),
        last_slots=last_slots,
    )


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """bool [B, T, S] -> additive mask [B, 1, T, S]: 0 where attention is allowed, the dtype's minimum elsewhere."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min).unsqueeze(1)


def prefix_allowed(num_images: int, prefix: int, mode: str, device: torch.device) -> Tensor:
    """Which image tokens see which: bool [B, P, P]; `mode` is 'causal' or 'full'."""
    allowed = torch.ones(prefix, prefix, dtype=torch.bool, device=device)
    if mode == "causal":
        allowed = allowed.tril()
    return allowed.expand(num_images, prefix, prefix)


def branch_allowed(branch_ids: Tensor, prefix_valid: Tensor, prefix: int) -> Tensor:
    """Which tokens a branch token sees: the prefix (unless the sample has no image) and its own branch so far.

    branch_ids [B, T], prefix_valid bool [B] -> bool [B, T, P + T]. Padding sees itself, so that no row is empty.
    """
    length = branch_ids.shape[1]
    same = branch_ids[:, :, None] == branch_ids[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=branch_ids.device).tril()
    own = same & causal
    image = prefix_valid[:, None, None].expand(-1, length, prefix)
    return torch.cat([image, own], dim=2)
