"""Super links of prompts that see no image: computed once for a list of classes, and kept for a corpus or a server.

Kept in memory by the trunk that made them, by their words: another model, or another dtype, is another trunk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lumen_ray.cancellation import between_passes
from lumen_ray.exemplars import Example
from lumen_ray.inference.branches import PendingBranch, with_regions
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import build_layout
from lumen_ray.trunk.tokenizer import LumenTokenizer
from lumen_ray.trunk.trunk import Trunk

#: Links that are kept, the latest ones: 1,203 classes, each in several phrasings, many times over.
MOST_LINKS = 1 << 16
#: Prompts that are computed together.
AT_ONCE = 128


class LinkKey(NamedTuple):
    """All that a link of words depends on."""

    decoder: str
    prompt: str
    route: str
    is_keypoint: bool
    examples: tuple[str, ...]  # keys of those whose embeddings are in the prompt

    @classmethod
    def of(cls, item: PendingBranch) -> LinkKey:
        examples = tuple(region.key for region in item.regions if isinstance(region, Example))
        return cls(item.decoder, item.branch.prompt, item.branch.route or "", item.prompt is None, examples)


def links_of_words(
    trunk: Trunk,
    tokenizer: LumenTokenizer,
    branches: Sequence[Branch],
    are_keypoints: Sequence[bool],
    examples: Sequence[Tensor] = (),
) -> dict[str, Tensor]:
    """What `WordLinks` computes, by one pass of a trunk."""
    layout = build_layout(branches, 1, tokenizer)
    layout.mark_keypoints(are_keypoints)
    regions = torch.stack(list(examples)) if examples else None
    links = trunk.branch_links(trunk.lead_prefix(), layout.to(trunk.lead.device), regions)
    return {name: link.embeddings.float().cpu() for name, link in links.items()}


class WordLinks:
    """The links of one trunk. `compute`: the embeddings of branches of image 0 without parents, from them, whether each
    is of a keypoint, and the embedding of each of their regions -> by decoder [N, C], float32 on the CPU. `embed`: the
    embeddings of examples on images of their own."""

    def __init__(
        self,
        compute: Callable[[list[Branch], list[bool], list[Tensor]], dict[str, Tensor]],
        embed: Callable[[list[Example]], list[Tensor]],
        most: int = MOST_LINKS,
    ):
        self._compute, self._embed = compute, embed
        self._most = most
        self._kept: OrderedDict[LinkKey, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def embeddings(self, items: Sequence[PendingBranch]) -> list[Tensor]:
        """The embedding [C] of each branch, computed for words that are not known yet; its regions are examples on
        images of their own."""
        keys = [LinkKey.of(item) for item in items]
        known = {key: self._kept[key] for key in keys if key in self._kept}
        missing = {key: item for key, item in zip(keys, items, strict=True) if key not in known}
        made = dict(self._made(list(missing.items())))  # between its passes others may drop what is known
        for key, link in (known | made).items():
            self._kept[key] = link
            self._kept.move_to_end(key)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return [made[key] if key in made else known[key] for key in keys]

    def _made(self, missing: Sequence[tuple[LinkKey, PendingBranch]]) -> list[tuple[LinkKey, Tensor]]:
        made = []
        for start in range(0, len(missing), AT_ONCE):
            between_passes()
            keys, items = zip(*missing[start : start + AT_ONCE], strict=True)
            plain = [Branch(0, key.prompt, route=key.route, reads_image=False) for key in keys]
            owned = zip(plain, (item.regions for item in items), strict=True)
            branches, examples, _ = with_regions(owned)
            links = self._compute(branches, [key.is_keypoint for key in keys], self._embed(examples))
            made += [(key, links[key.decoder][number].clone()) for number, key in enumerate(keys)]
        return made
