"""Serves a model with the settings of a file for `serve.bench` until its input ends. Run by its path, so that
`lumen_ray` is that of the checkout on PYTHONPATH; writes where the server and Ray's metrics are as a JSON line."""

import json
import sys
from pathlib import Path

from lumen_ray.serve.app import run
from lumen_ray.serve.settings import ServeSettings


def main(settings: str) -> None:
    server = run(ServeSettings.model_validate_json(Path(settings).read_text()), blocking=False)
    import ray

    (node,) = ray.nodes()
    metrics = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    print(json.dumps({"url": server.url, "metrics": metrics}), flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main(sys.argv[1])
