"""Validation during training: `evaluate` on the first images of a held-out split, for `lumen_ray.train.validation`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lumen_ray.data import urls
from lumen_ray.data.shards.shards import read_manifest
from lumen_ray.errors import UserError, suggest
from lumen_ray.evaluate.run import evaluate
from lumen_ray.evaluate.scorer import SplitScorer
from lumen_ray.evaluate.task_choice import choose_tasks
from lumen_ray.inference.engine import Engine
from lumen_ray.model.build import LoadedModel, ModelMeta
from lumen_ray.model.settings import ModelSettings
from lumen_ray.recipe import Recipe
from lumen_ray.run_settings import ValidationSettings
from lumen_ray.tasks import TASKS
from lumen_ray.train.validation import Scores

#: the metric that stands for a task, best first where a run has several
MAIN_METRICS = {
    "detect": "box_AP",
    "segment": "mask_AP",
    "pose": "keypoint_AP",
    "refer": "refer_p50",
    "ground": "ground_f1",
    "count": "count_accuracy",
    "region_segment": "region_segment_iou",
    "semantic": "semantic_miou",
    "vqa": "vqa_accuracy",
    "region_caption": "region_caption_accuracy",
    "caption": "caption_attributes",
    "chat": "routing_accuracy",
}
#: beginnings of metric names that differ from their task's name
_PREFIXES = {"box": "detect", "mask": "segment", "keypoint": "pose", "routing": "chat"}


@dataclass(frozen=True)
class Served:
    """The tasks of a model, without the model."""

    tasks: tuple[str, ...]
    serving: Mapping[str, str]


@dataclass(frozen=True)
class SplitValidator:
    """Scores a model on the split that a recipe's `validation` names."""

    settings: ValidationSettings
    shards: str
    trained: tuple[str, ...]  # tasks of the run

    @property
    def every(self) -> int:
        return self.settings.every

    def check(self, settings: ModelSettings, meta: ModelMeta) -> None:
        """Raises `UserError` for shards that cannot be read, tasks that they are not annotated for or that the model
        does not serve, and a metric that these tasks do not have."""
        tasks = self._tasks(settings, meta)
        self._metric(tasks)

    def score(self, loaded: LoadedModel, device: torch.device, output: Path) -> Scores:
        """Scores a model; writes the files of `evaluate` into `output`."""
        tasks = self._tasks(loaded.settings, loaded.meta)
        engine = Engine(loaded, str(device))
        report = evaluate(engine, self.shards, output, tasks=tasks, limit=self.settings.samples)
        # whole numbers are counts of what was scored
        metrics = {name: value for name, value in report["metrics"].items() if isinstance(value, float)}
        chosen = self._metric(tasks)
        return Scores(metrics, chosen, _is_error(chosen))

    def _tasks(self, settings: ModelSettings, meta: ModelMeta) -> list[str]:
        manifest, serving = read_manifest(self.shards), settings.serving
        known = [name for name, task in TASKS.items() if name in meta.tasks and (task.is_text or name in serving)]
        named = self.settings.tasks
        tasks, _ = choose_tasks(manifest, named, Served(tuple(known), serving))
        if named is not None:
            return tasks
        tasks = [name for name in tasks if name in self.trained and name in MAIN_METRICS and name != "chat"]
        if not tasks:
            raise UserError(
                f"the validation split '{urls.shown(self.shards)}' is annotated for none of the tasks that the run "
                f"trains ({', '.join(self.trained)}); name tasks under 'validation', or give another split",
                "nothing_to_evaluate",
            )
        return tasks

    def _metric(self, tasks: list[str]) -> str:
        """The metric that the best model is chosen by."""
        if self.settings.metric is None:
            return next(metric for task, metric in MAIN_METRICS.items() if task in tasks)
        names = [name for name in SplitScorer([], {}, tasks).evaluate()[0] if _task_of(name) in tasks]
        wanted = self.settings.metric
        found = next((name for name in names if name.casefold() == wanted.casefold()), None)
        if found is None:
            raise UserError(
                f"validation has no metric '{wanted}';{suggest(wanted, names)} of {', '.join(tasks)} it has: "
                f"{', '.join(names)}",
                "unknown_metric",
            )
        return found


def _task_of(metric: str) -> str | None:
    """The task that a metric is about."""
    for task in sorted(MAIN_METRICS, key=len, reverse=True):  # "region_caption_accuracy" is not of "region"
        if metric.startswith(f"{task}_"):
            return task
    return _PREFIXES.get(metric.split("_")[0])


def _is_error(metric: str) -> bool:
    """Whether a model is better for having less of a metric."""
    return metric == "count_error" or metric.endswith("ECE")


def validator_of(recipe: Recipe) -> SplitValidator | None:
    """The validator of a recipe; None without `validation`. Raises `UserError` if that names no shards."""
    settings = recipe.validation
    if settings is None:
        return None
    if settings.shards is None:
        raise UserError(
            f"recipe '{recipe.name}' validates, but names no held-out split; give its shard folder with --validate, or "
            "as 'shards' under 'validation'",
            "no_split",
        )
    return SplitValidator(settings, urls.absolute(settings.shards), tuple(recipe.tasks))
