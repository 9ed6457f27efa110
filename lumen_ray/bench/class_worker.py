"""Times one engine for `classes.bench`, in a process of its own: reads requests as JSON lines, writes results as JSON
lines. Run by its path, so that `lumen_ray` is that of the checkout on PYTHONPATH."""

import json
import resource
import sys
import time

import torch

from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request


def main(model: str, threads: int) -> None:
    """Answers every line {"image": [[[r, g, b], ..], ..], "classes": [..], "repeats": n}, the first pass unmeasured."""
    import numpy as np

    torch.set_num_threads(threads)
    engine = Engine.load(model)
    print(json.dumps({"version": engine.version}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        image = np.array(asked["image"], np.uint8)
        request = make_request("detect", classes=asked["classes"])
        ((answer,),) = engine.run([image], [[request]], score_threshold=asked["threshold"])
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(asked["repeats"]):
            engine.run([image], [[request]], score_threshold=asked["threshold"])
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        found = [[p.phrase, p.scores.tolist(), p.boxes.xyxy.tolist()] for p in answer.predictions if len(p)]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "found": found, "memory": memory}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
