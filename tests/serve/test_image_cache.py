"""Images that a trunk replica holds: the cache, the replica, the ingress and the HTTP API over it."""

import asyncio
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from support.serve_fakes import FakeBackend, base64_png, png

from lumen_ray.data.images import Picture
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request
from lumen_ray.serve.api import create_api
from lumen_ray.serve.decoder import DecoderJob, DecoderReplica
from lumen_ray.serve.image_cache import ImageCache, ImageGone, KeyedImage, gone, image_id
from lumen_ray.serve.ingress import ServeBackend
from lumen_ray.serve.job import TrunkJob, TrunkReply
from lumen_ray.serve.metrics import REGISTRY
from lumen_ray.serve.settings import ServeSettings, TrunkDeployment
from lumen_ray.serve.trunk import TrunkReplica


class Stored:
    """As much of `EncodedImages` as the cache reads."""

    def __init__(self, nbytes):
        self.nbytes = nbytes


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 9)), max_size=40), st.integers(0, 20))
def test_the_cache_holds_the_last_images_within_its_room(steps, room):
    cache, expected = ImageCache(room), []  # (key, bytes), the first to be dropped first
    for key, nbytes in steps:
        known = dict(expected).get(key)
        found = cache.get(key)
        assert (found is None) == (known is None)
        if known is not None:
            expected = [entry for entry in expected if entry[0] != key] + [(key, known)]
            assert found.nbytes == known
        else:
            cache.put(key, Stored(nbytes))
            expected.append((key, nbytes))
            while sum(size for _, size in expected) > room:
                expected.pop(0)
        assert cache.nbytes == sum(size for _, size in expected) <= room and len(cache) == len(expected)
    cache.resize(0)
    assert len(cache) == cache.nbytes == 0


@pytest.fixture
def trunk(model_folder):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    replica = TrunkReplica(str(model_folder), "cpu", {})
    replica.reconfigure(TrunkDeployment().user_config)
    yield replica
    torch.set_num_threads(before)


def pixels(seed, size=(96, 128)):
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)


def limited(task, **fields):
    return dataclasses.replace(make_request(task, **fields), score_threshold=0.0, max_per_phrase=3)


DETECT, CAPTION = limited("detect", classes=["red circle", "blue square"]), limited("caption")


def keyed(seed, *requests, given=True, size=(96, 128)):
    picture = Picture(pixels(seed, size), size) if given else None
    return TrunkJob(KeyedImage(f"{seed:032x}", size, picture), requests, 6)


def test_held_and_new_images_of_one_pass_get_the_engines_answers(trunk, model_folder):
    """Twice the same image, one that is held and one that is not, of one input size."""
    decoder, engine, encoded = DecoderReplica(str(model_folder), "lumen", "cpu"), Engine.load(model_folder), []
    encode = trunk.stage.encode

    def counted(images):
        encoded.append(len(images))
        return encode(images)

    trunk.stage.encode = counted
    for jobs in (
        [keyed(1, DETECT), keyed(2, DETECT)],
        [keyed(2, DETECT, given=False), keyed(3, DETECT), keyed(3, DETECT), keyed(1, DETECT)],
        [keyed(3, DETECT, given=False)],
        [keyed(1, CAPTION, DETECT, given=False), keyed(4, CAPTION)],
    ):
        outputs = pickle.loads(pickle.dumps(trunk.outputs(jobs)))
        rows = decoder.answers([DecoderJob(output, job.requests) for output, job in zip(outputs, jobs, strict=True)])
        for job, output, row in zip(jobs, outputs, rows, strict=True):
            from lumen_ray.inference.outputs import assemble

            said = assemble(output.plans, {})[0]
            image = pixels(int(job.image.image_id, 16))
            for got, text, wanted in zip(
                row, said, engine.run([image], [job.requests], max_new_tokens=6)[0], strict=True
            ):
                got = got or text
                assert got.text == wanted.text
                for p, q in zip(got.predictions, wanted.predictions, strict=True):
                    np.testing.assert_allclose(p.boxes.xyxy[:3], q.boxes.xyxy[:3], atol=1e-2)
                    np.testing.assert_allclose(p.scores[:3], q.scores[:3], atol=1e-4)
    assert encoded == [2, 1, 1]  # images 1 and 2, 3, 4
    assert trunk.images.nbytes == 4 * next(iter(trunk.images._images.values())).nbytes > 0


