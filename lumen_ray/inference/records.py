"""The canonical label table: one row per instance or text answer, with its provenance.

An answer without instances is one row without phrase and box, which records that the image was processed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from lumen_ray.answer import Answer
from lumen_ray.inference.request import Request
from lumen_ray.keypoints import known_edges
from lumen_ray.structures import Boxes, Keypoints, Masks, Prediction

LABEL_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("path", pa.string()),  # of the image file, or of the shard that holds it
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("task", pa.string()),
        ("prompt", pa.string()),  # the question, sentence or expression; null where the task has none
        ("phrase", pa.string()),  # class or phrase of the instance
        ("score", pa.float32()),
        ("box", pa.list_(pa.float32(), 4)),  # xyxy, absolute pixels after EXIF rotation
        ("mask", pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])),  # COCO RLE
        ("keypoints", pa.list_(pa.float32())),  # flat x, y, score
        ("keypoint_names", pa.list_(pa.string())),
        ("text", pa.string()),
        ("provenance", pa.string()),  # json: model, version, preset, settings
        ("presence", pa.float32()),  # probability that the image holds the phrase; null without a presence gate
        ("verified", pa.float32()),  # probability of "yes" when asked about the instance; null if not asked
        ("agreement", pa.float32()),  # IoU with the best instance of a second decoder, 0 without one; null without it
        ("sha256", pa.string()),  # of the image's encoded bytes, hexadecimal
        ("duplicate_of", pa.string()),  # image id of the image with the same bytes that the row was copied from
        ("phash", pa.string()),  # perceptual hash, 64 bits hexadecimal; null in labels made without deduplication
        ("labelled_at", pa.timestamp("us", "UTC")),
    ]
)
#: columns of `Prediction.marks`
MARKS = ("presence", "verified", "agreement")
#: columns that differ between two runs with equal results
TIME_COLUMNS = ("labelled_at",)

ERROR_SCHEMA = pa.schema(
    [("image_id", pa.string()), ("path", pa.string()), ("reason", pa.string()), ("message", pa.string())]
)


def answer_records(
    image_id: str, path: str, request: Request, answer: Answer, provenance: str = ""
) -> list[dict[str, Any]]:
    """The rows of `LABEL_SCHEMA` for one answer (plain JSON types); at least one row."""
    base: dict[str, Any] = dict.fromkeys(LABEL_SCHEMA.names)
    base.update(image_id=image_id, path=path, height=answer.size[0], width=answer.size[1])
    base.update(task=answer.task, prompt=request.text or None, provenance=provenance)
    if answer.text is not None:
        return [{**base, "text": answer.text}]
    records = []
    for p in answer.predictions:
        for i in range(len(p)):
            record = {**base, "phrase": p.phrase, "score": float(p.scores[i]), "box": p.boxes.xyxy[i].tolist()}
            if p.masks is not None:
                record["mask"] = p.masks.rles[i]
            if p.keypoints is not None:
                record["keypoints"] = p.keypoints.xyv[i].reshape(-1).tolist()
                record["keypoint_names"] = list(p.keypoints.names)
            record.update({name: float(values[i]) for name, values in p.marks.items()})
            records.append(record)
    return records or [base]


def records_to_answers(records: Sequence[dict[str, Any]]) -> list[Answer]:
    """The answers that the rows of one image came from, one per (task, prompt), in order of appearance.

    Phrases without instances are not in the rows and so not in the predictions.
    """
    groups: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["task"], record["prompt"]), []).append(record)
    return [_answer(task, rows) for (task, _), rows in groups.items()]


def record_edges(record: dict[str, Any]) -> Sequence[Sequence[int]]:
    """Pairs of 0-based keypoint indices that the record's skeleton joins; empty for unknown skeletons."""
    edges = json.loads(record["provenance"] or "{}").get("edges", {}).get(record["phrase"])
    return edges or known_edges(record["keypoint_names"])


def _answer(task: str, rows: Sequence[dict[str, Any]]) -> Answer:
    size = (rows[0]["height"], rows[0]["width"])
    if rows[0]["text"] is not None:
        return Answer(task, size, text=rows[0]["text"])
    phrases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["box"] is not None:
            phrases.setdefault(row["phrase"], []).append(row)
    return Answer(task, size, [_prediction(phrase, found, size) for phrase, found in phrases.items()])


def _prediction(phrase: str, rows: Sequence[dict[str, Any]], size: tuple[int, int]) -> Prediction:
    prediction = Prediction(
        phrase, Boxes(np.array([r["box"] for r in rows]), size), np.array([r["score"] for r in rows])
    )
    if rows[0]["mask"] is not None:
        prediction.masks = Masks([r["mask"] for r in rows], size)
    if rows[0]["keypoints"] is not None:
        points = np.array([r["keypoints"] for r in rows]).reshape(len(rows), -1, 3)
        prediction.keypoints = Keypoints(points, tuple(rows[0]["keypoint_names"]), size)
    for name in MARKS:
        if None not in (values := [row.get(name) for row in rows]):
            prediction.marks[name] = np.asarray(values, np.float32)
    return prediction
