"""Starts and joins Ray, and keeps its log lines off the terminal.

Import before `ray`, since Ray reads its environment on import.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from typing import Any

from lumen_ray import head_watch, ray_log
from lumen_ray.errors import UserError

CONNECT_SECONDS = 10.0
START_ATTEMPTS = 2
_TOO_SLOW = re.compile(r"timed out during startup|Timed out waiting for file")  # of the raylet; of the GCS's port


def prepare_environment() -> None:
    """Sets the environment that Ray reads on import; variables that the user has set are kept.

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
    """One per core on a local Ray, which has more logical CPUs than cores; None (no limit) on a cluster."""
    return None if os.environ.get("RAY_ADDRESS") else os.cpu_count() or 1


def init_local(num_cpus: int = 6, object_store_mb: int = 512) -> None:
    """Connects to the cluster of `RAY_ADDRESS` or of the running job; else starts a local Ray.

    `num_cpus` are logical: a small machine needs more of them than it has cores, or train workers and reads would wait
    for each other for ever. Raises `UserError` if no cluster answers at `RAY_ADDRESS` or a local Ray does not start.
    """
    prepare_environment()
    import ray

    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        _check_reachable(address)
        ray.init(log_to_driver=ray_log.on_terminal(), logging_level=logging.ERROR)
        if not address.startswith("ray://"):  # such a client need not reach the head's GCS
            head_watch.start(ray.get_runtime_context().gcs_address)
    else:
        _start(num_cpus=max(num_cpus, os.cpu_count() or 1), object_store_memory=object_store_mb << 20)
    prepare_data()


def _check_reachable(address: str) -> None:
    """Raises `UserError` if nothing listens at a HOST:PORT, which Ray itself would retry for many minutes.

    Names with a meaning to Ray, such as "auto", are not checked.
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
    """Starts a local Ray, once more if its processes do not come up in time, as happens on a busy machine.

    What the first attempt left ends with this process. Raises `UserError` if the second one fails too.
    """
    import ray

    quiet: dict[str, Any] = {"log_to_driver": ray_log.on_terminal(), "logging_level": logging.ERROR}
    for _ in range(START_ATTEMPTS):
        try:
            # "local": never another cluster that happens to run on this machine
            ray.init(address="local", include_dashboard=False, **quiet, **settings)
            return
        except Exception as error:  # Ray has no exception class for it
            if not _TOO_SLOW.search(str(error)):
                raise
    raise UserError(
        "Ray did not start in time on this machine, which may be busy; run the command again when it is less so, "
        "or without Ray where it can: label with --actors 0, prepare with --workers 0",
        "ray_start",
    )


def cluster_resources() -> dict[str, float]:
    """CPUs and GPUs of the cluster, with all nodes that its autoscaler may start."""
    import ray
    from ray._private.state import state

    most = state.get_max_resources_from_cluster_config() or {}
    now = ray.cluster_resources()
    return {name: max(most.get(name, 0), now.get(name, 0)) for name in ("CPU", "GPU")}


def prepare_data() -> None:
    """Applies this package's settings of Ray Data in this process."""
    import ray.data

    ray_log.quiet_loggers()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = 300


def shutdown() -> None:
    """Disconnects this process from Ray; ends the local cluster if this process started it."""
    import ray

    if "ray.serve" in sys.modules:
        # Serve keeps its client of the ended cluster and would use it in the next one
        from ray.serve.context import _disconnect

        _disconnect()
    head_watch.stop()
    if ray.is_initialized():
        ray.shutdown()
