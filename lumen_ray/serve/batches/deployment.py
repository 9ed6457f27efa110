"""The Batches deployment: one replica that answers batches through the trunk and the decoders. No HTTP, no model."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.serve.handle import DeploymentHandle

from lumen_ray.serve.asking import Backend
from lumen_ray.serve.batches.batch_store import BatchStore
from lumen_ray.serve.batches.file_store import FileStore
from lumen_ray.serve.batches.runner import BatchRunner
from lumen_ray.serve.ingress import ServeBackend
from lumen_ray.serve.measured import MeasuredBackend
from lumen_ray.serve.metrics import export_to_ray
from lumen_ray.serve.settings import Deployment, ServeSettings


def batches_options(settings: ServeSettings) -> dict[str, Any]:
    """Keyword arguments of `ray.serve.deployment`: one replica, since its work is that of the model."""
    assert settings.batches is not None, "the server takes batches"
    return Deployment(num_cpus=settings.batches.num_cpus, num_replicas=1).options()


def make_runner(backend: Backend, settings: ServeSettings) -> BatchRunner:
    """What answers the batches of the settings' folder through a backend."""
    assert settings.batches is not None, "the server takes batches"
    stores = FileStore(settings.batches), BatchStore(settings.batches)
    return BatchRunner(*stores, MeasuredBackend(backend), settings)


class BatchesReplica:
    """Answers batches for as long as it lives; where a replica was killed, the next one goes on."""

    def __init__(self, settings: ServeSettings, trunk: DeploymentHandle, decoders: dict[str, DeploymentHandle]):
        export_to_ray()
        backend = ServeBackend(trunk, decoders, settings)
        self._runner = make_runner(backend, settings)
        # Serve runs this on the event loop of the replica's calls
        self._running = asyncio.create_task(self._runner.run())
        if settings.reload is not None:
            self._watching = asyncio.create_task(backend.reloads.watch(settings.reload.watch_s))

    async def wake(self) -> None:
        """A batch was created or is to be cancelled."""
        self._runner.wake()

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica that no longer works on batches."""
        if self._running.done():
            await self._running