def test_an_image_that_is_not_held_fails_alone(trunk):
    found = trunk.outputs([keyed(1, DETECT), keyed(2, DETECT, given=False), keyed(3, DETECT)])
    assert [isinstance(one, ImageGone) for one in found] == [False, True, False]
    assert f"{2:032x}" in str(found[1]) and asyncio.run(trunk.image_size(f"{1:032x}")) == (96, 128)
    assert asyncio.run(trunk.image_size(f"{2:032x}")) is None
    again = pickle.loads(pickle.dumps(found[1]))
    assert (type(again), again.reason, again.field) == (ImageGone, "image_gone", "image_id")


def test_without_room_every_image_is_encoded(trunk):
    trunk.reconfigure({**TrunkDeployment().user_config, "image_cache_mb": 0})
    assert not isinstance(trunk.outputs([keyed(1, DETECT)])[0], Exception)
    assert isinstance(trunk.outputs([keyed(1, DETECT, given=False)])[0], ImageGone)


class Trunk:
    """A handle of one replica that holds `held`. `room`: whether it can hold more."""

    def __init__(self, *held, room=True):
        self.held, self.sessions, self.jobs, self.room = set(held), [], [], room

    def options(self, session_id):
        self.sessions.append(session_id)
        return self

    @property
    def link(self):
        return _Method(self._link)

    @property
    def image_size(self):
        return _Method(lambda key, version: (16, 20) if key in self.held else None)

    def _link(self, job):
        self.jobs.append(job)
        if job.image.picture is None and job.image.image_id not in self.held:
            raise gone(job.image.image_id)
        if self.room:
            self.held.add(job.image.image_id)
        return TrunkReply(("answer",), is_held=self.room)


class _Method:
    def __init__(self, function):
        self.function = function

    def remote(self, *args):
        async def call():
            return self.function(*args)

        return call()


def test_requests_about_one_image_go_to_one_replica():
    trunk = Trunk()
    backend = ServeBackend(trunk, {}, ServeSettings(model="m"))
    image = KeyedImage("a" * 32, (16, 20), Picture(pixels(0, (16, 20)), (16, 20)))

    async def ask():
        assert await backend.held_size(image.image_id, ask=False) is None
        await backend.infer(image, [DETECT], 8)
        assert await backend.held_size(image.image_id, ask=False) == (16, 20)
        trunk.held.clear()
        with pytest.raises(ImageGone):
            await backend.infer(dataclasses.replace(image, picture=None), [DETECT], 8)
        assert await backend.held_size(image.image_id, ask=False) is None  # not believed any more
        assert await backend.held_size(image.image_id, ask=True) is None
        trunk.held.add(image.image_id)
        assert await backend.held_size(image.image_id, ask=True) == (16, 20)

    asyncio.run(ask())
    assert set(trunk.sessions) == {image.image_id}
    off = ServeBackend(trunk, {}, ServeSettings(model="m", trunk={"image_cache_mb": 0}))
    assert asyncio.run(off.held_size(image.image_id, ask=True)) is None


class Holding(FakeBackend):
    """A backend that remembers what it was shown. `forgets`: the trunk has lost all since."""

    def __init__(self):
        super().__init__()
        self.sizes, self.images, self.forgets = {}, [], False

    async def held_size(self, image_id, ask):
        return self.sizes.get(image_id)

    async def infer(self, image, requests, max_new_tokens):
        self.images.append(image)
        if image.picture is None and self.forgets:
            self.sizes.clear()
            raise gone(image.image_id)
        self.sizes[image.image_id] = image.size
        shown = image.picture or Picture(np.zeros((*image.size, 3), np.uint8), image.size)
        return await super().infer(shown, requests, max_new_tokens)


@pytest.fixture
def holding(settings):
    backend = Holding()
    return backend, TestClient(create_api(backend, settings))


