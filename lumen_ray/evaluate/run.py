"""`evaluate` = label a split + score it: asks the engine everything that each row of a shard folder is annotated for.

All requests about an image go into one engine call. What the engine answered is kept in ``predictions.parquet``
(the label table's schema) beside the report, so that a score can be traced to its images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lumen_ray.data import files
from lumen_ray.data.files import write_atomically
from lumen_ray.data.images import decode
from lumen_ray.data.shards.shards import read_manifest, read_row_group
from lumen_ray.errors import UserError
from lumen_ray.evaluate.grounding import DECISION_THRESHOLD
from lumen_ray.evaluate.pictures import detector_of
from lumen_ray.evaluate.report import write_report
from lumen_ray.evaluate.scorer import Ask, Row, SplitScorer
from lumen_ray.inference.records import LABEL_SCHEMA, answer_records
from lumen_ray.inference.request import no_decoder
from lumen_ray.structures import Answer
from lumen_ray.tasks import TASKS, get_task

#: AP needs the low-scored predictions too; decisions (absence, counts, F1) use their own threshold.
SCORE_THRESHOLD = 0.01
#: Free chat is only asked for its first token; this many leave room for a word before it.
ROUTING_TOKENS = 8
MAX_PER_PHRASE = 500
#: AP counts this many instances of an image over all classes (LVIS: 300); those of 1,200 classes would fill the memory.
MAX_PER_IMAGE = 500
_AP_TASKS = ("detect", "segment", "pose")


def evaluate(
    engine: Any,
    shards_dir: str | Path,
    output_dir: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat_limit: int = 100,
    picture_limit: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Scores `engine` on the shard folder `shards_dir`; writes ``report.json`` and ``predictions.parquet``, and of
    pictures that were made ``generated.png`` and ``edited.png``.

    tasks: of the registry, by default all that the model serves and the split says it is annotated for; ``chat`` stands
    for routing accuracy; ``region_segment``, ``semantic`` and ``generate`` are scored on masks and captions where they
    are named.
    limit: images at most. chat_limit: images whose instructions are also asked as free chat (slow: text is sampled).
    picture_limit: images of which a picture is made from their caption or edited (slower still).
    progress: called with (images done, images in all) after each batch.
    Raises `UserError` for tasks that the split is not annotated for or that the model has no decoder for, numbers that
    make no sense, and an output folder that is a URL.

    Returns the report as a plain dict: ``metrics`` (metric -> value or None where the split has no annotations),
    ``tables``, ``settings``, counts and timing; ``images == scored + skipped``, the skipped ones with their reason in
    ``errors``.
    """
    limits = {"limit": limit, "chat_limit": chat_limit, "picture_limit": picture_limit}
    _check(batch_size, limits)
    output = files.local_folder(output_dir)
    manifest = read_manifest(shards_dir)
    scorer = _scorer(manifest, tasks, engine)
    total = min(manifest["rows"], limit) if limit is not None else manifest["rows"]
    started = time.monotonic()
    errors: list[dict[str, str]] = []
    done = 0

    def run(path: Path) -> None:
        nonlocal done
        with pq.ParquetWriter(path, LABEL_SCHEMA, compression="zstd") as writer:
            for rows in _batches(shards_dir, manifest, total, batch_size):
                records = _score_batch(engine, scorer, rows, errors, done, limits)
                writer.write_table(pa.Table.from_pylist(records, schema=LABEL_SCHEMA))
                done += len(rows)
                if progress is not None:
                    progress(done, total)

    write_atomically(output / "predictions.parquet", run)
    metrics, tables = scorer.evaluate()
    metrics |= scorer.pictures.evaluate(scorer.tasks, detector_of(engine, scorer.classes))
    scorer.pictures.save(output)
    seconds = time.monotonic() - started
    report = {
        "split": str(shards_dir),
        "model": {"preset": engine.preset, "version": engine.version},
        "tasks": [name for name in TASKS if name in scorer.tasks],
        "settings": {
            "score_threshold": SCORE_THRESHOLD,
            "max_per_phrase": MAX_PER_PHRASE,
            "max_per_image": MAX_PER_IMAGE,
            **limits,
            "batch_size": batch_size,
            **({"decoders": engine.chosen_decoders} if engine.chosen_decoders else {}),
            **({"dtype": engine.dtype} if engine.dtype != "float32" else {}),
        },
        "images": done,
        "scored": done - len(errors),
        "skipped": len(errors),
        "errors": errors,
        "seconds": round(seconds, 2),
        "images_per_second": round(done / max(seconds, 1e-9), 2),
        "metrics": metrics,
        "tables": tables,
    }
    write_report(report, output / "report.json")
    return report


def _check(batch_size: int, limits: dict[str, int | None]) -> None:
    for name, value in {"batch_size": batch_size, **limits}.items():
        least = 0 if name in ("chat_limit", "picture_limit") else 1
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; give {least} or more", "invalid_setting")


