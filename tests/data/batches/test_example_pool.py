"""Which objects of a batch show a class."""

import numpy as np
import pytest
import torch
from support.tiny_models import SIDE, tiny_tokenizer

from lumen_ray.data.batches.collate import BranchSettings, Collator
from lumen_ray.data.batches.example_pool import ExamplePool
from lumen_ray.data.batches.packing import Packing
from lumen_ray.data.batches.transforms import transform
from lumen_ray.data.images import decode
from lumen_ray.data.scenes import render as scenes
from lumen_ray.recipe import AugmentSettings

ROWS = [scenes.scene_row(6, i, SIDE) for i in range(6)]
TOKENIZER = tiny_tokenizer()


def samples():
    rng = np.random.default_rng(0)
    return [transform(row, decode(row["image"]), SIDE, AugmentSettings(), rng) for row in ROWS]


def inside(mask, box):
    ys, xs = np.nonzero(mask)
    found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], float)
    return np.abs(found - box).max() <= 0.1 * (np.asarray(box)[2:] - np.asarray(box)[:2]).max() + 1.5


def test_examples_are_objects_of_the_class_and_negatives_of_another():
    made = samples()
    pool = ExamplePool.of(ROWS, made, range(6))
    boxes = {}
    for image, row in enumerate(ROWS):
        for n, i in enumerate(made[image].kept):
            boxes.setdefault((image, row["instances"][i]["phrase"]), []).append(made[image].boxes[n])
    counts = {"mine": 0, "others": 0, "negative": 0}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        for phrase in ROWS[0]["classes"]:
            drawn = pool.draw(phrase, 0, rng)
            if drawn is None:
                assert phrase not in pool.objects
                continue
            for image, mask in drawn.positive:
                assert any(inside(mask, box) for box in boxes[image, phrase])
            sources = {image == 0 for image, _ in drawn.positive}
            assert len(sources) == 1 and 1 <= len(drawn.positive) <= 3
            counts["mine" if sources.pop() else "others"] += 1
            for image, mask in drawn.negative:
                rivals = [box for (at, name), own in boxes.items() if at == image and name != phrase for box in own]
                assert any(inside(mask, box) for box in rivals)
                counts["negative"] += 1
    assert all(counts.values()) and counts["others"] > counts["mine"]


def collate(rows, seed=0, **changes):
    branches = BranchSettings(exemplars=1.0, negatives=2, foreign_negatives=1)
    collator = Collator(TOKENIZER, SIDE, ("detect", "segment", "count"), {}, branches, **changes)
    images = [None if row["image"] is None else decode(row["image"]) for row in rows]
    return collator(rows, images, [np.random.default_rng((seed, n)) for n in range(len(rows))])


@pytest.mark.parametrize("packed", [False, True])
def test_prompts_by_example_have_the_targets_of_their_class(packed):
    """Only the prompt differs from one by name: present classes are to be found, absent ones are not."""
    blank = {**scenes.scene_row(6, 9, SIDE), "image": None, "instances": [], "classes": []}
    ids = [row["image_id"] for row in ROWS]
    rows = [blank, *ROWS] if packed else ROWS
    changes = {"packing": Packing(700, 16)} if packed else {}
    named = set()
    for seed in range(4):
        batch = collate(rows, seed, **changes)
        targets, layout = batch.targets["perception"], batch.layout
        slots = {}
        for (image, column), region in zip(layout.region_slots.tolist(), layout.region_index.tolist(), strict=True):
            slots.setdefault(int(layout.branch_ids[image, column]), []).append(region)
        present = absent = 0
        for link, index in enumerate(layout.link_branches["perception"].tolist()):
            if index not in slots:
                continue
            row = ROWS[ids.index(batch.image_ids[int(layout.link_images["perception"][link])])]
            text = TOKENIZER.decode(layout.input_ids[layout.branch_ids == index].tolist())
            named.add("objects" in text)
            owners = batch.region_images[slots[index]].tolist()
            assert all(bool(batch.has_image[owner]) for owner in owners)
            found = int(targets.valid[link].sum())
            present, absent = present + (found > 0), absent + (found == 0)
            assert found in {sum(i["phrase"] == name for i in row["instances"]) for name in row["classes"]}
        assert present and absent
    assert named == {True, False}


def test_without_the_setting_prompts_are_drawn_as_without_a_pool(monkeypatch):
    rows = ROWS[:2]

    def batch():
        collator = Collator(TOKENIZER, SIDE, ("detect",), {}, BranchSettings())
        return collator(rows, [decode(r["image"]) for r in rows], [np.random.default_rng(n) for n in (1, 2)])

    found = batch()
    monkeypatch.setattr(ExamplePool, "of", None)  # nor is one made
    assert torch.equal(found.layout.input_ids, batch().layout.input_ids)
    assert len(found.region_masks) == 0


def test_regions_of_prompts_that_do_not_fit_are_dropped():
    cut = collate(ROWS, packing=Packing(100, 16))
    assert cut.truncated and len(cut.region_masks) == len(cut.region_images)
    used = set(cut.layout.region_index.tolist())
    assert used == set(range(len(cut.region_masks))) and len(used) < len(collate(ROWS).region_masks)
