"""What a run needs of a cluster, and whether it is there: Ray would wait for what is missing for ever."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lumen_ray.errors import UserError
from lumen_ray.recipe import Recipe

WORKER_CPUS = 0.75  # logical CPUs of a worker and its reads; below one, so that two fit on 2 cores beside other tasks


def of_worker(use_gpu: bool) -> dict[str, float]:
    """What Ray sets aside for each worker."""
    return {"CPU": WORKER_CPUS} | ({"GPU": 1} if use_gpu else {})


def uses_gpus(resources: Mapping[str, float], recipe: Recipe) -> bool:
    """Whether each worker gets a GPU (else none does); `UserError` when the workers do not fit in the cluster.

    GPUs are used where there are any, and then there must be enough of them: ranks on CPUs beside idle GPUs would be
    nobody's wish.
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
    """The recipe with no more workers than there are GPUs, where there are GPUs but too few."""
    gpus = int(resources.get("GPU", 0))
    if not 0 < gpus < (recipe.min_workers or recipe.workers):
        return recipe
    return recipe.model_copy(update={"workers": gpus, "min_workers": min(recipe.min_workers, gpus)})


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + ("s" if number != 1 else "")
