"""Labels a corpus: images in, `LABEL_SCHEMA` Parquet out, one trunk pass per image for all its tasks.

    listing -> fragments -> model actors: read, decode, answer, publish -> counts in this process

What the actors write is the labels and the ledger (`ledger.py`); this process never holds a label or a list of images.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lumen_ray.data import files, urls
from lumen_ray.data.claim import Claim
from lumen_ray.data.pictures import left_out_note
from lumen_ray.errors import UserError
from lumen_ray.exemplar_file import load_exemplars
from lumen_ray.exemplars import ClassByExample
from lumen_ray.inference.device import find_device
from lumen_ray.inference.protocol import EngineProtocol
from lumen_ray.inference.tiles import Tiles
from lumen_ray.label.asking import SecondLookSettings
from lumen_ray.label.exporters.registry import DEFAULT_EXPORTS, check_formats, choose_tasks
from lumen_ray.label.job_metrics import JobMetrics
from lumen_ray.label.ledger import Ledger
from lumen_ray.label.listing import Listing, check_output
from lumen_ray.label.plan import Plan
from lumen_ray.label.progress import ErrorLimit, Status
from lumen_ray.label.requests import build_requests
from lumen_ray.label.retries import end_round, open_round
from lumen_ray.label.runs import Pool, Work
from lumen_ray.label.settings import (
    check_auto_classes,
    check_exemplars,
    check_numbers,
    check_second_look,
    chosen_decoders,
    exemplar_settings,
    job_settings,
)
from lumen_ray.label.spent import Spent, check_price, cost_text, priced_again
from lumen_ray.label.vocabulary import AUTO, VOCABULARY, write_vocabulary
from lumen_ray.label.workers import Outcome, WorkerSettings
from lumen_ray.structures import check_dtype

#: A job stops after this many failures of the model without a success: the model is at fault, not the images.
MODEL_FAILURES = 8
#: seconds for which the input is listed before the first image is labelled; a longer listing goes on beside it
LIST_AHEAD_S = 2.0
Progress = Callable[[Status], None]


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
    num_actors: int | range | None = 1,
    gpus_per_actor: float = 1,
    batch_size: int = 8,
    score_threshold: float = 0.3,
    max_per_phrase: int = 300,
    max_new_tokens: int = 48,
    device: str | None = None,
    dtype: str = "float32",
    fragment_size: int = 32,
    tiles: Tiles | None = None,
    image_column: str | None = None,
    refresh: bool = False,
    retry_errors: bool = False,
    max_errors: str | int | None = None,
    dedup: bool = False,
    usd_per_hour: float | None = None,
    exports: Sequence[str] | None = None,
    agree_with: str | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Labels the images of `input` (see `label.listing`) into the folder `output`; returns a summary.

    model: model folder, or a function that returns an engine (called in each actor).
    classes: names for the tasks that need some; 'auto': those of each image's caption (see `label.vocabulary`), task
        caption is then added to `tasks`.
    prompts: task -> texts for the tasks that need one (see `label.requests`).
    exemplars: classes given by example, on images of their own (see `label.requests`).
    decoders: task -> decoder, overriding the model folder's choice.
    num_actors: model actors on Ray; a range for a pool that grows and shrinks between its first and last number; None:
        as many as there are GPUs or cores; 0 labels in this process, without Ray.
    gpus_per_actor: the share of a GPU that an actor on Ray reserves, up to 1; several actors may share one.
    device: 'cpu' or 'cuda', in this process also 'cuda:N'; None: a GPU per actor if the cluster has any.
    dtype: 'float32' or 'bfloat16', of the model's weights and arithmetic.
    tiles: how images larger than a tile are divided (see `inference.tiles`); None looks at whole images only.
    image_column: the column of images or of their paths, where the input is a table with an unusual name for it.
    refresh: looks for images that were added to an input that has been listed before.
    retry_errors: asks images that have failed before again, each once; their errors are replaced by what comes of it.
    max_errors: stops the job once more images than this have failed: a number, or a share such as '5%', which counts
        from 100 images on.
    dedup: images with the same bytes are labelled once and get copies of the labels (see `label.duplicates`), and each
        image its perceptual hash. Changes no label, so a job may go on with another choice.
    usd_per_hour: price of the whole cluster for an hour, for the cost of all runs (see `label.spent`); of a finished
        job, the price of all its time.
    exports: formats to export the labels in, by their names in `exporters.registry`; None: `DEFAULT_EXPORTS` for a
        local output, none for one in a bucket.
    agree_with: a decoder of the model that answers too, where it can; instances get their agreement with it.
    verify: asks the LLM about each instance (see `inference.second_look`).
    progress: called with a `Status` after every few images.

    Writes ``labels/*.parquet``, ``errors.parquet``, the `exports`, ``summary.json`` and, with classes 'auto',
    ``vocabulary.csv``. Run again after a stop, it
    continues where it stopped. In the summary, ``images == labelled + errors``; on Ray, ``log`` names the file with
    Ray's log lines. Raises `UserError` for invalid requests, a decoder that cannot serve its task, a missing device, an
    input without images, or an output folder that another job is writing or that holds labels made with other
    settings; when the job stops for `max_errors`, a model that always fails or a store that cannot be reached; and,
    once the errors are written, if no image at all could be labelled.
    """
    tasks = list(dict.fromkeys([*tasks, "caption"] if classes == AUTO else tasks))
    check_output(input, output)
    exports = _exports(exports, output, tasks)
    check_numbers(num_actors, gpus_per_actor, batch_size, score_threshold, fragment_size)
    check_price(usd_per_hour)
    limit = ErrorLimit.parse(max_errors)
    device = check_device(device, num_actors)
    exemplars = load_exemplars(exemplars)
    requests = build_requests(tasks, classes, prompts, keypoints, exemplars)
    chosen = chosen_decoders(model, decoders or {})
    check_exemplars(model, exemplars)
    second = SecondLookSettings(agree_with, verify)
    check_second_look(model, second, tasks, chosen)
    if classes == AUTO:
        check_auto_classes(model, tasks, keypoints)
    ledger = Ledger(output)
    worker = WorkerSettings(
        model, tuple(requests), device, batch_size, score_threshold, max_per_phrase, max_new_tokens, chosen,
        check_dtype(dtype), output=ledger.output, tiles=tiles, second=second,
    )  # fmt: skip
    settings = job_settings(worker, input, tasks, classes, prompts, keypoints, image_column) | exemplar_settings(
        exemplars
    )
    inside = None if urls.is_url(output) else Path(ledger.output)
    listing = Listing(input, inside, image_column)
    listing.check()
    files.make_folder(ledger.output)
    with Claim(ledger.folder) as claim:
        ledger.open(settings)
        plan = ledger.plan(fragment_size)
        done = ledger.done()
        worker = replace(worker, round=open_round(ledger, retry_errors))
        ledger.round = worker.round
        if refresh:
            plan.reopen()
        elif not worker.round and (finished := _finished(ledger, plan, len(done), exports)) is not None:
            limit.check_numbers(finished["errors"], finished["images"])
            return priced_again(ledger, finished, usd_per_hour)
        spent = Spent(ledger.folder, usd_per_hour)
        work = Work(plan, done, None if plan.is_complete else listing, ledger.failed())
        pool = Pool(num_actors, gpus_per_actor, dedup)
        status, log = run_work(work, ledger, worker, pool, limit, claim, spent, progress)
        summary = _finish(ledger, status, exports, plan.left_out)
        end_round(ledger)  # not before: a round that is killed here has nothing left to ask
        spent.save(now=True)
    return summary | log


