"""Ranks whose shares of a step have nothing in common: none waits for another, and the loss is the whole batch's."""

import json
import math
from pathlib import Path

import pytest
import yaml
from support.ranks import run_ranks
from support.tiny_models import SIDE, tiny_settings
from support.train_fakes import job_of

from lumen_ray.data.batches.feed import plan_items
from lumen_ray.data.batches.plan import Plan
from lumen_ray.data.scenes import render as scenes
from lumen_ray.data.shards.schema import make_message, make_row
from lumen_ray.data.shards.shards import ShardWriter, build_manifest, write_manifest

STEPS, SEED = 9, 3  # such that every kind meets another
GROUPS = [
    {"tasks": ["detect", "segment", "pose", "refer", "caption", "vqa", "chat", "region_caption"], "weight": 3},
    {"tasks": ["pose"], "weight": 1},
    {"tasks": ["chat"], "weight": 1},
]
KINDS = ("full", "text", "broken", "boxes", "full", "rare", "empty", "broken", "text", "boxes")


def row_of(kind: str, number: int) -> dict:
    """A row that holds what its kind says and nothing else."""
    row = scenes.scene_row(7, number, SIDE)
    if kind == "text":
        chat = make_message("chat", "say something", f"number {number}")
        return make_row(f"text-{number}", None, (8, 8), "test", tasks=["chat"], messages=[chat])
    nothing = {"messages": [], "phrases": [], "regions": []}
    changes = {
        "full": {},
        "broken": {"image": b"no picture"},
        "boxes": nothing | {"tasks": ["detect"]},
        "rare": nothing | {"tasks": ["pose"]},
        "empty": nothing | {"tasks": ["detect"], "instances": [], "classes": []},
    }
    return row | changes[kind] | {"image_id": f"{kind}-{number}"}


@pytest.fixture(scope="module")
def skewed(tmp_path_factory) -> Path:
    """Row groups of 4 rows of one kind each, so that a rank's share of a step is of one kind."""
    folder = tmp_path_factory.mktemp("skew")
    with ShardWriter(folder / "shards", "part-00000.parquet", rows_per_group=4) as writer:
        for group, kind in enumerate(KINDS):
            for number in range(4 * group, 4 * group + 4):
                writer.write(row_of(kind, number))
    categories = [{"name": name, "keypoints": list(points)} for name, points in scenes.SKELETONS.items()]
    categories += [{"name": name} for name in scenes.CLASSES if name not in scenes.SKELETONS]
    write_manifest(folder / "shards", build_manifest([writer.entry], categories=categories))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_settings(vocab_size=330).model_dump(mode="json")))
    return folder


def job(folder: Path, run: str, workers: int):
    return job_of(
        folder, folder / run, {"steps": STEPS, "groups": GROUPS}, workers=workers, seed=SEED, log_samples=True
    )


def kinds_of(run: Path, rank: int) -> list[str]:
    lines = map(json.loads, (run / "samples" / f"{rank}.jsonl").read_text().splitlines())
    return [" ".join(sorted({name.split("-")[0] for name in line["image_ids"]})) for line in lines]


def test_every_rank_has_the_task_of_a_step_without_a_message(skewed):
    made = job(skewed, "plan", 2)
    for start in (0, 5):
        plans = [Plan(made.manifest, made.job.recipe) for _ in range(2)]
        mine, other = (plan_items(plan, rank, 2, start) for rank, plan in enumerate(plans))
        assert [(i["step"], i["group"]) for i in mine] == [(i["step"], i["group"]) for i in other]
        assert [i["step"] for i in mine] == list(range(start, STEPS))
        assert {i["group"] for i in mine} == {0, 1, 2}
        assert all(i["parts"] != j["parts"] for i, j in zip(mine, other, strict=True))


def test_no_rank_waits_for_another_and_the_loss_is_that_of_one_process(skewed):
    assert run_ranks(job(skewed, "two", 2), 2, timeout=150) == [0, 0]
    assert run_ranks(job(skewed, "one", 1), 1, timeout=150) == [0]
    pairs = set(zip(kinds_of(skewed / "two", 0), kinds_of(skewed / "two", 1), strict=True))
    unlike = {frozenset(pair) for pair in pairs if pair[0] != pair[1]}
    for kind in set(KINDS):
        assert any(kind in pair for pair in unlike), f"no step pairs '{kind}' with something else: {unlike}"
    two, one = (list(map(json.loads, (skewed / r / "metrics.jsonl").read_text().splitlines())) for r in ("two", "one"))
    assert len(two) == len(one) == STEPS
    for a, b in zip(two, one, strict=True):
        assert math.isfinite(a["loss"])
        names = {name for name in a if name.startswith("loss")}
        assert {n: a[n] for n in names} == pytest.approx({n: b[n] for n in names}, rel=1e-3, abs=1e-3)
