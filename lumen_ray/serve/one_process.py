"""The whole application in one replica process, for machines with one GPU: HTTP, trunk and decoders.

They are the same classes as in the deployments. Nothing is pickled between them: the trunk's tensors stay where they
are, and the model is called in threads of this process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ray import serve

from lumen_ray.answer import Answer
from lumen_ray.inference.request import Request, Shown
from lumen_ray.serve.admission import ingress_options
from lumen_ray.serve.batches.deployment import make_runner
from lumen_ray.serve.batches.runner import BatchRunner
from lumen_ray.serve.decoder import DecoderReplica, load_decoder
from lumen_ray.serve.http import logger
from lumen_ray.serve.http_replica import HttpReplica
from lumen_ray.serve.image_cache import KeyedImage
from lumen_ray.serve.job import TrunkJob, TrunkReply, sender
from lumen_ray.serve.metrics import STAGE_SECONDS
from lumen_ray.serve.room import Room
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.serve.trunk import TrunkReplica, load_trunk
from lumen_ray.structures import Size

if TYPE_CHECKING:
    from lumen_ray.inference.outputs import TrunkOutput

T = TypeVar("T")


class LocalBackend:
    """Implements `asking.Backend` with a trunk and, by name, decoders of this process."""

    def __init__(self, trunk: TrunkReplica, decoders: Mapping[str, DecoderReplica], settings: ServeSettings):
        """`trunk`: one that keeps its outputs here, see `kept`."""
        self.trunk, self.decoders = trunk, decoders
        self._timeout_s = settings.http.request_timeout_s
        self._info: dict[str, Any] | None = None
        stages = {"trunk": settings.trunk, **{name: settings.decoder(name) for name in decoders}}
        self.rooms = {
            name: Room(options.max_ongoing_requests, options.max_queued_requests, settings.http.retry_after_s)
            for name, options in stages.items()
        }

    async def infer(self, image: Shown | KeyedImage, requests: Sequence[Request], max_new_tokens: int) -> list[Answer]:
        """One trunk pass over what is shown, then the decoders that it has links for, in parallel."""
        job = TrunkJob(image, tuple(requests), max_new_tokens, sender.get())
        async with asyncio.timeout(self._timeout_s):
            async with self._place("trunk"):
                reply = await self.trunk.link(job)
            return await self._decoded(reply, job)

    async def stream(
        self, image: Shown | KeyedImage, requests: Sequence[Request], max_new_tokens: int
    ) -> AsyncGenerator[str | Answer, None]:
        job = TrunkJob(image, tuple(requests), max_new_tokens, sender.get())
        until = time.monotonic() + self._timeout_s
        reply: TrunkReply | None = None
        async with self._place("trunk"), aclosing(self.trunk.link_streaming(job)) as pieces:
            async for piece in _until(pieces, until):
                if isinstance(piece, TrunkReply):
                    reply = piece
                else:
                    yield piece
        assert reply is not None, "a stream ends with the reply"
        async with asyncio.timeout(until - time.monotonic()):
            (answer,) = await self._decoded(reply, job)
        yield answer

    async def _decoded(self, reply: TrunkReply, job: TrunkJob) -> list[Answer]:
        """The answers to a job, with those of the decoders that it has links for."""
        return reply.completed(await asyncio.gather(*(self._decode(name, reply, job) for name in reply.decoders)))

    async def _decode(self, name: str, reply: TrunkReply, job: TrunkJob) -> list[Answer | None]:
        output: Any = reply.output
        async with self._place(name):
            return await self.decoders[name].decode(output, job.for_decoders, job.sender)

    @asynccontextmanager
    async def _place(self, stage: str) -> AsyncIterator[None]:
        """The place of a request in trunk or decoder, whose time is measured with that of the wait for it."""
        with STAGE_SECONDS.timed(stage=stage):
            async with self.rooms[stage].place():
                yield

    async def held_size(self, image_id: str, ask: bool) -> Size | None:
        return await self.trunk.image_size(image_id)

    async def info(self) -> dict[str, Any]:
        if self._info is None:  # a replica has one version of the model
            self._info = await self.trunk.info()
        return self._info

    async def ready(self) -> dict[str, bool]:
        decoders = {name: decoder.health.is_ready for name, decoder in self.decoders.items()}
        return {"trunk": self.trunk.health.is_ready, **decoders}


async def _until(items: AsyncIterator[T], until: float) -> AsyncIterator[T]:
    """The items; raises `TimeoutError` at the time `until` of `time.monotonic`."""
    while True:
        try:
            item = await asyncio.wait_for(anext(items), until - time.monotonic())
        except StopAsyncIteration:
            return
        yield item


async def kept(output: TrunkOutput) -> TrunkOutput:
    """The `store` of a trunk whose decoders are in its process."""
    return output


@serve.ingress()
class OneProcess(HttpReplica):
    """The replica that has everything. When it dies, its requests end with it: nobody else could repeat them."""

    def __init__(self, settings: ServeSettings, model: str, decoders: Sequence[str]):
        """`model`: the model folder; `decoders`: those of the model."""
        _use_threads(settings, decoders)
        load = partial(load_trunk, dtype=settings.trunk.dtype)
        self.trunk = TrunkReplica(model, settings.trunk.torch_device, settings.serving, load, kept)
        self.decoders = {}
        for name in decoders:
            options = settings.decoder(name)
            load_one = partial(load_decoder, dtype=options.dtype)
            self.decoders[name] = DecoderReplica(model, name, options.torch_device, load_one)
        backend = LocalBackend(self.trunk, self.decoders, settings)
        super().__init__(backend, settings, wake_batches=self._wake_batches)
        self._batches: BatchRunner | None = None
        if settings.batches is not None:
            self._batches = make_runner(backend, settings)
            # Serve runs this on the event loop of the requests
            self._answering = asyncio.create_task(self._batches.run())

    def _wake_batches(self) -> None:
        if self._batches is not None:
            self._batches.wake()

    def reconfigure(self, options: Mapping[str, dict[str, Any]]) -> None:
        """Called by Serve at the start and on every change of the settings, without a restart."""
        self.trunk.reconfigure(options["trunk"])
        for name, decoder in self.decoders.items():
            decoder.reconfigure(options[name])

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica after several errors in a row."""
        await self.trunk.check_health()
        for decoder in self.decoders.values():
            await decoder.check_health()
        if self._batches is not None and (ended := self._answering).done():  # no reason to end all other requests
            why = None if ended.cancelled() else ended.exception()
            logger.error("batches had stopped and begin again", exc_info=why)
            self._answering = asyncio.create_task(self._batches.run())


def options_of(settings: ServeSettings, decoders: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments of `ray.serve.deployment` for `OneProcess`. Raises `UserError` as `settings.deployments`."""
    (deployment,) = settings.deployments(decoders).values()
    stages = {"trunk": settings.trunk, **{name: settings.decoder(name) for name in decoders}}
    options = {name: stage.user_config for name, stage in stages.items()}
    return {**ingress_options(settings, deployment), "user_config": options}


def _use_threads(settings: ServeSettings, decoders: Sequence[str]) -> None:
    """Gives every pass of the model as many threads as its own replica would have: Ray sets them for the CPUs of the
    whole process, of which trunk and decoders run passes at a time."""
    import torch

    most = max(settings.trunk.num_cpus, *(settings.decoder(name).num_cpus for name in decoders), 1.0)
    torch.set_num_threads(min(torch.get_num_threads(), int(most)))
