"""Embeddings of the regions of prompts. Those of examples on images of their own are computed once, and kept as long as
the trunk that made them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lumen_ray.exemplars import Example
from lumen_ray.inference.encoded_images import fit_images
from lumen_ray.structures import Region, Size
from lumen_ray.targets import Frame
from lumen_ray.trunk.prefix import Prefix
from lumen_ray.trunk.regions import region_mask
from lumen_ray.trunk.trunk import Trunk

#: Embeddings that are kept, the latest ones.
MOST_EMBEDDINGS = 1 << 14
#: Images that are encoded together.
AT_ONCE = 8


class ExampleEmbeddings:
    """`bucket`: (height, width) of an image -> (height, width) of the model input."""

    def __init__(self, trunk: Trunk, bucket: Callable[[Size], Size], most: int = MOST_EMBEDDINGS):
        self._trunk, self._bucket, self._most = trunk, bucket, most
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, examples: Sequence[Example]) -> list[Tensor]:
        """The embedding [width] of each example, on the trunk's device."""
        missing = {example.key: example for example in examples if example.key not in self._kept}
        made = self._made(list(missing.values()))
        found = []
        for example in examples:
            if (embedding := made.get(example.key)) is None:
                embedding = self._kept[example.key]
                self._kept.move_to_end(example.key)
            found.append(embedding)
        self._kept |= made
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return found

    def of_prompts(
        self, prefix: Prefix, regions: Sequence[Region | Example], images: Sequence[int], frames: Sequence[Frame]
    ) -> Tensor | None:
        """Embeddings [R, width] of the regions of prompts about `images`, indices into the prefix and `frames`; None if
        there are none."""
        if not regions:
            return None
        elsewhere = {i: r for i, r in enumerate(regions) if isinstance(r, Example) and r.image is not None}
        found = dict(zip(elsewhere, self.of(list(elsewhere.values())), strict=True))
        here = [i for i in range(len(regions)) if i not in found]
        if here:
            masks = torch.from_numpy(np.stack([_mask_here(regions[i], frames[images[i]]) for i in here]))
            owners, device = torch.tensor([images[i] for i in here]), self._trunk.lead.device
            found |= zip(here, self._trunk.region_embeddings(prefix, masks.to(device), owners.to(device)), strict=True)
        return torch.stack([found[i] for i in range(len(regions))])

    def _made(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        by_image: dict[int, list[Example]] = {}
        for example in examples:
            by_image.setdefault(id(example.image), []).append(example)
        by_bucket: dict[Size, list[list[Example]]] = {}
        for group in by_image.values():
            by_bucket.setdefault(self._bucket(_size(group[0])), []).append(group)
        made: dict[str, Tensor] = {}
        for bucket, groups in by_bucket.items():
            for start in range(0, len(groups), AT_ONCE):
                made |= self._encoded(groups[start : start + AT_ONCE], bucket)
        return made

    def _encoded(self, groups: Sequence[Sequence[Example]], bucket: Size) -> dict[str, Tensor]:
        """Embeddings by key of the examples on each of a few images."""
        pixels = fit_images([[_image(group[0])] for group in groups], bucket).pixels
        members = [(n, example) for n, group in enumerate(groups) for example in group]
        masks = torch.from_numpy(np.stack([region_mask(e.region(_size(e)), bucket) for _, e in members]))
        owners = torch.tensor([n for n, _ in members])
        device = self._trunk.lead.device
        embeddings = self._trunk.example_embeddings(pixels.to(device), masks.to(device), owners.to(device))
        return {example.key: embedding for (_, example), embedding in zip(members, embeddings, strict=True)}


def _mask_here(region: Region | Example, frame: Frame) -> np.ndarray:
    """A region of the image that is asked about as a mask of its input, uint8 [H, W]."""
    here = region.region(frame.size) if isinstance(region, Example) else region
    return region_mask(here, frame.input_size)


def _image(example: Example) -> np.ndarray:
    assert example.image is not None, "others are regions of the image that is asked about"
    return example.image


def _size(example: Example) -> Size:
    height, width = _image(example).shape[:2]
    return height, width
