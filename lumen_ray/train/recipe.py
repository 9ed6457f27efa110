"""A recipe: the stages of a training run as data (`configs/recipes/*.yaml`)."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from lumen_ray.config import Settings
from lumen_ray.data.collate import BranchSettings
from lumen_ray.data.transforms import AugmentSettings
from lumen_ray.errors import UserError, unknown
from lumen_ray.tasks import TASKS, get_task

#: names a stage may list under `trainable`; each is a part of the model
MODULES = ("vision", "regions", "llm", "queries", "link_heads", "dense", "lumen")
#: names a stage may weigh under `loss_weights`: every loss of the model
LOSSES = ("lm", "heatmap", "box", "mask", "keypoint")


class TaskGroup(Settings):
    """Tasks that are trained together in one step: every annotation of an image that they cover becomes a branch."""

    tasks: tuple[str, ...] = Field(description="names from the task registry")
    weight: float = Field(1.0, gt=0, description="how often this group is drawn, relative to the stage's other groups")

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if not tasks:
            raise UserError("a task group needs at least one task", "invalid_config")
        return tuple(get_task(name).name for name in tasks)


class Stage(Settings):
    name: str
    steps: int = Field(gt=0, description="optimizer steps")
    groups: tuple[TaskGroup, ...] = Field(
        (TaskGroup(tasks=tuple(TASKS)),), description="what step t trains is drawn from these by (seed, t)"
    )
    trainable: tuple[str, ...] = Field(MODULES, description=f"parts that learn, of {', '.join(MODULES)}")
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    lr_scale: dict[str, float] = Field({}, description="factor on the learning rate by part, e.g. {vision: 0.1}")
    warmup_steps: int = Field(20, ge=0)
    decay_from: float = Field(0.5, ge=0, le=1, description="share of the steps after which cosine decay begins")
    final_lr: float = Field(0.02, ge=0, description="learning rate at the end, relative to `lr`")
    weight_decay: float = Field(0.05, ge=0)
    grad_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    loss_weights: dict[str, float] = Field({}, description=f"factor on a loss, of {', '.join(LOSSES)}")
    augment: AugmentSettings = AugmentSettings()
    branches: BranchSettings = BranchSettings()

    @model_validator(mode="after")
    def _parts(self) -> Stage:
        for name in (*self.trainable, *self.lr_scale):
            if name not in MODULES:
                raise unknown("part", name, MODULES)
        for name in self.loss_weights:
            if name not in LOSSES:
                raise unknown("loss", name, LOSSES, plural="losses")
        if not self.trainable:
            raise UserError(
                f"stage '{self.name}' trains nothing; name parts under 'trainable', of {', '.join(MODULES)}",
                "invalid_config",
            )
        if not self.groups:
            raise UserError(f"stage '{self.name}' needs at least one task group under 'groups'", "invalid_config")
        return self


class Recipe(Settings):
    name: str
    model: str = Field("nano", description="preset in configs/models, or a path to a model YAML")
    seed: int = Field(0, ge=0)
    batch_size: int = Field(32, gt=0, description="images per optimizer step, over all workers")
    workers: int = Field(1, gt=0, description="Ray Train workers; each is one FSDP rank")
    checkpoint_every: int = Field(0, ge=0, description="steps between checkpoints inside a stage; 0: at its end only")
    stages: tuple[Stage, ...]

    @model_validator(mode="after")
    def _stages(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if not names:
            raise UserError("a recipe needs at least one stage under 'stages'", "invalid_config")
        if len(set(names)) != len(names):
            raise UserError(f"the stages of a recipe need different names, got {', '.join(names)}", "invalid_config")
        return self

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def at(self, step: int) -> tuple[int, int]:
        """(index of the stage, step within it) of a global step."""
        for index, stage in enumerate(self.stages):
            if step < stage.steps:
                return index, step
            step -= stage.steps
        return len(self.stages), 0
