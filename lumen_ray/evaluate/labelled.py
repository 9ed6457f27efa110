"""Scores a folder of `lumen-ray label` against shards that the same images are annotated in: box AP and recall, and how
well each number of an instance tells right ones from wrong ones."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.markup import escape
from scipy.stats import mannwhitneyu

from lumen_ray.answer import Answer
from lumen_ray.console import say
from lumen_ray.data.shards.shards import read_manifest, read_rows
from lumen_ray.errors import UserError
from lumen_ray.evaluate.coco import CocoEvaluator
from lumen_ray.evaluate.concepts import overlaps, true_instances
from lumen_ray.evaluate.grounding import matched
from lumen_ray.evaluate.scored import Row
from lumen_ray.inference.records import MARKS, records_to_answers
from lumen_ray.tasks import get_task

#: COCO's values that are printed
_SHOWN = ("AP", "AP50")
_COLUMNS = ("image_id", "height", "width", "classes", "instances")


def score(labels: str | Path, shards: str | Path, task: str = "detect") -> dict[str, Any]:
    """The boxes of `task` in a labelled folder, scored on the rows of the same image ids; masks and keypoints are not.

    ``images``; COCO's ``AP`` and ``AP50`` (None without annotations); ``objects`` annotated; ``instances`` found, of
    which ``right`` are matched to an object of their class at IoU 0.5 that no better scored one is matched to;
    ``recall``, their share of the objects; and by number (``score`` and the `MARKS` that the labels have) ``auc``: the
    probability that it is higher for a right instance than for a wrong one. Instances of classes that are not annotated
    in their image are wrong, and not in COCO's values. Raises `UserError` for a folder without labels of the task, and
    one with none of the shards' images.
    """
    get_task(task)
    truth = {row["image_id"]: row for row in read_rows(str(shards), _COLUMNS)}
    classes = [category["name"] for category in read_manifest(str(shards))["categories"]]
    evaluator = CocoEvaluator("bbox", classes)
    hits: list[np.ndarray] = []
    numbers: dict[str, list[np.ndarray]] = {name: [] for name in ("score", *MARKS)}
    images = objects = 0
    for image_id, answer in _answers(labels, task):
        if (row := truth.get(image_id)) is None:
            continue
        images += 1
        objects += len(row["instances"])
        evaluator.process([row], [answer])
        for p in answer.predictions:
            wanted = true_instances(row, p.phrase, "bbox")
            hits.append(matched(p.scores, overlaps(p, wanted or [], "bbox")))
            for name, values in numbers.items():
                of_name = p.scores if name == "score" else p.marks.get(name)
                values.append(np.full(len(p), np.nan) if of_name is None else of_name)
    if not images:
        raise UserError(
            f"'{labels}' holds no {task} labels of the images of '{shards}'; give the shards that were labelled, and "
            "one of the job's tasks",
            "no_labels",
        )
    right = np.concatenate([np.zeros(0, bool), *hits])
    found = evaluator.evaluate()
    return {
        "images": images,
        **{name: found[name] for name in _SHOWN},
        "objects": objects,
        "instances": len(right),
        "right": int(right.sum()),
        "recall": float(right.sum()) / objects if objects else None,
        "auc": _aucs(right, {name: np.concatenate([np.zeros(0), *values]) for name, values in numbers.items()}),
    }


def _aucs(right: np.ndarray, numbers: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The area under the ROC curve of each number that is known, where there are right and wrong instances."""
    found = {}
    for name, values in numbers.items():
        known = ~np.isnan(values)
        yes, no = values[known & right], values[known & ~right]
        if len(yes) and len(no):
            found[name] = float(mannwhitneyu(yes, no).statistic) / (len(yes) * len(no))
    return found


def _answers(labels: str | Path, task: str) -> Iterator[tuple[str, Answer]]:
    """(image id, answer) of every labelled image, one file in memory."""
    parts = sorted(Path(labels, "labels").glob("*.parquet"))
    if not parts:
        raise UserError(f"'{labels}' holds no labels; give an output folder of `lumen-ray label`", "not_labelled")
    for part in parts:
        rows: list[Row] = pq.read_table(part, filters=[("task", "=", task)]).to_pylist()
        for image_id, records in groupby(rows, key=lambda record: record["image_id"]):
            for answer in records_to_answers(list(records)):
                yield image_id, answer


def build_parser() -> argparse.ArgumentParser:
    """The options of `jobs/score.py`."""
    parser = argparse.ArgumentParser(prog="score.py", description=__doc__)
    parser.add_argument("labels", help="output folder of 'lumen-ray label'")
    parser.add_argument("--shards", required=True, help="folder of shards in which the images are annotated")
    parser.add_argument("--task", default="detect", help="task whose boxes are scored (default: detect)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the values of `score` as JSON; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        values = score(args.labels, args.shards, args.task)
    except UserError as error:
        say(escape(f"error: {error}"))
        return 2
    sys.stdout.write(json.dumps(values, indent=1) + "\n")
    return 0
