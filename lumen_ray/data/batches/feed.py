"""Makes the training batches of plan steps: reads row groups, decodes, augments, lays out the prompts.

The same `BatchReader` runs in Ray Data CPU tasks (`dataset_for_rank`) and in the training process (`local_batches`), so
that both give the same bytes.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lumen_ray.data.batches.collate import Collator
from lumen_ray.data.batches.negatives import class_frequencies
from lumen_ray.data.batches.packing import Packing
from lumen_ray.data.batches.plan import Plan, join_rows, row_rng
from lumen_ray.data.batches.row_errors import RowPlace, row_named
from lumen_ray.data.images import Picture, decode_reduced
from lumen_ray.data.shards.schema import make_row
from lumen_ray.data.shards.shards import read_manifest, read_row_group, read_rows
from lumen_ray.errors import UserError
from lumen_ray.input_size import SizeRule
from lumen_ray.model.settings import ModelSettings
from lumen_ray.recipe import Recipe, Stage
from lumen_ray.structures import Size, as_size
from lumen_ray.tasks import TASKS, family_of, text_pieces
from lumen_ray.trunk.batch import TrainingBatch
from lumen_ray.trunk.tokenizer import LumenTokenizer

if TYPE_CHECKING:
    import ray.data

T = TypeVar("T")
R = TypeVar("R")
ReadItem = Callable[[dict[str, Any]], TrainingBatch]

STEPS_PER_BLOCK = 16  # plan steps of one Ray Data task; a task costs tens of milliseconds


def skeletons_of(manifest: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Keypoint names by class."""
    return {c["name"]: tuple(c["keypoints"]) for c in manifest["categories"] if c.get("keypoints")}


