"""Labels a corpus: images in, `LABEL_SCHEMA` Parquet out, one trunk pass per image for all its tasks.

    fragments -> read and decode (CPU tasks) -> model actors -> this process: collects each fragment, publishes it

Decoded pixels travel as raw bytes; an image's labels are a few kilobytes, so one writer suffices and the ledger needs
no lock. `workers.py` holds the code that runs on the cluster.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lumen_ray.data import files
from lumen_ray.data.files import write_atomically
from lumen_ray.data.pictures import left_out_note
from lumen_ray.errors import UserError
from lumen_ray.exemplar_file import load_exemplars
from lumen_ray.exemplars import ClassByExample, no_exemplars
from lumen_ray.inference.device import find_device
from lumen_ray.inference.protocol import EngineProtocol
from lumen_ray.label.exporters.registry import DEFAULT_EXPORTS, check_formats, choose_tasks
from lumen_ray.label.inputs import find_inputs
from lumen_ray.label.ledger import Fragment, Ledger
from lumen_ray.label.requests import build_requests
from lumen_ray.label.workers import WorkerSettings, fingerprint, label_in_process, label_on_ray
from lumen_ray.structures import check_dtype

#: A job stops after this many failures of the model without a success: the model is at fault, not the images.
MODEL_FAILURES = 8

Progress = Callable[["Status"], None]


@dataclass
class Status:
    """The progress of a job. `finished_before`: images done in earlier runs."""

    total: int
    done: int = 0
    errors: int = 0
    finished_before: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def rate(self) -> float:
        """Images per second of this run."""
        return (self.done - self.finished_before) / max(time.monotonic() - self.started, 1e-9)


def label(
    model: str | Path | Callable[[], EngineProtocol],
    input: str | Path,
    output: str | Path,
    *,
    tasks: Sequence[str],
    classes: Sequence[str] | None = None,
    prompts: Mapping[str, Sequence[str]] | None = None,
    keypoints: Sequence[str] | None = None,
    exemplars: Sequence[ClassByExample] = (),
    decoders: Mapping[str, str] | None = None,
    num_actors: int = 1,
    batch_size: int = 8,
    score_threshold: float = 0.3,
    max_per_phrase: int = 300,
    max_new_tokens: int = 48,
    device: str | None = None,
    dtype: str = "float32",
    fragment_size: int = 32,
    exports: Sequence[str] = DEFAULT_EXPORTS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Labels the images of `input` (folder, glob or shard folder) into the folder `output`; returns a summary.

    model: model folder, or a function that returns an engine (called in each actor).
    prompts: task -> texts for the tasks that need one (see `label.requests`).
    exemplars: classes given by example, on images of their own (see `label.requests`).
    decoders: task -> decoder, overriding the model folder's choice.
    num_actors: model actors on Ray; 0 labels in this process, without Ray.
    device: 'cpu' or 'cuda', in this process also 'cuda:N'; None: a GPU per actor if the cluster has any.
    dtype: 'float32' or 'bfloat16', of the model's weights and arithmetic.
    exports: formats to export the labels in, by their names in `exporters.registry`; none: only the tables.
    progress: called with a `Status` after every image.

    Writes ``labels/*.parquet``, ``errors.parquet``, the `exports` and ``summary.json``. Run again after a stop, it
    continues where it stopped. In the summary, ``images == labelled + errors``; on Ray, ``log`` names the file with
    Ray's log lines. Raises `UserError` for invalid requests, a decoder that cannot serve its task, a missing device, an
    input without images, or an output folder that is a URL or holds labels made with other settings; and, once the
    errors are written, if no image at all could be labelled.
    """
    _check(num_actors, batch_size, score_threshold, fragment_size)
    exports = check_formats(exports) if exports else []
    for name in exports:
        choose_tasks(name, list(dict.fromkeys(tasks)))
    device = _check_device(device, num_actors)
    output = files.local_folder(output)
    exemplars = load_exemplars(exemplars)
    requests = build_requests(tasks, classes, prompts, keypoints, exemplars)
    chosen = _chosen_decoders(model, decoders or {})
    _check_exemplars(model, exemplars)
    worker = WorkerSettings(
        model, tuple(requests), device, batch_size, num_actors, score_threshold, max_per_phrase, max_new_tokens, chosen,
        check_dtype(dtype),
    )  # fmt: skip
    ledger = Ledger(output)
    inputs = find_inputs(input, exclude=output)
    ledger.open(_job_settings(worker, input, tasks, classes, prompts, keypoints) | _exemplar_settings(exemplars))
    fragments = ledger.plan(inputs.items, fragment_size)
    before = sum(entry["images"] for entry in ledger.entries().values())
    status = Status(before + sum(len(f.items) for f in fragments), done=before, finished_before=before)
    if fragments:
        results = (label_on_ray if num_actors else label_in_process)(fragments, worker)
        _collect(results, fragments, ledger, status, progress)
    summary = _finish(ledger, status, exports, inputs.left_out)
    if fragments and num_actors:
        from lumen_ray.ray_log import log_file

        summary["log"] = str(log_file())
    return summary