def test_the_same_image_is_decoded_once(holding):
    backend, client = holding
    body = {"image": base64_png(), "classes": ["a"]}
    first = client.post("/v1/detect", json=body).json()
    second = client.post("/v1/segment", json=body).json()
    third = client.post("/v1/detect", json={"image_id": first["image_id"], "classes": ["a"]}).json()
    assert first["image_id"] == second["image_id"] == third["image_id"] == image_id(png())
    assert [image.picture is None for image in backend.images] == [False, True, True]
    assert third["instances"] == first["instances"]
    several = client.post(
        "/v1/infer", json={"image_id": first["image_id"], "requests": [{"task": "detect", "classes": ["a"]}]}
    ).json()
    assert several["image_id"] == first["image_id"] and several["answers"][0]["instances"] == first["instances"]
    form = client.post("/v1/detect", files={"image_id": (None, first["image_id"]), "classes": (None, "a")})
    assert form.json()["instances"] == first["instances"]
    for bad in ((None, "<b>none</b>"), ("x.png", png())):  # a file is no id
        answer = client.post("/v1/detect", files={"image_id": bad, "classes": (None, "a")})
        assert answer.status_code == 400 and "image_id" in answer.json()["error"]["message"]
    url = f"data:image/png;base64,{base64_png()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it ?"}]
    client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]})
    assert backend.images[-1].picture is None


def test_an_image_that_was_forgotten_is_sent_again_or_410(holding):
    backend, client = holding
    body = {"image": base64_png(), "classes": ["a"]}
    first = client.post("/v1/detect", json=body).json()
    backend.forgets = True
    assert client.post("/v1/detect", json=body).status_code == 200  # the bytes are at hand
    assert [image.picture is None for image in backend.images] == [False, True, False]
    for path, fields in (
        ("/v1/detect", {"classes": ["a"]}),
        ("/v1/infer", {"requests": [{"task": "detect", "classes": ["a"]}]}),
    ):
        answer = client.post(path, json={"image_id": first["image_id"], **fields})
        assert (answer.status_code, answer.json()["error"]["reason"]) == (410, "image_gone")
        assert first["image_id"] in answer.json()["error"]["message"]


@pytest.mark.parametrize("given", ["", "abc", "x" * 32, 7])
def test_an_id_that_is_none_is_refused(holding, given):
    answer = holding[1].post("/v1/detect", json={"image_id": given, "classes": ["a"]})
    assert answer.status_code == 400 and "image_id" in answer.json()["error"]["message"]


def test_image_and_id_together_are_refused(holding):
    answer = holding[1].post("/v1/detect", json={"image": base64_png(), "image_id": "a" * 32, "classes": ["a"]})
    assert answer.status_code == 400 and "not both" in answer.json()["error"]["message"]


def test_lookups_and_bytes_are_counted():
    def value(name, **labels):
        return REGISTRY.get_sample_value(name, labels) or 0.0

    before = [value("lumen_ray_image_lookups_total", result=result) for result in ("hit", "miss")]
    cache = ImageCache(10)
    cache.get("a")
    cache.put("a", Stored(7))
    cache.get("a")
    after = [value("lumen_ray_image_lookups_total", result=result) for result in ("hit", "miss")]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1]
    assert value("lumen_ray_image_cache_bytes") == 7


def test_an_image_that_the_trunk_has_no_room_for_is_not_believed_held():
    trunk = Trunk(room=False)
    backend = ServeBackend(trunk, {}, ServeSettings(model="m"))
    image = KeyedImage("a" * 32, (16, 20), Picture(pixels(0, (16, 20)), (16, 20)))

    async def ask():
        await backend.infer(image, [DETECT], 8)
        return await backend.held_size(image.image_id, ask=False)

    assert asyncio.run(ask()) is None


def test_an_image_that_is_gone_is_refused_before_it_waits_for_a_pass(trunk):
    with trunk.stage.loop.turn(), pytest.raises(ImageGone):  # the model is busy
        asyncio.run(asyncio.wait_for(trunk.link(keyed(7, DETECT, given=False)), 5))


def test_a_pass_over_held_images_reserves_memory_as_others_do(trunk, monkeypatch):
    reserved = []
    images = trunk.stage.loop.images
    monkeypatch.setattr(trunk.stage.loop, "images", lambda tokens: reserved.append(tokens) or images(tokens))
    trunk.outputs([keyed(1, DETECT), keyed(2, DETECT)])
    trunk.outputs([TrunkJob(pixels(1), (DETECT,), 6), TrunkJob(pixels(2), (DETECT,), 6)])
    first, second = [tokens for tokens in reserved if tokens]
    assert first == second
