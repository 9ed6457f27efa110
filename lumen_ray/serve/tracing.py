"""OpenTelemetry traces of requests: FastAPI and Ray Serve make the spans, of ingress, trunk and decoders; here they get
the request id and where they are sent."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from opentelemetry import trace

from lumen_ray.errors import UserError
from lumen_ray.serve.settings import Tracing

if TYPE_CHECKING:
    from ray.serve.schema import TracingConfig

#: of Serve config files, for `tracing_config.exporter_import_path`
EXPORTER = "lumen_ray.serve.tracing:otlp"


def otlp() -> list[Any]:
    """The span processors of a Serve process: batches by OTLP over HTTP, to `OTEL_EXPORTER_OTLP_ENDPOINT`, by default
    localhost:4318."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())]


def name_request(identity: str) -> None:
    """Writes the request id on the span of this request, which is FastAPI's; nothing without tracing."""
    trace.get_current_span().set_attribute("request_id", identity)


def tracing_config(settings: Tracing | None) -> TracingConfig | None:
    """Serve's setting; None, with which its environment decides, if tracing is not configured here."""
    if settings is None:
        return None
    from ray.serve.schema import TracingConfig

    return TracingConfig(enabled=True, exporter_import_path=EXPORTER, sampling_ratio=settings.sampling_ratio)


def check_installed() -> None:
    """Raises `UserError` without the exporter."""
    try:
        is_there = find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        is_there = False
    if not is_there:
        raise UserError(
            "'tracing' needs the OTLP exporter of OpenTelemetry; pip install 'lumen-ray[otel]', or leave it out",
            "missing_package",
        )