def _job_settings(
    worker: WorkerSettings,
    input: str | Path,
    tasks: Sequence[str],
    classes: Sequence[str] | None,
    prompts: Mapping[str, Sequence[str]] | None,
    keypoints: Sequence[str] | None,
) -> dict[str, Any]:
    """The settings that labels depend on, as ``job.json`` keeps them (JSON types)."""
    return {
        "input": str(input),
        "model": fingerprint(worker.model),
        "tasks": list(dict.fromkeys(tasks)),
        "classes": list(classes or ()),
        "prompts": {name: list(texts) for name, texts in (prompts or {}).items()},
        "keypoints": list(keypoints or ()),
        "decoders": dict(worker.decoders) or None,  # null, as in folders older than this setting
        "dtype": None if worker.dtype == "float32" else worker.dtype,  # likewise
        "score_threshold": worker.score_threshold,
        "max_per_phrase": worker.max_per_phrase,
        "max_new_tokens": worker.max_new_tokens,
    }


def _exemplar_settings(exemplars: Sequence[ClassByExample]) -> dict[str, Any]:
    """The part of the job's settings that identifies the examples; empty without any, as in older folders."""
    if not exemplars:
        return {}
    found = [
        {
            "name": shown.name,
            "named": shown.named,
            "examples": [
                {"box": [float(value) for value in e.box], "positive": e.positive, "key": e.key} for e in shown.examples
            ],
        }
        for shown in exemplars
    ]
    return {"exemplars": found}


def _check(num_actors: int, batch_size: int, score_threshold: float, fragment_size: int) -> None:
    for name, value, least in (
        ("num_actors", num_actors, 0),
        ("batch_size", batch_size, 1),
        ("fragment_size", fragment_size, 1),
    ):
        if value < least:
            raise UserError(f"{name} is {value}; give {least} or more", "invalid_setting")
    if not 0 <= score_threshold <= 1:
        raise UserError(f"score_threshold is {score_threshold}; give a value from 0 to 1", "invalid_setting")


def _check_device(device: str | None, num_actors: int) -> str | None:
    """The device of this process; actors get their GPU from Ray, which also checks that there is one."""
    if num_actors == 0:
        return find_device(device)
    if device not in (None, "cpu", "cuda"):
        raise UserError(
            f"device '{device}' cannot be chosen for Ray's actors, which get one GPU each; give 'cpu' or 'cuda', or "
            "num_actors 0",
            "unknown_device",
        )
    return device


def _chosen_decoders(model: str | Path | Callable[[], EngineProtocol], decoders: Mapping[str, str]) -> dict[str, str]:
    """The entries of `decoders` that differ from the model folder's choice, which its fingerprint covers."""
    if not decoders:
        return {}
    if callable(model):
        raise UserError("decoders can be chosen for a model folder only; give one as the model", "invalid_setting")
    from lumen_ray.model.settings import read_settings

    settings = read_settings(model)
    return settings.choose(decoders, str(model)).chosen_over(settings)


def _check_exemplars(model: str | Path | Callable[[], EngineProtocol], exemplars: Sequence[ClassByExample]) -> None:
    """Raises `UserError` for exemplars if the model folder does not take them, before an actor is started."""
    if not exemplars or callable(model):
        return
    from lumen_ray.model.build import read_meta
    from lumen_ray.model.settings import read_settings

    layout = read_settings(model).prompt_layout
    if not read_meta(model).reads_exemplars or layout == "sequential":
        raise no_exemplars(exemplars[0].name, layout)