def _scorer(manifest: dict[str, Any], tasks: Sequence[str] | None, engine: Any) -> SplitScorer:
    # any annotated task can also be asked in free chat, whether or not the split holds conversations
    annotated = [n for n in TASKS if manifest["tasks"].get(TASKS[n].annotation) and n != "chat"]
    has = f"its tasks: {', '.join(annotated) or 'none'}"
    if tasks is not None and not tasks:
        raise UserError(f"no task given; give some that the split is annotated for, {has}", "empty_tasks")
    for name in tasks or ():
        get_task(name)
    judged = "detect" in engine.serving  # pictures are, by the model's own detector
    # what a split is not annotated for by name is asked where it is named
    by_default = [
        *(n for n in annotated if n in engine.tasks and not TASKS[n].annotated_as and (judged or not _draws(n))),
        "chat",
    ]
    wanted = by_default if tasks is None else list(dict.fromkeys(tasks))
    missing = [name for name in wanted if name not in annotated and name != "chat"]
    if missing or not annotated:
        raise UserError(
            f"the split is not annotated for {', '.join(missing) or 'any task'}; {has}", "nothing_to_evaluate"
        )
    if wanted == ["chat"]:
        raise UserError(
            f"task 'chat' asks for the other tasks in free chat; give some of them too, {has}", "nothing_to_evaluate"
        )
    for name in wanted:
        if not TASKS[name].is_text and name not in engine.serving:
            raise no_decoder(name, engine.tasks)
        if _draws(name) and not judged:
            raise UserError(
                f"task '{name}' is scored by what the model detects in its pictures, but it has no decoder for task "
                "'detect'; leave it out",
                "no_decoder",
            )
    categories = manifest["categories"]
    skeletons = {c["name"]: c["keypoints"] for c in categories if c.get("keypoints")}
    # of pictures no score is wanted that was not asked for, but whether the LLM knows when to draw
    spoken = [name for name in annotated if name in engine.tasks and _draws(name)] if tasks is None else []
    return SplitScorer([c["name"] for c in categories], skeletons, wanted, spoken)


def _draws(task: str) -> bool:
    return TASKS[task].result == "image"


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


def _score_batch(
    engine: Any,
    scorer: SplitScorer,
    rows: Sequence[Row],
    errors: list[dict[str, str]],
    first: int,
    limits: dict[str, int | None],
) -> list[dict[str, Any]]:
    """Asks and scores everything about `rows`; returns the answers as label records.

    Rows whose image cannot be read or whose texts cannot be asked go to `errors`.
    """
    images, asks, decisions, chats, blind_chats, edits, made, readable = [], [], [], [], [], [], [], []
    for number, row in enumerate(rows, start=first):
        try:
            if row["image"] is None:
                raise UserError("the row has no image", "no_image")
            image = decode(row["image"])
            mine, decided = scorer.asks(row), scorer.decision_asks(row)
            free, blind = scorer.chat_asks(row, number) if number < limits["chat_limit"] else ([], [])
            fresh, edited = scorer.picture_asks(row, number) if number < limits["picture_limit"] else ([], [])
        except UserError as error:
            errors.append({"image_id": row["image_id"], "reason": error.reason, "message": str(error)})
            continue
        readable.append(row)
        images.append(image)
        asks.append(mine)
        decisions.append(decided)
        chats.append(free)
        blind_chats.append(blind)
        edits.append(edited)
        made.append(fresh)
    records = []
    answers = _ask(engine, images, asks, score_threshold=SCORE_THRESHOLD, max_per_phrase=MAX_PER_PHRASE)
    for row, mine, found in zip(readable, asks, answers, strict=True):
        for (request, _), answer in zip(mine, found, strict=True):
            records += answer_records(row["image_id"], row["source"], request, answer)
    _ask(engine, images, decisions, score_threshold=DECISION_THRESHOLD, max_per_phrase=MAX_PER_PHRASE)
    # of free chat nothing is wanted of a decoder, only which one would have been called
    nothing = [None] * len(images)
    for pictures, free in ((images, chats), (nothing, blind_chats)):
        _ask(engine, pictures, free, max_new_tokens=ROUTING_TOKENS, route_only=True)
    _ask(engine, images, edits)
    _ask(engine, nothing, made)
    return records


def _ask(
    engine: Any, images: Sequence[np.ndarray | None], asks: Sequence[list[Ask]], **settings: Any
) -> list[list[Answer]]:
    """Runs the requests and hands each answer to its scorer; images without a request are not sent."""
    answers: list[list[Answer]] = [[] for _ in images]
    busy = [i for i, mine in enumerate(asks) if mine]
    if not busy:
        return answers
    requests = [[request for request, _ in asks[i]] for i in busy]
    for i, found in zip(busy, engine.run([images[i] for i in busy], requests, **settings), strict=True):
        for (request, score), answer in zip(asks[i], found, strict=True):
            answers[i].append(answer.best(MAX_PER_IMAGE) if request.task in _AP_TASKS else answer)
            score(answers[i][-1])
    return answers
