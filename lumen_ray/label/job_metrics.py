"""Exports how far a job is, from its driver."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lumen_ray.data import urls
from lumen_ray.label.metrics import (
    BYTES,
    DONE,
    ERRORS,
    FRAGMENTS_LEFT,
    IMAGES,
    LISTED,
    METRICS,
    MODEL_SECONDS,
    SECONDS_LEFT,
    USD,
    USD_EXPECTED,
    WORKER_SECONDS,
)
from lumen_ray.label.progress import Status
from lumen_ray.label.workers import Outcome
from lumen_ray.ray_metrics import export_to_ray, in_ray

#: key of `Status.facts` -> its gauge
_GAUGES = {
    "total": LISTED,
    "done": DONE,
    "fragments_left": FRAGMENTS_LEFT,
    "seconds_left": SECONDS_LEFT,
    "usd": USD,
    "usd_expected": USD_EXPECTED,
}


class JobMetrics:
    """Exports the progress of the job that writes `output`; nothing in a process without Ray."""

    def __init__(self, output: urls.Location):
        self._output = urls.shown(output)

    def counted(self, outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
        """Passes outcomes on and adds each to the counters."""
        for outcome in outcomes:
            if in_ray():
                export_to_ray(METRICS)
            self._add(outcome)
            yield outcome

    def _add(self, outcome: Outcome) -> None:
        labelled = outcome.done - outcome.errors - outcome.copied
        for result, number in (("labelled", labelled), ("copied", outcome.copied), ("failed", outcome.errors)):
            IMAGES.record(number, output=self._output, result=result)
        for reason, number in outcome.reasons.items():
            ERRORS.record(number, output=self._output, reason=reason)
        BYTES.record(outcome.bytes_read, output=self._output)
        WORKER_SECONDS.record(outcome.seconds, output=self._output)
        MODEL_SECONDS.record(outcome.busy_seconds, output=self._output)

    def show(self, status: Status) -> None:
        """Sets the gauges."""
        facts = status.facts()
        for name, gauge in _GAUGES.items():
            if facts[name] is not None:
                gauge.record(facts[name], output=self._output)

    def close(self) -> None:
        """Ends the gauges of the job; its process may do more."""
        for gauge in _GAUGES.values():
            gauge.forget(output=self._output)
