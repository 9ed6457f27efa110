"""The super link: learnable queries behind a routing token, and the head that makes them decoder-sized.

VisionLLM v2 (arXiv 2406.08394), sec. 3.3: when the LLM emits a routing token such as [DET], N learned query
embeddings are appended; their last hidden states, not text, condition the decoder, and its gradients flow back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lumen_ray.tasks import LINK_FAMILIES


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

    def only(self, members: Tensor) -> SuperLink:
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

    def take(self, members: Tensor) -> tuple[SuperLink, Tensor]:
        """The link of the prompts at `members`, and the images they are about (int64, rising), among which its
        `image_index` counts."""
        link = self.only(members)
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


class SuperLinkQueries(nn.Module):
    """The learned query embeddings, one set per decoder family: [num_queries, llm_width]."""

    def __init__(
        self, llm_width: int, std: float, families: Iterable[str] = ("perception",), pose_queries: bool = False
    ):
        """`std` is that of the LLM's own token embeddings, so that the queries enter on the same scale;
        `pose_queries`: keypoint prompts have some of their own."""
        super().__init__()
        numbers = {name: LINK_FAMILIES[name].num_queries for name in families}
        if pose_queries:
            numbers["pose"] = numbers["perception"]
        self.queries = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(number, llm_width) * std) for name, number in numbers.items()}
        )

    def of(self, family: str, posed: bool) -> list[nn.Parameter]:
        """The query sets that prompts of a family can have, those of keypoints among them where poses are asked for."""
        names = (family, "pose") if family == "perception" and posed else (family,)
        return [self.queries[name] for name in names if name in self.queries]

    def forward(self, family: str, parents: Tensor) -> Tensor:
        """[P, num_queries, llm_width] of prompts with these `parents` (int64 [P], -1 but for keypoint prompts)."""
        queries = self.queries[family].repeat(len(parents), 1, 1)
        if family != "perception" or "pose" not in self.queries:
            return queries
        return torch.where((parents >= 0)[:, None, None], self.queries["pose"], queries)


class LinkHead(nn.Module):
    """3-layer MLP and a mean over the queries: [P, N, llm_width] -> [P, channels] (perception families).

    With `reads_words` a linear path adds the mean embedding of the branch's tokens before the queries. In an LLM that
    starts from fresh weights less than a thousandth of what the queries say differs from one class name to the next;
    names that the image does not tell apart yet would fall together before a decoder can use the difference.
    """

    vocabulary = None  # reads words in the LLM's embeddings

    def __init__(self, llm_width: int, channels: int, reads_words: bool = False):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(llm_width, channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
        )
        # The default initialisation shrinks what differs between prompts at every layer until the biases, which do
        # not differ, are all that a decoder's normalisation sees.
        for layer in self.mlp[::2]:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        self.words = None
        if reads_words:  # which leads at first
            self.words = nn.Sequential(nn.LayerNorm(llm_width), nn.Linear(llm_width, channels))
            nn.init.normal_(self.mlp[-1].weight, std=0.1 * channels**-0.5)

    def forward(self, states: Tensor, words: Tensor | None = None, parents: Tensor | None = None) -> Tensor:
        """states [P, N, llm_width] at the queries, words [P, llm_width] with `reads_words` -> [P, channels].

        `parents` (int64 [P]) are for heads that tell keypoint prompts from those of objects.
        """
        link = self.mlp(states).mean(dim=1)
        return link if self.words is None else link + self.words(words)


def mean_words(embeds: Tensor, branch_ids: Tensor, queries: Tensor, num_branches: int) -> Tensor:
    """Mean embedding of every branch's tokens but its queries: embeds [B, T, W], branch_ids [B, T] (-1: padding),
    queries [..., 2] (image, token) -> [num_branches, W]."""
    word = branch_ids >= 0
    word[queries[..., 0], queries[..., 1]] = False
    owner = branch_ids[word]
    sums = embeds.new_zeros(num_branches, embeds.shape[-1]).index_add(0, owner, embeds[word])
    return sums / owner.bincount(minlength=num_branches).clamp_min(1).unsqueeze(1)
