"""The Trunk deployment: images and requests in, super links and dense features (or finished texts) out."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lumen_ray.serve.batching import MANY, Collector, map_grouped, value_of
from lumen_ray.serve.health import Health
from lumen_ray.serve.image_cache import ImageCache, ImageGone, KeyedImage, gone
from lumen_ray.serve.job import TrunkJob, TrunkReply, owner_of
from lumen_ray.serve.metrics import export_to_ray
from lumen_ray.structures import Size
from lumen_ray.tasks import TASKS

if TYPE_CHECKING:
    from ray import ObjectRef

    from lumen_ray.inference.encoded_images import EncodedImages
    from lumen_ray.inference.outputs import TrunkOutput
    from lumen_ray.inference.request import Shown
    from lumen_ray.inference.trunk_stage import TrunkStage


def load_trunk(model: str, device: str, serving: Mapping[str, str], dtype: str = "float32") -> TrunkStage:
    from lumen_ray.inference.trunk_stage import TrunkStage

    return TrunkStage.load(model, device, serving, dtype)


class TrunkReplica:
    """A replica with the trunk of the model.

    `serving`: task -> decoder, overriding the model's choice. `load` returns the engine's trunk half; tests pass their
    own. `store` puts an output where decoders find it by what it returns.
    """

    def __init__(
        self,
        model: str,
        device: str,
        serving: Mapping[str, str],
        load: Callable[[str, str, Mapping[str, str]], TrunkStage] = load_trunk,
        store: Callable[[TrunkOutput], Awaitable[ObjectRef[TrunkOutput] | TrunkOutput]] | None = None,
    ):
        export_to_ray()
        self.stage = load(model, device, serving)
        self.health = Health(self.stage.loop.busy_s)
        self.images = ImageCache()
        self._store = store or _in_object_store
        self._listeners: dict[int, Callable[[str], None]] = {}  # by the identity of their job
        # Threads, so that the event loop stays free to answer pings. The model is used by one of them at a time.
        self.batches: Collector[TrunkJob, TrunkOutput] = Collector(
            self.outputs,
            self._key,
            lambda job: job.cost,
            self.stage.loop.turn,
            MANY,
            owner=lambda job: owner_of(job.sender),
            leaves=lambda job: _writes(job) or passes_of(job) > 1,
        )

    @property
    def preset(self) -> str:
        return self.stage.loaded.settings.name

    def reconfigure(self, settings: dict[str, Any]) -> None:
        """Called by Serve at the start and on every change of the settings, without a restart."""
        self.batches.configure(settings)
        self.health.configure(settings)
        self.images.resize(settings["image_cache_mb"] << 20)

    async def link(self, job: TrunkJob) -> TrunkReply:
        """The answers that need no decoder, and what the decoders of the others read."""
        from lumen_ray.inference.outputs import assemble

        output = await self.output(job)
        answers = tuple(assemble(output.plans, {})[0])
        is_held = isinstance(job.image, KeyedImage) and job.image.image_id in self.images
        if not output.decoder_inputs:
            return TrunkReply(answers, is_held=is_held)
        return TrunkReply(answers, tuple(output.decoder_inputs), await self._store(output), is_held)

    async def link_streaming(self, job: TrunkJob) -> AsyncGenerator[str | TrunkReply, None]:
        """The text of the answer to the single request of a job in pieces, as it is written, then the reply as of
        `link`. Pieces are put together while the caller is busy."""
        event_loop, written = asyncio.get_running_loop(), asyncio.Event()
        text = sent = ""

        def listen(now: str) -> None:
            nonlocal text
            if len(now) > len(text):  # not while a job whose pass has failed is repeated alone
                text = now
                event_loop.call_soon_threadsafe(written.set)

        self._listeners[id(job)] = listen
        reply = asyncio.ensure_future(self.link(job))
        reply.add_done_callback(lambda _: written.set())
        try:
            while not reply.done():
                await written.wait()
                written.clear()
                if len(now := text) > len(sent):
                    yield now[len(sent) :]
                    sent = now
            yield await reply
        finally:
            reply.cancel()
            del self._listeners[id(job)]

    async def output(self, job: TrunkJob) -> TrunkOutput:
        """The inputs of the decoders for one image, and the plan of its answers. An image that is neither given nor
        held is refused before it waits for a pass."""
        image = job.image
        if isinstance(image, KeyedImage) and image.picture is None and image.image_id not in self.images:
            raise gone(image.image_id)
        return value_of(await self.batches.submit(job))

    async def image_size(self, image_id: str) -> Size | None:
        """(height, width) of an image that this replica holds; None if it does not."""
        return self.images.size_of(image_id)

    async def info(self) -> dict[str, Any]:
        """The public description of the model: preset, version, image size, the longest side of any input, tasks and
        the decoders that serve them, classes, skeletons and their edges, and whether it takes classes by example."""
        loaded = self.stage.loaded
        return {
            "preset": loaded.settings.name,
            "version": loaded.version,
            "image_size": loaded.settings.image_size,
            "largest_side": self.stage.largest_side,
            "tasks": list(self.stage.tasks),
            "decoders": loaded.settings.serving,
            "classes": list(loaded.meta.classes),
            "skeletons": {name: list(points) for name, points in loaded.meta.skeletons.items()},
            "edges": loaded.meta.edges,
            "exemplars": self.stage.takes_exemplars,
        }

    async def ping(self) -> bool:
        """Whether the model gets on."""
        return self.health.is_ready

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica after several errors in a row."""
        self.health.check()

    def outputs(self, jobs: list[TrunkJob]) -> list[TrunkOutput | Exception]:
        """One pass for all jobs of one key; a failed job gets its exception."""
        return map_grouped(jobs, self._key, self._link_group)

    def _key(self, job: TrunkJob) -> Hashable:
        """What jobs of one batch share. Those without text do not wait for the answers of others, nor does one for more
        passes than its own."""
        writes, passes = _writes(job), passes_of(job)
        if isinstance(job.image, KeyedImage):
            return writes, passes, True, False, job.max_new_tokens, self.stage.bucket(job.image.size)
        return writes, passes, False, job.image is None, job.max_new_tokens, self.stage.bucket_of(job.image)

    def _link_group(self, jobs: list[TrunkJob]) -> list[TrunkOutput | ImageGone]:
        keyed = [job.image for job in jobs if isinstance(job.image, KeyedImage)]
        if not keyed:
            return list(self._links([job.image for job in jobs if not isinstance(job.image, KeyedImage)], jobs))
        outputs: dict[int, TrunkOutput] = {}
        with self.stage.room(len(keyed), keyed[0].size):  # of the pass's own copies, besides what is held
            held = self._encoded(keyed)
            members = [n for n, image in enumerate(held) if image is not None]
            if members:
                from lumen_ray.inference.encoded_images import EncodedImages

                images = EncodedImages.concat([image for image in held if image is not None])
                outputs = dict(zip(members, self._links(images, [jobs[n] for n in members]), strict=True))
        return [outputs[n] if n in outputs else gone(image.image_id) for n, image in enumerate(keyed)]

    def _links(self, images: Sequence[Shown] | EncodedImages, jobs: Sequence[TrunkJob]) -> list[TrunkOutput]:
        requests = [job.requests for job in jobs]
        listeners = [self._listeners.get(id(job)) for job in jobs]
        texts = [""] * len(jobs)

        def on_text(image: int, request: int, new: str) -> None:
            if (listener := listeners[image]) is not None:
                texts[image] += new
                listener(texts[image])

        output = self.stage.links(
            images, requests, max_new_tokens=jobs[0].max_new_tokens, on_text=on_text if any(listeners) else None
        )
        return [output.select(index) for index in range(len(jobs))]

    def _encoded(self, images: Sequence[KeyedImage]) -> list[EncodedImages | None]:
        """The images, those that are not held encoded in one batch; None where one is neither held nor given."""
        found = {image.image_id: self.images.get(image.image_id) for image in images}
        new = {i.image_id: i.picture for i in images if found[i.image_id] is None and i.picture is not None}
        if new:
            batch = self.stage.encode(list(new.values()))
            for row, image_id in enumerate(new):
                image = batch.select(row)
                self.images.put(image_id, image)
                found[image_id] = image
        return [found[image.image_id] for image in images]


def passes_of(job: TrunkJob) -> int:
    """Passes over the names of a job, beside the one that encodes its image."""
    from lumen_ray.inference.trunk_stage import CLASS_CHUNK

    return math.ceil(job.branches / CLASS_CHUNK)


def _writes(job: TrunkJob) -> bool:
    """Whether a job has text to write, in steps between which others may have the model."""
    return any(TASKS[request.task].is_text for request in job.requests)


async def _in_object_store(output: TrunkOutput) -> ObjectRef[TrunkOutput]:
    """The reference to an output, which lives as long as this replica, and until the reference is dropped."""
    import ray

    return await asyncio.to_thread(ray.put, output)
