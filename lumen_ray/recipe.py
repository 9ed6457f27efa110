"""A recipe: the stages of a training run as data (`configs/recipes/*.yaml`)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from lumen_ray import config
from lumen_ray.config import Settings
from lumen_ray.decoders.registry import DECODERS, LOSSES, PARTS, decoders_for, get
from lumen_ray.errors import UserError, unknown
from lumen_ray.run_settings import MlflowSettings, ValidationSettings, WandbSettings, parse_profile
from lumen_ray.structures import Size
from lumen_ray.tasks import TASKS, TRAINABLE_TASKS, get_task

#: parts made of repeated blocks, which are checkpointed, compiled and decayed block by block
BLOCK_PARTS = ("vision", "llm", *DECODERS)
#: parts whose layers are deep enough for a learning rate by depth
DEEP_PARTS = ("vision", "llm")


def is_pattern(name: str) -> bool:
    """Whether a key of `lr_scale` names parameters rather than a part: it has a dot or a wildcard."""
    return any(sign in name for sign in ".*?[")


def _blocks_of(value: object) -> object:
    """Resolves `true` to all parts with blocks, `false` to none."""
    return {True: BLOCK_PARTS, False: ()}.get(value, value) if isinstance(value, bool) else value


#: settings that do not affect a run's result; a resumed run may change them
CARRIED_OUT = (
    "workers",
    "min_workers",
    "readers",
    "max_failures",
    "checkpoint_every",
    "keep_checkpoints",
    "async_checkpoints",
    "checkpoint_retries",
    "log_samples",
    "shard_group",
    "mlflow",
    "wandb",
    "profile",
    "validation",
)


class BucketRange(Settings):
    """Input sizes of every aspect ratio at every side."""

    sides: tuple[int, ...] = Field(
        min_length=1, description="pixels; a bucket has about the area of a square of this side"
    )
    aspect_ratios: tuple[float, ...] = Field((0.5, 0.75, 1.0, 4 / 3, 2.0), min_length=1, description="width / height")

    @field_validator("sides", "aspect_ratios")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < value < float("inf") for value in values):
            raise UserError(f"give positive numbers, got {list(values)}", "invalid_config")
        return values


def parse_buckets(value: Any) -> Any:
    """Validates `buckets` of a recipe, for pydantic: a list of [height, width], or the keys of `BucketRange`."""
    if value is None or isinstance(value, BucketRange):
        return value
    if isinstance(value, dict):
        try:
            return config.validate(BucketRange, value, "buckets")
        except UserError as error:  # the recipe's own check names the key
            raise UserError(str(error).removeprefix("buckets: "), error.reason) from None
    pairs = value if isinstance(value, list | tuple) else [value]
    if not pairs or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise UserError(
            "give [[height, width], ...] in pixels or {sides: [...], aspect_ratios: [...]}, "
            f"e.g. [[96, 128], [128, 96]], got {value!r}",
            "invalid_config",
        )
    for pair in pairs:
        if not all(isinstance(side, int) and side > 0 for side in pair):
            raise UserError(
                f"a bucket is [height, width] in whole, positive pixels, got {list(pair)}", "invalid_config"
            )
    return tuple((height, width) for height, width in pairs)


class BranchSettings(Settings):
    """The number of prompts per image and training step; at most `max_classes` + `negatives` +
    `foreign_negatives` classes.

    Negatives are classes annotated as absent, drawn by the rule of `data/batches/negatives.py`. A few are enough for a
    dozen classes; for a thousand use 20 to 50 (Detic and OWL-ViT use 50). Foreign ones are those of
    `data/batches/foreign.py`.
    """

    negatives: int = Field(3, ge=0, description="prompts for classes annotated as absent")
    foreign_negatives: int = Field(
        0, ge=0, description="prompts for names of things that are no class of the shards, and surely in no image"
    )
    exemplars: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the class prompts that show the class by boxes on this image or others of the batch",
    )
    negatives_by_frequency: float = Field(
        0.5, ge=0, le=1, description="share of negatives drawn by the square root of class frequency, others uniformly"
    )
    max_classes: int = Field(24, gt=0, description="maximum of prompts for classes that are present")
    max_phrases: int = Field(3, ge=0, description="maximum of ground and refer phrases")
    max_messages: int = Field(4, ge=0, description="maximum of captions, questions, region captions and chats")
    max_regions: int = Field(1, ge=0, description="maximum of region_segment prompts: a box, point, ... on an instance")
    max_poses: int = Field(1, ge=0, description="maximum of pose prompts for classes with annotated keypoints")
    looking_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the requests for classes, noun phrases and poses whose links see the image in training, "
        "as in free chat, in a model whose links else do not (links_see_image: false); elsewhere all do",
    )
    absent_poses: int = Field(1, ge=0, description="maximum of pose prompts for absent classes with keypoints")


class AugmentSettings(Settings):
    """Random augmentation of a training image, with all its annotations."""

    flip_x: bool = Field(False, description="mirror left-right at random; wrong if texts say 'left' and 'right'")
    flip_y: bool = Field(False, description="mirror top-bottom at random")
    turn: bool = Field(
        False, description="rotate by a random multiple of 90 degrees; of 180 if the input is not square"
    )
    scale: tuple[float, float] = Field(
        (1.0, 1.0), description="range of the random zoom; 1 fits the whole image into the input"
    )
    shift: float = Field(0.0, ge=0, le=0.5, description="maximum random shift, as a share of the input")
    color: float = Field(0.0, ge=0, le=1, description="strength of brightness, contrast and saturation jitter")

    @field_validator("scale")
    @classmethod
    def _ordered(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] < float("inf"):
            raise UserError(
                f"give [smallest, largest] zoom with 0 < smallest <= largest, got {list(scale)}", "invalid_config"
            )
        return scale


class LoraSettings(Settings):
    """Low-rank adapters (arXiv 2106.09685) in place of the full weights of the LLM, by `peft`."""

    rank: int = Field(16, gt=0, description="rank of the adapters' matrices")
    alpha: float = Field(32.0, gt=0, description="the adapters' output is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapters' input; its seed depends on the step")
    targets: tuple[str, ...] = Field(
        ("trunk.llm.*_proj",), min_length=1, description="names of linear layers that get adapters; * is a wildcard"
    )
    also_train: tuple[str, ...] = Field(
        ("trunk.llm.*embed_tokens", "trunk.llm.lm_head"),
        description="modules of the adapted parts to train in full, by default the vocabulary: routing tokens are new "
        "to a pretrained LLM; of a published LLM's vocabulary, only their rows learn",
    )
    save_adapters: bool = Field(False, description="also write the adapters to RUN/adapters.safetensors")


class EmaSettings(Settings):
    """Exponential moving average of the weights."""

    decay: float = Field(0.999, gt=0, lt=1, description="factor on the old average in each step")
    warmup: bool = Field(True, description="use decay (1 + t) / (10 + t) while it is less, to forget the first weights")
    export: bool = Field(True, description="export the average to the model folder, not the last weights")


class TaskGroup(Settings):
    """Tasks trained together in one step: annotations of an image for any of them become prompts."""

    tasks: tuple[str, ...] = Field(description="names of tasks; see `lumen_ray.tasks`")
    decoders: tuple[str, ...] = Field((), description="decoders to train; empty: all of the model that serve the tasks")
    weight: float = Field(1.0, gt=0, description="how often this group is drawn, relative to the stage's other groups")
    text_only: bool = Field(False, description="draw rows without image only: conversations of text alone")
    distil: bool = Field(
        False,
        description="with text_only: learn the probabilities that the LLM gives every token without adapters, in place "
        "of the tokens; for a published LLM and its own answers",
    )

    @property
    def learning(self) -> tuple[str, ...]:
        """The decoders, of all there are, that the group trains where a model has them."""
        able = {decoder for task in self.tasks for decoder in decoders_for(task)}
        return tuple(name for name in DECODERS if name in able and name in (self.decoders or able))

    @model_validator(mode="after")
    def _check_text(self) -> TaskGroup:
        if self.text_only and (wrong := [name for name in self.tasks if not TASKS[name].is_text]):
            raise UserError(f"task '{wrong[0]}' is not about text alone; leave out text_only", "invalid_config")
        if self.distil and not self.text_only:
            raise UserError("distil is for groups with text_only; add it, or leave distil out", "invalid_config")
        return self

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if not tasks:
            raise UserError("a task group needs at least one task", "invalid_config")
        blind = [name for name in tasks if name in TASKS and not TASKS[name].sees_image]
        if blind and len(tasks) > 1:
            raise UserError(
                f"task '{blind[0]}' needs a separate group: its images are targets, not inputs", "invalid_config"
            )
        for task in map(get_task, tasks):
            if task.derived_from:
                raise UserError(
                    f"task '{task.name}' cannot be trained: its answers are computed from those of "
                    f"'{task.derived_from}'; train '{task.derived_from}'",
                    "invalid_config",
                )
        return tasks

    @field_validator("decoders")
    @classmethod
    def _known_decoders(cls, decoders: tuple[str, ...]) -> tuple[str, ...]:
        for name in decoders:
            get(name)
        return decoders


class Stage(Settings):
    """A part of a run with one set of trained parts, tasks and learning rates."""

    name: str
    steps: int = Field(gt=0, description="optimizer steps")
    groups: tuple[TaskGroup, ...] = Field(
        (TaskGroup(tasks=TRAINABLE_TASKS),),
        description="task groups; one is drawn for each step, by (seed, step)",
    )
    trainable: tuple[str, ...] | None = Field(
        None, description=f"parts to train, of {', '.join(PARTS)}; null: all of the model"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    lr_scale: dict[str, float] = Field(
        {},
        description="factors on the learning rate by part {vision: 0.1}, module {trunk.vision.clip: 0.1} or parameter "
        'pattern {"*norm*": 0.5}; factors of all matching keys are multiplied, 0 freezes',
    )
    layer_decay: dict[str, float] = Field(
        {},
        description=f"factor on the rate from each block to the one below, by part: {', '.join(DEEP_PARTS)}",
    )
    warmup_steps: int = Field(20, ge=0, description="steps of linear warm-up")
    decay_from: float = Field(0.5, ge=0, le=1, description="share of the steps after which cosine decay begins")
    final_lr: float = Field(0.02, ge=0, description="learning rate at the end, relative to `lr`")
    weight_decay: float = Field(0.05, ge=0)
    grad_clip: float = Field(1.0, gt=0, description="maximum norm of the gradient")
    cache_trunk: int = Field(
        0,
        ge=0,
        description="MiB per worker in which a stage that trains link_heads and decoders alone keeps what they read of "
        "the trunk, instead of computing it in every step; 0: off",
    )
    accumulate: int = Field(1, gt=0, description="micro-steps that a step's batch is split into, to save memory")
    loss_weights: dict[str, float] = Field({}, description=f"factors on losses: {', '.join(LOSSES)}")
    augment: AugmentSettings = AugmentSettings()
    branches: BranchSettings = BranchSettings()

    @model_validator(mode="after")
    def _parts(self) -> Stage:
        for name in (*(self.trainable or ()), *(n for n in self.lr_scale if not is_pattern(n))):
            if name not in PARTS:
                raise unknown("part", name, PARTS)
        for name, factor in self.layer_decay.items():
            if name not in DEEP_PARTS:
                raise unknown("part with layers", name, DEEP_PARTS, plural="parts with layers")
            if not 0 < factor <= 1:
                raise UserError(f"layer_decay of '{name}' must be in (0, 1], got {factor}", "invalid_config")
        for name, factor in self.lr_scale.items():
            if factor < 0:
                raise UserError(f"lr_scale of '{name}' must not be negative, got {factor}", "invalid_config")
        for name in self.loss_weights:
            if name not in LOSSES:
                raise unknown("loss", name, LOSSES, plural="losses")
        if self.trainable == ():
            raise UserError(
                f"stage '{self.name}' trains nothing; name parts under 'trainable', of {', '.join(PARTS)}",
                "invalid_config",
            )
        if not self.groups:
            raise UserError(f"stage '{self.name}' needs at least one task group under 'groups'", "invalid_config")
        return self


class Recipe(Settings):
    """A training run: model, data loading, workers, and stages."""

    name: str
    model: str = Field("nano", description="preset in configs/models, or path of a model YAML")
    init_from: str | None = Field(
        None,
        description="model folder, or name of bundled weights, to start from; '--init-from' overrides it; null: fresh "
        "weights",
    )
    seed: int = Field(0, ge=0)
    batch_size: int = Field(32, gt=0, description="images per optimizer step, over all workers")
    buckets: tuple[Size, ...] | BucketRange | None = Field(
        None,
        description="input sizes as [[height, width], ...] or {sides: [...], aspect_ratios: [...]}; images of a step "
        "share one; null: a square of the preset's image_size",
    )
    pack_tokens: int = Field(
        0,
        ge=0,
        description="pack samples into rows of at most this many tokens in the LLM's batch; 0: a row each, padded to "
        "the longest",
    )
    workers: int = Field(1, gt=0, description="Ray Train workers; each is one FSDP rank")
    readers: int = Field(
        1, gt=0, description="Ray Data tasks per worker that read, decode and augment; raise it if data_wait is high"
    )
    min_workers: int = Field(
        0, ge=0, description="continue with as few workers when nodes are lost; 0: wait for resources for all workers"
    )
    max_failures: int = Field(
        3,
        ge=-1,
        description="restarts without a new checkpoint, after lost workers, before a run fails; -1: no limit",
    )
    checkpoint_every: int = Field(0, ge=0, description="steps between checkpoints within a stage; 0: only at its end")
    keep_checkpoints: int = Field(
        5, ge=0, description="newest checkpoints to keep, in addition to the last of each stage; 0: all"
    )
    async_checkpoints: bool = Field(
        True,
        description="write checkpoints while training goes on, from a copy in the memory of the CPU; false: training "
        "waits, and needs no memory for a copy",
    )
    checkpoint_retries: int = Field(
        3, ge=0, description="further tries of a checkpoint that a bucket did not take, before the run ends"
    )
    log_samples: bool = Field(False, description="write the image ids of every step to RUN/samples")
    shard_group: int = Field(
        0,
        ge=0,
        description="workers that share one copy of the weights, e.g. the GPUs of a node; each further group of as "
        "many holds another (HSDP); 0: all workers share one",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the arithmetic; weights and losses stay fp32")
    activation_checkpointing: tuple[str, ...] = Field(
        (), description=f"parts whose blocks recompute activations in the backward pass; true: {', '.join(BLOCK_PARTS)}"
    )
    compile: tuple[str, ...] = Field(
        (), description=f"parts whose blocks to compile with torch.compile; true: {', '.join(BLOCK_PARTS)}"
    )
    lora: LoraSettings | None = Field(None, description="train low-rank adapters in place of full weights; null: off")
    ema: EmaSettings | None = Field(None, description="keep a moving average of the weights; null: off")
    mlflow: MlflowSettings | None = Field(None, description="also log to MLflow; null: off")
    wandb: WandbSettings | None = Field(None, description="also log to Weights & Biases; null: off")
    profile: tuple[int, int] | None = Field(
        None, description="steps to profile, [first, end]; '--profile 10:20' overrides it; null: off"
    )
    validation: ValidationSettings | None = Field(
        None, description="score a held-out split during training and keep the best model; null: off"
    )
    stages: tuple[Stage, ...]

    _buckets = field_validator("buckets", mode="before")(parse_buckets)
    _profile = field_validator("profile", mode="before")(parse_profile)
    _all_blocks = field_validator("activation_checkpointing", "compile", mode="before")(_blocks_of)

    @model_validator(mode="after")
    def _known_parts(self) -> Recipe:
        for name in (*self.activation_checkpointing, *self.compile):
            if name not in BLOCK_PARTS:
                raise unknown("part with blocks", name, BLOCK_PARTS, plural="parts with blocks")
        return self

    @model_validator(mode="after")
    def _stages(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if not names:
            raise UserError("a recipe needs at least one stage under 'stages'", "invalid_config")
        if self.min_workers > self.workers:
            raise UserError(
                f"min_workers {self.min_workers} is more than workers {self.workers}; lower it", "invalid_config"
            )
        if len(set(names)) != len(names):
            raise UserError(f"the stages of a recipe need different names, got {', '.join(names)}", "invalid_config")
        return self

    @property
    def tasks(self) -> list[str]:
        """Every task that a stage trains, in the registry's order."""
        named = {task for stage in self.stages for group in stage.groups for task in group.tasks}
        return [task for task in TASKS if task in named]

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
