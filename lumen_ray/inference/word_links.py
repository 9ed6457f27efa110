"""Super links of prompts that see no image: computed once for a list of classes, and kept for a corpus or a server.

Kept in memory by the trunk that made them, by their words: another model, or another dtype, is another trunk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lumen_ray.inference.branches import PendingBranch
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

    @classmethod
    def of(cls, item: PendingBranch) -> LinkKey:
        return cls(item.decoder, item.branch.prompt, item.branch.route or "", item.prompt is None)


def links_of_words(
    trunk: Trunk, tokenizer: LumenTokenizer, branches: Sequence[Branch], are_keypoints: Sequence[bool]
) -> dict[str, Tensor]:
    """What `WordLinks` computes, by one pass of a trunk."""
    layout = build_layout(branches, 1, tokenizer)
    layout.mark_keypoints(are_keypoints)
    none = torch.zeros(0, device=trunk.lead.device)
    links = trunk.branch_links(trunk.lead_prefix(), layout.to(none.device), none, none.long())
    return {name: link.embeddings.float().cpu() for name, link in links.items()}


class WordLinks:
    """The links of one trunk. `compute`: the embeddings of branches of image 0 without parents, and whether each is of
    a keypoint -> by decoder [N, C], float32 on the CPU."""

    def __init__(self, compute: Callable[[list[Branch], list[bool]], dict[str, Tensor]], most: int = MOST_LINKS):
        self._compute = compute
        self._most = most
        self._kept: OrderedDict[LinkKey, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def embeddings(self, items: Sequence[PendingBranch]) -> list[Tensor]:
        """The embedding [C] of each branch, computed for words that are not known yet."""
        keys = [LinkKey.of(item) for item in items]
        missing = list(dict.fromkeys(key for key in keys if key not in self._kept))
        made = dict(self._made(missing))
        found = []
        for key in keys:
            if (link := made.get(key)) is None:
                link = self._kept[key]
                self._kept.move_to_end(key)
            found.append(link)
        self._kept |= made
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return found

    def _made(self, keys: Sequence[LinkKey]) -> list[tuple[LinkKey, Tensor]]:
        made = []
        for start in range(0, len(keys), AT_ONCE):
            part = keys[start : start + AT_ONCE]
            branches = [Branch(0, key.prompt, route=key.route, reads_image=False) for key in part]
            links = self._compute(branches, [key.is_keypoint for key in part])
            made += [(key, links[key.decoder][number].clone()) for number, key in enumerate(part)]
        return made
