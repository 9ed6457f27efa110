"""Metrics at Ray's endpoint for Prometheus, which every node has. There their names have "ray_" before them."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

#: between repetitions of a gauge's value: Ray sends each value once, and drops it after 20 s (two of its reports)
REPEAT_S = 2.0


class Metric:
    """A counter, gauge or histogram with labels. `name`: as Prometheus has it; counters end in "_total".

    Counts nothing before `export_to_ray`. Every process has series of its own; those of gauges end with it, or when
    they are forgotten.
    """

    def __init__(
        self, kind: str, name: str, description: str, labels: Sequence[str] = (), buckets: Sequence[float] = ()
    ):
        self.kind, self.name, self.description, self.labels = kind, name, description, tuple(labels)
        self.buckets = tuple(buckets)
        #: name without the ending that exporters add
        self.base = name.removesuffix("_total")
        self._in_ray: Any = None
        #: of a gauge: values of its labels -> labels and value
        self._series: dict[tuple[str, ...], tuple[dict[str, str], float]] = {}

    def record(self, value: float = 1, **labels: str) -> None:
        """Adds to a counter, sets a gauge, or observes for a histogram. Every label needs its value."""
        if self._in_ray is None or (self.kind == "counter" and value <= 0):  # which Ray refuses
            return
        valid = {name: _valid(text) for name, text in labels.items()}
        if self.kind == "gauge":
            self._series[tuple(valid.values())] = valid, value
        self._send(valid, value)

    def _send(self, labels: dict[str, str], value: float) -> None:
        try:
            add = {"counter": "inc", "gauge": "set", "histogram": "observe"}[self.kind]
            getattr(self._in_ray, add)(value, labels)
        except Exception as error:  # what watches a job must not end it
            self._in_ray = None
            warnings.warn(f"metric {self.name} is no longer exported: {error}", stacklevel=2)

    def repeat(self) -> None:
        """Sends a gauge's values again."""
        for labels, value in list(self._series.values()):
            if self._in_ray is not None:
                self._send(labels, value)

    def forget(self, **labels: str) -> None:
        """Ends the series of a gauge with exactly these labels."""
        self._series.pop(tuple(map(_valid, labels.values())), None)

    def export_to_ray(self) -> None:
        """From here on the values are at Ray's endpoint. In a process of Ray alone."""
        from ray.util import metrics

        if self._in_ray is not None:
            return
        if self.kind == "histogram":
            self._in_ray = metrics.Histogram(self.base, self.description, list(self.buckets), self.labels)
        else:
            made = {"counter": metrics.Counter, "gauge": metrics.Gauge}
            self._in_ray = made[self.kind](self.base, self.description, self.labels)
        if self.kind == "gauge":
            _repeater.add(self)


class _Repeater:
    """Repeats the values of gauges, in a thread, for as long as this process belongs to a Ray cluster."""

    def __init__(self) -> None:
        self._gauges: set[Metric] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, gauge: Metric) -> None:
        with self._lock:
            self._gauges.add(gauge)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="repeat-metrics")
                self._thread.start()

    def _run(self) -> None:
        while True:
            time.sleep(REPEAT_S)
            with self._lock:
                gauges = list(self._gauges)
            for gauge in gauges:
                if in_ray():
                    gauge.repeat()


_repeater = _Repeater()


def export_to_ray(metrics: Iterable[Metric]) -> None:
    for metric in metrics:
        metric.export_to_ray()


def in_ray() -> bool:
    """Whether this process belongs to a Ray cluster. Does not import Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _valid(label: str) -> str:
    """The label without what is no Unicode text, as names of files can have."""
    return label.encode("utf-8", "backslashreplace").decode()
