"""What /metrics and Ray's endpoint export, and the lines of the access log."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from starlette.routing import Route
from support.serve_fakes import FakeBackend, base64_png

from lumen_ray.answer import TokenUsage
from lumen_ray.errors import UserError
from lumen_ray.serve import metrics
from lumen_ray.serve.access import Access
from lumen_ray.serve.api import create_api
from lumen_ray.serve.batching import Collector
from lumen_ray.serve.http import Overloaded
from lumen_ray.serve.metrics import METRICS, REGISTRY
from lumen_ray.serve.settings import Http, Limits, ServeSettings

BODY = {"image": base64_png()}


def value(name, **labels):
    return REGISTRY.get_sample_value(name, labels) or 0


class Change:
    """How much a value has grown since."""

    def __init__(self, name, **labels):
        self.name, self.labels = name, labels
        self.before = value(name, **labels)

    @property
    def now(self):
        return value(self.name, **self.labels) - self.before


def test_the_page_names_what_is_exported():
    table = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    rows = dict(re.findall(r"^\| `(lumen_ray_\w+)` \| (.*?) \|", table, re.MULTILINE))
    assert list(rows) == [metric.name for metric in METRICS]
    assert {name: re.findall(r"`(\w+)`", labels) for name, labels in rows.items()} == {
        metric.name: list(metric.labels) for metric in METRICS
    }


def test_the_route_exports_all_of_them():
    client = TestClient(create_api(FakeBackend(), ServeSettings(model="m")))
    response = client.get("/metrics")
    families = {family.name: family.type for family in text_string_to_metric_families(response.text)}
    assert families == {metric.base: metric.kind for metric in METRICS}
    assert response.headers["content-type"].startswith("text/plain; version=")


def test_requests_tasks_and_tokens_are_counted():
    class Writing(FakeBackend):
        async def infer(self, *args):
            answers = await super().infer(*args)
            answers[0].usage = TokenUsage(70, 5)
            return answers

    client = TestClient(create_api(Writing(), ServeSettings(model="m")))
    changes = {
        "requests": Change("lumen_ray_requests_total", method="POST", route="/v1/infer", status="200"),
        "seconds": Change("lumen_ray_request_seconds_count", route="/v1/infer"),
        "captions": Change("lumen_ray_tasks_total", task="caption"),
        "counts": Change("lumen_ray_tasks_total", task="count"),
        "read": Change("lumen_ray_tokens_total", direction="read"),
        "written": Change("lumen_ray_tokens_total", direction="written"),
        "queue": Change("lumen_ray_stage_seconds_count", stage="queue"),
    }
    tasks = [{"task": "caption"}, {"task": "count", "classes": ["a"]}]
    assert client.post("/v1/infer", json={**BODY, "requests": tasks}).status_code == 200
    assert {name: change.now for name, change in changes.items()} == {
        "requests": 1, "seconds": 1, "captions": 1, "counts": 1, "read": 70, "written": 5, "queue": 1,
    }  # fmt: skip
    assert value("lumen_ray_requests_inside", state="working") == 0


def test_what_is_refused_early_counts_at_its_route():
    settings = ServeSettings(model="m", limits=Limits(max_body_bytes=1024))
    client = TestClient(create_api(FakeBackend(), settings))
    infer = "/v2/models/{name}/versions/{version}/infer"
    for route, path in {"/v1/detect": "/v1/detect", infer: "/v2/models/nano/versions/3/infer", "other": "/x/y"}.items():
        refused = Change("lumen_ray_requests_total", method="POST", route=route, status="413")
        assert client.post(path, content=2000 * "a").status_code == 413 and refused.now == 1


def test_errors_are_counted_by_reason_and_paths_nobody_serves_as_one():
    backend = FakeBackend()
    client = TestClient(create_api(backend, ServeSettings(model="m")))
    other = Change("lumen_ray_requests_total", method="GET", route="other", status="404")
    broken = Change("lumen_ray_errors_total", reason="no_phrases")
    overloaded = Change("lumen_ray_errors_total", reason="overloaded")
    refused = Change("lumen_ray_refusals_total", by="model")
    for path in ("/a", "/b/c"):
        client.get(path)
    backend.error = UserError("give classes", "no_phrases")
    client.post("/v1/caption", json=BODY)
    backend.error = Overloaded("full")
    client.post("/v1/caption", json=BODY)
    assert (other.now, broken.now, overloaded.now, refused.now) == (2, 1, 1, 1)


def test_batches_are_measured_by_their_stage():
    import asyncio

    size = Change("lumen_ray_batch_size_sum", stage="test")
    passes = Change("lumen_ray_pass_seconds_count", stage="test")
    waits = Change("lumen_ray_batch_wait_seconds_count", stage="test")
    collector = Collector(lambda items: items, lambda item: 0, stage="test")
    collector.configure({"max_batch_size": 4, "max_batch_tokens": 9, "batch_wait_timeout_s": 0.05})

    async def submit():
        return await asyncio.gather(*(collector.submit(n) for n in range(3)))

    assert asyncio.run(submit()) == [0, 1, 2]
    assert (size.now, waits.now) == (3, 3) and 1 <= passes.now <= 3


def test_ray_gets_the_same_values(monkeypatch):
    from ray.util import metrics as ray_metrics

    seen = []
    for kind, method in (("Counter", "inc"), ("Gauge", "set"), ("Histogram", "observe")):
        monkeypatch.setattr(
            getattr(ray_metrics, kind), method, lambda self, v, tags: seen.append((self.info["name"], v, tags))
        )
    for metric in METRICS:
        monkeypatch.setattr(metric, "_in_ray", None)
    metrics.export_to_ray()
    for metric in METRICS:
        metric.record(2, **dict.fromkeys(metric.labels, "ray"))
    assert seen == [(metric.base, 2, dict.fromkeys(metric.labels, "ray")) for metric in METRICS]
    for metric in METRICS:  # Ray adds "_total" to counters by itself
        assert metric.name == metric.base + ("_total" if metric.kind == "counter" else "")


def test_a_line_of_the_log_has_fields_that_serve_writes_as_json(access_lines):
    from ray.serve._private.logging_utils import JSONFormatter

    client = TestClient(create_api(FakeBackend(), ServeSettings(model="m", http=Http(access_log=True))))
    response = client.post("/v1/caption?a=b", json=BODY, headers={"X-Request-ID": "0123456789"})
    (record,) = access_lines
    line = json.loads(JSONFormatter().format(record))
    wanted = {
        "request_id": "0123456789", "method": "POST", "route": "/v1/caption", "path": "/v1/caption", "status": 200,
        "bytes_sent": len(response.content), "key": None, "levelname": "INFO",
    }  # fmt: skip
    assert {name: line[name] for name in wanted} == wanted and line["duration_ms"] > 0
    assert re.fullmatch(r"POST /v1/caption 200 [\d.]+ms", line["message"])


def test_without_the_setting_there_are_no_lines(access_lines):
    TestClient(create_api(FakeBackend(), ServeSettings(model="m"))).get("/v1/tasks")
    assert access_lines == []


@pytest.mark.parametrize("kind", [b"text/event-stream; charset=utf-8", b"application/json"])
def test_the_first_event_of_a_stream_is_timed(kind):
    import asyncio

    async def stream(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        for _ in range(2):
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def nothing(*_):
        pass

    timed = Change("lumen_ray_first_event_seconds_count", route="/v1/stream")
    scope = {"type": "http", "method": "POST", "path": "/v1/stream", "headers": []}
    asyncio.run(Access(stream, [Route("/v1/stream", nothing, methods=["POST"])], log=False)(scope, nothing, nothing))
    assert timed.now == (kind != b"application/json")
