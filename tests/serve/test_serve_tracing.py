"""Traces go where they are sent, and are refused before anything starts where the exporter is missing."""

from __future__ import annotations

import pytest

from lumen_ray.errors import UserError
from lumen_ray.serve import tracing
from lumen_ray.serve.settings import Tracing


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


def test_a_missing_exporter_is_named(monkeypatch):
    monkeypatch.setattr(tracing, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'lumen-ray\[otel\]'"):
        tracing.check_installed()
