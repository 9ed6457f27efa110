"""Who gets in with which key, and what a key above its limits is told."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi.testclient import TestClient
from support.serve_fakes import FakeBackend, base64_png

from lumen_ray.serve.api import create_api
from lumen_ray.serve.keys import new_key
from lumen_ray.serve.settings import Auth, Http, ServeSettings

BODY = {"image": base64_png()}


@pytest.fixture
def made(tmp_path):
    """Names -> keys, with their file: bob has limits of his own."""
    lines, found = [], {}
    for name in ("alice", "bob"):
        found[name], line = new_key(name)
        lines.append(line if name == "alice" else line.replace("}", ", requests_per_minute: 2}"))
    path = tmp_path / "keys.yaml"
    path.write_text("\n".join(lines))
    return found, path


def served(path, http=None, backend=None, **auth):
    settings = ServeSettings(model="m", auth=Auth(keys_file=str(path), **auth), http=http or Http())
    return create_api(backend or FakeBackend(), settings)


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def test_a_key_is_asked_for_but_where_health_and_pages_are(made):
    keys, path = made
    client = TestClient(served(path))
    for open_path in ("/healthz", "/readyz", "/", "/docs", "/openapi.json"):
        assert client.get(open_path).status_code == 200, open_path
    for closed in ("/v1/tasks", "/v1/models", "/metrics", "/nothing", "/healthz/", "/docs/x"):
        assert client.get(closed).status_code == 401, closed
        assert client.get(closed, headers=bearer(keys["alice"])).status_code != 401, closed
    assert client.post("/v1/caption", json=BODY).status_code == 401
    assert client.post("/v1/caption", json=BODY, headers=bearer(keys["bob"])).status_code == 200
    assert client.post("/v1/caption", json=BODY, headers={"X-API-Key": keys["bob"]}).status_code == 200
    assert TestClient(served(path, open_metrics=True)).get("/metrics").status_code == 200


@pytest.mark.parametrize(
    ("headers", "reason", "challenge"),
    [
        ({}, "missing_api_key", 'Bearer realm="lumen_ray"'),
        ({"Authorization": "Basic YTpi"}, "missing_api_key", 'Bearer realm="lumen_ray"'),
        ({"Authorization": "Bearer "}, "missing_api_key", 'Bearer realm="lumen_ray"'),
        (bearer("lumen-" + 43 * "x"), "invalid_api_key", 'Bearer realm="lumen_ray", error="invalid_token"'),
        (bearer("sk-123"), "invalid_api_key", 'Bearer realm="lumen_ray", error="invalid_token"'),
    ],
)
def test_a_refusal_has_the_envelope_and_a_challenge(made, headers, reason, challenge):
    backend = FakeBackend()
    client = TestClient(served(made[1], backend=backend))
    response = client.post("/v1/caption", json=BODY, headers=headers)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (401, reason, "invalid_request_error")
    assert response.headers["www-authenticate"] == challenge
    assert error["request_id"] == response.headers["x-request-id"] and backend.calls == []
    assert "sk-123" not in response.text


def test_a_key_above_its_rate_gets_429_and_others_do_not(made):
    keys, path = made
    client = TestClient(served(path, requests_per_minute=60))
    answers = [client.post("/v1/caption", json=BODY, headers=bearer(keys["bob"])) for _ in range(3)]
    assert [a.status_code for a in answers] == [200, 200, 429]
    assert [a.headers["x-ratelimit-remaining-requests"] for a in answers] == ["1", "0", "0"]
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
    assert 28 <= int(answers[2].headers["retry-after"]) <= 30
    other = client.post("/v1/caption", json=BODY, headers=bearer(keys["alice"]))
    assert other.status_code == 200 and other.headers["x-ratelimit-limit-requests"] == "60"
    assert client.get("/v1/tasks", headers=bearer(keys["bob"])).status_code == 200  # listings do not count


def test_a_key_has_so_many_requests_at_a_time(made):
    keys, path = made

    class Slow(FakeBackend):
        def __init__(self):
            super().__init__()
            self.free, self.inside = asyncio.Event(), 0

        async def infer(self, *args):
            self.inside += 1
            await self.free.wait()
            return await super().infer(*args)

    async def ask():
        backend = Slow()
        api = served(path, backend=backend, max_concurrent_requests=1)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as client:

            def post(name):
                return client.post("/v1/caption", json=BODY, headers=bearer(keys[name]))

            first, other = asyncio.create_task(post("alice")), asyncio.create_task(post("bob"))
            while backend.inside < 2:
                await asyncio.sleep(0.001)
            refused = await post("alice")
            backend.free.set()
            return refused, await first, await other, await post("alice")

    refused, *others = asyncio.run(ask())
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json()["error"]["code"] == "too_many_concurrent_requests"
    assert [r.status_code for r in others] == [200, 200, 200]


def test_the_log_has_the_name_of_a_key_and_never_the_key(made, access_lines):
    keys, path = made
    client = TestClient(served(path, Http(access_log=True)))
    client.post("/v1/caption", json=BODY, headers=bearer(keys["alice"]))
    client.post("/v1/caption", json=BODY, headers=bearer(keys["alice"] + "x"))
    assert [(line.status, line.key) for line in access_lines] == [(200, "alice"), (401, None)]
    assert access_lines[0].getMessage().endswith(" key=alice")
    assert not any(keys["alice"] in str(vars(line)) for line in access_lines)


def test_openapi_names_the_key(made):
    document = TestClient(served(made[1])).get("/openapi.json").json()
    assert document["security"] == [{"key": []}]
    assert document["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    assert "security" not in create_api(FakeBackend(), ServeSettings(model="m")).openapi()


def test_openais_client_reads_the_refusals(made):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(api_key="wrong", base_url="http://test/v1", max_retries=0,
                           http_client=TestClient(served(made[1]), base_url="http://test/v1"))  # fmt: skip
    with pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"
