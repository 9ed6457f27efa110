"""The plan is a pure function of (seed, t), the same for any number of ranks."""

from collections import Counter

import pytest

from lumen_ray.data.batches.plan import Plan, row_rng
from lumen_ray.errors import UserError
from lumen_ray.recipe import Recipe

STAGE = {"name": "one", "steps": 20}
DETECT, TEXT = {"tasks": ["detect"]}, {"tasks": ["caption", "vqa"], "weight": 2}


def manifest(groups=12, rows=2, tasks=("detect", "caption")):
    """Two files; only every second row group has captions."""
    entries = [{"rows": rows, "tasks": {t: 1 for t in tasks if t != "caption" or g % 2 == 0}} for g in range(groups)]
    half = groups // 2
    return {
        "files": [
            {"path": "a.parquet", "row_groups": entries[:half]},
            {"path": "b.parquet", "row_groups": entries[half:]},
        ]
    }


def recipe(**changes):
    stages = [{"name": "one", "steps": 20, "groups": [DETECT, TEXT]}, {"name": "two", "steps": 9, "groups": [DETECT]}]
    return Recipe.model_validate({"name": "r", "batch_size": 4, "stages": stages} | changes)


@pytest.mark.parametrize(("task", "learned_from"), [("generate", "caption"), ("region_segment", "segment")])
def test_a_task_without_rows_is_trained_by_its_annotation(task, learned_from):
    plan = Plan(manifest(tasks=("detect", learned_from)), recipe(stages=[STAGE | {"groups": [{"tasks": [task]}]}]))
    read = {(file, index) for t in range(20) for file, index, _ in plan[t].parts}
    assert read == {
        (f, i) for f in ("a.parquet", "b.parquet") for i in range(6) if learned_from != "caption" or i % 2 == 0
    }
    with pytest.raises(UserError, match=f"no annotations for {task}"):
        Plan(manifest(tasks=("detect",)), recipe(stages=[STAGE | {"groups": [{"tasks": [task]}]}]))[0]


def test_it_is_a_pure_function_of_seed_and_step():
    plans = [Plan(manifest(), recipe()) for _ in range(2)]
    forward = [plans[0][t] for t in range(29)]
    assert [plans[1][t] for t in reversed(range(29))][::-1] == forward
    assert [s.step for s in forward] == list(range(29))
    assert [s.stage for s in forward] == [0] * 20 + [1] * 9
    other = Plan(manifest(), recipe(seed=1))
    assert [other[t] for t in range(29)] != forward


def test_the_shares_of_the_ranks_are_the_global_batch():
    alone, both = Plan(manifest(), recipe()), Plan(manifest(), recipe(), 2)
    for t in range(29):
        assert both[t] == alone[t]
        assert both[t].share(0, 2) + both[t].share(1, 2) == alone[t].share(0, 1) == alone[t].parts
        assert len(both[t].share(0, 2)) == 1


def test_every_row_group_is_read_once_per_epoch():
    stages = [{"name": "one", "steps": 6, "groups": [DETECT]}, {"name": "two", "steps": 12, "groups": [DETECT]}]
    plan = Plan(manifest(), recipe(stages=stages))
    epochs = [[p for t in range(first, first + 6) for p in plan[t].parts] for first in (0, 6, 12)]
    for epoch in epochs:  # the second begins with the second stage: an epoch is not cut off by a stage
        assert len(set(epoch)) == len(epoch) == 12
    assert epochs[0] != epochs[1] != epochs[2]


def test_groups_are_drawn_by_weight_from_row_groups_that_have_their_tasks():
    stages = [{"name": "one", "steps": 600, "groups": [DETECT, TEXT]}]
    plan = Plan(manifest(), recipe(stages=stages))
    steps = [plan[t] for t in range(600)]
    drawn = Counter(s.group for s in steps)
    assert 340 < drawn[1] < 460
    assert {index % 2 for s in steps if s.group == 1 for _, index, _ in s.parts} == {0}


def test_impossible_plans_are_reported():
    with pytest.raises(UserError, match="batch_size 3 must be a multiple of 2 rows"):
        Plan(manifest(), recipe(batch_size=3))
    with pytest.raises(UserError, match="times 3 workers"):
        Plan(manifest(), recipe(), 3)
    with pytest.raises(UserError, match="no annotations for caption, vqa; they have: detect"):
        Plan(manifest(tasks=("detect",)), recipe())
    with pytest.raises(UserError, match="have no rows"):
        Plan({"files": []}, recipe())


def test_every_row_has_its_own_generator():
    first = row_rng(0, 5, "part-00000.parquet", 1, 2).random()
    assert row_rng(0, 5, "part-00000.parquet", 1, 2).random() == first
    others = [(1, 5, "part-00000.parquet", 1, 2), (0, 6, "part-00000.parquet", 1, 2),
              (0, 5, "part-00001.parquet", 1, 2),
              (0, 5, "part-00000.parquet", 2, 2), (0, 5, "part-00000.parquet", 1, 3)]  # fmt: skip
    assert first not in {row_rng(*key).random() for key in others}


def test_text_alone_is_drawn_from_row_groups_without_images():
    entries = [
        {"rows": 2, "tasks": {"chat": 2}, "sizes": sizes} for sizes in ("8x8 8x8", "- -", "- 8x8", "- -", "8x8 -")
    ]
    shards = {"files": [{"path": "a.parquet", "row_groups": entries}]}
    text, both = {"tasks": ["chat"], "text_only": True}, {"tasks": ["chat"]}
    for buckets in ({}, {"buckets": [[8, 8], [8, 16]]}):
        plan = Plan(shards, recipe(stages=[STAGE | {"groups": [text, both]}], batch_size=2, **buckets))
        drawn = [{index for t in range(20) if plan[t].group == g for _, index, _ in plan[t].parts} for g in (0, 1)]
        assert drawn == [{1, 3}, {0, 1, 2, 3, 4}]
    entries[:] = entries[:1]
    with pytest.raises(UserError, match="no row groups of text alone with chat"):
        Plan(shards, recipe(stages=[STAGE | {"groups": [text]}]))
