"""Rates of the pipeline bench, and the bench itself at a tiny size."""

import pytest
from support.bench_fakes import tiny_preset

from lumen_ray import ray_env
from lumen_ray.bench import inputs, pipeline
from lumen_ray.bench.timing import SidesDiffer
from lumen_ray.bench.workload import batches_equal, make_recipe, plan_of, scene_shards
from lumen_ray.data.batches.feed import plan_items
from lumen_ray.train.launch import prepare_job


def test_the_first_and_the_last_steps_do_not_count():
    times = [100.0, 150.0, 151.0, 152.0, 154.0, 154.1]  # the first two take their time, the last none
    assert pipeline.rate(times, 2, 1, 8) == pytest.approx(3 * 8 / 4)


def test_losses_are_compared():
    pipeline.check_losses([1.0, 20.0], [1.0, 20.0001])  # relative where the loss is large
    for one, other, why in (
        ([1.0, 20.0], [1.0, 20.2], "from step 1 on: 20.000000 and 20.200000"),
        ([0.1], [0.1001], "from step 0"),
        ([1.0], [float("nan")], "from step 0"),
        ([1.0], [1.0, 1.0], "one side made 1 steps, the other 2"),
    ):
        with pytest.raises(SidesDiffer, match=why):
            pipeline.check_losses(one, other)


def test_the_loader_gives_the_readers_batches(tmp_path):
    shards = scene_shards(tmp_path / "shards", 16, 96, photos=True)
    recipe = make_recipe(3, model=tiny_preset(tmp_path), batch_size=8, augment=inputs.AUGMENT)
    prepared = prepare_job(shards, recipe, tmp_path / "run")
    items = plan_items(plan_of(prepared.manifest, recipe), 0, 1)
    batches = list(inputs.loader_batches(prepared.reader, items, 1))
    assert len(batches) == 3
    assert all(batches_equal(batch, prepared.reader(item)) for batch, item in zip(batches, items, strict=True))
    assert not batches_equal(batches[0], batches[1])


@pytest.mark.ray
@pytest.mark.slow
def test_the_benches_run_at_a_tiny_size(tmp_path, monkeypatch):
    """Both compare results themselves: losses of every step, tensors of every batch."""
    preset = tiny_preset(tmp_path)
    shards = scene_shards(tmp_path / "shards", 16, 64)
    try:
        (tmp_path / "a").mkdir()
        monkeypatch.setattr(pipeline, "WARM", 2)
        monkeypatch.setattr(pipeline, "COOL", 1)
        result = pipeline.bench(tmp_path / "a", shards, model=preset, steps=6, batch_size=8, threads=1, turns=1)
        assert set(result.rates) == {"Ray Data + Ray Train", "bare loop"}
        assert result.aim == pipeline.AIM and result.reached is not None
        result = inputs.bench(tmp_path / "b", shards, model=preset, steps=96, batch_size=8, workers=2, turns=1)
        assert set(result.rates) == set(result.details["ready_images"]) == {"Ray Data", "DataLoader"}
        for turns in result.details["ready_images"].values():
            assert len(turns) == 1 and all(0 <= lying <= 64 * 8 and lying % 8 == 0 for lying in turns[0])
    finally:
        ray_env.shutdown()
