"""Cluster resources of a run, checked before it starts: Ray would wait forever for missing ones."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lumen_ray.errors import UserError
from lumen_ray.recipe import Recipe

WORKER_CPUS = 0.75  # logical CPUs of a worker and its readers; below one, so that two fit on 2 cores beside other tasks


def of_worker(use_gpu: bool) -> dict[str, float]:
    """The logical resources that Ray reserves for each worker."""
    return {"CPU": WORKER_CPUS} | ({"GPU": 1} if use_gpu else {})


def uses_gpus(resources: Mapping[str, float], recipe: Recipe) -> bool:
    """Whether workers get a GPU each, or none does. Raises `UserError` if the workers do not fit in the cluster.

    A cluster with GPUs needs one for every worker: nobody wants ranks on CPUs beside idle GPUs.
    """
    least = recipe.min_workers or recipe.workers
    gpus, cpus = int(resources.get("GPU", 0)), resources.get("CPU", 0)
    if 0 < gpus < least:
        setting = f"lower 'min_workers' to {gpus}" if recipe.min_workers else f"give --workers {gpus}"
        raise UserError(
            f"the cluster has {_count(gpus, 'GPU')} but the run needs {_count(least, 'worker')} with one each; "
            f"{setting}, or hide the GPUs to train on CPUs (CUDA_VISIBLE_DEVICES= or ray start --num-gpus 0)",
            "too_few_gpus",
        )
    needed = math.ceil(least * WORKER_CPUS)
    if cpus < needed:
        raise UserError(
            f"the cluster has {cpus:g} CPUs but {_count(least, 'worker')} need {needed}; lower 'workers' or start Ray "
            f"with more logical CPUs (ray start --head --num-cpus {needed})",
            "too_few_cpus",
        )
    return gpus > 0


def fitted(resources: Mapping[str, float], recipe: Recipe) -> Recipe:
    """The recipe with one worker per GPU, if the cluster has GPUs but too few; else the recipe itself."""
    gpus = int(resources.get("GPU", 0))
    if not 0 < gpus < (recipe.min_workers or recipe.workers):
        return recipe
    return recipe.model_copy(update={"workers": gpus, "min_workers": min(recipe.min_workers, gpus)})


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + ("s" if number != 1 else "")
