"""What a run folder says besides checkpoints and metrics: what the run was started with, and why it ended early."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lumen_ray.errors import UserError
from lumen_ray.model.settings import ModelSettings
from lumen_ray.train import parallel
from lumen_ray.train.loop import DivergedError
from lumen_ray.train.recipe import Recipe

FAILED = "failed.json"  # the error of a run that another try would not mend


def start_of(
    recipe: Recipe, settings: ModelSettings, manifest: dict[str, Any], init_from: str | None
) -> dict[str, Any]:
    """Everything that decides a run's result."""
    data = [[file["sha256"] for file in manifest["files"]], manifest["categories"]]
    return {
        "recipe": recipe.model_dump(mode="json"),
        "model": settings.model_dump(mode="json"),
        "shards": hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest(),
        "init_from": init_from,
    }


def keep_start(run: Path, start: dict[str, Any], resumes: bool) -> None:
    """Writes `RUN/recipe.json`; `UserError` when the run was started with something else than it is continued with."""
    saved = run / "recipe.json"
    if resumes and saved.is_file():
        before = json.loads(saved.read_text())
        names = {"recipe": "recipe", "model": "model settings", "shards": "shards", "init_from": "init_from"}
        other = [text for name, text in names.items() if before.get(name) != start[name]]
        if other:
            raise UserError(
                f"'{run}' holds a run of another {' and '.join(other)}; choose another output folder, or continue it "
                "with what it was started with",
                "run_exists",
            )
    run.mkdir(parents=True, exist_ok=True)
    partial = saved.with_name(saved.name + ".partial")
    partial.write_text(json.dumps(start))
    os.replace(partial, saved)


def run_once(run: Path, fit: Callable[[], None]) -> None:
    """Calls `fit`; an error that another try would not mend goes to `RUN/failed.json`, for the driver to raise.

    A loss that is not finite is seen by all ranks in the same step: each returns, and Ray has nothing to retry. An
    error of one rank has to be raised, for the others wait for it in a collective: Ray then starts the group anew,
    which finds the file and ends here.
    """
    if (run / FAILED).exists():
        return
    try:
        fit()
    except Exception as error:
        cause = told(error)
        if not isinstance(cause, UserError):
            raise
        partial = run / f"{FAILED}.{parallel.rank()}.partial"
        partial.write_text(json.dumps({"message": str(cause), "reason": cause.reason}))
        os.replace(partial, run / FAILED)
        if parallel.world_size() > 1 and not isinstance(error, DivergedError):
            raise cause from error


def raise_failure(run: Path) -> None:
    """The `UserError` that a worker recorded, if any."""
    if (run / FAILED).exists():
        failure = json.loads((run / FAILED).read_text())
        raise UserError(failure["message"], failure["reason"])


def forget_failure(run: Path) -> None:
    """Before a new try: the user may have mended what was wrong."""
    (run / FAILED).unlink(missing_ok=True)


def told(error: BaseException) -> BaseException:
    """The user's or the run's own error out of Ray's wrappers, else the error as it is."""
    queue, seen = [error], set()
    while queue:
        current = queue.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, (UserError, DivergedError)):
            return UserError(str(current), getattr(current, "reason", "training_diverged"))
        queue += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        queue += list(getattr(current, "worker_failures", {}).values())
    return error
