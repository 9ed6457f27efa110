"""Keeps Ray Data's scheduling loop from using half a core while it is idle.

When the consumer is slower than the tasks, a finished block waits for room, so the loop's `ray.wait` returns at once
and the loop spins. On two cores that halved the training rate. Ray Data calls this hook once per iteration.
"""

from __future__ import annotations

import time
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

SECONDS_PER_ITERATION = 0.05


class SchedulerThrottle(ExecutionCallback):
    """Sleeps in every iteration of the scheduling loop."""

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(SECONDS_PER_ITERATION)
