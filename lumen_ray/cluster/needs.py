"""What a preset and its recipe need of a cluster: counted on the meta device, as `doctor` and `plan` do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property

from lumen_ray import api, config
from lumen_ray.cluster.request import RenderRequest
from lumen_ray.errors import UserError
from lumen_ray.footprint import BF16, FP32, RecipeFootprint, Role, count_recipe, meta_model, roles_of
from lumen_ray.label.runs import THREADS_PER_GPU
from lumen_ray.model.settings import ModelSettings
from lumen_ray.plan.gpus import Gpu
from lumen_ray.plan.report import ACTOR, CUDA_ACTOR, cpus_wanted
from lumen_ray.plan.settings import LabelJob, check_memory, stage_times
from lumen_ray.plan.work import ModelWork, count_work
from lumen_ray.presets import model_path, recipe_path
from lumen_ray.recipe import Recipe

#: bytes of Ray's own processes in a pod, and of the predictions and texts that an evaluation holds: assumed
RAY_BYTES, EVALUATION_BYTES = 2e9, 8e9
#: share of a pod's memory for Ray's object store: batches and images on their way
STORE_SHARE = 0.25
#: the model in fp32 on the host of the first rank, and what writing it takes on top
WHOLE_MODEL = 1.2
CUDA_BYTES = 1e9  # of a process on a GPU, as `plan` assumes
GIB = 2**30


@dataclass(frozen=True)
class PodNeeds:
    """CPUs and GPUs of a pod, the bytes of its processes, and in words what they are of. `memory` adds Ray's object
    store.

    counted: of `processes`, bytes that are not assumed.
    """

    cpus: int
    gpus: int
    processes: float
    cpu_why: str
    memory_why: str
    counted: float = 0

    @property
    def memory(self) -> int:
        """GiB."""
        return math.ceil(self.processes / (1 - STORE_SHARE) / GIB)

    @property
    def object_store(self) -> int:
        """Bytes."""
        return round(self.memory * GIB * STORE_SHARE)


class Needs:
    """The needs of a request's preset. Raises `UserError` where they do not fit."""

    def __init__(self, request: RenderRequest, own_recipe: str):
        """own_recipe: that of the manifests, which is taken if it trains the preset."""
        if request.preset.endswith((".yaml", ".yml")):
            raise UserError(
                f"--preset '{request.preset}' is a file, which the image does not have; give a name in configs/models, "
                "and build the image with your own preset there",
                "unknown_preset",
            )
        self.request = request
        self.settings = config.load(ModelSettings, model_path(request.preset))
        self.gpu = request.kind_of_gpu
        self.is_own = config.load(Recipe, recipe_path(own_recipe)).model == self.settings.name
        self.recipe_name = request.recipe or (own_recipe if self.is_own else request.preset)

    @property
    def roles(self) -> list[Role]:
        """The trunk, then the decoders."""
        return _roles(self.settings.name)

    @property
    def weights(self) -> int:
        """Bytes of the whole model in fp32."""
        return sum(role.parameters for role in self.roles) * FP32

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe of training, with the workers that were asked for."""
        try:
            recipe = api.load_recipe(self.recipe_name, self.request.workers)
        except UserError as error:
            if self.request.recipe is None and error.reason == "unknown_preset":
                raise UserError(
                    f"preset '{self.request.preset}' has no recipe of its name to train it by; give --recipe, or leave "
                    "train and prepare out of --for",
                    "unknown_preset",
                ) from None
            raise
        if recipe.model != self.settings.name:
            raise UserError(
                f"recipe '{recipe.name}' trains '{recipe.model}' and not '{self.settings.name}'; give --preset "
                f"{recipe.model}, or another --recipe",
                "other_model",
            )
        return recipe

    @property
    def has_recipe(self) -> bool:
        try:
            return self.recipe is not None
        except UserError:
            return False

    @cached_property
    def footprint(self) -> RecipeFootprint:
        return count_recipe(self.settings, self.recipe)

    @property
    def rows_per_group(self) -> int:
        """Rows of a row group of the shards, so that every micro-step of every worker gets whole ones."""
        recipe = self.recipe
        parts = recipe.workers * max(stage.accumulate for stage in recipe.stages)
        if recipe.batch_size % parts:
            raise UserError(
                f"recipe '{recipe.name}' cannot split a batch of {recipe.batch_size} evenly over {recipe.workers} "
                f"workers in {parts // recipe.workers} micro-steps; give other --workers",
                "uneven_batch",
            )
        return recipe.batch_size // parts

    @property
    def training_pods(self) -> int:
        """Pods that train, all with as many ranks."""
        workers = self.workers
        if workers % self.ranks_per_pod:
            raise UserError(
                f"{workers} workers of recipe '{self.recipe.name}' do not fill nodes with {self.ranks_per_pod} GPUs; "
                "give another --gpus-per-node or --workers",
                "uneven_nodes",
            )
        return workers // self.ranks_per_pod

    @property
    def workers(self) -> int:
        """Workers that train, at most those of the recipe."""
        recipe, gpus = self.recipe, self.request.gpus
        if not gpus:
            return recipe.workers
        least = recipe.min_workers or recipe.workers
        if gpus < least:
            raise UserError(
                f"recipe '{recipe.name}' trains on {least} GPUs and --gpus is {gpus}; give --gpus {least}, or "
                f"--workers {gpus}",
                "too_few_gpus",
            )
        return min(recipe.workers, gpus)

    @property
    def ranks_per_pod(self) -> int:
        """Ranks of a pod that trains: one for each GPU of a node, so that they talk over NVLink; all without GPUs."""
        return min(self.request.gpus_per_node, self.workers) if self.gpu else self.workers

    def training(self) -> PodNeeds:
        """A pod that trains. Raises `UserError` for a recipe that does not fit on the GPU."""
        name, workers, ranks = self.recipe.name, self.workers, self.ranks_per_pod
        if self.gpu is None and self.recipe.precision != "fp32":
            raise UserError(
                f"recipe '{name}' trains in {self.recipe.precision}, which needs GPUs; give --gpus", "no_gpus"
            )
        counted = self.footprint
        if counted.model is None:
            raise UserError(f"the needs of recipe '{name}' cannot be counted: {counted.fault}", "missing_package")
        share = counted.memory(workers)
        if self.gpu is not None and share > self.gpu.memory:
            raise UserError(
                f"recipe '{name}' needs more than {share / 1e9:.0f} GB on each of {workers} GPUs, and a "
                f"{self.gpu.name} has {self.gpu.memory / 1e9:.0f} GB; give another --gpu, or more --gpus and --workers",
                "too_little_memory",
            )
        process = (CUDA_ACTOR if self.gpu else ACTOR) + self.recipe.readers * ACTOR
        whole = counted.model.parameters * FP32 * WHOLE_MODEL
        return PodNeeds(
            cpus=self._cpus(ranks, self.recipe.readers + 2),
            gpus=ranks if self.gpu else 0,
            processes=RAY_BYTES + whole + ranks * (process + share),
            cpu_why=self._per_gpu(ranks, f"a rank, {self.recipe.readers} reader and one to spare"),
            memory_why=f"the whole model, {_gib(whole)}, while it is read or written; for each rank {_gib(process)} of "
            f"processes and {_gib(share)} of a checkpoint; Ray itself {_gib(RAY_BYTES)}; a quarter object store",
            counted=whole + ranks * share,
        )

    @property
    def left_for_activations(self) -> float:
        """Bytes of a training GPU beside weights, gradients and optimiser."""
        assert self.gpu is not None
        return self.gpu.memory - self.footprint.memory(self.workers)

    def labelling(self, tasks: tuple[str, ...], num_classes: int, held: float = 0) -> PodNeeds:
        """A pod with one GPU that labels or evaluates and holds `held` bytes. Raises `UserError` if the model does not
        fit on it."""
        assert self.gpu is not None
        work = _work(self.settings.name, tasks, num_classes)
        job = LabelJob(1, tasks, num_classes, gpus=self.request.gpus, gpu=self.gpu)
        check_memory(work, job)
        wanted = cpus_wanted(stage_times(job, work, None), on_gpu=True)
        largest = max(role.largest for role in self.roles) * FP32
        images = 2 * job.batch_size * (min(job.megapixels * 1e6, work.longest_side**2) * 3 + job.image_mb * 1e6)
        return PodNeeds(
            cpus=self._cpus(1, max(math.ceil(wanted), THREADS_PER_GPU) + 1),
            gpus=1,
            processes=RAY_BYTES + CUDA_ACTOR + ACTOR + largest + images + held,
            cpu_why=self._per_gpu(
                1, f"{THREADS_PER_GPU} threads that decode, {wanted:.1f} would keep the model busy; one to spare"
            ),
            memory_why=f"processes {_gib(CUDA_ACTOR + ACTOR)}, a tensor on its way to the GPU {_gib(largest)}, images "
            f"and what is held {_gib(images + held)}, Ray itself {_gib(RAY_BYTES)}; a quarter object store",
        )

    def serving_gpu(self) -> Gpu:
        """The GPU that serves. Raises `UserError` if the trunk or a decoder does not fit on it."""
        assert self.gpu is not None
        for role in self.roles:
            needed = role.parameters * BF16 + CUDA_BYTES
            if needed > self.gpu.memory:
                raise UserError(
                    f"{role.name} of '{self.settings.name}' takes {needed / 1e9:.0f} GB in bfloat16, and a "
                    f"{self.gpu.name} has {self.gpu.memory / 1e9:.0f} GB; give a GPU with more memory (--gpu)",
                    "too_little_memory",
                )
        return self.gpu

    def serving(self, cpus: float) -> PodNeeds:
        """A pod with one GPU that serves; `cpus`: that all replicas reserve which may share it."""
        largest = max(role.largest for role in self.roles) * FP32
        processes = RAY_BYTES + len(self.roles) * CUDA_ACTOR + largest
        return PodNeeds(
            cpus=self._cpus(1, math.ceil(cpus) + 1),
            gpus=1,
            processes=processes,
            cpu_why=self._per_gpu(1, f"{cpus:g} of its replicas, and one to spare"),
            memory_why=f"{len(self.roles)} replicas at most, {_gib(CUDA_ACTOR)} each, a tensor on its way to the GPU "
            f"{_gib(largest)}, Ray itself {_gib(RAY_BYTES)}; a quarter object store",
        )

    def _cpus(self, gpus: int, of_each: int) -> int:
        return gpus * (self.request.cpus_per_gpu or of_each)

    def _per_gpu(self, gpus: int, why: str) -> str:
        if self.request.cpus_per_gpu:
            return "--cpus-per-gpu"
        return f"for each of {gpus} GPUs {why}" if gpus > 1 else why


@cache
def _roles(preset: str) -> list[Role]:
    return roles_of(meta_model(config.load(ModelSettings, model_path(preset))))


@cache
def _work(preset: str, tasks: tuple[str, ...], num_classes: int) -> ModelWork:
    """`count_work`, once for the jobs that ask for the same."""
    return count_work(config.load(ModelSettings, model_path(preset)), tasks, num_classes)


def _gib(value: float) -> str:
    return f"{value / GIB:.1f} GiB"
