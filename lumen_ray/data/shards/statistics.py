"""Statistics of a shard folder, counted in one pass: a few thousand rows in memory at a time, no image read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lumen_ray.data import urls
from lumen_ray.data.shards.shards import open_file, read_manifest, read_rejected

BATCH_ROWS = 2048
#: COCO's limits between small, medium and large objects: areas of 32 and 96 pixels squared
OBJECT_SIZES = (("small", 32**2), ("medium", 96**2), ("large", float("inf")))
#: upper limits of an image's longer side, pixels
IMAGE_SIDES = (128, 256, 512, 768, 1024, 1536, 2048, 4096)
#: upper limits of the number of objects in an image
PER_IMAGE = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)

# leaves of the columns, so that neither images nor the run lengths of masks are read
_COLUMNS = [
    "height", "width", "source", "classes",
    *(f"instances.list.element.{leaf}" for leaf in ("phrase", "keypoints", "crowd", "area", "mask.size")),
    "phrases.list.element.task", "phrases.list.element.instances",
    "messages.list.element.task", "regions.list.element.kind",
    "further_images.list.element.height", "further_images.list.element.width",
]  # fmt: skip


@dataclass
class Statistics:
    """Counts of a shard folder. Histograms are ``label -> number`` in order."""

    rows: int = 0
    files: int = 0
    bytes: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    tasks: dict[str, int] = field(default_factory=dict)  # rows per task
    #: objects, phrases and messages per task, regions per kind, images of rows beyond their first
    items: Counter[str] = field(default_factory=Counter)
    class_instances: Counter[str] = field(default_factory=Counter)
    class_images: Counter[str] = field(default_factory=Counter)
    class_absent: Counter[str] = field(default_factory=Counter)  # images annotated as not containing it
    image_sides: Counter[int] = field(default_factory=Counter)  # upper limit of the longer side -> images
    object_sizes: Counter[str] = field(default_factory=Counter)
    per_image: Counter[int] = field(default_factory=Counter)  # number of objects -> images annotated for objects
    masks: int = 0
    keypoints: int = 0
    crowds: int = 0
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # kind of record -> in, written, rejected
    changed: dict[str, int] = field(default_factory=dict)  # parts of records that were cut or dropped, by change
    notes: list[str] = field(default_factory=list)  # how the input was read
    reasons: Counter[str] = field(default_factory=Counter)  # rejected records by `general` reason
    examples: dict[str, str] = field(default_factory=dict)  # general reason -> one record rejected for it

    @property
    def instances(self) -> int:
        return self.class_instances.total()

    def share(self, number: int) -> float:
        """`number` as a fraction of all objects, 0..1; 0 if there are none."""
        return number / self.instances if self.instances else 0.0

    def image_side_histogram(self) -> dict[str, int]:
        return _histogram(self.image_sides, IMAGE_SIDES, "{}", "over {}")

    def per_image_histogram(self) -> dict[str, int]:
        return _histogram(self.per_image, PER_IMAGE, "{}", "over {}")

    def median_per_image(self) -> float:
        """The median number of objects per image; 0 without images."""
        if not self.per_image:
            return 0.0
        numbers, times = zip(*sorted(self.per_image.items()), strict=True)
        return float(numbers[int(np.searchsorted(np.cumsum(times), sum(times) / 2))])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        data = {name: dict(v) if isinstance(v, Counter) else v for name, v in vars(self).items()}
        return data | {
            "instances": self.instances,
            "image_sides": self.image_side_histogram(),
            "per_image": self.per_image_histogram(),
            "median_per_image": self.median_per_image(),
        }


def _histogram(values: Counter[int], limits: Sequence[int], within: str, beyond: str) -> dict[str, int]:
    """Values counted in ranges with upper `limits`, labelled ``low-high``; empty ranges at both ends are left out."""
    found: dict[str, int] = {}
    low = 0
    for limit in limits:
        label = within.format(limit if limit - low <= 1 else f"{low + 1}-{limit}")
        found[label] = sum(n for value, n in values.items() if (low < value <= limit) or value == limit == 0)
        low = limit
    found[beyond.format(low)] = sum(n for value, n in values.items() if value > low)
    labels = list(found)
    filled = [i for i, label in enumerate(labels) if found[label]]
    return {label: found[label] for label in labels[filled[0] : filled[-1] + 1]} if filled else {}


def gather(folder: urls.Location, progress: Callable[[int, int], None] | None = None) -> Statistics:
    """Counts the contents of a shard folder. `progress`: called with (rows done, total rows).

    Raises `UserError` if the folder has no shards, shards of another schema version, or damaged files.
    """
    manifest = read_manifest(folder)
    s = Statistics(files=len(manifest["files"]), bytes=sum(f["bytes"] for f in manifest["files"]))
    s.tasks, s.counts = dict(manifest["tasks"]), manifest.get("counts", {})
    s.changed, s.notes = manifest.get("changed", {}), manifest.get("notes", [])
    for entry in manifest["files"]:
        with open_file(folder, entry["path"]) as parquet:
            for batch in parquet.iter_batches(BATCH_ROWS, columns=_COLUMNS):
                _count(s, batch)
                if progress is not None:
                    progress(s.rows, manifest["rows"])
    s.items.update({"objects": s.instances})
    s.items = +s.items  # without zeros
    for record in read_rejected(folder):
        reason = general(record["reason"])
        s.reasons[reason] += 1
        s.examples.setdefault(reason, f"{record['image_id'] or record['origin']}: {record['reason']}")
    return s


def _count(s: Statistics, batch: pa.RecordBatch) -> None:
    s.rows += batch.num_rows
    s.sources.update(_values(batch["source"]))
    _count_images(s, batch["height"], batch["width"])
    if "further_images" in batch.schema.names:  # not in files written before there were several images
        further = batch["further_images"]
        s.items["further images"] += len(pc.list_flatten(further))
        _count_images(s, _leaf(further, "height"), _leaf(further, "width"))
    s.items.update(_values(_leaf(batch["phrases"], "task")))
    s.items.update(_values(_leaf(batch["messages"], "task")))
    s.items.update({f"{kind} regions": n for kind, n in _values(_leaf(batch["regions"], "kind")).items()})
    targets = _leaf(batch["phrases"], "instances")
    s.items["phrases with nothing to find"] += int(pc.sum(pc.equal(pc.list_value_length(targets), 0)).as_py() or 0)
    _count_objects(s, batch)


def _count_images(s: Statistics, heights: pa.Array, widths: pa.Array) -> None:
    longer = pc.drop_null(pc.max_element_wise(heights, widths)).to_numpy()
    limits = np.array([*IMAGE_SIDES, IMAGE_SIDES[-1] + 1])  # the last one for all larger images
    s.image_sides.update(limits[np.searchsorted(limits[:-1], longer[longer > 0])].tolist())


def _count_objects(s: Statistics, batch: pa.RecordBatch) -> None:
    column = batch["instances"]
    names = _leaf(column, "phrase")
    s.class_instances.update(_values(names))
    owners = pc.list_parent_indices(column)
    shown = pa.table({"row": owners, "name": names}).group_by(["row", "name"]).aggregate([])
    s.class_images.update(_values(shown["name"]))
    annotated = batch["classes"]
    listed = pa.table({"row": pc.list_parent_indices(annotated), "name": pc.list_flatten(annotated)})
    absent = listed.join(shown, ["row", "name"], join_type="left anti")
    s.class_absent.update(_values(absent["name"]))
    number, looked_for = (pc.fill_null(pc.list_value_length(c), 0).to_numpy() for c in (column, annotated))
    s.per_image.update(number[(number > 0) | (looked_for > 0)].tolist())
    areas = pc.fill_null(_leaf(column, "area"), 0.0).to_numpy(zero_copy_only=False)
    which = np.searchsorted([limit for _, limit in OBJECT_SIZES[:-1]], areas, side="right")
    s.object_sizes.update({name: int((which == i).sum()) for i, (name, _) in enumerate(OBJECT_SIZES)})
    s.masks += _given(_leaf(column, "mask"))
    s.keypoints += _given(_leaf(column, "keypoints"))
    s.crowds += int(pc.sum(_leaf(column, "crowd")).as_py() or 0)


def _leaf(column: pa.Array, name: str) -> pa.Array:
    """The field `name` of all elements of a column of lists of structs, null structs included."""
    return pc.struct_field(pc.list_flatten(column), name)


def _given(values: pa.Array) -> int:
    return len(values) - values.null_count


def _values(array: pa.Array | pa.ChunkedArray) -> Counter[str]:
    return Counter({v["values"]: v["counts"] for v in pc.value_counts(array).to_pylist() if v["values"] is not None})


_PARTICULAR = re.compile(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|-?\d+(?:\.\d+)?(?:x\d+)?")


def general(reason: str) -> str:
    """A reason without the details of one record (quoted names, numbers, lists), so that equal ones can be counted."""
    return _PARTICULAR.sub("…", reason)
