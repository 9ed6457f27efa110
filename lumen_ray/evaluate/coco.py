"""Average precision of boxes, masks and keypoints as COCO defines it: a thin layer over `pycocotools`.

The evaluator takes shard rows and the engine's answers, not files, and computes COCO's lines from the arrays that
`COCOeval` accumulates, so that classes with different numbers of keypoints share one table.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lumen_ray.answer import Answer
from lumen_ray.keypoints import keypoint_sigmas
from lumen_ray.structures import Boxes, Prediction

Kind = Literal["bbox", "segm", "keypoints"]
COCO_MAX_DETS = 100

# name -> (is a precision, IoU threshold or None for the mean over 0.50:0.95, area range, detections per image)
_LINES: dict[str, tuple[bool, float | None, str, int]] = {
    "AP": (True, None, "all", 100),
    "AP50": (True, 0.5, "all", 100),
    "AP75": (True, 0.75, "all", 100),
    "APs": (True, None, "small", 100),
    "APm": (True, None, "medium", 100),
    "APl": (True, None, "large", 100),
    "AR1": (False, None, "all", 1),
    "AR10": (False, None, "all", 10),
    "AR100": (False, None, "all", 100),
    "ARs": (False, None, "small", 100),
    "ARm": (False, None, "medium", 100),
    "ARl": (False, None, "large", 100),
}
_KEYPOINT_LINES: dict[str, tuple[bool, float | None, str, int]] = {
    "AP": (True, None, "all", 20),
    "AP50": (True, 0.5, "all", 20),
    "AP75": (True, 0.75, "all", 20),
    "APm": (True, None, "medium", 20),
    "APl": (True, None, "large", 20),
    "AR20": (False, None, "all", 20),
    "AR50": (False, 0.5, "all", 20),
    "AR75": (False, 0.75, "all", 20),
    "ARm": (False, None, "medium", 20),
    "ARl": (False, None, "large", 20),
}


class CocoEvaluator:
    """COCO's AP and AR lines over `classes`; `reset` / `process` / `evaluate`.

    kind: ``bbox``, ``segm`` or ``keypoints``.
    skeletons: class -> keypoint names; ``keypoints`` scores exactly these classes.
    sigmas: class -> one value per keypoint, instead of `keypoint_sigmas`.
    """

    def __init__(
        self,
        kind: Kind,
        classes: Sequence[str],
        *,
        skeletons: Mapping[str, Sequence[str]] | None = None,
        sigmas: Mapping[str, Sequence[float]] | None = None,
    ):
        self.kind = kind
        self.skeletons = dict(skeletons or {})
        self.classes = [c for c in classes if kind != "keypoints" or c in self.skeletons]
        self.sigmas = {c: keypoint_sigmas(names) for c, names in self.skeletons.items()}
        self.sigmas.update({c: tuple(values) for c, values in (sigmas or {}).items()})
        self._ids = {name: i + 1 for i, name in enumerate(self.classes)}
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self._images: list[dict[str, Any]] = []
        self._truth: list[dict[str, Any]] = []
        self._found: list[dict[str, Any]] = []

    def process(self, rows: Sequence[dict[str, Any]], answers: Sequence[Answer]) -> None:
        """Adds images: shard rows and, for each, the answer to a request for (some of) `classes`.

        Classes missing from a row's ``classes`` are not annotated exhaustively there; neither its instances nor its
        predictions of them are scored.
        """
        for row, answer in zip(rows, answers, strict=True):
            image = len(self._images) + 1
            self._images.append({"id": image, "height": row["height"], "width": row["width"]})
            annotated = set(row["classes"]) & set(self._ids)
            for instance in row["instances"]:
                if instance["phrase"] in annotated:
                    self._truth.append(self._annotation(instance, row, image, len(self._truth) + 1))
            for prediction in answer.predictions:
                if prediction.phrase in annotated:
                    self._found.extend(self._results(prediction, image))

    def evaluate(self) -> dict[str, Any]:
        """``{"AP": .., "AP50": .., ...}`` in 0..1, ``max_dets``, and ``per_class``: class -> AP50.

        Values without annotations are None. COCO counts the 100 best detections of a class in an image; where an image
        has more objects of a class, ``max_dets`` is raised to their number, or they could not all be found.
        """
        lines = _KEYPOINT_LINES if self.kind == "keypoints" else _LINES
        crowds = Counter((a["image_id"], a["category_id"]) for a in self._truth)
        dets = max([COCO_MAX_DETS, *crowds.values()])
        lines = {k: (*line[:3], dets if line[3] == COCO_MAX_DETS else line[3]) for k, line in lines.items()}
        groups = self._groups()
        evaluations = [self._accumulate(group, lines) for group in groups]
        if not evaluations:
            return {**dict.fromkeys(lines), "max_dets": None, "per_class": {}}
        precision = np.concatenate([e.eval["precision"] for e in evaluations], axis=2)  # [T, R, classes, areas, dets]
        recall = np.concatenate([e.eval["recall"] for e in evaluations], axis=1)  # [T, classes, areas, dets]
        params = evaluations[0].params
        values: dict[str, Any] = {name: _line(precision, recall, params, line) for name, line in lines.items()}
        values["max_dets"] = max(line[3] for line in lines.values())
        names = [name for group in groups for name in group]
        values["per_class"] = {
            name: _line(precision[:, :, k : k + 1], recall[:, k : k + 1], params, lines["AP50"])
            for k, name in enumerate(names)
        }
        return values

    def _groups(self) -> list[list[str]]:
        """Classes that can share one `COCOeval`: all, or those with the same sigmas."""
        if self.kind != "keypoints":
            return [self.classes] if self.classes else []
        groups: dict[tuple[float, ...], list[str]] = {}
        for name in self.classes:
            groups.setdefault(self.sigmas[name], []).append(name)
        return list(groups.values())

    def _annotation(self, instance: dict[str, Any], row: dict[str, Any], image: int, index: int) -> dict[str, Any]:
        size = (row["height"], row["width"])
        boxes = Boxes(np.asarray([instance["box"]]), size)
        area = instance["area"] if instance["area"] is not None else float(boxes.area[0])
        item = {
            "id": index,
            "image_id": image,
            "category_id": self._ids[instance["phrase"]],
            "bbox": boxes.to_xywh()[0].tolist(),
            "area": float(area),
            "iscrowd": int(bool(instance["crowd"])),
        }
        if self.kind == "segm":
            item["segmentation"] = instance["mask"]
            if instance["mask"] is None:  # unknown outline: neither a hit nor a miss, which is what crowd means
                item["segmentation"] = coco_mask.frPyObjects(np.array([item["bbox"]]), *size)[0]
                item["iscrowd"] = 1
        if self.kind == "keypoints":
            count = len(self.skeletons[instance["phrase"]])
            flat = np.asarray(instance["keypoints"] if instance["keypoints"] is not None else [0] * 3 * count)
            item["keypoints"] = flat.astype(float).tolist()
            item["num_keypoints"] = int((flat[2::3] > 0).sum())  # 0 makes COCO ignore the object
        return item

    def _results(self, prediction: Prediction, image: int) -> list[dict[str, Any]]:
        common = {"image_id": image, "category_id": self._ids[prediction.phrase]}
        items: list[dict[str, Any]] = [{**common, "score": float(score)} for score in prediction.scores]
        if self.kind == "bbox":
            for item, box in zip(items, prediction.boxes.to_xywh().tolist(), strict=True):
                item["bbox"] = box
        elif self.kind == "segm":
            if prediction.masks is None:
                if items:
                    raise ValueError(f"mask AP needs predictions with masks; '{prediction.phrase}' has none")
                return []
            for item, rle in zip(items, prediction.masks.rles, strict=True):
                item["segmentation"] = rle
        else:
            if prediction.keypoints is None:
                if items:
                    raise ValueError(f"keypoint AP needs predictions with keypoints; '{prediction.phrase}' has none")
                return []
            for item, xyv in zip(items, prediction.keypoints.xyv, strict=True):
                item["keypoints"] = xyv.astype(float).reshape(-1).tolist()
        return items

    def _accumulate(self, classes: Sequence[str], lines: Mapping[str, tuple]) -> COCOeval:
        """One accumulated `COCOeval` over `classes`, without its prints."""
        ids = {self._ids[name] for name in classes}
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": self._images,
            "annotations": [dict(a) for a in self._truth if a["category_id"] in ids],
            "categories": [{"id": self._ids[name], "name": name} for name in classes],
        }
        results = [dict(r) for r in self._found if r["category_id"] in ids]
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
            if results:
                found = truth.loadRes(results)
            else:  # loadRes takes the kind from the first result
                found = COCO()
                found.dataset = {**truth.dataset, "annotations": []}
                found.createIndex()
            evaluation = COCOeval(truth, found, self.kind)
            evaluation.params.maxDets = sorted({line[3] for line in lines.values()})
            if self.kind == "keypoints":
                evaluation.params.kpt_oks_sigmas = np.asarray(self.sigmas[classes[0]])
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation


def _line(precision: np.ndarray, recall: np.ndarray, params: Any, line: tuple) -> float | None:
    """One COCO line: the mean over IoU thresholds, recalls and classes that have annotations; None without any."""
    is_precision, threshold, area, detections = line
    values = precision if is_precision else recall
    values = values[..., params.areaRngLbl.index(area), params.maxDets.index(detections)]
    if threshold is not None:
        values = values[np.isclose(params.iouThrs, threshold)]
    values = values[values > -1]
    return float(values.mean()) if values.size else None
