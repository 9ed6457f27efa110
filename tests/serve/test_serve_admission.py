"""A full ingress refuses in the envelope of all errors, and goes on to say that it is healthy."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from support.serve_fakes import FakeBackend, base64_png

from lumen_ray.serve.admission import Gate, ingress_options
from lumen_ray.serve.api import create_api
from lumen_ray.serve.settings import Deployment, Http, ServeSettings


class Busy(FakeBackend):
    """Answers when `free` is set; `most` calls were made at the same time."""

    def __init__(self):
        super().__init__()
        self.free = asyncio.Event()
        self.now = self.most = 0

    async def infer(self, image, requests, max_new_tokens):
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.free.wait()
            return await super().infer(image, requests, max_new_tokens)
        finally:
            self.now -= 1


def served(backend, ongoing=2, queued=1):
    limits = Deployment(max_ongoing_requests=ongoing, max_queued_requests=queued)
    settings = ServeSettings(model="m", ingress=limits, http=Http(retry_after_s=7))
    transport = httpx.ASGITransport(create_api(backend, settings))
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def ask(client):
    return asyncio.create_task(client.post("/v1/caption", json={"image": base64_png()}))


def test_requests_above_the_limits_are_refused_in_the_envelope():
    async def full():
        backend = Busy()
        async with served(backend) as client:
            admitted = [ask(client) for _ in range(3)]
            await until(lambda: backend.now == 2)
            refused = [await ask(client) for _ in range(2)]
            health = await client.get("/healthz")
            backend.free.set()
            return backend, [await task for task in admitted], refused, health, await ask(client)

    backend, admitted, refused, health, later = asyncio.run(full())
    assert [r.status_code for r in (*admitted, later, health)] == [200] * 5 and backend.most == 2
    for response in refused:
        error = response.json()["error"]
        assert (response.status_code, error["reason"], response.headers["retry-after"]) == (503, "overloaded", "7")
        assert error["request_id"] == response.headers["x-request-id"]


def test_a_client_that_leaves_makes_room():
    async def leave():
        backend = Busy()
        async with served(backend, ongoing=1) as client:
            first, second = ask(client), ask(client)
            await until(lambda: backend.now == 1)
            await asyncio.sleep(0.01)
            for task in (second, first):
                task.cancel()
            await asyncio.gather(first, second, return_exceptions=True)
            backend.free.set()
            return [(await ask(client)).status_code for _ in range(3)]

    assert asyncio.run(asyncio.wait_for(leave(), 20)) == [200] * 3


def test_a_server_that_shuts_down_finishes_what_has_begun():
    async def shut_down():
        backend = Busy()
        settings = ServeSettings(model="m", http=Http(retry_after_s=7))
        gate = Gate(settings)
        transport = httpx.ASGITransport(create_api(backend, settings, gate))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            begun = ask(client)
            await until(lambda: backend.now == 1)
            gate.is_closed = True
            refused, ready, health = await ask(client), await client.get("/readyz"), await client.get("/healthz")
            inside = gate.inside
            backend.free.set()
            return refused, ready, health, await begun, (inside, gate.inside)

    refused, ready, health, begun, inside = asyncio.run(shut_down())
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "7")
    assert refused.json()["error"]["reason"] == "shutting_down"
    assert (ready.status_code, health.status_code, begun.status_code, inside) == (503, 200, 200, (1, 0))


def test_without_a_limit_all_wait():
    async def many():
        backend = Busy()
        async with served(backend, queued=-1) as client:
            tasks = [ask(client) for _ in range(20)]
            await until(lambda: backend.now == 2)
            backend.free.set()
            return backend.most, {(await task).status_code for task in tasks}

    assert asyncio.run(many()) == (2, {200})


@pytest.mark.parametrize("queued", [-1, 8])
def test_serve_leaves_refusing_to_the_ingress(queued):
    from ray import serve

    settings = ServeSettings(model="m", ingress=Deployment(max_ongoing_requests=4, max_queued_requests=queued))
    options = ingress_options(settings)
    serve.deployment(object, **options)
    assert options["max_ongoing_requests"] > 12 and options["max_queued_requests"] > 1000
    assert options["backpressure_config"] == {"retry_after_s": 1}
