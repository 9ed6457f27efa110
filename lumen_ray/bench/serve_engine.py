"""The engine for `serve.bench`, in a process of its own: reads what to run as JSON lines, writes what it took as JSON
lines. Run by its path."""

import json
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lumen_ray.data.images import decode_reduced
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request


def run(engine: Engine, jpegs: list[bytes], asked: dict[str, Any]) -> dict[str, Any]:
    """Passes over batches of encoded images, up to `count` images or `seconds`; with `keep`, the instances in each."""
    torch.set_num_threads(asked["threads"])
    request = make_request("detect", classes=asked["classes"])
    numbers, took, found = iter(range(asked["count"])), [], []
    start, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - start < asked["seconds"] and (some := list(islice(numbers, asked["batch"]))):
        began = time.perf_counter()
        images = [decode_reduced(jpegs[number % len(jpegs)], engine.largest_side) for number in some]
        answers = engine.run(images, [[request]] * len(some), score_threshold=asked["threshold"])
        took.append(time.perf_counter() - began)
        if asked["keep"]:
            found += [row[0].to_dict()["instances"] for row in answers]
    seconds, used = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds, "cpu": used, "took": took, "found": found}


def main(model: str, folder: str) -> None:
    """Answers every line {"classes": [..], "count", "batch", "seconds", "threads", "threshold", "keep"}."""
    engine = Engine.load(model)
    jpegs = [path.read_bytes() for path in sorted(Path(folder).glob("*.jpg"))]
    print(json.dumps({"version": engine.version, "classes": engine.classes}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(engine, jpegs, json.loads(line))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
