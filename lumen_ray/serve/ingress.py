"""The Ingress deployment: HTTP in, calls to the Trunk and the decoders, HTTP out. No model, no torch."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

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
from lumen_ray.serve.asking import SentText
from lumen_ray.serve.http import Overloaded, Unavailable, logger
from lumen_ray.serve.http_replica import HttpReplica
from lumen_ray.serve.image_cache import ImageGone, KeyedImage
from lumen_ray.serve.job import TrunkJob, TrunkReply, pinned, sender
from lumen_ray.serve.metrics import STAGE_SECONDS
from lumen_ray.serve.readiness import Ping, Readiness
from lumen_ray.serve.reload import Reloads
from lumen_ray.serve.settings import ModelDeployment, ServeSettings
from lumen_ray.serve.sleeping import Sleeper, State, woken
from lumen_ray.serve.versions import OtherVersion
from lumen_ray.structures import Size

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
#: Serve's words for deployments whose replicas do not start
_FAILED = ("UNHEALTHY", "DEPLOY_FAILED")
#: images of which an ingress replica remembers that a trunk holds them
_REMEMBERED = 10_000
#: seconds before a request is asked again whose trunk and decoder held different versions of the model
_OTHER_VERSION_WAIT_S = 0.2


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
    """Implements `asking.Backend` with the handles of the trunk and, by name, the decoders."""

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
        self._held: OrderedDict[str, Size] = OrderedDict()
        stages: dict[str, tuple[DeploymentHandle, ModelDeployment]] = {"trunk": (trunk, settings.trunk)}
        stages |= {name: (handle, settings.decoder(name)) for name, handle in decoders.items()}
        self._readiness = {name: _readiness_of(handle, options) for name, (handle, options) in stages.items()}
        handles = {name: handle for name, (handle, _) in stages.items()}
        self.reloads = Reloads(settings.model, handles, settings.http.request_timeout_s, self._forget)

    async def infer(self, image: Shown | KeyedImage, requests: Sequence[Request], max_new_tokens: int) -> list[Answer]:
        """One trunk pass over what is shown, then the decoders that it has links for, in parallel."""
        job, key = _job(image, requests, max_new_tokens), _key_of(image)

        async def call() -> list[Answer]:
            asked = self._of_version(job)
            reply: TrunkReply = await self._timed("trunk", lambda: self._trunk(key).link.remote(asked))
            self._remember(job.image, reply)
            return await self._decoded(reply, job)

        try:
            return await self._retried(call)
        except ImageGone:
            self._held.pop(key or "", None)
            raise

    def _of_version(self, job: TrunkJob) -> TrunkJob:
        """The job for the version that is served now, unless its request names another one."""
        return job if job.is_pinned else replace(job, version=self.reloads.version)

    def _trunk(self, key: str | None = None) -> DeploymentHandle:
        """The trunk for one call: the replica that holds the image of id `key`, any for None."""
        return self.trunk.options(session_id=key) if key else _any_replica(self.trunk)

    def _remember(self, image: Shown | KeyedImage, reply: TrunkReply) -> None:
        """Whether a trunk holds the image of a call."""
        if not isinstance(image, KeyedImage):
            return
        self._held.pop(image.image_id, None)
        if reply.is_held:
            self._held[image.image_id] = image.size
            if len(self._held) > _REMEMBERED:
                self._held.popitem(last=False)

    async def held_size(self, image_id: str, ask: bool) -> Size | None:
        if not self.settings.trunk.image_cache_mb:
            return None
        if image_id not in self._held and ask:
            version = self.reloads.version
            size = await self._retried(
                lambda: self._asked("trunk", lambda: self._trunk(image_id).image_size.remote(image_id, version))
            )
            if size is not None:
                self._held[image_id] = size
        return self._held.get(image_id)

    async def _decoded(self, reply: TrunkReply, job: TrunkJob) -> list[Answer]:
        """The answers to a job, with those of the decoders that it has links for."""

        def decode(name: str) -> _Call[list[Answer | None]]:
            return self.decoders[name].decode.remote(reply.output, job.for_decoders, job.sender, reply.version)

        return reply.completed(
            await asyncio.gather(*(self._timed(name, partial(decode, name)) for name in reply.decoders))
        )

    async def stream(
        self, image: Shown | KeyedImage, requests: Sequence[Request], max_new_tokens: int
    ) -> AsyncGenerator[str | Answer, None]:
        """When a replica dies, another one writes the answer again, of which what was sent is left out."""
        job = _job(image, requests, max_new_tokens)
        http, text = self.settings.http, SentText()
        until = time.monotonic() + http.request_timeout_s
        attempt = 0
        while attempt <= http.retries:
            text.begin()
            asked = self._of_version(job)
            try:
                async with aclosing(self._written(asked, until)) as pieces:
                    async for piece in pieces:
                        if isinstance(piece, Answer):
                            yield piece
                            return
                        if new := text.unsent(piece):
                            yield new
            except (ray_errors.RayError, RayServeException) as error:
                attempt += await self._check_lost(error, attempt)
        raise Unavailable("a replica died during this request; try again")

    async def _written(self, job: TrunkJob, until: float) -> AsyncGenerator[str | Answer, None]:
        """The texts of one call of the trunk and the answer, with what a decoder adds to it."""
        key = _key_of(job.image)
        await self._note_woken("trunk")
        began = time.monotonic()
        response = self._trunk(key).options(stream=True).link_streaming.remote(job)
        try:
            async with aclosing(_until(response, until)) as pieces:
                async for piece in pieces:
                    if not isinstance(piece, TrunkReply):
                        yield piece
                        continue
                    STAGE_SECONDS.record(time.monotonic() - began, stage="trunk")
                    self._readiness["trunk"].answered()
                    self._remember(job.image, piece)
                    async with asyncio.timeout(until - time.monotonic()):
                        (answer,) = await self._decoded(piece, job)
                    yield answer
        except (ray_errors.RayError, RayServeException) as error:
            if isinstance(cause_of(error), ImageGone):
                self._held.pop(key or "", None)
            raise

    async def info(self) -> dict[str, Any]:
        if self._info is not None:
            return self._info
        version = self.reloads.version
        info: dict[str, Any] = await self._retried(
            lambda: self._asked("trunk", lambda: self._trunk().info.remote(version))
        )
        if version == self.reloads.version:  # which may have changed meanwhile
            self._info = info
            self.reloads.version = version or info.get("version", "")
        return info

    def notes(self) -> dict[str, Any]:
        """What an operator should know, for /readyz, as of the last `ready`."""
        asleep = [name for name, one in self._readiness.items() if isinstance(one, Sleeper) and one.is_asleep]
        notes = {"scaled_to_zero": asleep, "reload_refused": self.reloads.refused}
        return {name: note for name, note in notes.items() if note}

    def _forget(self) -> None:
        """What is known of a version that is no longer served."""
        self._info = None
        self._held.clear()

    async def ready(self) -> dict[str, bool]:
        answers = await asyncio.gather(*(readiness.check() for readiness in self._readiness.values()))
        return dict(zip(self._readiness, answers, strict=True))

    async def _timed(self, stage: str, call: Callable[[], _Call[T]]) -> T:
        """The result of a call for a request's answer."""
        with STAGE_SECONDS.timed(stage=stage):
            return await self._asked(stage, call)

    async def _asked(self, stage: str, call: Callable[[], _Call[T]]) -> T:
        """The result of a call of the trunk or a decoder."""
        await self._note_woken(stage)
        result = await _awaited(call())
        self._readiness[stage].answered()
        return result

    async def _note_woken(self, stage: str) -> None:
        """For the header of the answer, if the request of this context now waits for a replica to start."""
        readiness, names = self._readiness[stage], woken.get()
        if isinstance(readiness, Sleeper) and names is not None and await readiness.is_woken():
            names.append(stage)

    async def _retried(self, call: Callable[[], Awaitable[T]]) -> T:
        """Awaits `call`, again if its replica dies: every call here is idempotent. Serve itself does not retry."""
        http = self.settings.http
        attempt = 0
        async with asyncio.timeout(http.request_timeout_s):
            while attempt <= http.retries:
                try:
                    return await call()
                except (ray_errors.RayError, RayServeException) as error:
                    attempt += await self._check_lost(error, attempt)
            raise Unavailable("a replica died during this request; try again")

    async def _check_lost(self, error: Exception, attempt: int) -> int:
        """Returns if another replica may be asked, with 1 since this one is lost, or 0 if it has another version of the
        model than the one that asked it; raises what another error of a call means."""
        cause = cause_of(error)
        if isinstance(cause, OtherVersion):  # all are to have that of the folder, or the others are being replaced
            self._info = None
            await self.reloads.switch()
            await asyncio.sleep(_OTHER_VERSION_WAIT_S)
            return 0
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, Overloaded | BackPressureError):
            message = "the server is at its limit of waiting requests; try again shortly"
            raise Overloaded(message, self.settings.http.retry_after_s) from None
        if isinstance(cause, DeploymentUnavailableError):
            raise Unavailable("a deployment of the model failed to start; see the server's log") from error
        if isinstance(cause, RequestCancelledError) or not isinstance(cause, _LOST):
            raise error
        logger.warning("a replica was lost (%s), attempt %d", type(cause).__name__, attempt + 1)
        return 1


