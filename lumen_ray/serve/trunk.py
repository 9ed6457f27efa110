"""The Trunk deployment: images and prompts in, super links and dense features (or finished texts) out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ray import serve

from lumen_ray.serve.batching import run_grouped, value_of
from lumen_ray.serve.job import TrunkJob, trim
from lumen_ray.structures import Answer, Size

if TYPE_CHECKING:
    from lumen_ray.inference.outputs import TrunkOutput
    from lumen_ray.inference.trunk_stage import TrunkStage


def load_trunk(model: str, device: str, serving: Mapping[str, str], dtype: str = "float32") -> TrunkStage:
    from lumen_ray.inference.trunk_stage import TrunkStage

    return TrunkStage.load(model, device, serving, dtype)


class Trunk:
    """`serving`: task -> the decoder that serves it, where it is another than the model says. `load` gives the engine's
    trunk half; tests hand in their own."""

    def __init__(
        self,
        model: str,
        device: str,
        serving: Mapping[str, str],
        load: Callable[[str, str, Mapping[str, str]], TrunkStage] = load_trunk,
    ):
        self.stage = load(model, device, serving)
        # One thread does all model work: the event loop stays free to collect the next batch and to answer pings,
        # and torch keeps one pool of workers.
        self.worker = ThreadPoolExecutor(1)

    def reconfigure(self, batching: dict[str, Any]) -> None:
        """Called by Serve at the start and whenever the settings change, without a restart."""
        self._batched.set_max_batch_size(batching["max_batch_size"])
        self._batched.set_batch_wait_timeout_s(batching["batch_wait_timeout_s"])

    async def link(self, job: TrunkJob) -> TrunkOutput:
        """What the decoder needs about one image: super link, dense features and the plan of the answers."""
        return value_of(await self._batched(job))

    async def answer(self, job: TrunkJob) -> list[Answer]:
        """Answers to queries that need no decoder."""
        from lumen_ray.inference.outputs import assemble

        output = value_of(await self._batched(job))
        return trim(assemble(output.plans, {})[0], job.queries)

    async def info(self) -> dict[str, Any]:
        """What a client may know about the model: preset, version, image size, tasks and the decoders that serve them,
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
        return True

    @serve.batch
    async def _batched(self, jobs: list[TrunkJob]) -> list[TrunkOutput | Exception]:
        return await asyncio.get_running_loop().run_in_executor(self.worker, self.run, jobs)

    def run(self, jobs: list[TrunkJob]) -> list[TrunkOutput | Exception]:
        """One pass for all jobs whose images share a size bucket and that want answers of the same length. A job that
        fails gets its exception."""
        return run_grouped(jobs, self._key, self._run_group)

    def _key(self, job: TrunkJob) -> tuple[int, Size]:
        return job.max_new_tokens, self.stage.bucket_of(job.image)

    def _run_group(self, jobs: list[TrunkJob]) -> list[TrunkOutput]:
        requests = [[query.request for query in job.queries] for job in jobs]
        output = self.stage.run([job.image for job in jobs], requests, max_new_tokens=jobs[0].max_new_tokens)
        return [output.select(row) for row in range(len(jobs))]
