"""Attention masks and position ids of prefixes and branches, in rows of their own and packed.

Legend: B rows, P prefix tokens, T branch tokens per row (padded), R packed rows of L tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lumen_ray.trunk.layout import Layout


def prefix_segments(lead: int, image_tokens: int, images: int, device: torch.device | str = "cpu") -> Tensor:
    """The image that each prefix token belongs to, -1 for the `lead` tokens before them: int64 [P]."""
    numbers = torch.arange(images, device=device).repeat_interleave(image_tokens)
    return torch.cat([torch.full((lead,), -1, device=device), numbers])


def prefix_allowed(segments: Tensor, mode: str) -> Tensor:
    """Attention mask of the prefix: bool [P, P]; `segments` as of `prefix_segments`. Image tokens attend to the lead
    and to their own image: to all of it (`mode` 'full') or to what precedes ('causal'). The lead is text."""
    causal = torch.ones(len(segments), len(segments), dtype=torch.bool, device=segments.device).tril()
    same = segments[:, None] == segments
    text = segments < 0
    within = causal if mode == "causal" else causal | ~text
    return (same & within) | (text & causal)


def branch_allowed(branch_ids: Tensor, seen: Tensor, segments: Tensor, alone: Tensor | None = None) -> Tensor:
    """Attention mask of branch tokens: the images they see and the lead (nothing of the prefix in rows that are
    `alone`), and the preceding tokens of the same branch.

    branch_ids and seen [B, T] as in `Layout`, segments [P] as of `prefix_segments`, alone bool [B] -> bool [B, T, P +
    T]. Padding attends to padding, so that no row is empty.
    """
    length = branch_ids.shape[1]
    same = branch_ids[:, :, None] == branch_ids[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=branch_ids.device).tril()
    return torch.cat([visible_prefix(seen, segments, alone), same & causal], dim=2)


def visible_prefix(seen: Tensor, segments: Tensor, alone: Tensor | None = None) -> Tensor:
    """The prefix tokens that each branch token attends to: bool [B, T, P]; arguments as of `branch_allowed`."""
    visible = segments < seen[..., None]
    return visible if alone is None else visible & ~alone[:, None, None]


def seen_prefix(layout: Layout, has_image: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of `visible_prefix` for rows of which some have no image; `has_image` bool [B]."""
    return layout.seen * has_image[:, None], segments, layout.alone


def rows_allowed(layout: Layout, has_image: Tensor, segments: Tensor) -> Tensor:
    """`branch_allowed` for rows of which some have no image."""
    return branch_allowed(layout.branch_ids, *seen_prefix(layout, has_image, segments))


def packed_allowed(pack: Tensor, layout: Layout, segments: Tensor, mode: str) -> Tensor:
    """Attention mask of packed rows: `prefix_allowed` and `branch_allowed` within each sample.

    pack [R, L] as in `Layout`; segments [P] of a prefix without lead -> bool [R, L, L]. Padding attends to padding.
    """
    sample, branch = _packed_owners(pack, layout.branch_ids, len(segments))
    of_rows = segments.expand(len(layout.branch_ids), -1)
    segment = packed(pack, torch.cat([of_rows, layout.seen], dim=1))  # of images; else those seen
    length = pack.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=pack.device).tril()
    image = branch < 0
    same = branch[:, :, None] == branch[:, None, :]
    of_images = image[:, :, None] & image[:, None, :] & (sample >= 0)[:, :, None]
    same = same & (~of_images | (segment[:, :, None] == segment[:, None, :]))
    order = causal if mode == "causal" else causal | (image[:, :, None] & image[:, None, :])
    to_image = image[:, None, :] & ~image[:, :, None] & (segment[:, None, :] < segment[:, :, None])
    return (sample[:, :, None] == sample[:, None, :]) & (same & order | to_image)


def position_ids(layout: Layout, segments: Tensor) -> Tensor:
    """Position ids int64 [B, P + T]: of prefix tokens from 0, of branch tokens from the end of their images on, in rows
    that are alone from 0. segments [P] as of `prefix_segments`."""
    image = torch.arange(len(segments), device=segments.device).expand(len(layout.offsets), -1)
    starts = (segments < 0).sum() + layout.images * (segments == 0).sum()
    starts = torch.where(layout.alone[:, None], 0, starts)
    return torch.cat([image, starts + layout.offsets], dim=1)


def branch_starts(layout: Layout, segments: Tensor, ends: Tensor) -> Tensor:
    """The position of the first token of each token's branch behind a cached prefix, whose images end at `ends` [B]:
    int64 [B, T]."""
    behind = torch.where(layout.images == 0, (segments < 0).sum(), ends[:, None])
    return torch.where(layout.alone[:, None], 0, behind)


def packed(pack: Tensor, values: Tensor) -> Tensor:
    """The values of packed tokens, [R, L], of those of all tokens, [B, P + T]."""
    return values.flatten()[pack.clamp_min(0)]


def unpacked(pack: Tensor, size: int) -> Tensor:
    """int64 [size]: index into the flattened packed rows of each cell of the flattened [B, P + T] grid, or -1."""
    index = torch.full((size + 1,), -1, dtype=torch.int64, device=pack.device)
    index[pack.flatten()] = torch.arange(pack.numel(), device=pack.device)  # padding writes the last, which is cut off
    return index[:size]


def _packed_owners(pack: Tensor, branch_ids: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """The sample (-1 at padding) and the branch (-1 for image tokens) of each packed token: int64 [R, L] each."""
    branch = packed(pack, torch.nn.functional.pad(branch_ids, (prefix, 0), value=-1))
    sample = torch.where(pack < 0, -1, pack // (prefix + branch_ids.shape[1]))
    return sample, torch.where(pack < 0, -1, branch)
