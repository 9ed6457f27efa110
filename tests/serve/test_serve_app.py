"""The application on a local Ray: real HTTP, real deployments, a nano model with random weights."""

from __future__ import annotations

import base64
import io
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from support.serve_fakes import free_port

from lumen_ray.errors import UserError
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request
from lumen_ray.inference.sampling import Sampling
from lumen_ray.serve.app import run
from lumen_ray.serve.settings import Batching, Deployment, Http, ServeSettings, TrunkDeployment
from lumen_ray.wire.settings import Defaults

PIXELS = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)


def image() -> str:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def server(model_folder):
    os.environ["PYTHONPATH"] = f"{Path(__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    settings = ServeSettings(
        model=str(model_folder),
        http=Http(port=free_port(), request_timeout_s=90),
        openai_sampling=True,
        defaults=Defaults(score_threshold=0, max_per_phrase=3),
        ingress=Deployment(num_cpus=0.1, max_ongoing_requests=12, max_queued_requests=4),
        trunk=TrunkDeployment(
            num_cpus=0.5, max_ongoing_requests=4, max_queued_requests=4, batching=Batching(max_batch_size=4)
        ),
    )
    running = run(settings, blocking=False)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


@pytest.mark.ray
def test_answers_are_the_engines(http, model_folder):
    engine = Engine.load(model_folder)
    for task, fields in {
        "detect": {"classes": ["red circle", "blue square"]},
        "segment": {"classes": ["red circle"]},
        "pose": {"classes": ["figure"]},
        "ground": {"text": "a [red circle] by a [square]"},
        "vqa": {"text": "what is it ?"},
        "caption": {},
    }.items():
        response = http.post(f"/v1/{task}", json={"image": image(), "max_new_tokens": 6, **fields})
        assert response.status_code == 200, response.text
        request = make_request(task, **fields)
        (expected,) = engine.run([PIXELS], [[request]], score_threshold=0, max_per_phrase=3, max_new_tokens=6)[0]
        expected, got = expected.to_dict(), response.json()
        assert got.get("text") == expected.get("text") and got["model"] == f"nano@{engine.version}"
        for a, b in zip(got.get("instances", ()), expected.get("instances", ()), strict=True):
            assert a["phrase"] == b["phrase"] and a["score"] == pytest.approx(b["score"], abs=1e-4)
            assert a["box"] == pytest.approx(b["box"], abs=1e-2)


@pytest.mark.ray
def test_neighbours_in_a_batch_do_not_matter(http):
    good = {"image": image(), "classes": ["red circle"]}
    bad = {"image": image(), "classes": ["dragon"]}  # has no keypoints: refused by the trunk
    alone = http.post("/v1/pose", json={**good, "keypoints": ["head"]}).json()["instances"]
    with ThreadPoolExecutor(4) as pool:
        bodies = [{**good, "keypoints": ["head"]}, bad, {**good, "keypoints": ["head"]}, bad]
        responses = list(pool.map(lambda body: http.post("/v1/pose", json=body), bodies))
    assert [r.status_code for r in responses] == [200, 400, 200, 400], [r.text for r in responses]
    assert responses[1].json()["error"]["reason"] == "unknown_skeleton"
    for response in (responses[0], responses[2]):
        assert [i["score"] for i in response.json()["instances"]] == pytest.approx(
            [i["score"] for i in alone], abs=1e-4
        )


