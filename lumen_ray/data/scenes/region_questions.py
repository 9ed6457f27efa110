"""Questions whether a box in a scene shows a class, to be answered with yes or no: what `label --verify` asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lumen_ray.data.scenes.text import CLASSES, COLOURS, SHAPES
from lumen_ray.data.shards.schema import make_message
from lumen_ray.structures import Boxes
from lumen_ray.tasks import region_question

#: share of wrong classes that have the colour or the shape of the right one
ALIKE = 0.7
#: boxes that show no object of the class have a lower IoU than this with all
MOST_IOU = 0.3


def region_questions_of(
    objects: Sequence[Any], first: int, side: int, rng: np.random.Generator
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(regions, messages) of up to four questions about a scene's objects, half of them to be answered with no: another
    class, or a box beside the objects of the class. `first`: number of the row's regions before these."""
    regions: list[dict[str, Any]] = []
    messages: list[dict[str, Any]] = []

    def ask(box: np.ndarray, name: str, answer: str) -> None:
        messages.append(make_message("chat", region_question(name), answer, (first + len(regions),)))
        regions.append({"kind": "box", "points": [float(v) for v in box], "mask": None})

    one, two = (objects[int(rng.integers(len(objects)))] for _ in range(2))
    box = np.clip(np.array(one.box) + rng.integers(-2, 3, 4), 0, side)
    ask(box, one.name, "yes")
    ask(box, _mistaken(one.name, rng), "no")
    if (beside := _box_beside(two, objects, side, rng)) is not None:
        ask(np.clip(np.array(two.box) + rng.integers(-2, 3, 4), 0, side), two.name, "yes")
        ask(beside, two.name, "no")
    return regions, messages


def _mistaken(name: str, rng: np.random.Generator) -> str:
    """Another class than `name`."""
    colour, shape = name.split()
    alike = [f"{colour} {other}" for other in SHAPES if other != shape]
    alike += [f"{other} {shape}" for other in COLOURS if other != colour]
    others = alike if rng.random() < ALIKE else [other for other in CLASSES if other != name]
    return others[rng.integers(len(others))]


def _box_beside(obj: Any, objects: Sequence[Any], side: int, rng: np.random.Generator) -> np.ndarray | None:
    """A box of about the object's size that shows none of its class; None after 12 tries."""
    same = Boxes(np.array([o.box for o in objects if o.name == obj.name]), (side, side))
    x1, y1, x2, y2 = obj.box
    for _ in range(12):
        width, height = np.clip(np.array([x2 - x1, y2 - y1]) * rng.uniform(0.6, 1.4, 2), 4, side).astype(int)
        x, y = rng.integers(0, side - width + 1), rng.integers(0, side - height + 1)
        box = np.array([x, y, x + width, y + height])
        if same.iou(Boxes(box, (side, side))).max() < MOST_IOU:
            return box
    return None
