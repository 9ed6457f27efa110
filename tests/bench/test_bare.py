"""The bare loop and the real one, on the same batches, have the same losses."""

import json
import pickle

import pytest
from support.bench_fakes import tiny_preset

from lumen_ray.bench import pipeline
from lumen_ray.bench.bare import BareRun, run
from lumen_ray.bench.workload import make_recipe, scene_shards
from lumen_ray.train.launch import prepare_job, train_local


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return scene_shards(tmp_path_factory.mktemp("bench") / "shards", 16, 64)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_losses_are_those_of_training(shards, tmp_path, workers):
    recipe = make_recipe(3, model=tiny_preset(tmp_path), batch_size=16, workers=workers)
    prepared = prepare_job(shards, recipe, tmp_path / "run")
    files = pipeline.batch_files(prepared, tmp_path)
    assert len(files) == workers
    held = [pickle.loads(data) for data in pickle.loads(files[0].read_bytes())]
    assert [len(batch.image_ids) for batch in held] == [16 // workers] * 3
    job = prepared.job
    times, losses = run(
        BareRun(recipe, job.start.settings, len(job.start.tokenizer), 1, files, tmp_path / "bare.pickle")
    )
    assert times == sorted(times) and len(times) == 3
    train_local(prepared)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    pipeline.check_losses([line["loss"] for line in lines], losses)


def test_a_rank_that_fails_is_reported(shards, tmp_path):
    recipe = make_recipe(1, model=tiny_preset(tmp_path), batch_size=8)
    job = prepare_job(shards, recipe, tmp_path / "run").job
    with pytest.raises(RuntimeError, match="bare loop ended"):
        run(
            BareRun(
                recipe, job.start.settings, len(job.start.tokenizer), 1, [tmp_path / "absent"], tmp_path / "bare.pickle"
            )
        )
