"""The super link: what leaves the trunk for a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SuperLink:
    """What leaves the trunk for one decoder: what each prompt of a batch asks of it.

    `decoder`: its name. `embeddings`: float32 [P, C]; for decoders that make pictures [P, T, C]. `image_index`: int64
    [P], the image of the batch each prompt is about. `parent`: int64 [P], -1, or for a keypoint prompt the index of its
    object's prompt. `group`: int64 [P]: prompts about one image that an expert decoder looks at together, such as the
    classes of one request; where it is not given, all prompts about an image. Light decoders look at each by itself.
    """

    decoder: str
    embeddings: Tensor
    image_index: Tensor
    parent: Tensor
    group: Tensor | None = None

    def __post_init__(self) -> None:
        if self.group is None:
            self.group = self.image_index

    def __len__(self) -> int:
        return len(self.image_index)

    def select(self, members: Tensor) -> SuperLink:
        """The link of the prompts at `members` (int64 [M], rising, no keypoint prompt without its object's)."""
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
        """The link of the prompts at `members`, and the images they are about (int64, rising), among which its
        `image_index` counts."""
        link = self.select(members)
        images, link.image_index = link.image_index.unique(return_inverse=True)
        return link, images

    def to(self, device: torch.device | str) -> SuperLink:
        return SuperLink(*(v if isinstance(v, str) else v.to(device) for v in vars(self).values()))

    def chunks(self, most: int) -> list[Tensor]:
        """Indices of all prompts in groups of at most `most` object prompts, each with its keypoint prompts."""
        owner = torch.where(self.parent < 0, torch.arange(len(self), device=self.parent.device), self.parent)
        objects = torch.nonzero(self.parent < 0).flatten()
        return [torch.nonzero(torch.isin(owner, part)).flatten() for part in objects.split(most) if len(part)]

    def group_chunks(self, most: int) -> list[Tensor]:
        """Indices of all prompts in parts of at most `most` groups."""
        return [torch.nonzero(torch.isin(self.group, part)).flatten() for part in self.group.unique().split(most)]


def concat(links: Sequence[SuperLink], first_images: Sequence[int]) -> SuperLink:
    """Links of one decoder as one, each about images from its `first_images` on; groups stay apart."""
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
