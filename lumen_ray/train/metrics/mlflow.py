"""Logging to MLflow, if a recipe or the environment names a server. A lost server does not stop a run."""

from __future__ import annotations

import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

from lumen_ray.data.files import write_atomically
from lumen_ray.errors import UserError
from lumen_ray.recipe import Recipe
from lumen_ray.run_settings import MlflowSettings

RUN_FILE = "mlflow.json"  # id of the MLflow run that a resumed run continues
URI = "MLFLOW_TRACKING_URI"
#: logged as `loss/total`, since file stores cannot hold both `loss` and `loss/lm`; always, whatever terms a step has
TOTALS = ("loss", "mfu")


def settings_of(recipe: Recipe) -> MlflowSettings | None:
    """The recipe's, or those of an environment that names a tracking server."""
    if recipe.mlflow or not os.environ.get(URI):
        return recipe.mlflow
    return MlflowSettings(experiment=os.environ.get("MLFLOW_EXPERIMENT_NAME", MlflowSettings().experiment))


def check_mlflow(recipe: Recipe) -> None:
    """Raises `UserError` if MLflow is configured and not installed."""
    if settings_of(recipe):
        _mlflow()


def _mlflow() -> Any:
    try:
        import mlflow
    except ImportError:
        raise UserError(
            f"logging to MLflow needs its client; install it with: pip install 'lumen-ray[mlflow]', or unset {URI} and "
            "'mlflow' in the recipe",
            "missing_package",
        ) from None
    return mlflow


def mlflow_tracker(run: Path, recipe: Recipe) -> MlflowTracker | None:
    settings = settings_of(recipe)
    return MlflowTracker(run, recipe, settings) if settings else None


class MlflowTracker:
    """Sends metrics to an MLflow server, every few steps."""

    def __init__(self, run: Path, recipe: Recipe, settings: MlflowSettings):
        mlflow = _mlflow()
        self._error = mlflow.exceptions.MlflowException
        self._metric = mlflow.entities.Metric
        self._every = settings.every
        self._waiting: list[Any] = []
        try:
            self._client = mlflow.MlflowClient(settings.tracking_uri)
            self._run_id = self._open(run, recipe, settings)
        except self._error as error:
            raise UserError(
                f"MLflow at '{settings.tracking_uri or os.environ.get(URI)}' cannot be used: "
                f"{str(error).splitlines()[0]}; correct 'mlflow' in the recipe or {URI}",
                "mlflow",
            ) from error

    def _open(self, run: Path, recipe: Recipe, settings: MlflowSettings) -> str:
        """The id of the folder's MLflow run, or of a new one with the recipe as its parameters."""
        if (run / RUN_FILE).is_file():
            known = json.loads((run / RUN_FILE).read_text())["run_id"]
            self._client.set_terminated(known, "RUNNING")
            return known
        experiment = self._client.get_experiment_by_name(settings.experiment)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(settings.experiment)
        run_id = self._client.create_run(experiment_id, run_name=run.name).info.run_id
        for name, value in recipe.model_dump(mode="json", exclude={"stages", "mlflow", "wandb"}).items():
            self._client.log_param(run_id, name, value)
        write_atomically(run / RUN_FILE, lambda path: path.write_text(json.dumps({"run_id": run_id})))
        return run_id

    def write(self, step: int, numbers: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        for name, value in numbers.items():
            self._waiting.append(self._metric(f"{name}/total" if name in TOTALS else name, value, now, step))
        if (step + 1) % self._every == 0:
            self.flush()

    def flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        try:
            for first in range(0, len(waiting), 1000):  # limit of one request
                self._client.log_batch(self._run_id, metrics=waiting[first : first + 1000])
        except self._error as error:
            warnings.warn(f"MLflow did not accept some metrics: {str(error).splitlines()[0]}", stacklevel=2)

    def close(self) -> None:
        self.flush()
        try:
            self._client.set_terminated(self._run_id)
        except self._error as error:
            warnings.warn(f"MLflow was not notified of the end of the run: {str(error).splitlines()[0]}", stacklevel=2)
