"""Starts Ray and connects to it. Import before `ray`, since Ray reads its environment variables on import."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

from lumen_ray.errors import UserError

CONNECT_SECONDS = 10.0


def prepare_environment() -> None:
    """Sets the environment variables that Ray reads on import, except those that are set already.

    A local Ray without token authentication writes no token into the home folder and needs none from `ray start`.
    """
    defaults = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",  # Ray's 15 more than halved the training speed on a shared 2-core machine
        "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # wait for a lost node, then go on with fewer workers (Ray: 60)
        "RAY_DEDUP_LOGS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_SERVE_LOG_TO_STDERR": "0",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def tasks_at_once() -> int | None:
    """Limit of parallel tasks: one per core on a local Ray, which has more logical CPUs; none on a cluster."""
    return None if os.environ.get("RAY_ADDRESS") else os.cpu_count() or 1


def init_local(num_cpus: int = 6, object_store_mb: int = 512) -> None:
    """Connects to the cluster of `RAY_ADDRESS` or of the running job, else starts a local Ray.

    num_cpus: logical CPUs of the local Ray; on a small machine more than cores, or train workers and read tasks
        deadlock waiting for each other.
    object_store_mb: size of the local Ray's object store, MiB.

    Raises `UserError` if no cluster answers, or if the local Ray does not start in time.
    """
    prepare_environment()
    import logging

    import ray

    if ray.is_initialized():
        return
    common: dict[str, Any] = {
        "log_to_driver": os.environ.get("LUMEN_RAY_WORKER_LOGS") == "1",
        "logging_level": logging.ERROR,
    }
    if address := os.environ.get("RAY_ADDRESS"):
        _check_reachable(address)
        ray.init(**common)
    else:
        _start(num_cpus=max(num_cpus, os.cpu_count() or 1), object_store_memory=object_store_mb << 20, **common)
    prepare_data()


def _check_reachable(address: str) -> None:
    """Raises `UserError` if nothing listens at a HOST:PORT; Ray itself would retry for many minutes.

    Names that Ray resolves, such as "auto", are not checked.
    """
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
    """Starts a Ray on this machine. Raises `UserError` if its processes do not start in time."""
    import ray

    try:
        # "local": never join another user's cluster on this machine
        ray.init(address="local", include_dashboard=False, **settings)
    except Exception as error:  # Ray has no exception class for it
        if "timed out during startup" not in str(error):
            raise
        raise UserError(
            "Ray did not start in time on this machine, which may be busy; run the command again when it is less so, "
            "or without Ray where it can: label with --actors 0, prepare with --workers 0",
            "ray_start",
        ) from None


def cluster_resources() -> dict[str, float]:
    """CPUs and GPUs of the cluster, including the nodes that its autoscaler may still start."""
    import ray
    from ray._private.state import state

    most = state.get_max_resources_from_cluster_config() or {}
    now = ray.cluster_resources()
    return {name: max(most.get(name, 0), now.get(name, 0)) for name in ("CPU", "GPU")}


def prepare_data() -> None:
    """Configures Ray Data in this process."""
    import ray.data

    _quiet()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = 300


def _quiet() -> None:
    """Keeps Ray's log lines below ERROR off the terminal; they are in the files of its session."""
    import logging

    if os.environ.get("LUMEN_RAY_WORKER_LOGS") == "1":
        return
    for name in ("ray.data", "ray.train", "ray.serve"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setLevel(logging.ERROR)
    logging.getLogger("ray.data._internal.util").setLevel(logging.ERROR)


def shutdown() -> None:
    """Disconnects this process from Ray, and stops the local cluster if this process started it."""
    import ray

    if "ray.serve" in sys.modules:
        # Serve caches the client of a stopped cluster, and would use it in the next one
        from ray.serve.context import _disconnect

        _disconnect()
    if ray.is_initialized():
        ray.shutdown()
