"""Which bucket an image gets, and batches of one bucket that are a pure function of their number."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import SIDE, mixed_shards, tiny_settings, tiny_tokenizer

from lumen_ray import config
from lumen_ray.data.batches.buckets import BucketStream, assign, choose, resolve
from lumen_ray.data.batches.feed import BatchReader, plan_items
from lumen_ray.data.batches.plan import Plan
from lumen_ray.data.shards.shards import read_manifest, row_sizes
from lumen_ray.errors import UserError
from lumen_ray.recipe import BucketRange, Recipe

BUCKETS = ((64, 96), (96, 64), (64, 64))
STAGES = [{"name": "one", "steps": 40}]


# -- which bucket -----------------------------------------------------------------------------------------------------


def padding(size, bucket):
    scale = min(bucket[0] / size[0], bucket[1] / size[1])
    return 1 - scale**2 * size[0] * size[1] / (bucket[0] * bucket[1])


sides = st.integers(1, 40).map(lambda n: 16 * n)
bucket_lists = st.lists(st.tuples(sides, sides), min_size=1, max_size=6, unique=True).map(tuple)
sizes = st.tuples(st.integers(1, 4000), st.integers(1, 4000))


@settings(max_examples=300, deadline=None)
@given(sizes, bucket_lists)
def test_the_chosen_bucket_needs_hardly_more_padding_than_any(size, buckets):
    chosen = choose(size, buckets)
    assert chosen in buckets
    assert padding(size, chosen) <= min(padding(size, b) for b in buckets) + 0.1 + 1e-9
    assert choose(size[::-1], tuple(b[::-1] for b in buckets)) == chosen[::-1]  # height and width are treated alike


def test_of_equal_shapes_the_smallest_that_does_not_shrink_the_image():
    buckets = ((96, 128), (192, 256), (384, 512), (128, 128))
    assert choose((90, 120), buckets) == (96, 128)
    assert choose((97, 129), buckets) == (192, 256)
    assert choose((1200, 1600), buckets) == (384, 512)
    assert choose((50, 50), buckets) == (128, 128)


def test_a_range_gives_buckets_of_about_the_same_area_on_the_grid():
    model = tiny_settings(vision={"clip": {"patch_size": 16, "num_attention_heads": 2, "hidden_size": 16}})
    found = resolve(BucketRange(sides=(256,), aspect_ratios=(0.5, 1.0, 2.0)), model)
    assert found == ((368, 176), (256, 256), (176, 368))
    assert all(side % model.input_step == 0 for bucket in found for side in bucket)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[100, 64]], r"bucket \[100, 64\] does not fit the grid of model 'tiny'.*multiples of 16, e.g. \[96, 64\]"),
        ([64, 64], r"give \[\[height, width\], ...\]"),
        ([], "give .*sides"),
        ([[64, 64.5]], "whole, positive pixels"),
        ([[0, 64]], "whole, positive pixels"),
        ({"sides": [64], "aspects": [1]}, "unknown key 'aspects'; did you mean 'aspect_ratios'"),
        ({"sides": [-1]}, "give positive numbers"),
    ],
)
def test_invalid_buckets_are_reported(value, message):
    with pytest.raises(UserError, match=message) as caught:
        recipe = config.validate(Recipe, {"name": "r", "stages": STAGES, "buckets": value}, "r.yaml")
        resolve(recipe.buckets, tiny_settings())
    assert caught.value.reason == "invalid_config"


def test_a_bucket_that_fills_no_batch_is_not_used():
    shapes = [(60, 90)] * 9 + [(90, 60)] * 3 + [None] * 2
    assert assign(shapes, BUCKETS, 4) == [(64, 96)] * 14  # nor would the second best, the square, be filled
    more = [*shapes, *[(64, 64)] * 4]
    assert assign(more, BUCKETS, 4) == [(64, 96)] * 9 + [(64, 64)] * 3 + [(64, 96)] * 2 + [(64, 64)] * 4
    assert assign(shapes, BUCKETS, 2)[-2:] == [None, None]  # enough texts for a batch of their own
    assert set(assign(shapes[:3], BUCKETS, 4)) == {(64, 96)}  # there is no other
    assert set(assign([*shapes[:3], *[None] * 4], BUCKETS, 4)) == {(64, 96)}  # three images alone fill no batch


# -- batches ----------------------------------------------------------------------------------------------------------


@st.composite
def pools(draw):
    """Row groups of mixed sizes."""
    shape = st.sampled_from([(60, 90), (90, 60), (64, 64), (300, 500), None])
    groups = draw(st.lists(st.lists(shape, min_size=1, max_size=7), min_size=1, max_size=12))
    return [("a", g, len(rows)) for g, rows in enumerate(groups)], groups, draw(st.integers(1, 6))


def stream(pool, shapes, size, seed=0):
    return BucketStream(pool, shapes, BUCKETS, size, lambda e: np.random.default_rng((seed, e)).permutation(len(pool)))


def simulated(pool, shapes, size, count, seed=0):
    """The first batches by walking through the epochs: a row joins its bucket's queue, a full queue is a batch."""
    rows = [[("a", g, r) for r in range(len(group))] for g, group in enumerate(shapes)]
    flat = [row for group in rows for row in group]
    chosen = dict(zip(flat, assign([shape for group in shapes for shape in group], BUCKETS, size), strict=True))
    queues, batches, epoch = {}, [], 0
    while len(batches) < count:
        for g in np.random.default_rng((seed, epoch)).permutation(len(pool)):
            for row in rows[g]:
                queue = queues.setdefault(chosen[row], [])
                queue.append(row)
                if len(queue) == size:
                    batches.append((chosen[row] or (64, 64), tuple(queue)))
                    queue.clear()
        epoch += 1
    return batches[:count]


