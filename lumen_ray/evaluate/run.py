"""`evaluate` = label a split and score it: asks the engine for everything that the rows of a shard folder annotate.

All requests about an image go into one engine call. The answers are kept in ``predictions.parquet`` (the label table's
schema) beside the report, so that a score can be traced to its images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lumen_ray.answer import Answer
from lumen_ray.data.files import write_atomically
from lumen_ray.data.images import decode
from lumen_ray.data.output_folder import OutputFolder
from lumen_ray.data.shards.shards import read_manifest, read_row_group
from lumen_ray.data.urls import Location
from lumen_ray.errors import UserError, suggest
from lumen_ray.evaluate.calibration import draw_reliability
from lumen_ray.evaluate.grounding import DECISION_THRESHOLD
from lumen_ray.evaluate.pictures import detector_of
from lumen_ray.evaluate.report import write_report
from lumen_ray.evaluate.scored import Row, ScoredRequest
from lumen_ray.evaluate.scorer import SplitScorer
from lumen_ray.evaluate.task_choice import choose_tasks
from lumen_ray.exemplar_file import load_exemplars
from lumen_ray.exemplars import ClassByExample
from lumen_ray.inference.protocol import EngineProtocol
from lumen_ray.inference.records import LABEL_SCHEMA, answer_records
from lumen_ray.tasks import CLASS_TASKS, TASKS

#: AP needs the low-scored predictions too; decisions (absence, counts, F1) use their own threshold.
SCORE_THRESHOLD = 0.01
#: Free chat only needs its first token; this many leave room for a word before it.
ROUTING_TOKENS = 8
MAX_PER_PHRASE = 500
#: AP counts this many instances of an image over all classes (LVIS: 300); those of 1,200 classes would fill the memory.
MAX_PER_IMAGE = 500
_AP_TASKS = ("detect", "segment", "pose")


@dataclass(frozen=True)
class Limits:
    """The first images of a split that are scored at all (None: all), asked in free chat, and have pictures made."""

    limit: int | None
    chat_limit: int
    picture_limit: int


@dataclass
class _Batch:
    """The readable rows of a batch with their images, uint8 [H, W, 3], and per row the requests of each engine call."""

    rows: list[Row] = field(default_factory=list)
    images: list[np.ndarray] = field(default_factory=list)
    perception: list[list[ScoredRequest]] = field(default_factory=list)
    decisions: list[list[ScoredRequest]] = field(default_factory=list)
    chats: list[list[ScoredRequest]] = field(default_factory=list)
    blind_chats: list[list[ScoredRequest]] = field(default_factory=list)  # of text alone
    generated: list[list[ScoredRequest]] = field(default_factory=list)
    edits: list[list[ScoredRequest]] = field(default_factory=list)


def evaluate(
    engine: EngineProtocol,
    shards_dir: str | Path,
    output_dir: Location,
    *,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat_limit: int = 100,
    picture_limit: int = 32,
    exemplars: Sequence[ClassByExample] = (),
    absent_classes: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Scores `engine` on the shard folder `shards_dir`.

    Writes ``report.json`` and ``predictions.parquet``, with task detect or segment ``reliability.png``, and with tasks
    that make pictures ``generated.png`` and ``edited.png``.

    tasks: by default all that the model serves and the split is annotated for; ``chat`` stands for routing accuracy;
    ``region_segment`` and ``semantic`` (scored on masks) and ``generate`` (on captions) must be named.
    limit: images at most. chat_limit: images whose instructions are also asked as free chat (slow: text is sampled).
    picture_limit: images for which a picture is generated from their caption or edited (slower still).
    exemplars: classes of the split that detect, segment and count ask for by example, on images of their own.
    absent_classes: names of things that no image shows, which detect asks for as well, without the split's classes.
    progress: called with (images done, images in all) after each batch.
    Raises `UserError` for tasks that the split is not annotated for or that the model has no decoder for, numbers that
    make no sense, exemplars of a class that the split does not have, and an output that cannot be written.

    Returns the report as a plain dict: ``metrics`` (metric -> value or None where the split has no annotations),
    ``tables``, ``settings``, counts and timing; ``images == scored + skipped``, with the reason of each skipped image
    in ``errors``.
    """
    limits = Limits(limit, chat_limit, picture_limit)
    _check(batch_size, limits)
    output = OutputFolder(output_dir)
    manifest = read_manifest(shards_dir)
    scorer = _scorer(manifest, tasks, engine, load_exemplars(exemplars), absent_classes)
    output.check()  # before the work whose results it gets
    total = min(manifest["rows"], limit) if limit is not None else manifest["rows"]
    started = time.monotonic()
    errors: list[dict[str, str]] = []
    done = 0

    def write_predictions(path: Path) -> None:
        nonlocal done
        with pq.ParquetWriter(path, LABEL_SCHEMA, compression="zstd") as writer:
            for rows in _batches(shards_dir, manifest, total, batch_size):
                batch = _requests(scorer, rows, errors, done, limits)
                records = _score_batch(engine, batch)
                writer.write_table(pa.Table.from_pylist(records, schema=LABEL_SCHEMA))
                done += len(rows)
                if progress is not None:
                    progress(done, total)

    with output:
        write_atomically(output.folder / "predictions.parquet", write_predictions)
        metrics, tables = scorer.evaluate()
        metrics |= scorer.pictures.evaluate(scorer.tasks, detector_of(engine, scorer.classes))
        scorer.pictures.save(output.folder)
        if diagrams := scorer.reliability:
            draw_reliability(diagrams, output.folder / "reliability.png")
        seconds = time.monotonic() - started
        report = {
            "split": str(shards_dir),
            "model": {"preset": engine.preset, "version": engine.version},
            "tasks": [name for name in TASKS if name in scorer.tasks],
            "settings": _settings(engine, batch_size, limits, scorer),
            **_counts(done, errors, seconds),
            "notes": _notes(scorer),
            "metrics": metrics,
            "tables": tables,
        }
        write_report(report, output.folder / "report.json")
    return report


