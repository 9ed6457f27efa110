"""The state of a label job, read from its output folder: on another terminal or machine, while it runs or later."""

from __future__ import annotations

import time
from typing import Any

from lumen_ray.console import seconds
from lumen_ray.data import files, urls
from lumen_ray.data.claim import read_claim
from lumen_ray.label.ledger import is_batch, open_finished
from lumen_ray.label.retries import current_round
from lumen_ray.label.spent import cost_text, read_spent

#: of a running job's state
_RUNNING = ("seconds_left", "fragments_left", "model_busy", "usd_expected")


def label_status(output: urls.Location) -> dict[str, Any]:
    """The state of the job that writes `output`, a folder or a bucket.

    ``state``: running, stopped, finished, or failed if no image at all could be labelled; ``images``: listed so far,
    all of them if ``is_listed``; ``counted``: what these are, "images", or "requests" of a batch file; ``done``,
    ``labelled``, ``errors``, ``retrying`` (of the errors, those that are about to be asked again); ``reasons``: number
    of errors by reason; ``copied`` of the labelled; ``instances`` by task; ``spent_seconds`` of all runs, their cost
    ``usd`` and the price ``usd_per_hour`` of the last one, None without a price; of a running job ``host``, ``pid``,
    ``seconds`` since it started, and once it has labelled ``images_per_second`` (or ``requests_per_second``),
    ``seconds_left``, ``fragments_left``, ``model_busy`` and ``usd_expected`` (see `progress.Status`). Raises
    `UserError` if `output` is not the output of
    `lumen-ray label`.
    """
    ledger = open_finished(output, of_images=False)
    counted = "requests" if is_batch(ledger.settings() or {}) else "images"
    plan, claim = ledger.plan(), read_claim(ledger.folder)
    totals = ledger.totals()
    ledger.round = current_round(ledger.folder)
    retrying = sum(ledger.failed().values())
    images, is_listed = plan.num_images(), plan.is_complete
    finished = is_listed and totals["images"] == images and files.is_file(urls.join(ledger.output, "summary.json"))
    is_over = is_listed and totals["images"] == images > 0 and not ledger.round
    failed = counted == "images" and is_over and not totals["labelled"]
    status: dict[str, Any] = {
        "state": "running" if claim else "finished" if finished else "failed" if failed else "stopped",
        "counted": counted,
        "images": images,
        "is_listed": is_listed,
        "done": totals["images"],
        "labelled": totals["labelled"],
        "copied": totals["copied"],
        "errors": totals["errors"],
        "retrying": retrying,
        "reasons": totals["reasons"],
        "instances": totals["instances"],
    }
    spent = read_spent(ledger.folder)
    status |= {"spent_seconds": round(spent["seconds"], 1), "usd": spent["usd"], "usd_per_hour": spent["usd_per_hour"]}
    if claim:
        status |= {"host": claim["host"], "pid": claim["pid"], "seconds": round(time.time() - claim["started"])}
        status |= {name: claim["state"].get(name) for name in (f"{counted}_per_second", *_RUNNING)}
    return status


def status_lines(output: urls.Location, status: dict[str, Any]) -> list[str]:
    """`label_status` in words."""
    share = f" ({status['done'] / status['images']:.0%})" if status["images"] and status["is_listed"] else ""
    listed = "" if status["is_listed"] else " listed so far"
    number = f"{status['done']:,} of {status['images']:,} {status['counted']}{listed}{share}"
    copied = f", {status['copied']:,} copied" if status["copied"] else ""
    lines = [f"{urls.shown(output)}: {status['state']}, {number}, {status['errors']:,} errors{copied}"]
    if status["reasons"]:
        lines.append("errors: " + ", ".join(f"{reason} {number:,}" for reason, number in status["reasons"].items()))
    if status["retrying"]:
        lines.append(f"{status['retrying']:,} of the errors wait to be asked again")
    elif status["errors"] and status["state"] == "finished" and status["counted"] == "images":
        lines.append("once the images are mended, the same command with --retry-errors asks those that failed again")
    if status["instances"]:
        lines.append("instances: " + ", ".join(f"{task} {number:,}" for task, number in status["instances"].items()))
    if status["state"] == "running":
        rate, left = status[f"{status['counted']}_per_second"], status["seconds_left"]
        speed = f", {rate:.1f} {status['counted']}/s" if rate else ""
        lines.append(
            f"process {status['pid']} on {status['host']}, for {seconds(status['seconds'])}{speed}"
            + (f", about {seconds(left)} left" if left is not None else "")
        )
        if status["model_busy"] is not None:
            lines.append(f"model busy {status['model_busy']:.0%}" + _left(status["fragments_left"]))
    elif status["state"] == "stopped":
        limit = ", with a higher --max-errors if that stopped it" if status["errors"] else ""
        lines.append(f"run the same command again to continue{limit}")
    elif status["state"] == "failed":
        lines.append("no image could be labelled; fix the images and run the same command with --retry-errors")
    if status["usd"] is not None:
        cost = cost_text(status["usd"], status.get("usd_expected"))
        price = f"the last one at ${status['usd_per_hour']:,.2f} an hour"
        lines.append(f"{cost} for {seconds(status['spent_seconds'])} in all runs, {price}")
    return lines


def _left(fragments: int | None) -> str:
    return "" if fragments is None else f", {fragments:,} fragments waiting or in work"
