"""Write shard folders in parallel on Ray: one task per output file, each a pure function of its unit of work.

So the files do not depend on how many tasks ran at once. Files are written into a staging folder beside the output
and moved into place when all are done, the manifest last: a job that dies leaves what was there before untouched.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lumen_ray.data import scenes, shards
from lumen_ray.data.sources import coco, coco_json
from lumen_ray.errors import UserError

Progress = Callable[[int, int], None]  # records done, records in all
Unit = dict[str, Any]  # {"number", "records", "payload"}: one output file
ROWS_PER_FILE = 512
_STAGING = ".staging"


@dataclass
class _Job:
    """What `_prepare` needs: the units of work, `write(unit, folder)` for one of them, and what the manifest says.

    `inputs`: number of records per kind that came in; `rejected`: those set aside before any unit ran.
    """

    output: Path
    units: list[Unit]
    write: Callable[[Unit, str], dict[str, Any]]
    categories: list[dict[str, Any]]
    origin: dict[str, Any]
    inputs: dict[str, int]
    rejected: list[dict[str, str]] = field(default_factory=list)
    overwrite: bool = False
    workers: int | None = None
    progress: Progress | None = None


def prepare_scenes(
    output: str | Path,
    num: int,
    seed: int = 0,
    *,
    side: int = 128,
    rows_per_group: int = shards.ROWS_PER_GROUP,
    rows_per_file: int = ROWS_PER_FILE,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Render `num` synthetic scenes of the set `seed` into the shard folder `output`; returns a summary.

    Scenes are independent draws, so their order needs no shuffling. `workers`: most tasks at once (None: as the
    cluster allows, 0: in this process, without Ray). Raises `UserError` for an output that already holds shards,
    unless `overwrite`.
    """
    if num < 1:
        raise UserError(f"the number of scenes must be at least 1, got {num}", "invalid_config")
    if side < 64:
        raise UserError(f"scenes need a side of at least 64 pixels, got {side}", "invalid_config")
    if seed < 0:
        raise UserError(f"the seed must not be negative, got {seed}", "invalid_config")
    _check_rows(rows_per_group, rows_per_file)
    bounds = range(0, num, rows_per_file)
    units = [_unit(i, range(first, min(first + rows_per_file, num))) for i, first in enumerate(bounds)]

    def write(unit: Unit, folder: str) -> dict[str, Any]:
        rows = ((scenes.scene_row(seed, index, side), [], 0) for index in json.loads(unit["payload"]))
        return _write_file(unit, folder, rows, rows_per_group)

    categories = [
        {
            "name": name,
            "keypoints": list(scenes.SKELETONS.get(name, ())),
            "skeleton": [list(edge) for edge in scenes.SKELETON_EDGES] if name in scenes.SKELETONS else [],
        }
        for name in scenes.CLASSES
    ]
    origin = {"kind": "scenes", "seed": seed, "num": num, "side": side}
    return _prepare(
        _Job(Path(output), units, write, categories, origin, {"images": num}, [], overwrite, workers, progress)
    )


