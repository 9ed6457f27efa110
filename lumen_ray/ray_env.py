"""How this package starts Ray and talks to it. Import before `ray`, since Ray reads its environment on import."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

from lumen_ray.errors import UserError

CONNECT_SECONDS = 10.0


def prepare_environment() -> None:
    """Settings that must stand before Ray is imported; what the user has set wins.

    A local Ray without token authentication writes no token into the home folder and needs none from `ray start`.
    """
    defaults = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",  # Ray's 15 more than halved the training rate on a shared 2-core machine
        "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # of a lost node, before fewer workers go on (Ray's 60)
        "RAY_DEDUP_LOGS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_SERVE_LOG_TO_STDERR": "0",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def tasks_at_once() -> int | None:
    """One per core of a Ray of our own, which has more logical CPUs than cores; on a cluster as many as it has room."""
    return None if os.environ.get("RAY_ADDRESS") else os.cpu_count() or 1


def init_local(num_cpus: int = 6, object_store_mb: int = 512) -> None:
    """Connects to the cluster of `RAY_ADDRESS` or of the running job; else starts a local Ray.

    `num_cpus` are logical: on a small machine there must be more than cores, or train workers and reads wait for each
    other for ever.
    """
    prepare_environment()
    import logging

    import ray

    if ray.is_initialized():
        return
    common = {"log_to_driver": os.environ.get("LUMEN_RAY_WORKER_LOGS") == "1", "logging_level": logging.ERROR}
    if address := os.environ.get("RAY_ADDRESS"):
        _check_reachable(address)
        ray.init(**common)
    else:
        _start(num_cpus=max(num_cpus, os.cpu_count() or 1), object_store_memory=object_store_mb << 20, **common)
    prepare_data()


def _check_reachable(address: str) -> None:
    """`UserError` where nothing listens at a HOST:PORT, which Ray itself would try again for many minutes. Names that
    Ray gives a meaning of its own, such as "auto", are left to it."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError):
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={address}; start one there, or unset RAY_ADDRESS to start one on "
            "this machine",
            "ray_unreachable",
        ) from None


def _start(**settings: Any) -> None:
    """A Ray of our own on this machine; `UserError` when it is too busy for its processes to come up in time."""
    import ray

    try:
        # never somebody else's cluster that happens to run on this machine
        ray.init(address="local", include_dashboard=False, **settings)
    except Exception as error:  # Ray raises no class of its own for it
        if "timed out during startup" not in str(error):
            raise
        raise UserError(
            "Ray did not start in time on this machine, which may be busy; run the command again when it is less so, "
            "or without Ray where it can: label with --actors 0, prepare with --workers 0",
            "ray_start",
        ) from None


def cluster_resources() -> dict[str, float]:
    """CPUs and GPUs that the cluster has, or can have once its autoscaler has started all nodes it may."""
    import ray
    from ray._private.state import state

    most = state.get_max_resources_from_cluster_config() or {}
    now = ray.cluster_resources()
    return {name: max(most.get(name, 0), now.get(name, 0)) for name in ("CPU", "GPU")}


def prepare_data() -> None:
    """Ray Data's settings in this process, for the data sets it makes."""
    import ray.data

    _quiet()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = 300


def _quiet() -> None:
    """Ray's own log lines go to its session's files; our terminal shows our progress. Errors still come through."""
    import logging

    if os.environ.get("LUMEN_RAY_WORKER_LOGS") == "1":
        return
    for name in ("ray.data", "ray.train", "ray.serve"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setLevel(logging.ERROR)
    logging.getLogger("ray.data._internal.util").setLevel(logging.ERROR)


def shutdown() -> None:
    """Ends this process's Ray, with the local cluster if this process started it."""
    import ray

    if "ray.serve" in sys.modules:
        # Serve keeps its client of a cluster that has ended, and would ask it for a replica in the next one
        from ray.serve.context import _disconnect

        _disconnect()
    if ray.is_initialized():
        ray.shutdown()
