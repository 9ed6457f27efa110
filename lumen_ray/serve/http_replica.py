"""The replica that has the HTTP API, whatever answers behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from lumen_ray.serve.admission import Gate
from lumen_ray.serve.api import create_api
from lumen_ray.serve.asking import Backend
from lumen_ray.serve.metrics import export_to_ray
from lumen_ray.serve.settings import ServeSettings


class HttpReplica:
    """Builds the FastAPI application in the replica, so that it need not be pickled. Arguments are those of
    `create_api`."""

    def __init__(
        self,
        backend: Backend,
        settings: ServeSettings,
        notes: Callable[[], dict[str, Any]] = dict,
        wake_batches: Callable[[], None] = lambda: None,
    ):
        export_to_ray()
        self._notes, self._wake = notes, wake_batches
        self.settings = settings
        self.backend = backend
        self.gate = Gate(settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self.backend, self.settings, self.gate, self._notes, self._wake)

    async def close(self) -> int:
        """Takes no more requests; returns the number of those that are not answered yet."""
        self.gate.is_closed = True
        return self.gate.inside
