"""What a model finds for names of things that no image of a split shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lumen_ray.answer import Answer

#: names that the report lists
MOST_NAMES = 20


class AbsentNames:
    """`names`: those to ask for, each once; `left_out`: names that were given but are classes of the split."""

    def __init__(self, names: Sequence[str] = (), left_out: Sequence[str] = ()):
        self.names, self.left_out = list(names), list(left_out)
        self._images = self._marred = 0
        self._found: Counter[str] = Counter()

    def process(self, answer: Answer) -> None:
        """Counts the boxes of one image, all of which are wrong."""
        found = {p.phrase: len(p.scores) for p in answer.predictions if len(p.scores)}
        self._images += 1
        self._marred += bool(found)
        self._found.update(found)

    def evaluate(self) -> dict[str, Any]:
        """Boxes per image over all names, and the share of images with one; None if no image was asked about."""
        images = self._images or None
        return {
            "absent_boxes_per_image": images and self._found.total() / images,
            "absent_images_with_a_box": images and self._marred / images,
        }

    @property
    def note(self) -> str:
        """The result in a sentence."""
        boxes = self._found.total() / max(self._images, 1)
        often = "".join(f", most often '{name}'" for name, _ in self._found.most_common(1))
        rest = ", ".join([*self.left_out[:3], *(["..."] if len(self.left_out) > 3 else [])])
        without = f"; left out as classes of the split: {rest}" if rest else ""
        return f"for {len(self.names):,} names of absent classes there are {boxes:.2f} boxes per image{often}{without}"

    @property
    def worst(self) -> dict[str, float | None]:
        """Boxes per image of the names that are found most often."""
        return {name: count / self._images for name, count in self._found.most_common(MOST_NAMES)}
