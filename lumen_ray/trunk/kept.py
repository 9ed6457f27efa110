"""Outputs of a frozen trunk, kept between the steps of a training stage.

A branch attends to the image and to itself, so what link heads and decoders read of a frozen trunk is the same whenever
the same prompt about the same image returns. An entry is identified by what it is computed from, the image's pixels and
the branch's tokens: prompts whose links do not see the image share one. Link heads are not part of what is kept, so
they can learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

import torch
from torch import Tensor

from lumen_ray.trunk.batch import TrainingBatch
from lumen_ray.trunk.layout import Layout

#: hidden states [B, T, width] of the branches' tokens, and the dense features [B, C, h, w] or None
Outputs = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class _Link:
    """A link of a batch: its key, the row it is in, and the columns of its queries (int64 [N])."""

    key: bytes
    row: int
    queries: Tensor


@dataclass
class KeptOutputs:
    """The states of queries and the dense features of images. Once `room` is used up nothing more is kept: of rows that
    come in turn, those that came last would else push out those that come next.

    `any_rank`: whether something is so on any rank, a collective; ranks run the trunk together or not at all."""

    room: int  # bytes
    any_rank: Callable[[bool], bool] = bool
    _kept: dict[bytes, Tensor] = field(default_factory=dict)

    def outputs(self, batch: TrainingBatch, reads_dense: bool, run: Callable[[TrainingBatch], Outputs]) -> Outputs:
        """What `run` returns for a batch, with states at the queries alone and dense features of images with links
        alone, 0 elsewhere. Runs only the rows of which something is missing."""
        images = _digests(batch.images)
        links = list(_links(batch.layout, images))
        rows = sorted({link.row for link in links})
        maps = {row: b"dense" + images[row] for row in rows} if reads_dense else {}
        missing = {link.row for link in links if link.key not in self._kept}
        missing |= {row for row, key in maps.items() if key not in self._kept}
        fresh: dict[bytes, Tensor] = {}
        if self.any_rank(bool(missing)):
            part = sorted(missing) or [0]
            fresh = _computed(batch.rows(torch.tensor(part)), [images[row] for row in part], run)
        hidden, dense = self._filled(batch, links, maps, fresh)
        self._keep(fresh)
        return hidden, dense

    def _filled(
        self, batch: TrainingBatch, links: list[_Link], maps: dict[int, bytes], fresh: dict[bytes, Tensor]
    ) -> Outputs:
        """The outputs for the batch. `maps`: the key of the dense features of each row that has them."""

        def find(key: bytes) -> Tensor:
            return (fresh[key] if key in fresh else self._kept[key]).to(batch.images.device)

        states = [find(link.key) for link in links]
        hidden = torch.zeros(*batch.layout.input_ids.shape, 1, device=batch.images.device)
        if states:
            hidden = states[0].new_zeros(*batch.layout.input_ids.shape, states[0].shape[-1])
        for link, values in zip(links, states, strict=True):
            hidden[link.row, link.queries] = values
        if not maps:
            return hidden, None
        found = torch.stack([find(key) for key in maps.values()])
        dense = found.new_zeros(len(batch.images), *found.shape[1:])
        dense[list(maps)] = found
        return hidden, dense

    def _keep(self, fresh: dict[bytes, Tensor]) -> None:
        for key, values in fresh.items():
            size = values.element_size() * values.numel()
            if key not in self._kept and size <= self.room:
                self._kept[key] = values
                self.room -= size


def _computed(
    batch: TrainingBatch, images: list[bytes], run: Callable[[TrainingBatch], Outputs]
) -> dict[bytes, Tensor]:
    """The outputs of all links and images of a batch, by key, on the CPU."""
    with torch.no_grad():
        hidden, dense = run(batch)
    found = {link.key: hidden[link.row, link.queries].cpu() for link in _links(batch.layout, images)}
    if dense is not None:
        found |= {b"dense" + image: values.clone() for image, values in zip(images, dense.cpu(), strict=True)}
    return found


def _digests(images: Tensor) -> list[bytes]:
    """A digest of the pixels of each image, uint8 [B, 3, H, W]."""
    size = bytes(str(tuple(images.shape[-2:])), "ascii")
    return [blake2b(image.numpy().tobytes() + size, digest_size=16).digest() for image in images.cpu()]


def _links(layout: Layout, images: list[bytes]) -> Iterator[_Link]:
    """The links of a layout; `images`: digests, by row."""
    branches, tokens, counted, seen = (
        values.cpu().numpy() for values in (layout.branch_ids, layout.input_ids, layout.images, layout.seen)
    )
    for family, slots in layout.query_slots.items():
        owners, parents = layout.link_branches[family].tolist(), layout.link_parents[family].tolist()
        for place, branch, parent in zip(slots.cpu(), owners, parents, strict=True):
            row = int(place[0, 0])
            columns = branches[row] == branch
            first = int(columns.argmax())
            sees = bool(seen[row, first])
            about = images[row] if sees else b""
            kind = bytes(f"{int(counted[row, first])} {sees} {parent >= 0}", "ascii")
            key = blake2b(tokens[row, columns].tobytes() + kind + about, digest_size=16).digest()
            yield _Link(key, row, place[:, 1])