def run_work(
    work: Work,
    ledger: Ledger,
    worker: WorkerSettings,
    pool: Pool,
    limit: ErrorLimit,
    claim: Claim,
    spent: Spent,
    progress: Progress | None,
    counted: str = "images",
) -> tuple[Status, dict[str, str]]:
    """Does the fragments of `work` that are left; `counted`: see `Status`. Returns the status and, if Ray was
    used, the summary's ``log``. Raises as `label`."""
    work = _list_ahead(work)
    before, plan, again = ledger.totals(), work.plan, sum(work.failed.values())
    done, errors = before["images"] - again, before["errors"] - again
    status = Status(plan.num_images(), done, errors, done, plan.is_complete)
    status.copied, status.spent, status.counted = before["copied"], spent, counted
    status.fragments, status.num_fragments = before["fragments"] - len(work.failed), plan.num_fragments()
    limit.check(status)
    worker, metrics = replace(worker, proven=before["labelled"] > 0), JobMetrics(ledger.output)
    tell = _told(status, claim, plan, metrics, progress)
    if status.done == status.total and status.is_listed:
        tell()  # that the rest, such as exports, is being done
        metrics.close()
        return status, {}
    try:
        run = metrics.counted(pool.run(work, worker))
        _collect(run, ledger, status, limit, tell, proven=worker.proven)
        if not status.is_listed:  # so that the last numbers have their total
            _look_at_plan(status, plan)
            tell()
    finally:
        metrics.close()
        spent.save(now=True)
    if not pool.is_remote:
        return status, {}
    from lumen_ray.ray_log import log_file

    return status, {"log": str(log_file())}


