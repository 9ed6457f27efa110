"""The numbers of a training run for Prometheus, at Ray's endpoint of the node that rank 0 or the controller is on."""

from __future__ import annotations

from typing import Any

from lumen_ray.data import urls
from lumen_ray.ray_metrics import Metric, export_to_ray, in_ray
from lumen_ray.recipe import Recipe

STEP = Metric("gauge", "lumen_train_step", "optimizer steps done, of all starts of the run", ("run",))
RECIPE_STEPS = Metric("gauge", "lumen_train_recipe_steps", "optimizer steps of the whole recipe", ("run",))
LOSS = Metric("gauge", "lumen_train_loss", "each loss of a step, and their weighted sum, 'total'", ("run", "term"))
TASK_LOSS = Metric("gauge", "lumen_train_task_loss", "a loss by the task of its samples", ("run", "term", "task"))
SOURCE_LOSS = Metric("gauge", "lumen_train_source_loss", "a loss by source of the shards", ("run", "term", "source"))
PASSES = Metric("gauge", "lumen_train_passes", "passes over the samples of a source", ("run", "source"))
VALIDATION = Metric("gauge", "lumen_train_validation", "a metric of the newest validation", ("run", "metric"))
RESTARTS = Metric(
    "counter", "lumen_train_restarts_total", "starts from a checkpoint after a worker was lost", ("run", "reason")
)
CHECKPOINT_STEP = Metric("gauge", "lumen_train_checkpoint_step", "steps in the newest checkpoint, or 0", ("run",))
CHECKPOINT_SECONDS = Metric(
    "gauge", "lumen_train_checkpoint_seconds", "time for which the newest checkpoint held up the run", ("run",)
)
#: name in `metrics.jsonl` -> its metric, and the factor between their units
_SCALARS = {
    "lr": (Metric("gauge", "lumen_train_learning_rate", "learning rate of a step", ("run",)), 1),
    "grad_norm": (Metric("gauge", "lumen_train_grad_norm", "norm of the gradient, before it is clipped", ("run",)), 1),
    "samples_per_s": (Metric("gauge", "lumen_train_samples_per_second", "images of all ranks", ("run",)), 1),
    "tokens_per_s": (
        Metric("gauge", "lumen_train_tokens_per_second", "tokens of all ranks, with those of images", ("run",)),
        1,
    ),
    "data_wait": (Metric("gauge", "lumen_train_data_wait", "share of a step that rank 0 waits for data", ("run",)), 1),
    "padding": (Metric("gauge", "lumen_train_padding", "share of the LLM's tokens that are padding", ("run",)), 1),
    "mfu": (Metric("gauge", "lumen_train_mfu", "share of the GPU's peak FLOP/s, on rank 0", ("run",)), 1),
    "memory_gb": (Metric("gauge", "lumen_train_memory_bytes", "peak memory of rank 0", ("run",)), 1e9),
}

#: all of them
METRICS: tuple[Metric, ...] = (
    STEP, RECIPE_STEPS, LOSS, TASK_LOSS, SOURCE_LOSS, PASSES, VALIDATION,
    *(metric for metric, _ in _SCALARS.values()), CHECKPOINT_STEP, CHECKPOINT_SECONDS, RESTARTS,
)  # fmt: skip


class RunMetrics:
    """Exports what rank 0 writes to `metrics.jsonl`, and its checkpoints; nothing in a process without Ray."""

    def __init__(self, run: urls.Location, recipe: Recipe, step: int):
        """`step`: of the checkpoint that the run goes on from, 0 without one."""
        self._run = urls.shown(run)
        if in_ray():
            export_to_ray(METRICS)
        STEP.record(step, run=self._run)
        RECIPE_STEPS.record(recipe.total_steps, run=self._run)
        CHECKPOINT_STEP.record(step, run=self._run)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """The values of a step, numbered from 0, by their names in `metrics.jsonl`."""
        STEP.record(step + 1, run=self._run)
        for name, value in values.items():
            match name.split("/"):
                case ["loss"]:
                    LOSS.record(value, run=self._run, term="total")
                case ["loss", term]:
                    LOSS.record(value, run=self._run, term=term)
                case ["task", term, task]:
                    TASK_LOSS.record(value, run=self._run, term=term, task=task)
                case ["source", term, *source]:
                    SOURCE_LOSS.record(value, run=self._run, term=term, source="/".join(source))
                case ["passes", *source]:
                    PASSES.record(value, run=self._run, source="/".join(source))
                case ["validation", *parts]:
                    VALIDATION.record(value, run=self._run, metric="/".join(parts))
                case [scalar] if scalar in _SCALARS:
                    metric, factor = _SCALARS[scalar]
                    metric.record(value * factor, run=self._run)

    def saved(self, step: int, seconds: float) -> None:
        """A checkpoint after `step` steps, for which training stood still for `seconds`."""
        CHECKPOINT_STEP.record(step, run=self._run)
        CHECKPOINT_SECONDS.record(seconds, run=self._run)


def count_restart(run: urls.Location, error: BaseException) -> None:
    """Counts a restart after this error. Called in the process of Ray Train's controller."""
    if in_ray():
        RESTARTS.export_to_ray()
    RESTARTS.record(run=urls.shown(run), reason=type(error).__name__)