@dataclass
class BatchReader:
    """Makes the batch of one rank for one micro-step. Small enough to be pickled into every task."""

    shards: str
    recipe: Recipe
    tokenizer: LumenTokenizer
    input_size: int  # side of the square input of steps whose plan names no bucket
    skeletons: dict[str, tuple[str, ...]]
    frequencies: dict[str, int] = field(default_factory=dict)  # images per class
    token_side: int = 0  # input pixels per side of one image token; needed where the recipe packs
    prompt_layout: str = "branches"  # the model's
    input_rules: dict[str, SizeRule] = field(default_factory=dict)  # by decoder of the model
    links_see_image: bool = True  # the model's

    @classmethod
    def of(
        cls,
        shards: str,
        recipe: Recipe,
        tokenizer: LumenTokenizer,
        settings: ModelSettings,
        manifest: dict[str, Any],
    ) -> BatchReader:
        """The reader of a shard folder with this manifest for a model with these settings."""
        return cls(
            shards,
            recipe,
            tokenizer,
            settings.image_size,
            skeletons_of(manifest),
            class_frequencies(manifest),
            settings.token_side,
            settings.prompt_layout,
            settings.input_rules,
            settings.links_see_image,
        )

    def __call__(self, item: dict[str, Any]) -> TrainingBatch:
        """The batch of an item of `plan_items`, with images that cannot be read under `rejected`.

        Their rows stay, without image and annotations: the shape of a batch does not depend on broken images, and a
        rank whose images are all broken still takes part in the step. Raises `UserError` (`broken_row`), which names
        the row, for annotations that cannot be used.
        """
        started = time.perf_counter()
        stage = self.recipe.stages[item["stage"]]
        step, group = item["step"], stage.groups[item["group"]]
        tasks, size = group.tasks, as_size(item.get("bucket") or self.input_size)
        input_rules = {name: rule for name, rule in self.input_rules.items() if name in group.learning}
        samples, rejected = [], []
        for file, index, wanted in item["parts"]:
            numbers = range(wanted) if isinstance(wanted, int) else wanted
            for number, row in zip(numbers, read_row_group(self.shards, file, index, numbers), strict=True):
                place = RowPlace(file, index, number)
                with row_named(place, row["image_id"]):
                    sample, reason = _decoded(row, tasks, size, self._decoded_side(stage, size, row, input_rules))
                if reason is not None:  # a broken image is reported in the metrics and does not stop the run
                    rejected.append({"image_id": row["image_id"], "reason": reason, **place._asdict()})
                samples.append(replace(sample, place=place, rng_key=(self.recipe.seed, step, *place)))
        collator = Collator(
            self.tokenizer, size, tasks, self.skeletons, stage.branches, stage.augment, self.frequencies,
            self._packing(size), self.prompt_layout, input_rules, self.links_see_image,
        )  # fmt: skip
        batch = _collated(collator, samples)
        places = {sample.row["image_id"]: str(sample.place) for sample in samples}
        return replace(
            batch,
            step=step,
            places=[places[image_id] for image_id in batch.image_ids],
            possible_tasks=list(tasks),
            decoders=list(group.learning),
            distil=group.distil,
            rejected=rejected,
            read_s=time.perf_counter() - started,
        )

    @staticmethod
    def _decoded_side(stage: Stage, size: Size, row: dict[str, Any], input_rules: dict[str, SizeRule]) -> int:
        """Pixels that the longer side of an image must have once decoded: enough for the largest zoom in the largest
        input, of the trunk and of decoders."""
        shape = (max(1, row["height"]), max(1, row["width"]))
        sides = [max(size), *(max(rule.fit(shape)[0]) for rule in input_rules.values())]
        return math.ceil(max(sides) * max(1.0, stage.augment.scale[1]))

    def _packing(self, size: Size) -> Packing | None:
        if not self.recipe.pack_tokens:
            return None
        return Packing(self.recipe.pack_tokens, (size[0] // self.token_side) * (size[1] // self.token_side))


@dataclass(frozen=True)
class _Sample:
    """A row with its decoded images; where it is in the shards, and the key of its random generator."""

    row: dict[str, Any]
    image: Picture | None
    edited: Picture | None = None
    further: Sequence[Picture] = ()
    place: RowPlace = RowPlace("", 0, 0)
    rng_key: tuple[int, int, str, int, int] = (0, 0, "", 0, 0)


def _decoded(row: dict[str, Any], tasks: Sequence[str], size: Size, side: int) -> tuple[_Sample, str | None]:
    """A row with its images, decoded for `side` pixels; without them and its annotations, and the reason, if one cannot
    be read."""
    try:
        image = None if row["image"] is None else decode_reduced(row["image"], side)
        edited = None
        if "edit" in tasks and row["target_image"] is not None:
            edited = decode_reduced(row["target_image"], side)
        return _Sample(row, image, edited, _further_images(row, tasks, max(size))), None
    except UserError as error:
        empty = make_row(row["image_id"], None, (row["height"], row["width"]), row["source"])
        return _Sample(empty, None), str(error)


def _collated(collator: Collator, samples: Sequence[_Sample]) -> TrainingBatch:
    """The batch of some rows. If that fails, the rows are tried one by one, to name the one at fault."""

    def collate(some: Sequence[_Sample]) -> TrainingBatch:
        return collator(
            [sample.row for sample in some],
            [sample.image for sample in some],
            [row_rng(*sample.rng_key) for sample in some],
            [sample.edited for sample in some],
            [sample.further for sample in some],
        )

    try:
        return collate(samples)
    except MemoryError:
        raise
    except Exception:
        for sample in samples:
            with row_named(sample.place, sample.row["image_id"]):
                collate([sample])
        raise


def _further_images(row: dict[str, Any], tasks: Sequence[str], side: int) -> list[Picture]:
    """The further images of a row, decoded for an input of `side` pixels; none if no prompt of the tasks sees them.

    Raises `UserError` if one cannot be decoded.
    """
    asked = any(message["task"] in tasks and message["image_turns"] for message in row["messages"])
    if row["image"] is None or not asked or not all(TASKS[task].sees_image for task in tasks):
        return []
    found = []
    for number, image in enumerate(row["further_images"], start=2):
        try:
            found.append(decode_reduced(image["image"], side))
        except UserError as error:
            raise UserError(f"image {number}: {error}", error.reason) from None
    return found


def plan_items(plan: Plan, rank: int, world_size: int, start: int = 0) -> list[dict[str, Any]]:
    """The plan of one rank from step `start` on, one dict per micro-step.

    A whole row group takes a few bytes; with buckets every row number is listed (8 bytes a row or more).
    """
    items = []
    for s in (plan[t] for t in range(start, len(plan))):
        micro_steps = plan.recipe.stages[s.stage].accumulate
        for number in range(rank * micro_steps, (rank + 1) * micro_steps):
            parts = join_rows(s.share(number, world_size * micro_steps))
            items.append({"step": s.step, "stage": s.stage, "group": s.group, "bucket": s.bucket, "parts": parts})
    return items


def local_batches(reader: BatchReader, plan: Plan, start: int = 0) -> Iterator[TrainingBatch]:
    """The batches of a single rank, without Ray."""
    return (reader(item) for item in plan_items(plan, 0, 1, start))


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays: torch's default takes milliseconds per batch, also in the training process."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


def to_bytes(batch: TrainingBatch) -> bytes:
    """Pickles a batch of CPU tensors; `pickle.loads` returns writable tensors."""
    out = io.BytesIO()
    _Pickler(out, protocol=5).dump(batch)
    return out.getvalue()


def one_ahead(make: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yields `make(item)` of each item; a thread makes the next one while the last is consumed."""
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for item in items:
            made = thread.submit(make, item)
            if waiting is not None:
                yield waiting.result()
            waiting = made
        if waiting is not None:
            yield waiting.result()


def dataset_for_rank(reader: ReadItem, items: list[dict[str, Any]], readers: int = 1) -> ray.data.Dataset:
    """A Ray Data pipeline that reads, decodes and augments in `readers` CPU tasks: a block row per item, in plan order.

    The tasks request no logical CPUs, since the rank has reserved theirs and others would make them wait, and run on
    the node of this process. `preserve_order` is set in the context of this data set only.
    """
    import ray.data

    from lumen_ray.data.batches.throttle import SchedulerThrottle

    def read(block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for batch in one_ahead(lambda text: to_bytes(reader(json.loads(text))), block["item"]):
            yield {"batch": [batch]}

    blocks = max(1, -(-len(items) // STEPS_PER_BLOCK))
    dataset = ray.data.from_items([{"item": json.dumps(item)} for item in items], override_num_blocks=blocks)
    dataset.context.execution_options.preserve_order = True
    dataset.context.target_max_block_size = 1 << 20
    dataset.context.custom_execution_callback_classes = [SchedulerThrottle]
    pool = ray.data.TaskPoolStrategy(size=readers)
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return dataset.map_batches(read, batch_size=None, compute=pool, num_cpus=0, label_selector=here)


def ray_batches(iterator: ray.data.DataIterator) -> Iterator[TrainingBatch]:
    """The batches of a pipeline of `dataset_for_rank`."""
    for row in iterator.iter_batches(batch_size=1, batch_format=None, prefetch_batches=2):
        yield pickle.loads(row["batch"][0].as_buffer())


def read_texts(shards: str | Path, limit_rows: int = 4000, families: Iterable[str] = ("perception",)) -> list[str]:
    """The texts to train a tokenizer on: those of the first rows of the shards, and all prompts for their classes.

    `families`: the link families of the model.
    """
    manifest = read_manifest(shards)
    texts: list[str] = []
    skeletons = skeletons_of(manifest)
    for category in manifest["categories"]:
        for task in TASKS.values():
            if not task.is_text and task.result != "image":
                texts += [task.prompt(category["name"], t) for t in range(len(task.templates))]
        for name in skeletons.get(category["name"], ()):
            texts.append(TASKS["pose"].keypoint_prompt(name, category["name"]))
    for row in islice(read_rows(shards, ["phrases", "messages"]), max(0, limit_rows)):
        texts += [p["phrase"] for p in row["phrases"] or ()]
        for message in row["messages"] or ():
            for turn in message["turns"]:
                linked = bool(message.get("links")) and turn["role"] == "assistant"
                # routing tokens are in the vocabulary already
                texts += [words for words, _ in text_pieces(turn["content"])] if linked else [turn["content"]]
    for task in TASKS.values():
        if task.result == "image" and task.routing_token and family_of(task.routing_token).name in families:
            texts += [task.prompt(template=t) for t in range(len(task.templates))]
    return texts
