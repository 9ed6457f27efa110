"""The time and money that went into an output folder over all runs, kept in ``ledger/spent.json``."""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from typing import Any

from lumen_ray.data import files, urls
from lumen_ray.errors import UserError
from lumen_ray.label.ledger import Ledger

#: what a killed job loses of its time at most, beside the time since its last result
SAVE_S = 10.0
_FILE = "spent.json"


def read_spent(ledger: urls.Location) -> dict[str, Any]:
    """``seconds`` of all runs, ``usd`` and ``usd_per_hour`` (None without a price), as last saved."""
    path = urls.join(ledger, _FILE)
    try:
        found = json.loads(files.read_text(path)) if files.is_file(path) else {}
    except ValueError:  # damaged
        found = {}
    return {"seconds": found.get("seconds", 0.0), "usd": found.get("usd"), "usd_per_hour": found.get("usd_per_hour")}


class Spent:
    """Counts the time from its creation on, after that of earlier runs in the ledger folder `ledger`.

    usd_per_hour: price of everything the job occupies; None: the price of the run before, if it had one. Earlier runs
    without a price count at the first price that is given.
    """

    def __init__(self, ledger: urls.Location, usd_per_hour: float | None = None):
        before = read_spent(ledger)
        self._path = urls.join(ledger, _FILE)
        self._started = self._saved = time.monotonic()
        self._seconds_before = before["seconds"]
        self.usd_per_hour: float | None = before["usd_per_hour"] if usd_per_hour is None else usd_per_hour
        self._usd_before = self._price(self._seconds_before) if before["usd"] is None else before["usd"]

    @property
    def seconds(self) -> float:
        """Of all runs."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def usd(self) -> float | None:
        """Of all runs; None without a price."""
        more = self._price(time.monotonic() - self._started)
        return None if more is None or self._usd_before is None else self._usd_before + more

    def usd_expected(self, seconds_left: float | None) -> float | None:
        """Of the whole job, which needs so many seconds more; None while that is unknown, or without a price."""
        more = None if seconds_left is None else self._price(seconds_left)
        spent = self.usd
        return None if more is None or spent is None else spent + more

    def save(self, now: bool = False) -> None:
        """Saves the numbers if that was not done in the last `SAVE_S` seconds, or `now`."""
        if now or time.monotonic() > self._saved + SAVE_S:
            self._saved = time.monotonic()
            numbers = {"seconds": self.seconds, "usd": self.usd, "usd_per_hour": self.usd_per_hour}
            with suppress(UserError):  # a store that is away for a moment
                files.write_bytes(self._path, json.dumps(numbers).encode(), durable=False)

    def _price(self, seconds: float) -> float | None:
        return None if self.usd_per_hour is None else self.usd_per_hour * seconds / 3600


def priced_again(ledger: Ledger, summary: dict[str, Any], usd_per_hour: float | None) -> dict[str, Any]:
    """The summary of a job that has nothing left to do, once all its time costs this price: it is kept in
    ``summary.json`` and the ledger. None: as it is."""
    if usd_per_hour is None:
        return summary
    seconds = read_spent(ledger.folder)["seconds"]
    numbers = {"seconds": seconds, "usd": usd_per_hour * seconds / 3600, "usd_per_hour": usd_per_hour}
    files.write_bytes(urls.join(ledger.folder, _FILE), json.dumps(numbers).encode())
    usd = round(usd_per_hour * summary.get("spent_seconds", seconds) / 3600, 4)
    path = urls.join(ledger.output, "summary.json")
    kept = json.loads(files.read_text(path)) | {"usd": usd}
    files.write_bytes(path, (json.dumps(kept, indent=1) + "\n").encode())
    return summary | {"usd": usd}


def check_price(usd_per_hour: float | None) -> None:
    """Raises `UserError` for a price that is none."""
    if usd_per_hour is not None and not (math.isfinite(usd_per_hour) and usd_per_hour >= 0):
        raise UserError(
            f"usd_per_hour is {usd_per_hour}; give the price of the whole cluster for an hour, such as 12.5",
            "invalid_setting",
        )


def cost_text(usd: float | None, expected: float | None = None) -> str:
    """``"$0.12 of about $1.40"``, ``"under $0.01"``; empty without a price."""
    if usd is None:
        return ""
    return _dollars(usd) + ("" if expected is None else f" of about {_dollars(expected)}")


def _dollars(usd: float) -> str:
    return "under $0.01" if 0 < usd < 0.01 else f"${usd:,.2f}"
