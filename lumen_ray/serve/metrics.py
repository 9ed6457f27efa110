"""What the server counts and measures, for Prometheus.

Each metric is kept twice: in this process, for `/metrics` of the ingress, and, in a replica, by `ray.util.metrics`, for
the endpoint that Ray has on every node, where it stands under its name with "ray_" before it. Only there are trunk and
decoders, and all replicas of the ingress.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry

from lumen_ray import ray_metrics

REGISTRY = CollectorRegistry()
prometheus_client.disable_created_metrics()  # a series more for every one, and Ray's endpoint has none
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_COUNTS = (1, 2, 4, 8, 16, 32, 64)


class Metric(ray_metrics.Metric):
    """A metric that is in `REGISTRY` too. `name`: as in `/metrics`."""

    def __init__(
        self, kind: str, name: str, description: str, labels: Sequence[str] = (), buckets: Sequence[float] = ()
    ):
        super().__init__(kind, name, description, labels, buckets)
        made = {"counter": prometheus_client.Counter, "gauge": prometheus_client.Gauge}
        self._local: Any = (
            prometheus_client.Histogram(name, description, labels, buckets=buckets, registry=REGISTRY)
            if kind == "histogram"
            else made[kind](self.base, description, labels, registry=REGISTRY)
        )

    def record(self, value: float = 1, **labels: str) -> None:
        local = self._local.labels(**labels) if self.labels else self._local
        match self.kind:
            case "counter":
                local.inc(value)
            case "gauge":
                local.set(value)
            case _:
                local.observe(value)
        super().record(value, **labels)

    @contextmanager
    def timed(self, **labels: str) -> Iterator[None]:
        """Observes the seconds of a block, whether it fails or not."""
        start = perf_counter()
        try:
            yield
        finally:
            self.record(perf_counter() - start, **labels)


REQUESTS = Metric("counter", "lumen_ray_requests_total", "HTTP requests answered", ("method", "route", "status"))
REQUEST_SECONDS = Metric("histogram", "lumen_ray_request_seconds", "time to the end of an answer", ("route",), _SECONDS)
FIRST_EVENT_SECONDS = Metric(
    "histogram", "lumen_ray_first_event_seconds", "time to the first event of a streamed answer", ("route",), _SECONDS
)
KEY_REQUESTS = Metric("counter", "lumen_ray_key_requests_total", "HTTP requests by API key", ("key", "status"))
TASKS = Metric("counter", "lumen_ray_tasks_total", "tasks answered, several in a request of /v1/infer", ("task",))
TOKENS = Metric("counter", "lumen_ray_tokens_total", "tokens of texts that the model read and wrote", ("direction",))
ERRORS = Metric("counter", "lumen_ray_errors_total", "errors answered, by their reason", ("reason",))
REFUSALS = Metric(
    "counter", "lumen_ray_refusals_total", "requests refused for a limit of load: of ingress, model or key", ("by",)
)
INSIDE = Metric("gauge", "lumen_ray_requests_inside", "requests in the ingress replica: working or waiting", ("state",))
STAGE_SECONDS = Metric(
    "histogram",
    "lumen_ray_stage_seconds",
    "time of a request in a stage as the ingress sees it: queue (before it is worked on), trunk, or a decoder",
    ("stage",),
    _SECONDS,
)
BATCH_WAIT_SECONDS = Metric(
    "histogram", "lumen_ray_batch_wait_seconds", "time of a request in a replica before its pass", ("stage",), _SECONDS
)
PASS_SECONDS = Metric("histogram", "lumen_ray_pass_seconds", "time of a pass of the model", ("stage",), _SECONDS)
BATCH_SIZE = Metric("histogram", "lumen_ray_batch_size", "requests of a pass of the model", ("stage",), _COUNTS)
IMAGE_LOOKUPS = Metric(
    "counter", "lumen_ray_image_lookups_total", "images that a trunk was asked about: hit or miss", ("result",)
)
IMAGE_BYTES = Metric("gauge", "lumen_ray_image_cache_bytes", "bytes of the encoded images that a trunk holds")

#: all of them
METRICS: tuple[Metric, ...] = (
    REQUESTS, REQUEST_SECONDS, FIRST_EVENT_SECONDS, KEY_REQUESTS, TASKS, TOKENS, ERRORS, REFUSALS, INSIDE,
    STAGE_SECONDS, BATCH_WAIT_SECONDS, PASS_SECONDS, BATCH_SIZE, IMAGE_LOOKUPS, IMAGE_BYTES,
)  # fmt: skip


def export_to_ray() -> None:
    """Also gives all values of this process to Ray's endpoint. Called by every replica at its start."""
    ray_metrics.export_to_ray(METRICS)


def exposition() -> tuple[bytes, str]:
    """All values of this process in Prometheus's text format, and their content type."""
    return prometheus_client.generate_latest(REGISTRY), prometheus_client.CONTENT_TYPE_LATEST
