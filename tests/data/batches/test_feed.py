"""Plan steps to batches: the same bytes each time, and broken images are reported."""

import pickle
import threading

import numpy as np
import pytest
import torch
from support.tiny_models import SIDE, tiny_model, tiny_tokenizer

from lumen_ray.bench.workload import batches_equal
from lumen_ray.data.batches.feed import (
    BatchReader,
    local_batches,
    one_ahead,
    plan_items,
    read_texts,
    skeletons_of,
    to_bytes,
)
from lumen_ray.data.batches.plan import Plan
from lumen_ray.data.scenes import render as scenes
from lumen_ray.data.shards.prepare import prepare_source
from lumen_ray.data.shards.schema import make_message
from lumen_ray.data.shards.shards import ShardWriter, build_manifest, read_manifest, read_row_group, write_manifest
from lumen_ray.data.sources.scenes import ScenesSource
from lumen_ray.recipe import Recipe

AUGMENT = {"flip_x": True, "turn": True, "scale": [0.8, 1.2], "shift": 0.1, "color": 0.3}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("feed") / "shards"
    prepare_source(folder, ScenesSource(16, side=SIDE), rows_per_group=4, workers=0)
    return folder


def recipe(**changes):
    stages = [{"name": "one", "steps": 5, "augment": AUGMENT}]
    return Recipe.model_validate({"name": "r", "batch_size": 8, "stages": stages} | changes)


def reader(folder):
    return BatchReader(str(folder), recipe(), tiny_tokenizer(), SIDE, skeletons_of(read_manifest(folder)))


def test_a_step_gives_the_same_batch_each_time(shards):
    plan = Plan(read_manifest(shards), recipe())
    items = plan_items(plan, 0, 1)
    batches = [reader(shards)(item) for item in items]
    for item, batch in zip(items, batches, strict=True):
        assert batches_equal(batch, reader(shards)(item))
    assert [b.step for b in local_batches(reader(shards), plan, 3)] == [3, 4]
    assert batches_equal(next(local_batches(reader(shards), plan, 3)), batches[3])
    assert not torch.equal(batches[0].images, batches[1].images)


def test_a_batch_comes_out_of_its_bytes_as_it_went_in(shards):
    batch = reader(shards)(plan_items(Plan(read_manifest(shards), recipe()), 0, 1)[0])
    found = pickle.loads(to_bytes(batch))
    assert batches_equal(found, batch)
    assert found.images.dtype == torch.uint8
    assert found.has_image.dtype == torch.bool
    found.images.zero_()  # may be written to, without a word to the batch it came from
    assert batch.images.any()


def test_two_ranks_read_the_halves_of_the_batch(shards):
    plan = Plan(read_manifest(shards), recipe(), 2)
    read = reader(shards)
    whole = read(plan_items(plan, 0, 1)[2])
    halves = [read(plan_items(plan, rank, 2)[2]) for rank in range(2)]
    assert torch.equal(torch.cat([h.images for h in halves]), whole.images)
    assert halves[0].tasks + halves[1].tasks == whole.tasks


def test_a_step_of_more_images_than_there_are_has_some_again(tmp_path):
    """Buckets deal out rows, so the end of an epoch and the beginning of the next can meet in one row group."""
    prepare_source(tmp_path / "few", ScenesSource(5, side=SIDE), rows_per_group=5, workers=0)
    made = recipe(buckets=[[SIDE, SIDE], [SIDE, 2 * SIDE]])
    read = BatchReader(str(tmp_path / "few"), made, tiny_tokenizer(), SIDE, {})
    names = [row["image_id"] for row in read_row_group(tmp_path / "few", "part-00000.parquet", 0)]
    for item in plan_items(Plan(read_manifest(tmp_path / "few"), made), 0, 1):
        numbers = [number for _, _, rows in item["parts"] for number in rows]
        assert len(numbers) == 8
        assert read(item).image_ids == [names[number] for number in numbers]


def test_items_start_at_a_step(shards):
    plan = Plan(read_manifest(shards), recipe(), 2)
    assert plan_items(plan, 1, 2, 3) == plan_items(plan, 1, 2)[3:]
    assert plan_items(plan, 1, 2, 5) == []