@pytest.mark.ray
def test_conversations_are_answered_as_by_the_engine(http, model_folder):
    """With an image and as text alone, greedy and sampled, whatever else is in the batch."""
    history, url = [("hello", "hi there")], {"type": "image_url", "image_url": "data:image/png;base64," + image()}
    sampled = {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.1, "seed": 11, "stop": ["zz"]}
    cases = [(pixels, settings) for pixels in (PIXELS, None) for settings in ({}, sampled)]

    def body(pixels, settings):
        first = [{"type": "text", "text": "hello"}] + ([] if pixels is None else [url])
        turns = [("system", "be brief"), ("user", first), ("assistant", "hi there"), ("user", "what is it ?")]
        messages = [{"role": role, "content": content} for role, content in turns]
        return {"messages": messages, "max_tokens": 6, "logprobs": True, **settings}

    bodies = [body(*case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        system, asked, _, last = bodies[0]["messages"]
        answered = {"role": "assistant", "content": "red circle " * 1500}  # more tokens than the context has
        too_long = {"messages": [system, asked, answered, last], "max_tokens": 6}
        responses = list(pool.map(lambda body: http.post("/v1/chat/completions", json=body), [too_long, *bodies[1:]]))
    refused, *responses = [responses[0], http.post("/v1/chat/completions", json=bodies[0]), *responses[1:]]
    assert (refused.status_code, refused.json()["error"]["reason"]) == (400, "context_too_long"), refused.text
    engine = Engine.load(model_folder)
    for (pixels, settings), response in zip(cases, responses, strict=True):
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        drawn = Sampling(**{**settings, "stop": ("zz",)}) if settings else Sampling()
        request = make_request("chat", text="what is it ?", history=history, system="be brief", sampling=drawn)
        [[expected]] = engine.run([pixels], [[request]], score_threshold=0, max_per_phrase=3, max_new_tokens=6)
        assert choice["message"]["content"] == (expected.text or "")
        assert choice["finish_reason"] == ("length" if expected.is_cut else "stop")
        usage, written = response.json()["usage"], expected.usage
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (written.prompt, written.completion)
        content = choice["logprobs"]["content"]
        assert "".join(entry["token"] for entry in content) == (expected.text or "")
        of_tokens = [entry["logprob"] for entry in content]
        assert of_tokens == pytest.approx((expected.log_probs or [])[: len(content)], abs=1e-3)


@pytest.mark.ray
def test_health_errors_and_page(http):
    assert http.get("/readyz").json() == {"ready": True, "deployments": {"trunk": True, "lumen": True}}
    assert http.get("/v1/models").json()["data"][0]["lumen"]["classes"] == ["red circle", "figure"]
    assert "<!doctype html>" in http.get("/").text
    response = http.post("/v1/detct", json={})
    assert response.status_code == 404
    assert response.headers.get_list("x-request-id") == [response.json()["error"]["request_id"]]


@pytest.mark.ray
def test_overload_is_503_with_retry_after(http):
    """The trunk takes and queues 8 of them, the ingress 16."""
    body = {"image": image(), "max_new_tokens": 60}
    with ThreadPoolExecutor(24) as pool:
        responses = list(pool.map(lambda _: http.post("/v1/caption", json=body), range(24)))
    refused = [r for r in responses if r.status_code == 503]
    assert {r.status_code for r in responses} == {200, 503}, [r.text for r in responses]
    assert all(r.json()["error"]["reason"] == "overloaded" and r.headers["retry-after"] == "1" for r in refused)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("task", "fields"),
    [("caption", {"max_new_tokens": 60}), ("detect", {"classes": ["red circle"]})],
    ids=["caption", "detect"],
)
def test_requests_survive_the_death_of_a_replica(http, task, fields):
    """Four clients ask without a pause; the trunk's replica is killed, on whose response a decoder's call may wait;
    nobody sees it."""
    import ray

    def trunk_replica() -> str:
        actors = ray.util.list_named_actors(all_namespaces=True)
        return next(a["name"] for a in actors if a["name"].startswith("SERVE_REPLICA::lumen#Trunk#"))

    answers, enough = [], threading.Event()

    def client():
        while not enough.is_set():
            answers.append(http.post(f"/v1/{task}", json={"image": image(), **fields}))

    def wait_for(count):
        deadline = time.monotonic() + 60
        while len(answers) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(answers) >= count

    victim = trunk_replica()
    clients = [threading.Thread(target=client) for _ in range(4)]
    for thread in clients:
        thread.start()
    wait_for(4)
    ray.kill(ray.get_actor(victim, namespace="serve"))
    wait_for(len(answers) + 12)
    enough.set()
    for thread in clients:
        thread.join()
    assert {r.status_code for r in answers} == {200}, [r.text for r in answers if r.status_code != 200][:1]
    assert trunk_replica() != victim


@pytest.mark.ray
def test_the_model_stops_when_the_client_has_left(http):
    (process,) = [p for p in psutil.process_iter(["cmdline"]) if is_trunk(p)]

    def cpu_s() -> float:
        return process.cpu_times().user + process.cpu_times().system

    def ask(timeout: float) -> None:
        http.post("/v1/caption", json={"image": image(), "max_new_tokens": 1000}, timeout=timeout)

    begin, cpu = time.monotonic(), cpu_s()
    ask(120)
    took, whole = time.monotonic() - begin, cpu_s() - cpu
    cpu = cpu_s()
    with pytest.raises(httpx.ReadTimeout):
        ask(took / 5)
    time.sleep(2 * took)
    assert cpu_s() - cpu < 0.7 * whole


def is_trunk(process: psutil.Process) -> bool:
    """Whether it is the replica of this process's Ray."""
    names = " ".join(process.info["cmdline"] or ())
    return "Trunk" in names and "ServeReplica" in names and os.getpid() in {p.pid for p in process.parents()}


def test_missing_model_is_refused_before_ray_starts(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        run(ServeSettings(model=str(tmp_path / "none")))
