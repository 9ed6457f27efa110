"""The choice of classes to prompt: exhaustive ones only, within the budget, absent ones partly by frequency."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumen_ray.data.batches.negatives import choose_classes, class_frequencies, draw, weighted_draw
from lumen_ray.data.shards.schema import make_row
from lumen_ray.recipe import BranchSettings

NAMES = [f"class {i}" for i in range(1200)]


def row_of(classes, phrases):
    instances = [
        {"phrase": p, "box": [0.0, 0, 4, 4], "mask": None, "keypoints": None, "crowd": False, "area": 16.0}
        for p in phrases
    ]
    return make_row("a", b"", (8, 8), "test", tasks=["detect"], classes=list(classes), instances=instances)


def chosen(row, visible, rng, frequencies=None, **changes):
    return choose_classes(row, visible, BranchSettings(**changes), frequencies or {}, np.random.default_rng(rng))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_chosen_classes_are_annotated_and_within_the_budget(data):
    names = NAMES[:20]
    classes = data.draw(st.lists(st.sampled_from(names), unique=True))
    phrases = data.draw(st.lists(st.sampled_from(names), max_size=30))
    visible = data.draw(st.lists(st.sampled_from(phrases), unique=True)) if phrases else []
    budget = BranchSettings(
        negatives=data.draw(st.integers(0, 25)),
        max_classes=data.draw(st.integers(1, 25)),
        negatives_by_frequency=data.draw(st.floats(0, 1)),
    )
    frequencies = data.draw(st.dictionaries(st.sampled_from(names), st.integers(0, 10**6)))
    row, seed = row_of(classes, phrases), data.draw(st.integers(0, 2**31))
    one, two = (choose_classes(row, visible, budget, frequencies, np.random.default_rng(seed)) for _ in range(2))
    assert one == two
    assert len(set(one)) == len(one)
    present, absent = [c for c in one if c in phrases], [c for c in one if c not in phrases]
    assert set(one) <= set(classes)
    assert set(present) <= set(visible), "what was cropped away is asked for neither way"
    assert len(present) == min(budget.max_classes, len(set(visible) & set(classes)))
    assert len(absent) == min(budget.negatives, len(set(classes) - set(phrases)))


def test_a_federated_row_uses_checked_classes_only():
    """LVIS: 'cat' is annotated, 'dog' was looked for in vain, 'tree' is not exhaustive, nobody checked more."""
    row = row_of(["cat", "dog"], ["cat", "tree"])
    for seed in range(20):
        assert sorted(chosen(row, ["cat", "tree"], seed, negatives=50)) == ["cat", "dog"]


def test_negatives_follow_the_square_root_of_frequency():
    names = NAMES[:4]
    frequencies = {names[0]: 100, names[1]: 25, names[2]: 4, names[3]: 0}  # square roots 10, 5, 2 and, unseen, 1
    row, rng, rounds = row_of(names, []), np.random.default_rng(0), 6000
    for share in (0.0, 0.5, 1.0):
        budget = BranchSettings(negatives=1, negatives_by_frequency=share)
        drawn = Counter(choose_classes(row, [], budget, frequencies, rng)[0] for _ in range(rounds))
        for name, root in zip(names, (10, 5, 2, 1), strict=True):
            wanted = share * root / 18 + (1 - share) / 4
            assert drawn[name] / rounds == pytest.approx(wanted, abs=0.025), (share, name)


def test_a_long_list_gives_a_budget_of_negatives_and_rare_classes_too():
    frequencies = {name: int(10000 / (i + 1)) for i, name in enumerate(NAMES)}  # Zipf, as in LVIS
    row, seen = row_of(NAMES, NAMES[:3]), Counter()
    for seed in range(300):
        asked = chosen(row, NAMES[:3], seed, frequencies, negatives=20)
        assert len(asked) == 23 and set(asked[:3]) == set(NAMES[:3])
        seen.update(asked[3:])
    assert sum(seen[name] for name in NAMES[-600:]) > 0.2 * seen.total()
    assert sum(seen[name] for name in NAMES[3:103]) > 0.15 * seen.total()


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 9))
def test_draws_are_without_replacement(number, count, seed):
    items = list(range(number))
    for drawn in (
        draw(items, count, np.random.default_rng(seed)),
        weighted_draw(items, np.arange(1, number + 1.0), count, np.random.default_rng(seed)),
    ):
        assert len(drawn) == len(set(drawn)) == min(number, count)
        assert set(drawn) <= set(items)


def test_training_weighs_negatives_by_the_manifests_counts(tmp_path, monkeypatch):
    from support.tiny_models import tiny_tokenizer

    from lumen_ray.data.batches import prompts
    from lumen_ray.data.batches.feed import BatchReader
    from lumen_ray.data.scenes import render as scenes
    from lumen_ray.data.shards import shards
    from lumen_ray.recipe import Recipe
    from lumen_ray.train.launch import prepare_job

    with shards.ShardWriter(tmp_path / "shards", "part-00000.parquet", rows_per_group=2) as writer:
        for i in range(2):
            writer.write(scenes.scene_row(0, i, 64))
    categories = [{"name": name, "keypoints": []} for name in scenes.CLASSES]
    shards.write_manifest(tmp_path / "shards", shards.build_manifest([writer.entry], categories=categories))
    recipe = Recipe.model_validate({"name": "r", "batch_size": 2, "stages": [{"name": "one", "steps": 1}]})
    reader = prepare_job(tmp_path / "shards", recipe, tmp_path / "run").reader
    assert isinstance(reader, BatchReader) and sum(reader.frequencies.values()) > 0
    seen, choose = [], prompts.choose_classes
    monkeypatch.setattr(
        prompts, "choose_classes", lambda row, v, s, f, rng: seen.append(f) or choose(row, v, s, f, rng)
    )
    reader.tokenizer = tiny_tokenizer()
    reader({"step": 0, "stage": 0, "group": 0, "parts": [("part-00000.parquet", 0, 2)]})
    assert seen == [class_frequencies(shards.read_manifest(tmp_path / "shards"))] * 2


def test_frequencies_come_from_the_manifest_and_older_ones_lack_them():
    assert class_frequencies({"categories": [{"name": "a", "images": 3}, {"name": "b", "images": 0}]}) == {
        "a": 3,
        "b": 0,
    }
    assert class_frequencies({"categories": [{"name": "a"}]}) == {}
