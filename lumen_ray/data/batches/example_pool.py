"""Objects of a training batch by which a class may be shown, on the prompted image or on another of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lumen_ray.data.batches.region_prompts import drawn_box
from lumen_ray.data.batches.transforms import Sample
from lumen_ray.trunk.regions import region_mask

MOST_POSITIVE = 3
#: share of the prompts by example that also show an object of another class as what is not meant
NEGATIVE_SHARE = 0.25
#: how far a drawn side may be off, as a share of the box: users do not draw exactly
LOOSENESS = 0.08


class Shown(NamedTuple):
    """An object: the image of the batch that it is on, and its box as a mask of the input, uint8 [H, W]."""

    image: int
    mask: np.ndarray


class Drawn(NamedTuple):
    positive: list[Shown]
    negative: list[Shown]


@dataclass
class ExamplePool:
    """`objects`: (image, box xyxy in its input, (height, width) of that) of every object, by class."""

    objects: dict[str, list[tuple[int, np.ndarray, tuple[int, int]]]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.objects)

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]], samples: Sequence[Sample], images: Sequence[int]) -> ExamplePool:
        """The objects of the rows at `images`, whose images the batch has; crowds are none."""
        pool = cls()
        for image in images:
            sample, size = samples[image], samples[image].image.shape[:2]
            for n, i in enumerate(sample.kept):
                if not sample.crowd[n]:
                    phrase = rows[image]["instances"][i]["phrase"]
                    pool.objects.setdefault(phrase, []).append((image, sample.boxes[n], size))
        return pool

    def draw(self, phrase: str, image: int, rng: np.random.Generator) -> Drawn | None:
        """Objects of a class: all on `image` or all on others, as users give them; None if there is none in the
        batch. Sometimes with objects of another class, from anywhere."""
        mine = [item for item in self.objects.get(phrase, ()) if item[0] == image]
        others = [item for item in self.objects.get(phrase, ()) if item[0] != image]
        sources = [items for items in (mine, others) if items]
        if not sources:
            return None
        items = sources[int(rng.integers(len(sources)))]
        positive = [items[i] for i in rng.permutation(len(items))[: 1 + int(rng.integers(MOST_POSITIVE))]]
        negative = []
        classes = [name for name in self.objects if name != phrase]
        if classes and rng.random() < NEGATIVE_SHARE:
            against = self.objects[classes[int(rng.integers(len(classes)))]]
            negative = [against[int(rng.integers(len(against)))]]
        return Drawn([_shown(item, rng) for item in positive], [_shown(item, rng) for item in negative])


def _shown(item: tuple[int, np.ndarray, tuple[int, int]], rng: np.random.Generator) -> Shown:
    image, box, size = item
    return Shown(image, region_mask(drawn_box(box, size, rng, LOOSENESS), size))
