"""Traces go where they are sent, and are refused before anything starts where the exporter is missing."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.serve_fakes import FakeBackend

from lumen_ray.errors import UserError
from lumen_ray.serve import tracing
from lumen_ray.serve.api import create_api
from lumen_ray.serve.http import Guard
from lumen_ray.serve.settings import ServeSettings, Tracing

ID = {"X-Request-ID": "0123456789abcdef"}


def test_serve_gets_the_exporter_and_the_ratio():
    assert tracing.tracing_config(None) is None
    made = tracing.tracing_config(Tracing(sampling_ratio=0.25))
    assert (made.enabled, made.sampling_ratio) == (True, 0.25)
    from ray._common.utils import import_attr

    assert import_attr(made.exporter_import_path) is tracing.otlp


def test_spans_are_sent_by_otlp(monkeypatch):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from ray.serve._private.tracing_utils import _load_span_processors

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    tracing.check_installed()
    (processor,) = _load_span_processors(tracing.EXPORTER, "spans.json")
    assert processor.span_exporter._endpoint == "http://collector:4318/v1/traces"
    processor.shutdown()


def test_the_span_of_a_request_has_its_id():
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    guard = Guard(create_api(FakeBackend(), ServeSettings(model="m")), max_body_bytes=1)

    async def traced(scope, receive, send):
        with provider.get_tracer("test").start_as_current_span("request"):
            await guard(scope, receive, send)

    TestClient(traced).get("/healthz", headers=ID)
    (span,) = exporter.get_finished_spans()
    assert span.attributes["request_id"] == ID["X-Request-ID"]


def test_a_missing_exporter_is_named(monkeypatch):
    monkeypatch.setattr(tracing, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'lumen-ray\[otel\]'"):
        tracing.check_installed()
