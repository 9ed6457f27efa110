"""Selection of the positive places that train masks, bounded per object and per image."""

from __future__ import annotations

from torch import Tensor

from lumen_ray.decoders.common.ragged import place_in_group


def select_mask_positives(
    objects: Tensor, boxes: Tensor, centers: Tensor, images: Tensor, per_object: int, per_image: int
) -> Tensor:
    """Indices of at most `per_object` positives of each object and `per_image` of each image.

    objects int64 [N]: the object of each positive; boxes float32 [N, 4]: its true box, xyxy; centers [N, 2]: the
    positive's place, xy; images int64 [N]. The nearest to the box centre are selected: distances are exact, where a
    choice by score would depend on rounding and so on the rank split. In a crowded image each object's nearest positive
    comes first, in a pseudo-random order of objects that changes with augmentation.
    """
    distance = (centers - (boxes[:, :2] + boxes[:, 2:]) / 2).square().sum(-1)
    keep = best_of_each(objects, -distance, per_object)
    priority = scattered(boxes[keep]) - place_in_group(objects[keep])
    return keep[best_of_each(images[keep], priority, per_image)]


def best_of_each(groups: Tensor, values: Tensor, most: int) -> Tensor:
    """Indices of the `most` highest `values` [N] of each group (int64 [N]), by group, best first; ties by index.

    The result of a group does not depend on the other groups, so a loss over it does not depend on the rank split.
    """
    order = values.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    return order[place_in_group(groups[order]) < most]


def scattered(boxes: Tensor) -> Tensor:
    """A pseudo-random number in [0, 1) for each box [N, 4], a function of the box alone."""
    x1, y1, x2, y2 = boxes.double().unbind(-1)  # no matrix product: its rounding may depend on N
    return ((x1 * 12.9898 + y1 * 78.233 + x2 * 37.719 + y2 * 4.581).sin() * 43758.5453).frac().abs()
