"""What a longer list of classes costs: images per second of CPU time against the number of classes, in this checkout
and, beside it in turns, in another."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lumen_ray.bench.json_worker import JsonWorker
from lumen_ray.bench.prompts import class_names
from lumen_ray.bench.timing import Result, SidesDiffer, in_turns
from lumen_ray.data.images import decode
from lumen_ray.data.scenes import render as scenes
from lumen_ray.errors import UserError
from lumen_ray.presets import DEFAULT_MODEL

COUNTS = (1, 12, 80, 400, 1203)
SECONDS = 2.0  # of a side in a turn, about
THRESHOLD = 0.3
TOLERANCE = 1e-3
THIS, OTHER = "this", "other checkout"
WORKER = Path(__file__).with_name("class_worker.py")


def check(against: str | None) -> None:
    """Raises `UserError` unless `against` is a checkout, or None."""
    if against is not None and not (Path(against) / "lumen_ray" / "__init__.py").is_file():
        raise UserError(f"--against '{against}' has no package lumen_ray; give the folder of a checkout", "usage")


class _Side:
    """An engine of a checkout in a process of its own."""

    def __init__(self, root: Path, model: str, threads: int):
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        threads_set = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self._worker = JsonWorker(  # -P: the folder of the script holds modules with common names
            "a side of the comparison",
            [sys.executable, "-P", str(WORKER), model, str(threads)],
            os.environ | threads_set | {"PYTHONPATH": path},
        )
        self.version: str = self._worker.read()["version"]
        self.close = self._worker.close

    def ask(self, classes: list[str], image: list[Any], repeats: int) -> dict[str, Any]:
        """Times `repeats` passes, after one that warms up."""
        return self._worker.ask({"image": image, "classes": classes, "repeats": repeats, "threshold": THRESHOLD})


def bench(
    *,
    against: str | None = None,
    model: str = DEFAULT_MODEL,
    against_model: str | None = None,
    threads: int = 1,
    turns: int = 3,
    counts: Any = COUNTS,
) -> Iterator[Result]:
    """A result for each number of classes. `against_model`: that of the other checkout, by default `model`. Raises
    `SidesDiffer` if the checkouts find different instances with the same weights."""
    image = decode(scenes.scene_row(0, 1, 128)["image"]).tolist()
    roots = {THIS: Path(__file__).parents[2]} | ({OTHER: Path(against)} if against else {})
    with ExitStack() as stack:
        models = {THIS: model, OTHER: against_model or model}
        sides = {name: _Side(root, models[name], threads) for name, root in roots.items()}
        for side in sides.values():
            stack.callback(side.close)
        same_weights = len({side.version for side in sides.values()}) == 1
        for count in counts:
            names = class_names(count)
            first = {name: side.ask(names, image, 1) for name, side in sides.items()}
            if same_weights:
                _check_equal([result["found"] for result in first.values()], count)
            slowest = max(result["seconds"]["wall"] for result in first.values())
            repeats = max(1, round(SECONDS / slowest))
            memory: dict[str, int] = {}

            def rate(name: str, names: list[str] = names, repeats: int = repeats, memory: Any = memory) -> float:
                result = sides[name].ask(names, image, repeats)
                memory[name] = result["memory"]
                return repeats / result["seconds"]["cpu"]

            rates = in_turns({name: lambda name=name: rate(name) for name in sides}, turns)  # type: ignore[misc]
            yield Result(
                f"{count:,} classes",
                "images/s of CPU time",
                rates,
                equal=f"instances, their scores and boxes to {TOLERANCE:g}" if against and same_weights else "",
                note="" if same_weights else "the checkouts have other weights, so instances are not compared",
                budget=f"{threads} threads",
                details={"classes": count, "model": model, "peak_memory": memory},
            )


def _check_equal(found: list[list[Any]], count: int) -> None:
    """Raises `SidesDiffer` unless all sides found the same."""
    for other in found[1:]:
        same = len(other) == len(found[0]) and all(
            a[0] == b[0]
            and len(a[1]) == len(b[1])
            and all(abs(x - y) <= TOLERANCE for x, y in zip(a[1], b[1], strict=True))
            and all(
                abs(x - y) <= TOLERANCE * 128
                for p, q in zip(a[2], b[2], strict=True)
                for x, y in zip(p, q, strict=True)
            )
            for a, b in zip(found[0], other, strict=True)
        )
        if not same:
            raise SidesDiffer(f"with {count} classes the checkouts find different instances")
