"""The environment that Ray Serve reads on import. Import before `ray.serve`."""

from __future__ import annotations

import os

from lumen_ray.ray_env import prepare_environment

_DEFAULTS = {
    # a replica that fails its health checks ends at once: a stuck one would hold its GPU for the time of a request more
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # in our envelope what Serve's proxy answers by itself, as when an ingress replica dies under a request
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "lumen_ray.serve.proxy:middlewares",
    # replicas report their load every second (default 10), so that upscale_delay_s decides
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}


def prepare_serve_environment() -> None:
    """Sets the environment that Ray reads on import; variables that the user has set are kept."""
    prepare_environment()
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
