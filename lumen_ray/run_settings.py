"""Settings of a training run that its result does not depend on: where metrics go, what is profiled and validated."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from lumen_ray.config import Settings
from lumen_ray.errors import UserError

MOST_PROFILED = 100  # steps; the events of a step take megabytes of memory and of the trace


class MlflowSettings(Settings):
    """Logging to MLflow. MLflow's environment variables supply what is left out."""

    tracking_uri: str | None = Field(None, description="server or folder, e.g. http://host:5000")
    experiment: str = "lumen-ray"
    every: int = Field(10, gt=0, description="steps between requests to the server")


class WandbSettings(Settings):
    """Logging to Weights & Biases. Its environment variables (WANDB_API_KEY, WANDB_MODE, ...) supply the rest."""

    project: str = Field("lumen-ray", min_length=1, description="project of the run; '--wandb' overrides it")
    entity: str | None = Field(
        None, description="user or team that the project belongs to; null: the account's default"
    )


class ValidationSettings(Settings):
    """Scoring of a held-out split during training, and the best model by its metrics."""

    shards: str | None = Field(None, description="shard folder of the held-out split; '--validate' overrides it")
    every: int = Field(500, gt=0, description="steps between validations, in addition to the one after the last step")
    samples: int = Field(512, gt=0, description="images to score, the first of the split")
    tasks: tuple[str, ...] | None = Field(
        None, description="tasks to score; null: those of the run that the split is annotated for, without pictures"
    )
    metric: str | None = Field(
        None, description="metric of evaluate's report that the best model has most of; null: the first task's"
    )


def parse_profile(value: Any) -> Any:
    """Validates `profile` of a recipe, for pydantic: "FIRST:END" or [FIRST, END], steps FIRST to END - 1."""
    if value is None:
        return None
    bounds = value.split(":") if isinstance(value, str) else value
    try:
        first, end = map(int, bounds)
    except (TypeError, ValueError):
        raise UserError(
            f"give the first step and the one to end before, as 10:20, got {value!r}", "invalid_profile"
        ) from None
    if first < 0 or end <= first:
        raise UserError(
            f"{first}:{end} has no steps; give a first step from 0 on and a later one to end before, as 10:20",
            "invalid_profile",
        )
    if end - first > MOST_PROFILED:
        raise UserError(
            f"{first}:{end} are {end - first} steps, whose trace would fill the memory; profile at most "
            f"{MOST_PROFILED}",
            "invalid_profile",
        )
    return first, end


def ranks_per_copy(ranks: int, group: int) -> int:
    """The ranks that share one copy of the weights: `group`, a recipe's `shard_group`, where it divides them, else
    all."""
    return group if 0 < group < ranks and ranks % group == 0 else ranks