@settings(max_examples=150, deadline=None)
@given(pools())
def test_batches_equal_those_of_a_walk_through_the_epochs(pool):
    groups, shapes, size = pool
    count = 3 * sum(len(rows) for rows in shapes) // size + 3
    made = stream(groups, shapes, size)
    batches = [made.batch(n) for n in range(count)]
    assert batches == simulated(groups, shapes, size, count)
    if sum(len(rows) for rows in shapes) >= size:  # a batch that two epochs share may hold a row twice
        assert max(n for _, rows in batches for n in Counter(rows).values()) <= 2


@settings(max_examples=60, deadline=None)
@given(pools(), st.randoms())
def test_batches_can_be_computed_in_any_order(pool, random):
    groups, shapes, size = pool
    count = 4 * sum(len(rows) for rows in shapes) // size + 1
    expected = [stream(groups, shapes, size).batch(n) for n in range(count)]
    order = list(range(count))
    random.shuffle(order)
    other = stream(groups, shapes, size)
    assert {n: other.batch(n) for n in order} == dict(enumerate(expected))


def test_an_epoch_is_sorted_once():
    made = stream([("a", 0, 8)], [[(64, 64)] * 8], 2)
    assert made._batches(0) is made._batches(0)
    assert [made.batch(n) for n in range(40)] == [made.batch(n) for n in range(40)]
    assert len(made._full) <= 3 and len(made._epochs) <= 3


# -- the plan and the reader ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return mixed_shards(tmp_path_factory.mktemp("buckets"))


def recipe(**changes):
    data = {"name": "r", "batch_size": 4, "buckets": BUCKETS, "stages": STAGES}
    return Recipe.model_validate(data | changes)


def test_the_manifest_lists_the_sizes(shards):
    groups = read_manifest(shards)["files"][0]["row_groups"]
    shapes = [size for group in groups for size in row_sizes(group)]
    assert Counter(shapes) == {(64, 40): 16, (40, 64): 16, (64, 64): 16, None: 12}
    with pytest.raises(UserError, match="without image sizes.*prepare them again"):
        row_sizes({"rows": 5, "tasks": {}})


def test_the_plan_is_a_pure_function_of_seed_and_step_and_the_same_for_all_ranks(shards):
    manifest = read_manifest(shards)
    plan = Plan(manifest, recipe())
    steps = [plan[t] for t in range(40)]
    again = Plan(manifest, recipe(), 2)
    assert [again[t] for t in reversed(range(40))][::-1] == steps
    assert {step.bucket for step in steps} == set(BUCKETS)
    for step in steps:
        assert step.share(0, 2) + step.share(1, 2) == step.parts and len(step.share(0, 2)) == 2
    other = Plan(manifest, recipe(seed=1))
    assert [other[t] for t in range(40)] != steps
    with pytest.raises(UserError, match="batch_size 4 must be a multiple of 3 workers"):
        Plan(manifest, recipe(), 3)


def read(shards, which, rank=0, ranks=1, start=0):
    manifest = read_manifest(shards)
    reader = BatchReader(str(shards), which, tiny_tokenizer(), SIDE, {}, token_side=16)
    return [reader(item) for item in plan_items(Plan(manifest, which, ranks), rank, ranks, start)]


def test_batches_have_the_size_of_their_bucket_and_images_fill_it(shards):
    seen = Counter()
    for batch in read(shards, recipe()):
        size = tuple(batch.images.shape[-2:])
        assert size in BUCKETS
        texts = [name.startswith("text") for name in batch.image_ids]
        assert all(texts) or not any(texts)
        assert batch.has_image.tolist() == [not text for text in texts]
        if not any(texts):
            whole = {(64, 96): (60, 96), (96, 64): (96, 60), (64, 64): (64, 64)}[size]
            boxes = batch.targets["perception"].boxes[:, 0]
            np.testing.assert_allclose(boxes, np.tile([0, 0, whole[1], whole[0]], (len(boxes), 1)), atol=1e-3)
        seen.update(batch.image_ids)
    assert len(seen) == 60 and set(seen.values()) <= {2, 3}  # 40 steps of 4 are 2.67 epochs


def test_two_ranks_and_a_resumed_run_read_what_one_rank_reads(shards):
    whole = [batch.image_ids for batch in read(shards, recipe())]
    halves = [[batch.image_ids for batch in read(shards, recipe(), rank, 2)] for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    assert [batch.image_ids for batch in read(shards, recipe(), start=17)] == whole[17:]


def test_one_bucket_reads_whole_row_groups_at_its_size(shards):
    one = recipe(buckets=((96, 64),), batch_size=5)
    plain = recipe(buckets=None, batch_size=5)
    for batch, square in zip(read(shards, one)[:4], read(shards, plain)[:4], strict=True):
        assert batch.images.shape[-2:] == (96, 64) and square.images.shape[-2:] == (SIDE, SIDE)
        assert batch.image_ids == square.image_ids
