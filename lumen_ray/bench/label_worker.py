"""Labels a folder with the defaults of a checkout, for `label.bench_command`, and writes what it took as a JSON line.
Run by its path, so that `lumen_ray` is that of the checkout on PYTHONPATH."""

import json
import sys
import time
from typing import Any

STARTED = time.perf_counter()

import lumen_ray  # noqa: E402  the import is part of what is measured


def main(model: str, source: str, output: str, tasks: str = "detect", actors: str = "") -> None:
    """Writes ``seconds`` of the whole job, ``images_per_second`` between the first and the last progress, and
    ``driver_cpu``, the CPU seconds of this process between them; ``job_seconds`` from the first image that is listed to
    the summary. `actors`: their number, then without exports; else both by default. With it, ``all_cpu``: CPU seconds
    of this process and all of Ray's for ``cpu_images`` images, between the first and the last progress."""
    chosen: Any = {}
    used: Any = float
    if actors:
        from lumen_ray.plan.process_tree import cpu_seconds

        chosen, used = {"actors": int(actors), "exports": []}, cpu_seconds
    seen = []

    def progress(status: object) -> None:
        seen.append((time.perf_counter(), time.process_time(), status.done, used()))  # type: ignore[attr-defined]

    summary = lumen_ray.label(source, output, model=model, tasks=tasks.split(","), progress=progress, **chosen)
    assert summary["labelled"] == summary["images"], summary
    first, last = seen[0], seen[-1]
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - STARTED,
                "images_per_second": (last[2] - first[2]) / (last[0] - first[0]),
                "driver_cpu": last[1] - first[1],
                "all_cpu": last[3] - first[3],
                "cpu_images": last[2] - first[2],
                "job_seconds": summary["seconds"],
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
