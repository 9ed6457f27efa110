"""Segmentation from visual prompts, and semantic segmentation, on masks drawn by hand."""

import numpy as np
import pytest

from lumen_ray.answer import Answer
from lumen_ray.data.scenes.render import scene_row
from lumen_ray.evaluate.masks import RegionSegmentEvaluator, SemanticEvaluator, region_prompts
from lumen_ray.inference.semantic import class_regions
from lumen_ray.structures import Boxes, Masks, Prediction
from lumen_ray.trunk.regions import region_mask

SIZE = (10, 20)


def area(y1, y2, x1, x2):
    mask = np.zeros(SIZE, bool)
    mask[y1:y2, x1:x2] = True
    return mask


def prediction(phrase, masks, scores):
    boxes = [[0, 0, 1, 1]] * len(masks)
    return Prediction(phrase, Boxes(boxes, SIZE), scores, Masks.from_arrays(np.array(masks).reshape(-1, *SIZE), SIZE))


def rle(mask):
    return Masks.from_arrays(mask[None]).rles[0]


def test_a_pixel_belongs_to_its_best_scored_instance():
    left, both, nothing = class_regions(
        [
            prediction("left", [area(0, 10, 0, 10), area(0, 2, 0, 20)], [0.9, 0.3]),
            prediction("both", [area(0, 10, 5, 15)], [0.5]),
            prediction("nothing", [], []),
        ]
    )
    wanted = area(0, 10, 0, 10) | area(0, 2, 15, 20)
    assert np.array_equal(left.masks.to_arrays()[0], wanted) and left.boxes.xyxy.tolist() == [[0, 0, 20, 10]]
    assert np.array_equal(both.masks.to_arrays()[0], area(0, 10, 10, 15)) and both.scores[0] == np.float32(0.5)
    assert len(nothing) == 0 and class_regions([]) == []


def test_mean_iou_is_over_pixels_of_all_images():
    row = {"instances": [
        {"phrase": "a", "mask": rle(area(0, 10, 0, 4))}, {"phrase": "a", "mask": rle(area(0, 10, 4, 8))},
        {"phrase": "c", "mask": rle(area(0, 1, 0, 1))},
    ]}  # fmt: skip
    evaluator = SemanticEvaluator(["a", "b", "c", "d"])
    found = [prediction("a", [area(0, 10, 0, 10)], [1]), prediction("b", [area(0, 1, 0, 2)], [1])]
    evaluator.process(row, Answer("semantic", SIZE, [*found, prediction("c", [], []), prediction("d", [], [])]))
    evaluator.process({"instances": []}, Answer("semantic", SIZE, [prediction("a", [], [])]))
    assert evaluator.evaluate()["semantic_miou"] == pytest.approx((80 / 100 + 0 + 0) / 3)
    assert SemanticEvaluator(["a"]).evaluate() == {"semantic_miou": None}


def test_the_best_scored_mask_of_a_region_counts():
    evaluator = RegionSegmentEvaluator()
    truth = rle(area(0, 10, 0, 10))
    found = [area(0, 10, 0, 5), area(0, 10, 0, 10)]
    for best in (prediction("region", found, [0.9, 0.8]), prediction("region", [], [])):
        evaluator.process(truth, Answer("region_segment", SIZE, [best]))
    assert evaluator.evaluate() == {"region_segment_iou": pytest.approx(0.25), "region_segment_p50": 0.5}


def test_prompts_lie_on_the_instances_they_are_for():
    row = scene_row(3, 4, 96)
    prompts = region_prompts(row)
    assert [region.kind for region, _ in prompts] == ["box", "point", "box"][: len(prompts)] and len(prompts) > 1
    for region, truth in prompts:
        inside = Masks([truth], region.size).to_arrays()[0]
        asked = region_mask(region, 96).astype(bool)
        assert (asked & inside).sum() > 0.5 * min(asked.sum(), inside.sum())
    crowd = {**row, "instances": [{**i, "crowd": True} for i in row["instances"]]}
    assert region_prompts(crowd) == []
