"""Deployments that scale to zero, without Ray."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient

from lumen_ray.serve.api import create_api
from lumen_ray.serve.ingress import ServeBackend
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.serve.sleeping import HEADER, Sleeper, State, woken

ASLEEP = {"lumen": {"autoscaling": {"min_replicas": 0, "max_replicas": 2, "downscale_delay_s": 30}}}


class Deployment:
    def __init__(self, running=0, is_healthy=True):
        self.state, self.looks, self.now = State(running, is_healthy), 0, 100.0
        self.sleeper = Sleeper(self.look, awake_s=30, clock=lambda: self.now)

    async def look(self):
        self.looks += 1
        return self.state


@pytest.mark.parametrize(
    ("running", "is_healthy", "ready", "asleep"),
    [(0, True, True, True), (1, True, True, False), (0, False, False, True), (1, False, False, False)],
)
def test_one_without_replicas_is_ready_if_they_can_be_started(running, is_healthy, ready, asleep):
    found = Deployment(running, is_healthy).sleeper
    assert asyncio.run(found.check()) is ready and found.is_asleep is asleep


def test_a_request_knows_that_it_wakes_it():
    """The controller is not asked while the last answer is so recent that a replica must live."""
    one = Deployment()

    async def ask():
        before = await one.sleeper.is_woken()
        one.sleeper.answered()
        soon = await one.sleeper.is_woken()
        one.now += 31
        return before, soon, await one.sleeper.is_woken()

    assert asyncio.run(ask()) == (True, False, True) and one.looks == 2


def test_readiness_sends_nothing_to_a_decoder_that_may_sleep(monkeypatch):
    deployment = SimpleNamespace(replica_states={}, status="HEALTHY")
    status = SimpleNamespace(applications={"lumen": SimpleNamespace(deployments={"LumenDecoder": deployment})})
    monkeypatch.setattr("lumen_ray.serve.ingress.serve.status", lambda: status)
    decoder = SimpleNamespace(app_name="lumen", deployment_name="LumenDecoder")  # has no method to be called

    async def ping():
        return True

    trunk = SimpleNamespace(ping=SimpleNamespace(remote=ping))
    trunk.options = lambda session_id: trunk
    backend = ServeBackend(trunk, {"lumen": decoder}, ServeSettings(model="m", decoders=ASLEEP))

    async def ready():
        before = await backend.ready(), backend.notes()
        deployment.replica_states = {"RUNNING": 1}
        return [*before, await backend.ready(), backend.notes()]

    both = {"trunk": True, "lumen": True}
    assert asyncio.run(ready()) == [both, {"scaled_to_zero": ["lumen"]}, both, {}]


def test_a_trunk_is_woken_by_every_question(monkeypatch):
    """Also by those before its pass: for the model's description, and for an image that it may hold."""
    deployment = SimpleNamespace(replica_states={}, status="HEALTHY")
    status = SimpleNamespace(applications={"lumen": SimpleNamespace(deployments={"Trunk": deployment})})
    monkeypatch.setattr("lumen_ray.serve.ingress.serve.status", lambda: status)

    async def answer(*_):
        deployment.replica_states = {"RUNNING": 1}
        return {}

    method = SimpleNamespace(remote=answer)
    trunk = SimpleNamespace(app_name="lumen", deployment_name="Trunk", info=method, image_size=method)
    trunk.options = lambda session_id: trunk
    settings = ServeSettings(model="m", trunk=ASLEEP["lumen"])

    async def woken_by(ask):
        deployment.replica_states = {}
        backend, names = ServeBackend(trunk, {}, settings), []
        woken.set(names)
        await ask(backend)
        await ask(backend)
        return names

    assert asyncio.run(woken_by(lambda backend: backend.info())) == ["trunk"]
    assert asyncio.run(woken_by(lambda backend: backend.held_size("an image", ask=True))) == ["trunk"]


def test_an_answer_names_what_it_has_woken(backend, settings):
    infer = backend.infer

    async def waking(*asked):
        woken.get().extend(["lumen", "lumen"])
        return await infer(*asked)

    with TestClient(create_api(backend, settings)) as client:
        assert HEADER not in client.post("/v1/chat", json={"text": "hello"}).headers
        backend.infer = waking
        assert client.post("/v1/chat", json={"text": "hello"}).headers[HEADER] == "lumen"
        assert HEADER not in client.get("/healthz").headers


def test_notes_are_told_at_readyz(backend, settings):
    api = create_api(backend, settings, notes=lambda: {"reload_refused": "it is damaged"})
    with TestClient(api) as client:
        assert client.get("/readyz").json() == {
            "ready": True,
            "deployments": {"trunk": True, "lumen": True},
            "reload_refused": "it is damaged",
        }
