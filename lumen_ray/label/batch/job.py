"""Answers a batch file of chat requests: the ledger, plan and workers of a label job, with lines in place of images."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lumen_ray.data import files, urls
from lumen_ray.data.claim import Claim
from lumen_ray.inference.protocol import EngineProtocol
from lumen_ray.label.batch.lines import RequestListing, fingerprint
from lumen_ray.label.batch.output import ERRORS, OUTPUT, finish
from lumen_ray.label.batch.requests import ANSWER_SCHEMA
from lumen_ray.label.batch.worker import BatchActor, BatchLabeller
from lumen_ray.label.ledger import Ledger
from lumen_ray.label.pipeline import Progress, check_device, run_work
from lumen_ray.label.plan import Plan
from lumen_ray.label.progress import ErrorLimit, Status
from lumen_ray.label.runs import Pool, Work
from lumen_ray.label.settings import check_numbers, chosen_decoders, job_settings
from lumen_ray.label.spent import Spent, check_price, cost_text, priced_again
from lumen_ray.label.workers import WorkerSettings
from lumen_ray.structures import check_dtype

#: what these jobs count, in messages
COUNTED = "requests"


def answer_batch(
    model: str | Path | Callable[[], EngineProtocol],
    requests: str | Path,
    output: str | Path,
    *,
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
    max_errors: str | int | None = None,
    usd_per_hour: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Answers the chat requests in a batch file (see `batch.lines`) into the folder `output`; returns a summary.

    model, decoders, num_actors, gpus_per_actor, device, dtype, max_errors, usd_per_hour, progress: as of
        `pipeline.label`, with lines for images.
    batch_size: requests that are given to the engine together.
    score_threshold, max_per_phrase, max_new_tokens: of requests that do not say, or cannot.

    Writes ``output.jsonl`` and ``errors.jsonl`` (see `batch.output`) at the end, and ``summary.json``. Run again after
    a stop, it continues where it stopped. In the summary, ``requests == answered + errors``. A line that cannot be
    answered is in ``errors.jsonl`` and stops nothing. Raises `UserError` as `pipeline.label` does, but not where no
    line at all could be answered.
    """
    check_numbers(num_actors, gpus_per_actor, batch_size, score_threshold, fragment_size)
    check_price(usd_per_hour)
    limit = ErrorLimit.parse(max_errors)
    device = check_device(device, num_actors)
    chosen = chosen_decoders(model, decoders or {})
    listing = RequestListing(requests)
    listing.check()
    ledger = Ledger(output, ANSWER_SCHEMA)
    worker = WorkerSettings(
        model, (), device, batch_size, score_threshold, max_per_phrase, max_new_tokens, chosen, check_dtype(dtype),
        output=ledger.output,
    )  # fmt: skip
    settings = job_settings(worker, requests, ["chat"], None, None, None, None) | {"batch": fingerprint(requests)}
    files.make_folder(ledger.output)
    with Claim(ledger.folder) as claim:
        ledger.open(settings)
        plan, done = ledger.plan(fragment_size), ledger.done()
        if (finished := _finished(ledger, plan, len(done))) is not None:
            limit.check_numbers(finished["errors"], finished["requests"], COUNTED)
            return priced_again(ledger, finished, usd_per_hour)
        spent = Spent(ledger.folder, usd_per_hour)
        work = Work(plan, done, None if plan.is_complete else listing)
        pool = Pool(num_actors, gpus_per_actor, labeller=BatchLabeller, actor=BatchActor)
        status, log = run_work(work, ledger, worker, pool, limit, claim, spent, progress, COUNTED)
        summary = _finish(ledger, status)
        spent.save(now=True)
    return summary | log


def _finished(ledger: Ledger, plan: Plan, done: int) -> dict[str, Any] | None:
    """The summary of a job that has nothing left to do; None for others."""
    paths = [urls.join(ledger.output, name) for name in ("summary.json", OUTPUT, ERRORS)]
    if plan.num_fragments() != done or not all(files.is_file(path) for path in paths):
        return None
    summary = json.loads(files.read_text(paths[0]))
    return {**summary, "finished_before": summary["requests"], "seconds": 0.0, "requests_per_second": 0.0}


def _finish(ledger: Ledger, status: Status) -> dict[str, Any]:
    """Writes the output and the summary of all runs."""
    totals, usage = finish(ledger)
    first = totals["first_error"]
    seconds = time.monotonic() - status.started
    summary = {
        "output": urls.join(ledger.output, OUTPUT),
        "errors_file": urls.join(ledger.output, ERRORS),
        "requests": totals["images"],
        "answered": totals["labelled"],
        "errors": totals["errors"],
        "reasons": totals["reasons"],
        "first_error": first and {"custom_id": first["image_id"], **{n: first[n] for n in ("reason", "message")}},
        "usage": usage,
        "finished_before": status.finished_before,
        "seconds": round(seconds, 2),
        "requests_per_second": round((status.done - status.finished_before) / max(seconds, 1e-9), 2),
        **status.spent_facts(0),
    }
    del summary["usd_expected"]  # nothing more is
    files.write_bytes(urls.join(ledger.output, "summary.json"), (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def answered_line(summary: dict[str, Any], output: str | Path) -> str:
    """The summary of `answer_batch` in one line."""
    first = summary["first_error"]
    log = f"; log -> {summary['log']}" if summary.get("log") else ""
    reason = f" (e.g. {first['custom_id']}: {first['message']})" if first else ""
    cost = cost_text(summary.get("usd"))
    return (
        f"{summary['requests']} requests: {summary['answered']} answered, {summary['errors']} errors{reason} -> "
        f"{output} ({OUTPUT}, {ERRORS}){log}{cost and '; ' + cost}"
    )
