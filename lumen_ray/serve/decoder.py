"""The deployments of the decoders: super links and what the decoder reads in, finished answers out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ray import serve

from lumen_ray.serve.batching import run_grouped, value_of
from lumen_ray.serve.job import Query, trim
from lumen_ray.structures import Answer

if TYPE_CHECKING:
    from lumen_ray.inference.decoder_stage import DecoderStage
    from lumen_ray.inference.outputs import TrunkOutput

Item = tuple["TrunkOutput", tuple[Query, ...]]
Answers = list[Answer | None]


def load_decoder(model: str, name: str, device: str, dtype: str = "float32") -> DecoderStage:
    from lumen_ray.inference.decoder_stage import DecoderStage

    return DecoderStage.load(model, name, device, dtype)


class Decoder:
    """One decoder, by name. `load` gives the engine's decoder half; tests hand in their own."""

    def __init__(
        self, model: str, name: str, device: str, load: Callable[[str, str, str], DecoderStage] = load_decoder
    ):
        self.stage = load(model, name, device)
        self.worker = ThreadPoolExecutor(1)  # as in `Trunk`

    def reconfigure(self, batching: dict[str, Any]) -> None:
        """Called by Serve at the start and whenever the settings change, without a restart."""
        self._batched.set_max_batch_size(batching["max_batch_size"])
        self._batched.set_batch_wait_timeout_s(batching["batch_wait_timeout_s"])

    async def decode(self, output: TrunkOutput, queries: tuple[Query, ...]) -> Answers:
        """Answers to the queries about one image, None to those that another decoder serves. The tensors lie in
        shared memory: they are read, never written."""
        return value_of(await self._batched((output, queries)))

    async def ping(self) -> bool:
        return True

    @serve.batch
    async def _batched(self, items: list[Item]) -> list[Answers | Exception]:
        return await asyncio.get_running_loop().run_in_executor(self.worker, self.run, items)

    def run(self, items: list[Item]) -> list[Answers | Exception]:
        """One pass for all items of one input size with the same limit of instances, which bounds what is looked at
        before overlaps are merged and so must not depend on the neighbours. An item that fails gets its exception."""
        return run_grouped(items, self._key, self._run_group)

    def _key(self, item: Item) -> tuple[bool, int, tuple[int, ...]]:
        output, queries = item
        return self.stage.name in output.parts, max(query.max_per_phrase for query in queries), output.input_size

    def _run_group(self, items: list[Item]) -> list[Answers]:
        from lumen_ray.decoders.base import PredictSettings
        from lumen_ray.inference.outputs import assemble, finished, merge

        queries = [query for _, asked in items for query in asked]
        limits = PredictSettings(
            min(query.score_threshold for query in queries), max(query.max_per_phrase for query in queries)
        )
        output = merge([output for output, _ in items])
        answers = assemble(output.plans, {self.stage.name: self.stage.run(output, limits)})
        return [[finished(a) for a in trim(row, asked)] for row, (_, asked) in zip(answers, items, strict=True)]
