"""Images of many shapes: each passes in its bucket, and answers do not depend on the others."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import scrambled, tiny_loaded

from lumen_ray.inference.decoder_stage import DecoderStage
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request
from lumen_ray.inference.trunk_stage import TrunkStage
from lumen_ray.model.build import load_model, save_model
from lumen_ray.serve.decoder import DecoderJob, DecoderReplica
from lumen_ray.serve.job import TrunkJob
from lumen_ray.serve.trunk import TrunkReplica
from lumen_ray.structures import Region

BUCKETS = [[64, 64], [48, 96], [96, 48]]
EVERYTHING = {"score_threshold": 0.0, "max_per_phrase": 20, "max_new_tokens": 4}
CLASSES = ("red circle", "blue square", "figure")


@pytest.fixture(scope="module")
def engine():
    loaded = tiny_loaded()
    loaded.meta.buckets = BUCKETS
    scrambled(loaded.model, 0.15)
    return Engine(loaded)


def picture(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def requests(size):
    region = Region("box", size, np.array([[2, 3], [size[1] / 2, size[0] / 2]]))
    return [
        make_request("segment", classes=list(CLASSES)),
        make_request("caption"),
        make_request("pose", classes=["figure"]),
        make_request("region_caption", region=region),
        make_request("refer", text="the circle left of the square"),
    ]


def same(one, other):
    for x, y in zip(one, other, strict=True):
        assert (x.task, x.text, x.route, x.size) == (y.task, y.text, y.route, y.size)
        for p, q in zip(x.predictions, y.predictions, strict=True):
            assert p.phrase == q.phrase and len(p) == len(q) > 0
            scale = max(p.boxes.size)
            np.testing.assert_allclose(p.scores, q.scores, atol=1e-4)
            np.testing.assert_allclose(p.boxes.xyxy / scale, q.boxes.xyxy / scale, atol=1e-4)
            if p.masks is not None:
                assert p.masks.size == x.size and (p.masks.to_arrays() == q.masks.to_arrays()).mean() > 0.999
            if p.keypoints is not None:
                ours, theirs = p.keypoints.xyv[..., :2] / scale, q.keypoints.xyv[..., :2] / scale
                np.testing.assert_allclose(ours, theirs, atol=1e-4)


shapes = st.sampled_from([(64, 64), (40, 80), (100, 48), (30, 31), (200, 420), (170, 90)])


@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(shapes, min_size=1, max_size=5))
def test_an_image_gets_the_same_answers_in_any_company(engine, sizes):
    images = [picture(size, seed) for seed, size in enumerate(sizes)]
    asked = [requests(size) for size in sizes]
    for image, mine, answers in zip(images, asked, engine.run(images, asked, **EVERYTHING), strict=True):
        same(answers, engine.run([image], [mine], **EVERYTHING)[0])


def test_a_bucket_is_that_of_the_shape_and_everything_lies_in_its_frame(engine):
    stage = engine.trunk
    wanted = {(300, 310): (64, 64), (100, 200): (48, 96), (33, 16): (96, 48)}
    for size, bucket in wanted.items():
        assert stage.bucket(size) == bucket
        out = stage.links([picture(size)], [[make_request("detect", classes=["a"])]])
        assert out.dense.shape[-2:] == (bucket[0] // 4, bucket[1] // 4)
        assert out.frames[0].input_size == bucket and out.frames[0].size == size
    with pytest.raises(ValueError, match="share a bucket"):
        stage.links([picture((64, 64)), picture((40, 80))], [[], []])


def test_without_buckets_every_image_fits_the_square():
    stage = TrunkStage(tiny_loaded())
    assert {stage.bucket(size) for size in ((64, 64), (10, 500), (0, 0))} == {(64, 64)}


def test_a_model_folder_keeps_its_buckets(engine, tmp_path):
    loaded = engine.loaded
    save_model(tmp_path, loaded.model.state_dict(), loaded.settings, loaded.tokenizer, loaded.meta)
    assert load_model(tmp_path).meta.buckets == BUCKETS
    again, image = Engine.load(tmp_path), picture((40, 80))
    same(*(e.run([image], [requests((40, 80))], **EVERYTHING)[0] for e in (engine, again)))


def test_deployments_batch_images_of_one_bucket(engine, monkeypatch):
    trunk = TrunkReplica("", "cpu", {}, lambda *_: TrunkStage(engine.loaded))
    decoder = DecoderReplica("", "lumen", "cpu", lambda *_: DecoderStage(engine.loaded, "lumen"))
    sizes = [(64, 64), (40, 80), (60, 64), (90, 40), (50, 100)]
    asked = (replace(make_request("detect", classes=list(CLASSES)), score_threshold=0.0, max_per_phrase=5),)
    jobs = [TrunkJob(picture(size, seed), asked, 4) for seed, size in enumerate(sizes)]
    broken = TrunkJob(np.zeros((0, 0, 3), np.uint8), asked, 4)
    *outputs, failed = trunk.outputs([*jobs, broken])
    assert isinstance(failed, Exception)
    passes = []
    predict = decoder.stage.predict
    monkeypatch.setattr(
        decoder.stage, "predict", lambda output, limits: passes.append(len(output.dense)) or predict(output, limits)
    )
    answers = decoder.answers([DecoderJob(output, asked) for output in outputs])
    assert sorted(passes) == [1, 2, 2]  # tall, wide, square
    for job, answer in zip(jobs, answers, strict=True):
        same(answer, engine.run([job.image], [asked])[0])
