"""Whether a replica's model gets on: for `/readyz`, and for Serve, which replaces a replica that does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Health:
    """Judges a model by `busy_s`, the seconds since its current pass began. Event loops answer pings all the same while
    the thread of the model is stuck."""

    def __init__(self, busy_s: Callable[[], float]):
        self._busy_s = busy_s
        self.not_ready_after_s = self.replace_after_s = float("inf")

    def configure(self, settings: dict[str, Any]) -> None:
        """Applies the settings of `settings.ModelDeployment`."""
        self.not_ready_after_s = settings["not_ready_after_s"]
        self.replace_after_s = settings["replace_after_s"]

    @property
    def is_ready(self) -> bool:
        return self._busy_s() <= self.not_ready_after_s

    def check(self) -> None:
        """Raises RuntimeError, upon which Serve replaces the replica, if the model is stuck."""
        if (busy := self._busy_s()) > self.replace_after_s:
            raise RuntimeError(f"the model has been in one pass for {busy:.0f} s; this replica is to be replaced")
