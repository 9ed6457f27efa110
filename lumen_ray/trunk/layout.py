"""The prefix-and-branches prompt layout, for training and inference alike.

One image is a *prefix*: its image tokens, encoded once. Each prompt about it is a *branch*:

    <user> instruction <assistant> response <eos>               text, written by the LLM; a conversation repeats it
    <user> instruction <assistant> [DET] q1 .. qN               routing token and super-link queries

A branch sees the prefix and itself, never another branch: a 4-D mask, and position ids that restart where the prefix
ends. So a prompt's result depends neither on the prompts asked with it, nor on their order, nor on the batch.
By setting, the prompts of an image share one causal string instead: see `sequential.py`.

Legend: B images, P prefix tokens, T branch tokens per image (padded), S = P + T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lumen_ray.errors import UserError
from lumen_ray.tasks import REGION_TOKEN, family_of
from lumen_ray.trunk.branch import IGNORE, Branch, Piece
from lumen_ray.trunk.sequential import sequential_pieces
from lumen_ray.trunk.tokenizer import ASSISTANT, EOS, PAD, USER, LumenTokenizer


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
    link_groups: dict[str, Tensor]  # family -> int64 [Q], a number for each image and group of its branches
    region_slots: Tensor  # int64 [R, 2]
    region_index: Tensor  # int64 [R], which region fills the slot
    last_slots: Tensor  # int64 [number of branches, 2], each branch's last token
    #: int64 [R, L], or None: the LLM then works on the B rows of P + T tokens. Else on R rows in which images and texts
    #: are packed; each entry is a place in the flattened [B, P + T] grid, -1 at padding
    pack: Tensor | None = None

    def llm_shape(self, prefix: int) -> tuple[int, int]:
        """(rows, tokens per row) that the LLM computes with a prefix of so many image tokens."""
        if self.pack is not None:
            return tuple(self.pack.shape)
        return len(self.input_ids), prefix + self.input_ids.shape[1]

    def to(self, device: torch.device | str) -> Layout:
        def move(value):
            if value is None:
                return None
            return {k: v.to(device) for k, v in value.items()} if isinstance(value, dict) else value.to(device)

        return Layout(**{name: move(value) for name, value in self.__dict__.items()})


def branch_piece(index: int, branch: Branch, tokenizer: LumenTokenizer) -> Piece:
    """One branch. The routing token and the responses are supervised, the instructions and the queries are not."""
    ids = tokenizer.ids
    piece = Piece(index, members=[index], regions=branch.regions)
    for instruction, response in (*branch.history, (branch.prompt, branch.response)):
        piece.add([ids[USER], *tokenizer.encode(instruction), ids[ASSISTANT]], False)
        if response is not None and branch.route is None:
            piece.add([*tokenizer.encode(response), ids[EOS]], True)
    if branch.route is not None:
        piece.add([ids[branch.route]], True)
        piece.add_queries(index, branch.route, ids[PAD])
        return piece
    piece.tokens, piece.labels = piece.tokens[: branch.limit], piece.labels[: branch.limit]
    return piece


def branch_tokens(branch: Branch, tokenizer: LumenTokenizer) -> tuple[list[int], list[int], int]:
    """(token ids, labels, number of trailing query slots) of one branch."""
    piece = branch_piece(0, branch, tokenizer)
    return piece.tokens, piece.labels, len(piece.tokens) - piece.queries[0][1] if piece.queries else 0


def _pieces(
    branches: Sequence[Branch], num_images: int, tokenizer: LumenTokenizer, prompt_layout: str
) -> list[list[Piece]]:
    """What each image is asked, as runs of tokens."""
    members: list[list[tuple[int, Branch]]] = [[] for _ in range(num_images)]
    for index, branch in enumerate(branches):
        members[branch.image].append((index, branch))
    if prompt_layout == "sequential":
        return [list(sequential_pieces(asked, tokenizer)) for asked in members]
    if USER not in tokenizer.ids:
        raise UserError(
            "this tokenizer spells turns out; set the model's prompt_layout to 'sequential'", "wrong_layout"
        )
    return [[branch_piece(index, branch, tokenizer) for index, branch in asked] for asked in members]


def build_layout(
    branches: Sequence[Branch], num_images: int, tokenizer: LumenTokenizer, prompt_layout: str = "branches"
) -> Layout:
    """All tensors of the layout from a list of branches, packed one after the other behind each image's prefix.

    `prompt_layout`: as in `ModelSettings`.
    """
    rows = _pieces(branches, num_images, tokenizer, prompt_layout)
    length = max([sum(len(piece.tokens) for piece in row) for row in rows] + [1])
    # arrays, since writing a few numbers into a tensor costs ten times as much
    input_ids = np.full((num_images, length), tokenizer.ids[PAD])
    labels = np.full((num_images, length), IGNORE)
    branch_ids = np.full((num_images, length), -1)
    offsets = np.zeros((num_images, length), np.int64)
    last_slots = np.zeros((len(branches), 2), np.int64)
    slots: dict[str, list] = {}
    links: dict[str, list[int]] = {}
    region_slots, region_index = [], []
    for image, row in enumerate(rows):
        start = 0
        for piece in row:
            end = start + len(piece.tokens)
            input_ids[image, start:end] = piece.tokens
            labels[image, start:end] = piece.labels
            branch_ids[image, start:end] = piece.owner
            offsets[image, start:end] = np.arange(len(piece.tokens))
            last_slots[piece.members] = image, end - 1
            for index, place in piece.queries:
                family = family_of(branches[index].route)
                links.setdefault(family.name, []).append(index)
                first = start + place
                slots.setdefault(family.name, []).append([[image, first + n] for n in range(family.num_queries)])
            regions = [start + t for t, token in enumerate(piece.tokens) if token == tokenizer.ids[REGION_TOKEN]]
            if len(regions) != len(piece.regions):
                prompts = ", ".join(repr(branches[i].prompt) for i in piece.members)
                raise ValueError(f"{prompts}: {len(regions)} {REGION_TOKEN} but {len(piece.regions)} regions")
            region_slots += [[image, t] for t in regions]
            region_index += list(piece.regions)
            start = end
    link_parents, link_groups = {}, {}
    numbers = {asked: n for n, asked in enumerate(dict.fromkeys((b.image, b.group) for b in branches))}
    for family, members in links.items():
        place = {branch: i for i, branch in enumerate(members)}
        link_parents[family] = torch.tensor([place.get(branches[b].parent, -1) for b in members])
        link_groups[family] = torch.tensor([numbers[branches[b].image, branches[b].group] for b in members])
    return Layout(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        branch_ids=torch.from_numpy(branch_ids),
        offsets=torch.from_numpy(offsets),
        query_slots={family: torch.tensor(s) for family, s in slots.items()},
        link_branches={family: torch.tensor(b) for family, b in links.items()},
        link_images={family: torch.tensor([branches[b].image for b in m]) for family, m in links.items()},
        link_parents=link_parents,
        link_groups=link_groups,
        region_slots=torch.tensor(region_slots, dtype=torch.int64).reshape(-1, 2),
        region_index=torch.tensor(region_index, dtype=torch.int64),
        last_slots=torch.from_numpy(last_slots),
    )


def prefix_allowed(num_images: int, prefix: int, mode: str, device: torch.device) -> Tensor:
    """Which image tokens see which: bool [B, P, P]; `mode` is 'causal' or 'full'."""
    allowed = torch.ones(prefix, prefix, dtype=torch.bool, device=device)
    if mode == "causal":
        allowed = allowed.tril()
    return allowed.expand(num_images, prefix, prefix)


def branch_allowed(branch_ids: Tensor, prefix_valid: Tensor, prefix: int, lead: int = 0) -> Tensor:
    """Which tokens a branch token sees: the prefix (without an image only its first `lead` tokens) and its own branch
    so far.

    branch_ids [B, T], prefix_valid bool [B] -> bool [B, T, P + T]. Padding sees itself, so that no row is empty.
    """
    length = branch_ids.shape[1]
    same = branch_ids[:, :, None] == branch_ids[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=branch_ids.device).tril()
    own = same & causal
    text = torch.arange(prefix, device=branch_ids.device) < lead
    image = (prefix_valid[:, None] | text)[:, None].expand(-1, length, -1)
    return torch.cat([image, own], dim=2)


def packed_allowed(pack: Tensor, branch_ids: Tensor, prefix: int, mode: str) -> Tensor:
    """Which tokens of packed rows see which: what `prefix_allowed` and `branch_allowed` say, within each sample.

    pack [R, L] as in `Layout`; branch_ids [B, T] -> bool [R, L, L]. Padding sees itself.
    """
    sample, branch = _packed_owners(pack, branch_ids, prefix)
    length = pack.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=pack.device).tril()
    image = branch < 0
    own = branch[:, :, None] == branch[:, None, :]
    order = causal if mode == "causal" else causal | (image[:, :, None] & image[:, None, :])
    to_image = image[:, None, :] & ~image[:, :, None]
    return (sample[:, :, None] == sample[:, None, :]) & (own & order | to_image)


def packed_positions(pack: Tensor, offsets: Tensor, prefix: int) -> Tensor:
    """Position ids of packed rows, int64 [R, L]: those that each token has in its own sample."""
    image = torch.arange(prefix, device=pack.device).expand(len(offsets), -1)
    return torch.cat([image, prefix + offsets], dim=1).flatten()[pack.clamp_min(0)]


def unpacked(pack: Tensor, size: int) -> Tensor:
    """int64 [size]: where each place of the flattened [B, P + T] grid stands in the flattened packed rows, else -1."""
    places = torch.full((size + 1,), -1, dtype=torch.int64, device=pack.device)
    places[pack.flatten()] = torch.arange(pack.numel(), device=pack.device)  # padding writes the last, which is cut off
    return places[:size]


def _packed_owners(pack: Tensor, branch_ids: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Of each packed token its sample (-1 at padding) and its branch (-1 for image tokens): int64 [R, L] each."""
    branch = torch.nn.functional.pad(branch_ids, (prefix, 0), value=-1).flatten()[pack.clamp_min(0)]
    sample = torch.where(pack < 0, -1, pack // (prefix + branch_ids.shape[1]))
    return sample, torch.where(pack < 0, -1, branch)
