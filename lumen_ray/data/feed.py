"""Plan steps -> training batches: read the row groups, decode, augment, lay out the prompts.

One function does it wherever it runs: in Ray Data CPU tasks (`dataset_for_rank`) or in the training process
(`local_batches`), so that both see the same bytes.
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from lumen_ray.data.collate import Collator
from lumen_ray.data.images import decode
from lumen_ray.data.mixture import Plan, row_rng
from lumen_ray.data.schema import make_row
from lumen_ray.data.shards import read_manifest, read_row_group
from lumen_ray.errors import UserError
from lumen_ray.model.tokenizer import LumenTokenizer
from lumen_ray.tasks import TASKS
from lumen_ray.train.recipe import Recipe

if TYPE_CHECKING:
    import ray.data

STEPS_PER_BLOCK = 8  # plan steps one Ray Data task works off; tasks cost tens of milliseconds each
READ_CPUS = 0.25  # logical CPUs of a rank's reading task; below one, so that a machine of 2 cores has room for 2 ranks


def skeletons_of(manifest: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Keypoint names by class."""
    return {c["name"]: tuple(c["keypoints"]) for c in manifest["categories"] if c.get("keypoints")}


@dataclass
class BatchReader:
    """Makes the batch of one rank for one plan step. Small enough to be pickled into every task."""

    shards: str
    recipe: Recipe
    tokenizer: LumenTokenizer
    input_size: int
    skeletons: dict[str, tuple[str, ...]]

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """`item` as of `plan_items` -> the batch, with the pictures that could not be read under `rejected`.

        Their rows stay, without picture and annotations: a batch has the same shape whatever is broken, and a rank
        whose pictures are all broken still takes part in the step.
        """
        started = time.perf_counter()
        stage = self.recipe.stages[item["stage"]]
        step, tasks = item["step"], stage.groups[item["group"]].tasks
        rows, images, rngs, rejected = [], [], [], []
        for file, index, _ in item["parts"]:
            for number, row in enumerate(read_row_group(self.shards, file, index)):
                try:
                    image = None if row["image"] is None else decode(row["image"])
                except UserError as error:  # a bad picture is reported with its step and does not stop the job
                    rejected.append({"image_id": row["image_id"], "reason": str(error)})
                    row, image = make_row(row["image_id"], None, (row["height"], row["width"]), row["source"]), None
                rows.append(row)
                images.append(image)
                rngs.append(row_rng(self.recipe.seed, step, file, index, number))
        collator = Collator(self.tokenizer, self.input_size, tasks, self.skeletons, stage.branches, stage.augment)
        batch = collator(rows, images, rngs)
        return batch | {"step": step, "rejected": rejected, "read_s": time.perf_counter() - started}


def plan_items(plan: Plan, rank: int, world_size: int, start: int = 0) -> list[dict[str, Any]]:
    """The plan of one rank from step `start` on, a few bytes a step."""
    steps = (plan[t] for t in range(start, len(plan)))
    return [
        {"step": s.step, "stage": s.stage, "group": s.group, "parts": list(s.share(rank, world_size))} for s in steps
    ]


def local_batches(reader: BatchReader, plan: Plan, start: int = 0) -> Iterator[dict[str, Any]]:
    """Batches of a single process, without Ray."""
    return (reader(item) for item in plan_items(plan, 0, 1, start))


def dataset_for_rank(reader: BatchReader, items: list[dict[str, Any]]) -> ray.data.Dataset:
    """A Ray Data pipeline that reads, decodes and augments on CPU tasks; one block row per step, in plan order.

    `preserve_order` is set on the data set's own context, so that other data sets of the process keep theirs.
    """
    import ray.data

    from lumen_ray.data.pacing import Paced

    def read(block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for text in block["item"]:
            yield {"batch": [pickle.dumps(reader(json.loads(text)), protocol=5)]}

    blocks = max(1, -(-len(items) // STEPS_PER_BLOCK))
    dataset = ray.data.from_items([{"item": json.dumps(item)} for item in items], override_num_blocks=blocks)
    dataset.context.execution_options.preserve_order = True
    dataset.context.target_max_block_size = 1 << 20
    dataset.context.custom_execution_callback_classes = [Paced]
    return dataset.map_batches(read, batch_size=None, compute=ray.data.TaskPoolStrategy(size=1), num_cpus=READ_CPUS)


def ray_batches(iterator: ray.data.DataIterator) -> Iterator[dict[str, Any]]:
    """Batches out of the pipeline of `dataset_for_rank`."""
    for row in iterator.iter_batches(batch_size=1, batch_format=None, prefetch_batches=2):
        yield pickle.loads(row["batch"][0].as_py())


def read_texts(shards: str | Path, limit_rows: int = 4000) -> list[str]:
    """Every text of the first rows of the shards, and every prompt of their classes: what a tokenizer learns from."""
    manifest = read_manifest(shards)
    texts: list[str] = []
    skeletons = skeletons_of(manifest)
    for category in manifest["categories"]:
        for task in TASKS.values():
            if not task.is_text:
                texts += [task.prompt(category["name"], t) for t in range(len(task.templates))]
        pose = TASKS["pose"].keypoint_template
        for name in skeletons.get(category["name"], ()):
            texts.append(pose.replace("{keypoint}", name).replace("{}", category["name"]))
    columns = ["phrases", "messages"]
    for file in manifest["files"]:
        table = pq.read_table(Path(shards) / file["path"], columns=columns)
        for row in table.slice(0, max(0, limit_rows)).to_pylist():
            texts += [p["phrase"] for p in row["phrases"] or ()]
            texts += [turn["content"] for m in row["messages"] or () for turn in m["turns"]]
        limit_rows -= table.num_rows
        if limit_rows <= 0:
            break
    return texts
