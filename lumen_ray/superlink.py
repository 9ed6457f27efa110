"""The super link: prompt embeddings that the trunk hands to a decoder (VisionLLM v2, arXiv 2406.08394, sec. 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SuperLink:
    """The prompts of a batch for one decoder.

    `decoder`: its name. `embeddings`: float32 [P, C]; for image decoders [P, T, C]. `image_index`: int64 [P], the image
    of each prompt in the batch. `parent`: int64 [P], -1, or for a keypoint prompt the index of its object's prompt.
    `group`: int64 [P], prompts about one image that an expert decoder processes jointly, such as the classes of one
    request; by default all prompts about an image. The light decoder processes each prompt on its own.
    """

    decoder: str
    embeddings: Tensor
    image_index: Tensor
    parent: Tensor
    group: Tensor = None  # type: ignore[assignment]  # __post_init__ replaces None

    def __post_init__(self) -> None:
        if self.group is None:
            self.group = self.image_index

    def __len__(self) -> int:
        return len(self.image_index)

    def select(self, members: Tensor) -> SuperLink:
        """The link of the prompts at `members` (int64 [M], ascending; a keypoint prompt only with its parent)."""
        place = torch.full((len(self) + 1,), -1, dtype=torch.int64, device=members.device)
        place[members] = torch.arange(len(members), device=members.device)
        return SuperLink(
            self.decoder,
            self.embeddings[members].contiguous(),
            self.image_index[members],
            place[self.parent[members]],  # parent -1 reads the last entry, which is -1
            self.group[members],
        )

    def select_with_images(self, members: Tensor) -> tuple[SuperLink, Tensor]:
        """The link of the prompts at `members`, and the images they refer to (int64, ascending); the link's
        `image_index` indexes those images."""
        link = self.select(members)
        images, link.image_index = link.image_index.unique(return_inverse=True)
        return link, images

    def to(self, device: torch.device | str) -> SuperLink:
        tensors = (self.embeddings, self.image_index, self.parent, self.group)
        return SuperLink(self.decoder, *(value.to(device) for value in tensors))

    def chunks(self, most: int) -> list[Tensor]:
        """Indices of all prompts, split into chunks of at most `most` object prompts with their keypoint prompts."""
        if 0 < len(self) <= most:
            return [torch.arange(len(self), device=self.parent.device)]
        owner = torch.where(self.parent < 0, torch.arange(len(self), device=self.parent.device), self.parent)
        objects = torch.nonzero(self.parent < 0).flatten()
        return [torch.nonzero(torch.isin(owner, chunk)).flatten() for chunk in objects.split(most) if len(chunk)]

    def group_chunks(self, most: int) -> list[Tensor]:
        """Indices of all prompts, split into chunks of at most `most` groups."""
        if 0 < len(self) <= most:
            return [torch.arange(len(self), device=self.group.device)]
        return [torch.nonzero(torch.isin(self.group, chunk)).flatten() for chunk in self.group.unique().split(most)]


def concat(links: Sequence[SuperLink], first_images: Sequence[int]) -> SuperLink:
    """Concatenates links of one decoder; the images of each start at its entry in `first_images`, and groups of
    different links stay distinct."""
    parents, groups, prompts, group = [], [], 0, 0
    for link in links:
        parents.append(torch.where(link.parent >= 0, link.parent + prompts, link.parent))
        _, numbers = link.group.unique(return_inverse=True)
        groups.append(numbers + group)
        prompts += len(link)
        group += int(numbers.max()) + 1 if len(link) else 0
    images = [link.image_index + first for link, first in zip(links, first_images, strict=True)]
    embeddings = torch.cat([link.embeddings for link in links])
    return SuperLink(links[0].decoder, embeddings, torch.cat(images), torch.cat(parents), torch.cat(groups))