@pytest.mark.parametrize("broken", [{1}, {0, 1, 2, 3}])
def test_broken_pictures_are_reported_and_the_batch_keeps_its_size(tmp_path, broken):
    with ShardWriter(tmp_path, "part.parquet", rows_per_group=4) as writer:
        for i in range(4):
            row = scenes.scene_row(0, i, SIDE)
            writer.write({**row, "image": row["image"][:200]} if i in broken else row)
    categories = [{"name": c, "keypoints": [], "skeleton": []} for c in scenes.CLASSES]
    write_manifest(tmp_path, build_manifest([writer.entry], categories=categories))
    batch = reader(tmp_path)({"step": 0, "stage": 0, "group": 0, "parts": [("part.parquet", 0, 4)]})
    assert [r["image_id"] for r in batch.rejected] == [f"scene-0-{i:07d}" for i in sorted(broken)]
    assert all(r["reason"] for r in batch.rejected)
    assert batch.has_image.tolist() == [i not in broken for i in range(4)]
    owners = {int(image) for image in np.unique(np.nonzero((batch.layout.branch_ids >= 0).any(1).numpy())[0])}
    assert owners == set(range(4)) - broken
    model = tiny_model()
    sum(term.total for term in model(batch).values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# -- conversations about several images -------------------------------------------------------------------------------


def write_several(folder, broken=()):
    """Four rows with one to four images each, of which the numbered further ones cannot be decoded."""
    with ShardWriter(folder, "part.parquet", rows_per_group=4) as writer:
        for i in range(4):
            row = scenes.scene_row(0, i, SIDE)
            images = [scenes.scene_row(1, n, SIDE)["image"] for n in range(i)]
            images = [image[:200] if (i, n) in broken else image for n, image in enumerate(images)]
            message = make_message("chat", "which ?", f"image {i}", image_turns=(0,) * i)
            further = [{"image": image, "height": SIDE, "width": SIDE} for image in images]
            tasks = [*row["tasks"], "chat"]
            messages = [*row["messages"], message]
            writer.write({**row, "messages": messages, "further_images": further, "tasks": tasks})
    categories = [{"name": c, "keypoints": [], "skeleton": []} for c in scenes.CLASSES]
    write_manifest(folder, build_manifest([writer.entry], categories=categories))


def read_several(folder, tasks, **changes):
    groups = [{"tasks": tasks}]
    stages = [{"name": "one", "steps": 1, "augment": AUGMENT, "groups": groups, "branches": {"max_messages": 50}}]
    made = recipe(stages=stages, **changes)
    read = BatchReader(str(folder), made, tiny_tokenizer(), SIDE, {}, token_side=16)
    return read({"step": 0, "stage": 0, "group": 0, "parts": [("part.parquet", 0, 4)]})


@pytest.mark.parametrize("pack_tokens", [0, 2000])
def test_the_further_images_of_a_row_are_read(tmp_path, pack_tokens):
    write_several(tmp_path)
    batch = read_several(tmp_path, ["chat"], pack_tokens=pack_tokens)
    assert batch.rejected == [] and batch.further_rows.tolist() == [1, 2, 2, 3, 3, 3]
    assert batch.further_images.shape == (6, 3, SIDE, SIDE) and batch.further_images.dtype == torch.uint8
    for first in (1, 3):  # those of a row in their order
        assert torch.equal(batch.further_images[first], batch.further_images[0])
    assert torch.equal(batch.further_images[2], batch.further_images[4])
    assert batches_equal(pickle.loads(to_bytes(batch)), batch)


@pytest.mark.parametrize("tasks", [["detect"], ["caption"], ["generate"]])
def test_further_images_that_no_prompt_sees_are_not_decoded(tmp_path, tasks):
    write_several(tmp_path, broken={(3, 1)})
    batch = read_several(tmp_path, tasks)
    assert batch.rejected == [] and len(batch.further_images) == 0


def test_a_further_image_that_is_broken_rejects_its_row(tmp_path):
    write_several(tmp_path, broken={(3, 1)})
    batch = read_several(tmp_path, ["chat"])
    (rejected,) = batch.rejected
    assert rejected["image_id"] == "scene-0-0000003" and rejected["reason"].startswith("image 3: the image cannot")
    assert batch.has_image.tolist() == [True, True, True, False]
    assert batch.further_rows.tolist() == [1, 2, 2] and not (batch.layout.branch_ids[3] >= 0).any()


def test_the_tokenizer_learns_from_every_prompt(shards):
    texts = read_texts(shards)
    assert any("left hand" in t for t in texts)
    assert len(read_texts(shards, limit_rows=4)) < len(texts)


def test_the_next_is_made_while_one_is_handed_over():
    started = {n: threading.Event() for n in range(4)}

    def make(number):
        started[number].set()
        return number * 10

    given = one_ahead(make, range(4))
    for number in range(4):
        assert next(given) == number * 10
        assert started[min(number + 1, 3)].wait(10)
    assert list(given) == [] and list(one_ahead(make, [])) == []


def test_what_fails_while_it_is_made_ahead_fails_at_its_place():
    given = one_ahead(lambda n: 1 // n, [1, 0, 1])
    assert next(given) == 1
    with pytest.raises(ZeroDivisionError):
        next(given)