def prepare_coco(
    output: str | Path,
    annotations: Sequence[str | Path],
    images: str | Path,
    *,
    shuffle_seed: int = 0,
    source: str = "coco",
    rows_per_group: int = shards.ROWS_PER_GROUP,
    rows_per_file: int = ROWS_PER_FILE,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Convert COCO json files and their folder of images into the shard folder `output`; returns a summary.

    Rows are shuffled once with `shuffle_seed`. Images and annotations that cannot be used go to `rejected.parquet`
    with their reason. Raises `UserError` for missing or malformed files, when not one image can be used, and for an
    output that already holds shards, unless `overwrite`. `workers`: as in `prepare_scenes`.
    """
    _check_rows(rows_per_group, rows_per_file)
    images = Path(images).absolute()
    if not images.is_dir():
        raise UserError(f"image folder '{images}' does not exist", "missing_images")
    loaded = coco_json.load(annotations)
    if not loaded.images:
        raise UserError(f"no image is listed in {', '.join(map(str, annotations))}", "empty_input")
    order = np.random.default_rng(shuffle_seed).permutation(len(loaded.images))
    bounds = range(0, len(order), rows_per_file)
    units = [
        _unit(i, [vars(loaded.images[j]) for j in order[first : first + rows_per_file]])
        for i, first in enumerate(bounds)
    ]
    keypoints = {category["name"]: len(category["keypoints"]) for category in loaded.categories}

    def write(unit: Unit, folder: str) -> dict[str, Any]:
        records = (coco_json.CocoImage(**record) for record in json.loads(unit["payload"]))
        rows = (_coco_row(record, images, keypoints, source) for record in records)
        return _write_file(unit, folder, rows, rows_per_group)

    origin = {
        "kind": "coco",
        "annotations": [Path(path).name for path in annotations],
        "shuffle_seed": shuffle_seed,
        "merged_annotations": loaded.merged,
    }
    inputs = {"images": len(loaded.images), "annotations": loaded.listed - loaded.merged}
    return _prepare(
        _Job(
            Path(output), units, write, loaded.categories, origin, inputs, loaded.rejected, overwrite, workers, progress
        )
    )


def _check_rows(rows_per_group: int, rows_per_file: int) -> None:
    for name, value in (("rows_per_group", rows_per_group), ("rows_per_file", rows_per_file)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}", "invalid_config")


def _unit(number: int, records: Sequence[Any]) -> Unit:
    return {"number": number, "records": len(records), "payload": json.dumps(list(records))}


def _coco_row(record: coco_json.CocoImage, images: Path, keypoints: dict[str, int], source: str) -> Any:
    try:
        path = coco.find_image(images, record.file_name)
        data = path.read_bytes() if path else None
    except OSError:  # no permission, or a name the file system cannot hold
        data = None
    row, rejected = coco.to_row(record, data, keypoints, source)
    written = len(row["instances"]) + len(row["messages"]) if row else 0
    return row, rejected, written


def _write_file(unit: Unit, folder: str, rows: Iterator[Any], rows_per_group: int) -> dict[str, Any]:
    """Write one file; `rows` yields (row or None, rejected records, number of annotations written)."""
    rejected: list[dict[str, str]] = []
    annotations = images_rejected = 0
    with shards.ShardWriter(folder, f"part-{unit['number']:05d}.parquet", rows_per_group) as writer:
        for row, lost, written in rows:
            rejected += lost
            annotations += written
            if row is None:
                images_rejected += 1
            else:
                writer.write(row)
    counts = {"records": unit["records"], "annotations": annotations, "images_rejected": images_rejected}
    return {"number": unit["number"], "entry": writer.entry, "rejected": rejected, **counts}


def _run(job: _Job, folder: str) -> list[dict[str, Any]]:
    """The results of all units in their order, computed here (`workers=0`) or by Ray Data tasks."""
    total, done, results = sum(unit["records"] for unit in job.units), 0, []
    for result in _run_here(job, folder) if job.workers == 0 else _run_on_ray(job, folder):
        done += result["records"]
        results.append(result)
        if job.progress is not None:
            job.progress(done, total)
    return sorted(results, key=lambda result: result["number"])


def _run_here(job: _Job, folder: str) -> Iterator[dict[str, Any]]:
    for unit in job.units:
        yield job.write(unit, folder)


def _run_on_ray(job: _Job, folder: str) -> Iterator[dict[str, Any]]:
    from lumen_ray import ray_env

    ray_env.prepare_environment()
    import ray

    if not ray.is_initialized():
        ray_env.init_local()
    write = job.write  # the task carries this alone, not the job with all its units

    def write_batch(batch: dict[str, Any]) -> dict[str, Any]:
        # results as json: their nested, sometimes empty lists have no fixed Arrow type
        fields = zip(batch["number"], batch["records"], batch["payload"], strict=True)
        written = [write({"number": int(n), "records": int(r), "payload": str(p)}, folder) for n, r, p in fields]
        return {"result": [json.dumps(result) for result in written]}

    dataset = ray.data.from_items(job.units, override_num_blocks=len(job.units))
    dataset = dataset.map_batches(write_batch, batch_size=1, compute=ray.data.TaskPoolStrategy(size=job.workers))
    for row in dataset.iter_rows():
        yield json.loads(row["result"])


def _prepare(job: _Job) -> dict[str, Any]:
    """Run the units into a staging folder, then publish files, `rejected.parquet` and manifest; returns the summary."""
    output = job.output.absolute()
    _check_output(output, job.overwrite)
    staging = output / _STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        results = _run(job, str(staging))
        rejected = [*job.rejected, *(record for result in results for record in result["rejected"])]
        entries = [result["entry"] for result in results if result["entry"] is not None]
        if not entries:
            raise UserError(
                f"not one of {job.inputs['images']} images can be used; the first: "
                f"'{rejected[0]['image_id']}': {rejected[0]['reason']}",
                "empty_input",
            )
        counts = _count(job, results, rejected)
        manifest = shards.build_manifest(entries, categories=job.categories, counts=counts, origin=job.origin)
        _publish(output, staging, manifest, rejected)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    size = sum(entry["bytes"] for entry in entries)
    summary = {key: manifest[key] for key in ("rows", "tasks", "counts", "rejected")}
    return {"output": str(output), "files": len(entries), "bytes": size, **summary}


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"output '{output}' is a file; give a folder", "invalid_output")
    if (output / shards.MANIFEST).exists() and not overwrite:
        raise UserError(
            f"'{output}' already holds shards; give another output folder or allow overwriting", "output_exists"
        )


def _count(job: _Job, results: list[dict[str, Any]], rejected: list[Any]) -> dict[str, dict[str, int]]:
    """In, written and rejected records per kind. Counted apart, so that the manifest's check means something."""
    images = sum(result["entry"]["rows"] for result in results if result["entry"])
    written = {"images": images, "annotations": sum(result["annotations"] for result in results)}
    lost = {"images": sum(result["images_rejected"] for result in results)}
    lost["annotations"] = len(rejected) - lost["images"]
    return {
        kind: {"in": number, "written": written[kind], "rejected": lost[kind]} for kind, number in job.inputs.items()
    }


def _publish(output: Path, staging: Path, manifest: dict[str, Any], rejected: list[dict[str, str]]) -> None:
    """Move the staged files into place; the old manifest goes first and the new one comes last."""
    (output / shards.MANIFEST).unlink(missing_ok=True)
    for old in output.glob("part-*.parquet"):
        old.unlink()
    for entry in manifest["files"]:
        (staging / entry["path"]).replace(output / entry["path"])
    shards.write_rejected(output, rejected)
    shards.write_manifest(output, manifest)
