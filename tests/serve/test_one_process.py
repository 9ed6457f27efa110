"""The topology with one process: the HTTP API over trunk and decoders of the same process, and its settings."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import AsyncMock, Mock

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from support.chat_fakes import line
from support.clusters import wait_for
from support.serve_fakes import free_port

from lumen_ray.answer import Answer
from lumen_ray.config import validate
from lumen_ray.errors import UserError
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request
from lumen_ray.serve import http_replica, one_process
from lumen_ray.serve.admission import ingress_options
from lumen_ray.serve.api import create_api
from lumen_ray.serve.app import run
from lumen_ray.serve.decoder import DecoderReplica
from lumen_ray.serve.http import Overloaded
from lumen_ray.serve.metrics import REGISTRY
from lumen_ray.serve.one_process import LocalBackend, kept, options_of
from lumen_ray.serve.settings import Batches, Batching, Http, ModelDeployment, ServeSettings, TrunkDeployment
from lumen_ray.serve.trunk import TrunkReplica
from lumen_ray.wire.settings import Defaults

PIXELS = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)
CLASSES = ["red circle", "blue square"]


def image(pixels: np.ndarray = PIXELS) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def settings_of(model_folder: Path, **fields: object) -> ServeSettings:
    given = {"topology": "one_process", "defaults": Defaults(score_threshold=0, max_per_phrase=3), **fields}
    return ServeSettings.model_validate({"model": str(model_folder), **given})


@pytest.fixture(scope="module")
def engine(model_folder) -> Engine:
    return Engine.load(model_folder)


@pytest.fixture
def local(model_folder) -> LocalBackend:
    return backend_of(settings_of(model_folder))


def backend_of(settings: ServeSettings) -> LocalBackend:
    trunk = TrunkReplica(settings.model, "cpu", {}, store=kept)
    trunk.reconfigure(settings.trunk.user_config)
    decoder = DecoderReplica(settings.model, "lumen", "cpu")
    decoder.reconfigure(settings.decoder("lumen").user_config)
    return LocalBackend(trunk, {"lumen": decoder}, settings)


@pytest.fixture
def client(local, model_folder) -> TestClient:
    return TestClient(create_api(local, settings_of(model_folder)))


@pytest.mark.parametrize(
    ("task", "fields"),
    [("detect", {"classes": CLASSES}), ("pose", {"classes": ["figure"]}), ("vqa", {"text": "what ?"}), ("caption", {})],
)
def test_answers_are_the_engines(client, engine, task, fields):
    response = client.post(f"/v1/{task}", json={"image": image(), "max_new_tokens": 6, **fields})
    assert response.status_code == 200, response.text
    ((expected,),) = engine.run(
        [PIXELS], [[make_request(task, **fields)]], score_threshold=0, max_per_phrase=3, max_new_tokens=6
    )
    expected, got = expected.to_dict(), response.json()
    assert got.get("text") == expected.get("text")
    assert len(got.get("instances", ())) == len(expected.get("instances", ()))
    for a, b in zip(got.get("instances", ()), expected.get("instances", ()), strict=True):
        assert a["phrase"] == b["phrase"] and a["score"] == pytest.approx(b["score"], abs=1e-4)
        assert a["box"] == pytest.approx(b["box"], abs=1e-2)


def hits() -> float:
    return REGISTRY.get_sample_value("lumen_ray_image_lookups_total", {"result": "hit"}) or 0


def test_an_image_is_held_and_asked_about_again(client):
    first = client.post("/v1/detect", json={"image": image(), "classes": CLASSES}).json()
    before = hits()
    again = client.post("/v1/caption", json={"image_id": first["image_id"], "max_new_tokens": 4})
    assert again.status_code == 200 and hits() == before + 1
    gone = client.post("/v1/caption", json={"image_id": "0" * 32})
    assert (gone.status_code, gone.json()["error"]["reason"]) == (410, "image_gone")


def test_a_mistake_fails_alone(client):
    bodies = [{"classes": ["figure"]}, {"classes": ["dragon"]}, {"classes": ["figure"]}]
    with ThreadPoolExecutor(3) as pool:
        responses = list(pool.map(lambda body: client.post("/v1/pose", json={"image": image(), **body}), bodies))
    assert [response.status_code for response in responses] == [200, 400, 200]
    assert responses[1].json()["error"]["reason"] == "unknown_skeleton"


def test_requests_share_passes(local):
    """They wait while the model is busy."""
    name, labels = "lumen_ray_batch_size", {"stage": "trunk"}

    def passes() -> float:
        return REGISTRY.get_sample_value(f"{name}_count", labels) or 0

    before = passes()

    async def ask() -> list[list[Answer]]:
        request = make_request("detect", classes=CLASSES)
        with local.trunk.stage.loop.turn():
            tasks = [asyncio.create_task(local.infer(PIXELS, [request], 4)) for _ in range(6)]
            while len(local.trunk.batches._waiting) < 6:
                await asyncio.sleep(0.001)
        return await asyncio.gather(*tasks)

    assert len(asyncio.run(ask())) == 6 and passes() == before + 1


def test_a_stream_has_the_text_and_then_the_answer(local):
    async def collect() -> list[str | Answer]:
        request = make_request("vqa", text="what is it ?")
        return [piece async for piece in local.stream(PIXELS, [request], 6)]

    *pieces, answer = asyncio.run(collect())
    assert isinstance(answer, Answer) and "".join(map(str, pieces)) == answer.text


@pytest.mark.parametrize("full", ["trunk", "lumen"])
def test_a_full_stage_refuses(model_folder, full):
    narrow = {"max_ongoing_requests": 1, "max_queued_requests": 0, "batching": Batching(max_batch_size=1)}
    sections = {"trunk": TrunkDeployment(**narrow)} if full == "trunk" else {"decoders": {"lumen": narrow}}
    local = backend_of(settings_of(model_folder, **sections))
    request = make_request("detect", classes=CLASSES)

    async def ask() -> list[object]:
        replica = local.trunk if full == "trunk" else local.decoders["lumen"]
        began, free = threading.Event(), threading.Event()
        inner = replica.batches._run

        def slow(jobs: list[object]) -> list[object]:
            began.set()
            assert free.wait(20)
            return inner(jobs)

        replica.batches._run = slow
        first = asyncio.create_task(local.infer(PIXELS, [request], 4))
        await asyncio.to_thread(began.wait, 20)
        (second,) = await asyncio.gather(local.infer(PIXELS, [request], 4), return_exceptions=True)
        free.set()
        return [await first, second]

    answers, refused = asyncio.run(ask())
    assert len(answers) == 1 and isinstance(refused, Overloaded)


def test_a_slow_model_times_out(model_folder):
    local = backend_of(settings_of(model_folder, http=Http(request_timeout_s=0.05)))
    request = make_request("vqa", text="what ?")

    async def collect() -> list[str | Answer]:
        return [piece async for piece in local.stream(PIXELS, [request], 4)]

    with local.trunk.stage.loop.turn():
        for call in (lambda: local.infer(PIXELS, [request], 4), collect):
            with pytest.raises(TimeoutError):
                asyncio.run(call())
    assert not any(room.inside for room in local.rooms.values())


def test_a_stuck_stage_is_not_ready(local, model_folder):
    api = TestClient(create_api(local, settings_of(model_folder)))
    assert api.get("/readyz").json() == {"ready": True, "deployments": {"trunk": True, "lumen": True}}
    local.decoders["lumen"].health.not_ready_after_s = -1
    response = api.get("/readyz")
    assert response.status_code == 503 and response.json()["deployments"] == {"trunk": True, "lumen": False}


def test_batches_that_stop_begin_again_without_a_new_replica(tmp_path, monkeypatch):
    began, settings = [], settings_of(tmp_path, batches=Batches(folder=str(tmp_path)))

    class Stopping:
        async def run(self) -> None:
            began.append(1)
            raise KeyError("a bug")

    monkeypatch.setattr(one_process, "make_runner", lambda *_: Stopping())
    monkeypatch.setattr(one_process, "TrunkReplica", lambda *_: Mock(check_health=AsyncMock()))
    monkeypatch.setattr(http_replica, "export_to_ray", lambda: None)

    async def checked() -> None:
        plain = one_process.OneProcess.__mro__[1]  # without the wrapper of Serve
        replica = plain(settings, settings.model, [])
        for count in (1, 2):
            while not replica._answering.done():
                await asyncio.sleep(0)
            assert len(began) == count
            await replica.check_health()

    asyncio.run(checked())
    gc.collect()  # here: within `ast.parse`, as pytest's, Python 3.11 fails if the collector formats a traceback


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"trunk": {"num_replicas": 2}}, "'trunk.num_replicas' has no effect with topology 'one_process'"),
        ({"decoders": {"lumen": {"autoscaling": {}}}}, "'decoders.lumen.autoscaling' has no effect"),
        ({"trunk": {"health_check_period_s": 2}}, "give 'health_check_period_s' in 'ingress'"),
        ({"http": {"retries": 1}}, "'http.retries' has no effect"),
        ({"reload": {}}, "'reload' needs replicas of trunk and decoders"),
        ({"topology": "one"}, "'topology' is invalid"),
    ],
)
def test_settings_without_effect_are_refused(data, says):
    with pytest.raises(UserError) as caught:
        validate(ServeSettings, {"model": "m", "topology": "one_process", **data}, "test.yaml")
    assert says in str(caught.value) and caught.value.reason == "invalid_config"


def test_one_replica_has_what_all_sections_reserve():
    sections = {
        "ingress": {"num_replicas": 2, "num_cpus": 0.5},
        "trunk": {"num_cpus": 2, "num_gpus": 0.7},
        "decoders": {"lumen": {"num_cpus": 0.5, "num_gpus": 0.3}},
    }
    settings = validate(ServeSettings, {"model": "m", "topology": "one_process", **sections}, "test")
    options = options_of(settings, ["lumen"])
    assert options["ray_actor_options"] == {"num_cpus": 3, "num_gpus": 1} and options["num_replicas"] == 2
    assert options["max_ongoing_requests"] == ingress_options(settings)["max_ongoing_requests"]
    assert options["user_config"] == {
        "trunk": settings.trunk.user_config, "lumen": settings.decoders["lumen"].user_config
    }  # fmt: skip
    assert settings.logical_cpus(["lumen"]) == 6
    with pytest.raises(UserError, match="6 CPUs \\(one_process 6\\), but this Ray has 4"):
        settings.check_room(["lumen"], {"CPU": 4, "GPU": 2})
    more = settings.model_copy(update={"decoders": {"lumen": ModelDeployment(num_gpus=0.5)}})
    with pytest.raises(UserError, match="reserve 1.2 GPUs together \\(trunk 0.7, lumen 0.5\\)"):
        options_of(more, ["lumen"])


@pytest.mark.ray
def test_the_death_of_the_replica_is_a_503_and_another_one_follows(model_folder, tmp_path):
    """Answers over real HTTP, and those of clients whose replica is killed: none is repeated but in batches."""
    import openai
    import ray

    os.environ["PYTHONPATH"] = f"{Path(__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    settings = settings_of(model_folder, http=Http(port=free_port()), batches=Batches(folder=str(tmp_path / "batches")))
    server = run(settings, blocking=False)
    lines = [line(f"id {n}", "what is it ?", max_tokens=4) for n in range(40)]
    body = {"image": image(), "classes": CLASSES}
    answers: list[httpx.Response] = []
    enough = threading.Event()

    def client() -> None:
        while not enough.is_set():
            answers.append(http.post("/v1/detect", json=body))

    def await_answers(count: int) -> None:
        deadline = time.monotonic() + 120
        while sum(answer.status_code == 200 for answer in answers) < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    try:
        with httpx.Client(base_url=server.url, timeout=120) as http:
            assert http.get("/readyz").json()["deployments"] == {"trunk": True, "lumen": True}
            assert "lumen_ray_pass_seconds" in http.get("/metrics").text
            names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
            (replica,) = [name for name in names if name.startswith("SERVE_REPLICA::lumen#")]
            asker = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any")
            sent = asker.files.create(file=("lines.jsonl", "\n".join(lines).encode()), purpose="batch")
            batch = asker.batches.create(
                input_file_id=sent.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
            threads = [threading.Thread(target=client) for _ in range(4)]
            for thread in threads:
                thread.start()
            await_answers(8)
            ray.kill(ray.get_actor(replica, namespace="serve"))
            await_answers(len(answers) + 8)
            enough.set()
            for thread in threads:
                thread.join()
            wait_for(lambda: asker.batches.retrieve(batch.id).status == "completed", "the end of the batch", 120)
            output = asker.files.content(asker.batches.retrieve(batch.id).output_file_id).text
            assert {json.loads(each)["custom_id"] for each in output.splitlines()} == {f"id {n}" for n in range(40)}
    finally:
        enough.set()
        server.stop()
    lost = [answer for answer in answers if answer.status_code != 200]
    assert {answer.status_code for answer in lost} <= {503, 504}  # 504: the next replica took too long to load
    gone = [answer for answer in lost if answer.status_code == 503]
    assert all(a.json()["error"]["reason"] == "unavailable" and int(a.headers["retry-after"]) > 0 for a in gone)