def _list_ahead(work: Work) -> Work:
    """Lists the input for a moment, so that mistakes in it are raised here and most totals are known from the start.

    Returns the work, without the listing if that is now complete.
    """
    if work.listing is None:
        return work
    ends = time.monotonic() + LIST_AHEAD_S
    for _ in work.plan.fragments(work.listing):
        if time.monotonic() > ends:
            return work
    return replace(work, listing=None)


def _told(
    status: Status, claim: Claim, plan: Plan, metrics: JobMetrics, progress: Progress | None
) -> Callable[[], None]:
    """Passes progress on to the caller, the metrics and, for `lumen-ray label status`, the claim."""
    checked = time.monotonic()

    def tell() -> None:
        nonlocal checked
        if claim.is_lost:
            claim.check()
        if not status.is_listed and time.monotonic() > checked + LIST_AHEAD_S:
            checked = time.monotonic()
            _look_at_plan(status, plan)
        claim.state = status.facts()
        metrics.show(status)
        if status.spent is not None:
            status.spent.save()
        if progress is not None:
            progress(status)

    return tell


def _look_at_plan(status: Status, plan: Plan) -> None:
    # the total first: other threads take a job whose listing is complete for done once it has that many images
    is_listed = plan.is_complete
    status.total, status.num_fragments = plan.num_images(), plan.num_fragments()
    status.is_listed = is_listed


def _exports(exports: Sequence[str] | None, output: str | Path, tasks: Sequence[str]) -> Sequence[str]:
    """The exports to write. Raises `UserError` for unknown ones, one that holds none of the tasks, and, in a bucket,
    for any."""
    chosen = check_formats(exports) if exports else []
    if urls.is_url(output):
        if chosen:
            raise UserError(
                f"output '{urls.shown(output)}' is a URL, where {', '.join(chosen)} cannot be written; leave the "
                "exports out and use `lumen-ray label export` afterwards, or give a folder on a file system",
                "invalid_output",
            )
        return ()
    chosen = list(DEFAULT_EXPORTS) if exports is None else chosen
    for name in chosen:
        choose_tasks(name, tasks)
    return chosen


def check_device(device: str | None, num_actors: int | range | None) -> str | None:
    """The device of this process; actors get their GPU from Ray, which also checks that there is one."""
    if num_actors == 0:
        return find_device(device)
    if device not in (None, "cpu", "cuda"):
        raise UserError(
            f"device '{device}' cannot be chosen for Ray's actors, which get one GPU each; give 'cpu' or 'cuda', or "
            "0 actors",
            "unknown_device",
        )
    return device


