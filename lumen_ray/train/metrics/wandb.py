"""Logging to Weights & Biases, if a recipe, `--wandb` or the environment names a project. Nothing is sent without.

Its client sends from a process of its own and tries again, so a lost server does not stop a run. It gets the metrics,
the recipe, and what W&B notes of the machine and its packages; not the console, the code, or errors of the client.
"""

from __future__ import annotations

import json
import os
import uuid
import warnings
from pathlib import Path
from typing import Any

from lumen_ray.data.files import write_atomically
from lumen_ray.errors import UserError
from lumen_ray.recipe import Recipe
from lumen_ray.run_settings import WandbSettings

RUN_FILE = "wandb.json"  # id of the run that a resumed run continues
PROJECT = "WANDB_PROJECT"


def settings_of(recipe: Recipe) -> WandbSettings | None:
    """The recipe's, or those of an environment that names a project."""
    if recipe.wandb or not os.environ.get(PROJECT):
        return recipe.wandb
    return WandbSettings(project=os.environ[PROJECT], entity=os.environ.get("WANDB_ENTITY"))


def check_wandb(recipe: Recipe) -> None:
    """Raises `UserError` if W&B is configured and not installed."""
    if settings_of(recipe):
        _wandb()


def _wandb() -> Any:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else the client reports its errors to its maker
    try:
        import wandb
    except ImportError:
        raise UserError(
            "logging to Weights & Biases needs its client; install it with: pip install 'lumen-ray[wandb]', or leave "
            f"out --wandb, {PROJECT} and 'wandb' in the recipe",
            "missing_package",
        ) from None
    return wandb


class WandbTracker:
    """Sends metrics to a W&B run, which a resumed run continues."""

    def __init__(self, run: Path, recipe: Recipe, settings: WandbSettings):
        wandb = _wandb()
        self._error = wandb.errors.Error
        known = json.loads((run / RUN_FILE).read_text())["run_id"] if (run / RUN_FILE).is_file() else None
        run_id = known or uuid.uuid4().hex[:8]
        try:
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                id=run_id,
                resume="allow",
                name=run.name,
                dir=str(run),
                config=recipe.model_dump(mode="json", exclude={"wandb", "mlflow"}),
                settings=wandb.Settings(console="off", save_code=False, silent=True, disable_git=True),
            )
        except self._error as error:
            raise UserError(
                f"Weights & Biases cannot be used: {_first_line(error)}; set WANDB_API_KEY where training runs, or "
                "WANDB_MODE=offline to write a folder for 'wandb sync'",
                "wandb",
            ) from error
        write_atomically(run / RUN_FILE, lambda path: path.write_text(json.dumps({"run_id": run_id})))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        if step < self._run.step:  # a repeated step: W&B keeps what it has
            return
        try:
            self._run.log(numbers, step=step)
        except self._error as error:
            warnings.warn(f"W&B did not accept some metrics: {_first_line(error)}", stacklevel=2)

    def flush(self) -> None:
        """Nothing waits in this process."""

    def close(self) -> None:
        try:
            self._run.finish()
        except self._error as error:
            warnings.warn(f"W&B was not notified of the end of the run: {_first_line(error)}", stacklevel=2)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def wandb_tracker(run: Path, recipe: Recipe) -> WandbTracker | None:
    settings = settings_of(recipe)
    return WandbTracker(run, recipe, settings) if settings else None