def _collect(
    results: Iterable[dict[str, Any]],
    fragments: Sequence[Fragment],
    ledger: Ledger,
    status: Status,
    progress: Progress | None,
) -> None:
    """Gathers per-image results into fragments and publishes each as soon as it is complete."""
    by_index = {fragment.index: fragment for fragment in fragments}
    waiting: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)
    succeeded = sum(entry["labelled"] for entry in ledger.entries().values())
    model_failures: list[str] = []
    for result in results:
        if result["reason"] == "unusable_model":
            raise UserError(result["message"], "unusable_model")
        status.done += 1
        status.errors += bool(result["reason"])
        succeeded += not result["reason"]
        if result["reason"] == "model_error":
            model_failures.append(result["message"])
        index = result["fragment"]
        waiting[index][result["index"]] = result
        if not succeeded and len(model_failures) >= MODEL_FAILURES:
            break
        # nothing is published before the model's first success, so that a bad model leaves no errors to clean up
        ready = [i for i, found in waiting.items() if len(found) == len(by_index[i].items)]
        for i in ready if succeeded or not model_failures else ():
            _publish(ledger, by_index[i], waiting.pop(i))
        if progress is not None:
            progress(status)
    if model_failures and not succeeded:
        raise RuntimeError(
            f"the model failed on each of {len(model_failures)} images; the first time: {model_failures[0]}"
        )
    assert not waiting, f"{len(waiting)} fragments came back incomplete"


def _publish(ledger: Ledger, fragment: Fragment, results: dict[int, dict[str, Any]]) -> None:
    records, errors = [], []
    for position, item in enumerate(fragment.items):
        result = results[position]
        if result["reason"]:
            error = {"image_id": item.image_id, "path": item.path}
            errors.append({**error, "reason": result["reason"], "message": result["message"]})
        else:
            records += json.loads(result["records"])
    ledger.publish(fragment, records, errors)


def _finish(ledger: Ledger, status: Status, exports: Sequence[str], left_out: Counter[str]) -> dict[str, Any]:
    """Writes errors, exports and the summary of the whole output folder (all runs)."""
    from lumen_ray.label.exporters.export import export

    entries = ledger.entries()
    errors_path = ledger.write_errors()
    errors = [error for entry in entries.values() for error in entry["errors"]]
    if errors and not any(entry["labelled"] for entry in entries.values()):
        raise UserError(
            f"none of {len(errors)} images could be labelled, the first, '{errors[0]['image_id']}', because "
            f"{errors[0]['message']}; see '{errors_path}', fix the images and give a new output folder",
            "nothing_labelled",
        )
    instances: Counter[str] = Counter()
    for table in ledger.tables():
        boxed = table.filter(table["box"].is_valid())
        instances.update(boxed["task"].to_pylist())
    seconds = time.monotonic() - status.started
    summary: dict[str, Any] = {
        "output": str(ledger.output),
        "images": sum(e["images"] for e in entries.values()),
        "labelled": sum(e["labelled"] for e in entries.values()),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "left_out": dict(left_out),
        "instances": dict(instances),
        "fragments": len(entries),
        "finished_before": status.finished_before,
        "seconds": round(seconds, 2),
        "images_per_second": round((status.done - status.finished_before) / max(seconds, 1e-9), 2),
    }
    assert summary["images"] == summary["labelled"] + summary["errors"] == status.total
    written = export(ledger.output, exports) if exports else {}
    summary["exports"] = {name: found["output"] for name, found in written.items()}
    write_atomically(ledger.output / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=1)))
    return summary


def labelled_line(summary: dict[str, Any], output: str | Path) -> str:
    """The summary of `label` in one line."""
    first = summary["first_error"]
    log = f"; log -> {summary['log']}" if summary.get("log") else ""
    reason = f" (e.g. {first['image_id']}: {first['message']}; see errors.parquet)" if first else ""
    left_out = left_out_note(Counter(summary.get("left_out", {})))
    written = ", ".join(["labels/*.parquet", *(Path(path).name for path in summary.get("exports", {}).values())])
    return (
        f"{summary['images']} images: {summary['labelled']} labelled, {summary['errors']} errors{reason} -> {output} "
        f"({written}){log}{left_out and '; ' + left_out}"
    )