async def _until(response: Any, until: float) -> AsyncGenerator[Any, None]:
    """The items of a streaming call; raises `TimeoutError` at the time `until` of `time.monotonic`. A call that is left
    before its end is cancelled."""
    items, is_done = aiter(response), False
    try:
        while True:
            try:
                item = await asyncio.wait_for(anext(items), until - time.monotonic())
            except StopAsyncIteration:
                is_done = True
                return
            yield item
    finally:
        if not is_done:
            response.cancel()


async def _awaited(response: _Call[T]) -> T:
    """The result of a call. One that is given up, as after a time-out, is cancelled: Serve itself does so only for
    requests whose client has left."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


def _job(image: Shown | KeyedImage, requests: Sequence[Request], max_new_tokens: int) -> TrunkJob:
    """The job of the HTTP request in this context."""
    version = pinned.get()
    return TrunkJob(image, tuple(requests), max_new_tokens, sender.get(), version, bool(version))


def _key_of(image: Shown | KeyedImage) -> str | None:
    return image.image_id if isinstance(image, KeyedImage) else None


def _any_replica(handle: DeploymentHandle) -> DeploymentHandle:
    """A handle for one call: those without a session id go to one replica where sessions have theirs."""
    return handle.options(session_id=uuid.uuid4().hex)


async def _ping(handle: DeploymentHandle) -> Ping:
    try:
        return Ping.FINE if await _any_replica(handle).ping.remote() else Ping.STUCK
    except (ray_errors.RayError, RayServeException) as error:
        return Ping.BUSY if isinstance(cause_of(error), BackPressureError) else Ping.GONE


async def _is_running(handle: DeploymentHandle) -> bool:
    """Whether Serve's controller knows a running replica: the handle's own list lags behind, and is private."""
    return (await _state(handle)).running > 0


async def _state(handle: DeploymentHandle) -> State:
    status = await asyncio.to_thread(serve.status)
    application = status.applications.get(handle.app_name)
    deployment = application.deployments.get(handle.deployment_name) if application else None
    if deployment is None:
        return State(0, is_healthy=False)
    running = sum(count for state, count in deployment.replica_states.items() if state == "RUNNING")
    return State(running, deployment.status not in _FAILED)


def _readiness_of(handle: DeploymentHandle, options: ModelDeployment) -> Readiness | Sleeper:
    if options.autoscaling is not None and options.min_replicas == 0:
        return Sleeper(partial(_state, handle), options.autoscaling.downscale_delay_s)
    return Readiness(partial(_ping, handle), partial(_is_running, handle), options.not_ready_after_s)


@serve.ingress()
class Ingress(HttpReplica):
    """The replica that calls the others."""

    def __init__(
        self,
        settings: ServeSettings,
        trunk: DeploymentHandle,
        decoders: dict[str, DeploymentHandle],
        batches: DeploymentHandle | None = None,
    ):
        """`batches`: answers batches, None on a server that takes none."""
        backend = ServeBackend(trunk, decoders, settings)
        super().__init__(backend, settings, backend.notes, self._wake_batches)
        self._batches = batches
        if settings.reload is not None:
            # Serve runs this on the event loop of the requests
            self._watching = asyncio.create_task(backend.reloads.watch(settings.reload.watch_s))

    def _wake_batches(self) -> None:
        """Without waiting for an answer: a replica that dies of it finds the batch when it starts again."""
        if self._batches is not None:
            self._batches.wake.remote()