def _collect(
    outcomes: Iterable[Outcome],
    ledger: Ledger,
    status: Status,
    limit: ErrorLimit,
    tell: Callable[[], None],
    proven: bool,
) -> None:
    """Adds up what the workers have done, and publishes what they withheld once the model has succeeded anywhere."""
    failures, first_failure = 0, ""
    withheld: list[tuple[int, int, list[dict[str, str]]]] = []
    for outcome in outcomes:
        if outcome.fault:
            raise UserError(outcome.fault, "unusable_model")
        status.add(outcome)
        failures += len(outcome.failures)
        first_failure = first_failure or (outcome.failures or [""])[0]
        withheld += outcome.withheld
        proven |= outcome.done > outcome.errors
        if not proven and failures >= MODEL_FAILURES:
            break
        while proven and withheld:
            index, images, errors = withheld.pop()
            ledger.publish(index, images, [], errors)
        tell()
        if outcome.stop is not None:
            message, reason = outcome.stop
            raise UserError(f"{message}; run the same command again to continue", reason)
        limit.check(status)
    if failures and not proven:
        raise UserError(
            f"the model failed on each of {failures} {status.counted}; the first time: {first_failure}; mend the model "
            f"or the {status.counted} and run again",
            "model_failed",
        )


def _finished(ledger: Ledger, plan: Plan, done: int, exports: Sequence[str]) -> dict[str, Any] | None:
    """The summary of a job that has nothing left to do; None for others."""
    path = urls.join(ledger.output, "summary.json")
    if not files.is_file(path) or plan.num_fragments() != done:
        return None
    summary = json.loads(files.read_text(path))
    written = {name for name, path in summary.get("exports", {}).items() if files.exists(path)}
    if summary["fragments"] != done or not set(exports) <= written:
        return None
    return {**summary, "finished_before": summary["images"], "seconds": 0.0, "images_per_second": 0.0}


def _finish(ledger: Ledger, status: Status, exports: Sequence[str], left_out: Counter[str]) -> dict[str, Any]:
    """Writes errors, exports and the summary of the whole output folder (all runs)."""
    from lumen_ray.label.exporters.export import export

    ledger.remove_leftovers()
    totals, errors_path = ledger.write_errors()
    if totals["images"] and not totals["labelled"]:
        end_round(ledger)
        first = totals["first_error"]
        raise UserError(
            f"none of {totals['images']} images could be labelled, the first, '{first['image_id']}', because "
            f"{first['message']}; see '{urls.shown(errors_path)}', fix the images and run again with --retry-errors "
            "(retry_errors=True)",
            "nothing_labelled",
        )
    seconds = time.monotonic() - status.started
    summary: dict[str, Any] = {
        "output": ledger.output,
        **totals,
        "left_out": dict(left_out),
        "finished_before": status.finished_before,
        "seconds": round(seconds, 2),
        "images_per_second": round((status.done - status.finished_before) / max(seconds, 1e-9), 2),
        **status.spent_facts(0),
    }
    del summary["usd_expected"]  # nothing more is
    planned = ledger.plan().num_images()
    assert totals["images"] == totals["labelled"] + totals["errors"] == planned, f"{totals} of {planned} images"
    written = export(ledger.output, exports) if exports else {}
    summary["exports"] = {name: found["output"] for name, found in written.items()}
    if (ledger.settings() or {}).get("classes") == AUTO:
        summary["vocabulary"] = write_vocabulary(ledger)
    files.write_bytes(urls.join(ledger.output, "summary.json"), (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def labelled_line(summary: dict[str, Any], output: str | Path) -> str:
    """The summary of `label` in one line."""
    first = summary["first_error"]
    log = f"; log -> {summary['log']}" if summary.get("log") else ""
    reason = f" (e.g. {first['image_id']}: {first['message']}; see errors.parquet)" if first else ""
    again = "; once the images are mended, --retry-errors asks those that failed again" if first else ""
    before = "nothing was left to do: " if summary.get("finished_before") == summary["images"] else ""
    left_out = left_out_note(Counter(summary.get("left_out", {})))
    tables = ["labels/*.parquet", *([VOCABULARY] if "vocabulary" in summary else [])]
    written = ", ".join([*tables, *(Path(path).name for path in summary.get("exports", {}).values())])
    copied = f" ({summary['copied']} copied)" if summary.get("copied") else ""
    cost = cost_text(summary.get("usd"))
    return (
        f"{before}{summary['images']} images: {summary['labelled']} labelled{copied}, {summary['errors']} "
        f"errors{reason} -> {output} ({written}){log}{left_out and '; ' + left_out}{again}{cost and '; ' + cost}"
    )
