"""The Ingress deployment: HTTP in, calls to the Trunk and the decoders, HTTP out. No model, no torch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI
from ray import exceptions as ray_errors
from ray import serve
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle

from lumen_ray.answer import Answer
from lumen_ray.errors import UserError
from lumen_ray.inference.request import Request, Shown
from lumen_ray.serve.admission import Gate
from lumen_ray.serve.api import create_api
from lumen_ray.serve.http import Overloaded, Unavailable, logger
from lumen_ray.serve.job import TrunkJob, TrunkReply
from lumen_ray.serve.metrics import STAGE_SECONDS, export_to_ray
from lumen_ray.serve.readiness import Ping, Readiness
from lumen_ray.serve.settings import ServeSettings

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

#: raised by a call whose replica, or an object made by it, is lost
_LOST = (
    ray_errors.RayActorError,
    ray_errors.WorkerCrashedError,
    ray_errors.ObjectLostError,
    ray_errors.NodeDiedError,
    ReplicaUnavailableError,
)


def cause_of(error: BaseException) -> BaseException:
    """The innermost error of a remote call; a call whose argument is a failed response wraps the error once more, and
    is a plain `RayServeException` if the argument's replica died ("an upstream actor died")."""
    while True:
        inner = error.cause if isinstance(error, ray_errors.RayTaskError) else None
        if isinstance(error, RayServeException) and isinstance(error.__cause__, ray_errors.RayError):
            inner = error.__cause__
        if not isinstance(inner, BaseException):
            return error
        error = inner


class _Call(Awaitable[T_co], Protocol[T_co]):
    """A call of a deployment."""

    def cancel(self) -> None: ...


class ServeBackend:
    """Implements `task_api.Backend` with the handles of the trunk and, by name, the decoders."""

    def __init__(
        self,
        trunk: DeploymentHandle,
        decoders: dict[str, DeploymentHandle],
        settings: ServeSettings,
    ):
        self.trunk = trunk
        self.decoders = decoders
        self.settings = settings
        self._info: dict[str, Any] | None = None
        stages = {"trunk": (trunk, settings.trunk)}
        stages |= {name: (handle, settings.decoder(name)) for name, handle in decoders.items()}
        self._readiness = {
            name: Readiness(partial(_ping, handle), partial(_is_running, handle), options.not_ready_after_s)
            for name, (handle, options) in stages.items()
        }

    async def infer(self, image: Shown, requests: Sequence[Request], max_new_tokens: int) -> list[Answer]:
        """One trunk pass over what is shown, then the decoders that it has links for, in parallel."""
        job = TrunkJob(image, tuple(requests), max_new_tokens)
        plain = tuple(replace(request, examples={}) for request in requests)  # decoders read no images of examples

        async def call() -> list[Answer]:
            reply: TrunkReply = await self._timed("trunk", self.trunk.link.remote(job))
            found = await asyncio.gather(
                *(self._timed(name, self.decoders[name].decode.remote(reply.output, plain)) for name in reply.decoders)
            )
            rows = zip(reply.answers, *found, strict=True)
            return [next(answer for answer in answers if answer is not None) for answers in rows]

        return await self._retried(call)

    async def info(self) -> dict[str, Any]:
        if self._info is not None:
            return self._info
        info: dict[str, Any] = await self._retried(lambda: _awaited(self.trunk.info.remote()))
        self._info = info
        return info

    async def ready(self) -> dict[str, bool]:
        answers = await asyncio.gather(*(readiness.check() for readiness in self._readiness.values()))
        return dict(zip(self._readiness, answers, strict=True))

    async def _timed(self, stage: str, response: _Call[T]) -> T:
        """The result of a call of the trunk or a decoder."""
        with STAGE_SECONDS.timed(stage=stage):
            result = await _awaited(response)
        self._readiness[stage].answered()
        return result

    async def _retried(self, call: Callable[[], Awaitable[T]]) -> T:
        """Awaits `call`, again if its replica dies: every call here is idempotent. Serve itself does not retry."""
        http = self.settings.http
        async with asyncio.timeout(http.request_timeout_s):
            for attempt in range(http.retries + 1):
                try:
                    return await call()
                except (ray_errors.RayError, RayServeException) as error:
                    cause = cause_of(error)
                    if isinstance(cause, UserError):
                        raise cause from None
                    if isinstance(cause, BackPressureError):
                        message = "the server is at its limit of waiting requests; try again shortly"
                        raise Overloaded(message, http.retry_after_s) from None
                    if isinstance(cause, DeploymentUnavailableError):
                        raise Unavailable("a deployment of the model failed to start; see the server's log") from error
                    if isinstance(cause, RequestCancelledError) or not isinstance(cause, _LOST):
                        raise
                    logger.warning("a replica was lost (%s), attempt %d", type(cause).__name__, attempt + 1)
            raise Unavailable("a replica died during this request; try again")


async def _awaited(response: _Call[T]) -> T:
    """The result of a call. One that is given up, as after a time-out, is cancelled: Serve itself does so only for
    requests whose client has left."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


async def _ping(handle: DeploymentHandle) -> Ping:
    try:
        return Ping.FINE if await handle.ping.remote() else Ping.STUCK
    except (ray_errors.RayError, RayServeException) as error:
        return Ping.BUSY if isinstance(cause_of(error), BackPressureError) else Ping.GONE


async def _is_running(handle: DeploymentHandle) -> bool:
    """Whether Serve's controller knows a running replica: the handle's own list lags behind, and is private."""
    status = await asyncio.to_thread(serve.status)
    application = status.applications.get(handle.app_name)
    deployment = application.deployments.get(handle.deployment_name) if application else None
    states = deployment.replica_states.items() if deployment else ()
    return any(state == "RUNNING" and count > 0 for state, count in states)


@serve.ingress()
class Ingress:
    """Builds the FastAPI application in the replica, so that it need not be pickled."""

    def __init__(
        self,
        settings: ServeSettings,
        trunk: DeploymentHandle,
        decoders: dict[str, DeploymentHandle],
    ):
        export_to_ray()
        self.settings = settings
        self.backend = ServeBackend(trunk, decoders, settings)
        self.gate = Gate(settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self.backend, self.settings, self.gate)

    async def close(self) -> int:
        """Takes no more requests; returns the number of those that are not answered yet."""
        self.gate.is_closed = True
        return self.gate.inside
