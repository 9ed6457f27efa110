"""The Trunk deployment: images and requests in, super links and dense features (or finished texts) out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lumen_ray.serve.batching import Collector, map_grouped, value_of
from lumen_ray.serve.health import Health
from lumen_ray.serve.job import TrunkJob, TrunkReply
from lumen_ray.serve.metrics import export_to_ray
from lumen_ray.structures import Size
from lumen_ray.tasks import TASKS

if TYPE_CHECKING:
    from ray import ObjectRef

    from lumen_ray.inference.outputs import TrunkOutput
    from lumen_ray.inference.trunk_stage import TrunkStage


#: Passes at a time: one uses the model, others wait for it or for text answers, which all of them write together.
MAX_BATCHES = 32


def load_trunk(model: str, device: str, serving: Mapping[str, str], dtype: str = "float32") -> TrunkStage:
    from lumen_ray.inference.trunk_stage import TrunkStage

    return TrunkStage.load(model, device, serving, dtype)


class TrunkReplica:
    """A replica with the trunk of the model.

    `serving`: task -> decoder, overriding the model's choice. `load` returns the engine's trunk half; tests pass their
    own.
    """

    def __init__(
        self,
        model: str,
        device: str,
        serving: Mapping[str, str],
        load: Callable[[str, str, Mapping[str, str]], TrunkStage] = load_trunk,
    ):
        export_to_ray()
        self.stage = load(model, device, serving)
        self.health = Health(self.stage.loop.busy_s)
        # Threads, so that the event loop stays free to answer pings. The model is used by one of them at a time.
        self.batches: Collector[TrunkJob, TrunkOutput] = Collector(
            self.outputs, self._key, lambda job: job.cost, self.stage.loop.turn, MAX_BATCHES
        )

    def reconfigure(self, settings: dict[str, Any]) -> None:
        """Called by Serve at the start and on every change of the settings, without a restart."""
        self.batches.configure(settings)
        self.health.configure(settings)

    async def link(self, job: TrunkJob) -> TrunkReply:
        """The answers that need no decoder, and what the decoders of the others read."""
        from lumen_ray.inference.outputs import assemble

        output = await self.output(job)
        answers = tuple(assemble(output.plans, {})[0])
        if not output.decoder_inputs:
            return TrunkReply(answers)
        return TrunkReply(answers, tuple(output.decoder_inputs), await asyncio.to_thread(_put, output))

    async def output(self, job: TrunkJob) -> TrunkOutput:
        """The inputs of the decoders for one image, and the plan of its answers."""
        return value_of(await self.batches.submit(job))

    async def info(self) -> dict[str, Any]:
        """The public description of the model: preset, version, image size, tasks and the decoders that serve them,
        classes, skeletons and their edges."""
        loaded = self.stage.loaded
        return {
            "preset": loaded.settings.name,
            "version": loaded.version,
            "image_size": loaded.settings.image_size,
            "tasks": list(self.stage.tasks),
            "decoders": loaded.settings.serving,
            "classes": list(loaded.meta.classes),
            "skeletons": {name: list(points) for name, points in loaded.meta.skeletons.items()},
            "edges": loaded.meta.edges,
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

    def _key(self, job: TrunkJob) -> tuple[bool, bool, int, Size]:
        """What jobs of one pass share. Those without text do not wait for the answers of others."""
        writes = any(TASKS[request.task].is_text for request in job.requests)
        return writes, job.image is None, job.max_new_tokens, self.stage.bucket_of(job.image)

    def _link_group(self, jobs: list[TrunkJob]) -> list[TrunkOutput]:
        images, requests = [job.image for job in jobs], [job.requests for job in jobs]
        output = self.stage.links(images, requests, max_new_tokens=jobs[0].max_new_tokens)
        return [output.select(index) for index in range(len(jobs))]


def _put(output: TrunkOutput) -> ObjectRef[TrunkOutput]:
    """Stores an output for the decoders. It lives as long as this replica, and until the reference is dropped."""
    import ray

    return ray.put(output)