def collect_instances(
    engine: EngineProtocol,
    shards_dir: str | Path,
    tasks: Sequence[str] | None,
    possible: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The instances that a model finds on a split, by task: see `CalibrationEvaluator.instances`.

    tasks: by default all of `possible` that the model serves and the split is annotated for. Images that cannot be read
    are left out. Raises `UserError` as `evaluate`, and if no task is left.
    """
    limits = Limits(limit, 0, 0)
    _check(batch_size, limits)
    manifest = read_manifest(shards_dir)
    chosen = tasks or [task for task in choose_tasks(manifest, None, engine)[0] if task in possible]
    if not chosen:
        raise UserError(f"the split is annotated for none of {', '.join(possible)}", "no_tasks")
    scorer = _scorer(manifest, chosen, engine)
    total = min(manifest["rows"], limit) if limit is not None else manifest["rows"]
    done = 0
    for rows in _batches(shards_dir, manifest, total, batch_size):
        _score_batch(engine, _requests(scorer, rows, [], done, limits))
        done += len(rows)
        if progress is not None:
            progress(done, total)
    return {task: scorer.calibration[task].instances for task in chosen}


def _check(batch_size: int, limits: Limits) -> None:
    for name, value in {"batch_size": batch_size, **vars(limits)}.items():
        least = 0 if name in ("chat_limit", "picture_limit") else 1
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; give {least} or more", "invalid_setting")


def _settings(engine: EngineProtocol, batch_size: int, limits: Limits, scorer: SplitScorer) -> dict[str, Any]:
    """The ``settings`` of the report; choices that are not the default are added."""
    settings = {
        "score_threshold": SCORE_THRESHOLD,
        "max_per_phrase": MAX_PER_PHRASE,
        "max_per_image": MAX_PER_IMAGE,
        **vars(limits),
        "batch_size": batch_size,
    }
    if engine.chosen_decoders:
        settings["decoders"] = engine.chosen_decoders
    if engine.dtype != "float32":
        settings["dtype"] = engine.dtype
    if scorer.exemplars:
        settings["exemplars"] = list(scorer.exemplars)
    if scorer.absent.names:
        settings["absent_classes"] = len(scorer.absent.names)
    return settings


def _counts(images: int, errors: list[dict[str, str]], seconds: float) -> dict[str, Any]:
    """The counts and timing of the report."""
    return {
        "images": images,
        "scored": images - len(errors),
        "skipped": len(errors),
        "errors": errors,
        "seconds": round(seconds, 2),
        "images_per_second": round(images / max(seconds, 1e-9), 2),
    }


def _notes(scorer: SplitScorer) -> list[str]:
    """Sentences about what is not scored, and about names of absent classes."""
    notes = [scorer.absent.note] if scorer.absent.names else []
    if scorer.about_several:
        number = scorer.about_several
        notes.append(f"{number} questions and captions about several images are not scored, only those about one")
    return notes


def _scorer(
    manifest: dict[str, Any],
    named: Sequence[str] | None,
    engine: EngineProtocol,
    exemplars: Sequence[ClassByExample] = (),
    absent: Sequence[str] = (),
) -> SplitScorer:
    tasks, spoken = choose_tasks(manifest, named, engine)
    categories = manifest["categories"]
    classes = [c["name"] for c in categories]
    skeletons = {c["name"]: c["keypoints"] for c in categories if c.get("keypoints")}
    _check_exemplars(exemplars, classes, tasks)
    if absent and "detect" not in tasks:
        raise UserError("names of absent classes are asked for by task detect; add it, or leave them out", "no_tasks")
    scorer = SplitScorer(
        classes, skeletons, tasks, spoken, exemplars, [name.strip() for name in absent if name.strip()]
    )
    if absent and not scorer.absent.names:
        raise UserError(
            "all names of absent classes are classes of the split; give names of things that none of its images shows",
            "empty_classes",
        )
    return scorer


def _check_exemplars(exemplars: Sequence[ClassByExample], classes: Sequence[str], tasks: Sequence[str]) -> None:
    """Raises `UserError` for exemplars of another class than the split's, or that no task asks for."""
    for name in (shown.name for shown in exemplars):
        if name not in classes:
            raise UserError(
                f"class '{name}' is given by example, but the split has no such class;{suggest(name, classes)} its "
                f"classes: {', '.join([*classes[:20], *(['...'] if len(classes) > 20 else [])]) or 'none'}",
                "unknown_class",
            )
    if exemplars and not set(CLASS_TASKS) & set(tasks):
        raise UserError(
            f"classes are given by example, which only {', '.join(CLASS_TASKS)} ask for; name one of them in the "
            "tasks, or leave the examples out",
            "unused_exemplars",
        )


def _batches(folder: str | Path, manifest: dict[str, Any], total: int, batch_size: int) -> Iterator[list[Row]]:
    """The first `total` rows, in lists of `batch_size`."""
    rows = (
        row
        for file in manifest["files"]
        for group in range(len(file["row_groups"]))
        for row in read_row_group(folder, file["path"], group)
    )
    batch: list[Row] = []
    for _, row in zip(range(total), rows, strict=False):
        batch.append(row)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _requests(
    scorer: SplitScorer, rows: Sequence[Row], errors: list[dict[str, str]], first: int, limits: Limits
) -> _Batch:
    """The images and requests of `rows`, the first of which is number `first` of the split.

    Rows whose image cannot be read or whose texts are invalid go to `errors`.
    """
    batch = _Batch()
    for number, row in enumerate(rows, start=first):
        try:
            if row["image"] is None:
                raise UserError("the row has no image", "no_image")
            image = decode(row["image"])
            perception, decisions = scorer.requests(row), scorer.decision_requests(row)
            chats, blind = scorer.chat_requests(row, number) if number < limits.chat_limit else ([], [])
            generated, edits = scorer.picture_requests(row, number) if number < limits.picture_limit else ([], [])
        except UserError as error:
            errors.append({"image_id": row["image_id"], "reason": error.reason, "message": str(error)})
            continue
        batch.rows.append(row)
        batch.images.append(image)
        batch.perception.append(perception)
        batch.decisions.append(decisions)
        batch.chats.append(chats)
        batch.blind_chats.append(blind)
        batch.generated.append(generated)
        batch.edits.append(edits)
    return batch


def _score_batch(engine: EngineProtocol, batch: _Batch) -> list[dict[str, Any]]:
    """Runs and scores all requests of a batch; returns the answers about what is annotated as label records."""
    no_images = [None] * len(batch.images)
    answers = _run(
        engine,
        batch.images,
        batch.perception,
        most=MAX_PER_IMAGE,
        score_threshold=SCORE_THRESHOLD,
        max_per_phrase=MAX_PER_PHRASE,
    )
    _run(engine, batch.images, batch.decisions, score_threshold=DECISION_THRESHOLD, max_per_phrase=MAX_PER_PHRASE)
    # of free chat only the route is scored, so no decoder has to run
    _run(engine, batch.images, batch.chats, max_new_tokens=ROUTING_TOKENS, route_only=True)
    _run(engine, no_images, batch.blind_chats, max_new_tokens=ROUTING_TOKENS, route_only=True)
    _run(engine, batch.images, batch.edits)
    _run(engine, no_images, batch.generated)
    return [
        record
        for row, scored, found in zip(batch.rows, batch.perception, answers, strict=True)
        for item, answer in zip(scored, found, strict=True)
        for record in answer_records(row["image_id"], row["source"], item.request, answer)
    ]


def _run(
    engine: EngineProtocol,
    images: Sequence[np.ndarray | None],
    requests: Sequence[Sequence[ScoredRequest]],
    most: int | None = None,
    **settings: Any,
) -> list[list[Answer]]:
    """Answers per image, each passed to its score; images without a request are not sent. `most`: instances of an
    answer that AP counts."""
    answers: list[list[Answer]] = [[] for _ in images]
    busy = [i for i, row in enumerate(requests) if row]
    if not busy:
        return answers
    rows = [[item.request for item in requests[i]] for i in busy]
    for i, found in zip(busy, engine.run([images[i] for i in busy], rows, **settings), strict=True):
        for item, answer in zip(requests[i], found, strict=True):
            answers[i].append(answer.best(most) if most and item.request.task in _AP_TASKS else answer)
            item.score(answers[i][-1])
    return answers
