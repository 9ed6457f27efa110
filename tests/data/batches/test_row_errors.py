"""Errors in rows name the file, the row group and the row."""

import pickle

import pytest
from support.tiny_models import SIDE, tiny_tokenizer

from lumen_ray.data.batches.feed import BatchReader, plan_items, skeletons_of
from lumen_ray.data.batches.plan import Plan
from lumen_ray.data.batches.row_errors import RowPlace, row_named
from lumen_ray.data.scenes import render as scenes
from lumen_ray.data.shards.shards import ShardWriter, build_manifest, read_manifest, read_row_group, write_manifest
from lumen_ray.errors import UserError
from lumen_ray.recipe import Recipe

RECIPE = Recipe.model_validate({"name": "r", "batch_size": 8, "stages": [{"name": "one", "steps": 1}]})
CATEGORIES = [{"name": name, "keypoints": list(scenes.SKELETONS.get(name, ()))} for name in scenes.CLASSES]


def batch_of(folder, change):
    """The batch of 8 scenes in row groups of 4, the sixth changed by `change`."""
    rows = [scenes.scene_row(0, index, SIDE) for index in range(8)]
    change(rows[5])
    with ShardWriter(folder, "part-00000.parquet", rows_per_group=4) as writer:
        for row in rows:
            writer.write(row)
    write_manifest(folder, build_manifest([writer.entry], categories=CATEGORIES))
    manifest = read_manifest(folder)
    reader = BatchReader(str(folder), RECIPE, tiny_tokenizer(), SIDE, skeletons_of(manifest))
    return reader(plan_items(Plan(manifest, RECIPE), 0, 1)[0])


def test_annotations_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError) as error:
        batch_of(tmp_path, lambda row: row["instances"][0].update(keypoints=[1.0, 2.0]))
    place, _, why = str(error.value).partition(" cannot be trained on: ")
    assert place == "part-00000.parquet, row group 1, row 1 (image scene-0-0000005)"
    assert why.startswith("ValueError in transforms.py:")
    assert error.value.reason == "broken_row" and "\n" not in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_an_image_that_cannot_be_read_is_left_out_and_named(tmp_path):
    batch = batch_of(tmp_path, lambda row: row.update(image=b"nothing"))
    (rejected,) = batch.rejected
    assert {**rejected, "reason": ""} == {
        "image_id": "scene-0-0000005", "reason": "", "file": "part-00000.parquet", "row_group": 1, "row": 1
    }  # fmt: skip
    assert rejected["reason"].startswith("the image cannot be read")


def test_every_row_of_a_batch_knows_its_place_and_source(tmp_path):
    batch = batch_of(tmp_path, lambda row: None)
    numbers = [int(image_id[-7:]) for image_id in batch.image_ids]
    assert batch.places == [str(RowPlace("part-00000.parquet", n // 4, n % 4)) for n in numbers]
    assert batch.sources == ["scenes"] * 8


def test_too_little_memory_is_not_the_fault_of_a_row():
    with pytest.raises(MemoryError), row_named(RowPlace("a", 0, 0), "b"):
        raise MemoryError


def test_a_manifest_that_promises_more_rows(tmp_path):
    batch_of(tmp_path, lambda row: None)
    with pytest.raises(UserError, match="row group 1 of shard file 'part-00000.parquet' has 4 rows"):
        read_row_group(tmp_path, "part-00000.parquet", 1, [4])
