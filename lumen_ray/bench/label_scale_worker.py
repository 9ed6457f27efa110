"""A job of `label_scale.bench`, in a process of its own so that its memory is its own; writes a JSON line."""

import json
import resource
import sys
import time
from pathlib import Path

from lumen_ray.bench.label_scale import empty_engine
from lumen_ray.label.pipeline import label


def main(source: str, output: str, number: str) -> None:
    """Writes ``seconds``, ``first_s`` (from the model being up to the first progress), ``driver_ms_per_image``,
    ``peak_mib`` of this process, and ``again_s`` of the same job once it is finished."""
    up = Path(f"{output}-up")
    first: list[float] = []

    def progress(status: object) -> None:
        if not first:
            first.append(time.time() - float(up.read_text()))

    def run() -> tuple[dict, float, float]:
        began, cpu = time.perf_counter(), time.process_time()
        options = {"tasks": ["detect"], "classes": ["nothing"], "exports": ()}
        summary = label(empty_engine(up), source, output, num_actors=1, progress=progress, **options)  # type: ignore[arg-type]
        return summary, time.perf_counter() - began, time.process_time() - cpu

    summary, seconds, cpu = run()
    assert summary["labelled"] == summary["images"] == int(number), summary
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    _, again, _ = run()
    print(
        json.dumps(
            {
                "seconds": seconds,
                "first_s": first[0],
                "driver_ms_per_image": cpu / int(number) * 1e3,
                "peak_mib": peak,
                "again_s": again,
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
