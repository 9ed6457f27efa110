"""Scores of masks beyond COCO's: segmentation from a visual prompt, and semantic segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from lumen_ray.answer import Answer
from lumen_ray.evaluate.scored import Row
from lumen_ray.structures import Region

MAX_REGIONS = 3  # instances of a row that get a visual prompt


def region_prompts(row: Row) -> list[tuple[Region, dict[str, Any]]]:
    """(visual prompt, true mask) of the first instances of a row that have a mask: boxes and points in turn.

    The point is the pixel of the instance that is nearest to the mean of its pixels.
    """
    size = (row["height"], row["width"])
    prompts: list[tuple[Region, dict[str, Any]]] = []
    for instance in (i for i in row["instances"] if i["mask"] and not i["crowd"]):
        if len(prompts) == MAX_REGIONS:
            break
        ys, xs = np.nonzero(coco_mask.decode(instance["mask"]))
        if not len(xs):
            continue
        if len(prompts) % 2 == 0:
            x1, y1, x2, y2 = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
            region = Region("box", size, np.array([[x1, y1], [x2, y2]], np.float32))
        else:
            near = np.argmin((xs - xs.mean()) ** 2 + (ys - ys.mean()) ** 2)
            region = Region("point", size, np.array([[xs[near] + 0.5, ys[near] + 0.5]], np.float32))
        prompts.append((region, instance["mask"]))
    return prompts


class RegionSegmentEvaluator:
    """Mean IoU of the best-scored mask of each region prompt with the instance it was drawn on."""

    def __init__(self) -> None:
        self.ious: list[float] = []

    def process(self, truth: dict[str, Any], answer: Answer) -> None:
        (prediction,) = answer.predictions
        best = prediction.masks.rles[:1] if prediction.masks is not None else []
        self.ious.append(float(coco_mask.iou(best, [truth], [0])[0, 0]) if best else 0.0)

    def evaluate(self) -> dict[str, Any]:
        """``region_segment_iou`` and ``_p50``, the share of IoUs of 0.5 and more; None without any."""
        ious = np.array(self.ious)
        return {
            "region_segment_iou": float(ious.mean()) if len(ious) else None,
            "region_segment_p50": float((ious >= 0.5).mean()) if len(ious) else None,
        }


class SemanticEvaluator:
    """Mean IoU over classes, from the predicted and true pixels of each in all images (PASCAL VOC's segmentation)."""

    def __init__(self, classes: Sequence[str]):
        self.common = dict.fromkeys(classes, 0.0)
        self.either = dict.fromkeys(classes, 0.0)

    def process(self, row: Row, answer: Answer) -> None:
        """`answer`: at most one region per class (see `inference.semantic`)."""
        for prediction in answer.predictions:
            name = prediction.phrase
            true = [i["mask"] for i in row["instances"] if i["phrase"] == name and i["mask"]]
            assert prediction.masks is not None, "semantic segmentation needs masks"
            found = coco_mask.merge(prediction.masks.rles) if len(prediction.masks) else None
            wanted = coco_mask.merge(true) if true else None
            masks = [rle for rle in (found, wanted) if rle is not None]
            if len(masks) == 2:
                self.common[name] += float(coco_mask.area(coco_mask.merge(masks, intersect=True)))
            if masks:
                self.either[name] += float(coco_mask.area(coco_mask.merge(masks)))

    def evaluate(self) -> dict[str, Any]:
        """``semantic_miou`` over the classes with predicted or true pixels; None without any."""
        ious = [self.common[name] / either for name, either in self.either.items() if either]
        return {"semantic_miou": float(np.mean(ious)) if ious else None}
