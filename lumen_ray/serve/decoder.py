"""The decoder deployments: decoder inputs in, finished answers out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from lumen_ray.answer import Answer
from lumen_ray.inference.fair_share import SharedModel
from lumen_ray.inference.request import Request
from lumen_ray.serve.batching import MANY, Collector, map_grouped, value_of
from lumen_ray.serve.health import Health
from lumen_ray.serve.job import owner_of
from lumen_ray.serve.metrics import export_to_ray
from lumen_ray.wire.limits import cost_of

if TYPE_CHECKING:
    from lumen_ray.decoders.base import PredictSettings
    from lumen_ray.inference.decoder_stage import DecoderStage
    from lumen_ray.inference.outputs import TrunkOutput

Answers = list[Answer | None]


class DecoderJob(NamedTuple):
    """What the trunk has made of an image, the requests about it, and who asks, as of `job.sender`."""

    output: TrunkOutput
    requests: tuple[Request, ...]
    sender: str = ""


def load_decoder(model: str, name: str, device: str, dtype: str = "float32") -> DecoderStage:
    from lumen_ray.inference.decoder_stage import DecoderStage

    return DecoderStage.load(model, name, device, dtype)


class DecoderReplica:
    """A replica with one decoder of the model. `load` returns the engine's decoder half; tests pass their own."""

    def __init__(
        self, model: str, name: str, device: str, load: Callable[[str, str, str], DecoderStage] = load_decoder
    ):
        export_to_ray()
        self.stage = load(model, name, device)
        self.model = SharedModel()
        self.health = Health(self.model.busy_s)
        # threads, so that the event loop stays free to answer pings
        self.batches: Collector[DecoderJob, Answers] = Collector(
            self.answers,
            self._key,
            lambda job: cost_of(job.requests, 0),
            self.model.turn,
            MANY,
            name,
            lambda job: owner_of(job.sender),
            lambda job: self.stage.passes(job.output) > 1,
        )

    def reconfigure(self, settings: dict[str, Any]) -> None:
        """Called by Serve at the start and on every change of the settings, without a restart."""
        self.batches.configure(settings)
        self.health.configure(settings)

    async def decode(self, output: TrunkOutput, requests: tuple[Request, ...], sender: str = "") -> Answers:
        """Answers to the requests about one image, None for those that another decoder serves. `sender`: as of
        `job.TrunkJob`.

        The tensors lie in shared memory: they are read, never written.
        """
        return value_of(await self.batches.submit(DecoderJob(output, requests, sender)))

    async def ping(self) -> bool:
        """Whether the model gets on."""
        return self.health.is_ready

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica after several errors in a row."""
        self.health.check()

    def answers(self, jobs: list[DecoderJob]) -> list[Answers | Exception]:
        """One pass for all jobs of one input size with the same limit of instances, or as many as each takes alone; a
        failed job gets its exception.

        The limit bounds the instances before overlaps are merged, so it must not depend on the other jobs of a pass.
        """
        with self.model.turn():
            return map_grouped(jobs, self._key, self._answer_group)

    def _key(self, job: DecoderJob) -> tuple[int, int, tuple[int, ...]]:
        """What jobs of one batch share. One does not wait for more passes than its own."""
        from lumen_ray.inference.outputs import loosest

        most = loosest(job.requests, _limits()).max_per_phrase
        return self.stage.passes(job.output), most, job.output.input_size

    def _answer_group(self, jobs: list[DecoderJob]) -> list[Answers]:
        from lumen_ray.inference.outputs import assemble, finish, loosest, merge, request_limits

        default = _limits()
        used = loosest((request for _, requests, _ in jobs for request in requests), default)
        output = merge([output for output, _, _ in jobs])
        rows = assemble(output.plans, {self.stage.name: self.stage.predict(output, used)})
        return [
            [
                None if answer is None else finish(answer, request_limits(request, default), used)
                for request, answer in zip(requests, answers, strict=True)
            ]
            for answers, (_, requests, _) in zip(rows, jobs, strict=True)
        ]


def _limits() -> PredictSettings:
    """The limits of requests without their own; the ingress sets them on every request."""
    from lumen_ray.decoders.base import PredictSettings

    return PredictSettings()
