"""The sides of the serving bench, each a process: the engine, servers, and the client that loads them."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lumen_ray.bench.json_worker import JsonWorker
from lumen_ray.plan.process_tree import cpu_by_command

HERE = Path(__file__)
#: by what a command line has: the name of a process in reports
_ROLES = {
    "ServeController": "controller",
    "ProxyActor": "proxy",
    "haproxy": "proxy",
    "raylet": "raylet",
    "gcs_server": "GCS",
    "ray::": "other of Ray",
    "ray/": "other of Ray",
}
_REPLICA = re.compile(r"ServeReplica:\w+:(\w+)")
#: seconds between two reports of a process to Ray's endpoint, and some more
REPORT_S = 12
#: of Ray's endpoint, for the trunk: requests and passes
_REQUESTS, _PASSES = "ray_lumen_ray_batch_wait_seconds_count", "ray_lumen_ray_batch_size_count"


def role_of(command: str) -> str:
    """The name of a process of a server by its command line."""
    if found := _REPLICA.search(command):
        return found[1]
    return next((role for part, role in _ROLES.items() if part in command), "driver")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _environment(root: Path, threads: int) -> dict[str, str]:
    """That of a process of the checkout at `root`."""
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def haproxy_environment(folder: Path) -> dict[str, str]:
    """With which a server has HAProxy, which comes with Ray Serve, in place of Serve's own proxy. `folder`: of its
    files."""
    files = {"SOCKET_PATH": "admin.sock", "CONFIG_FILE_LOC": "haproxy.cfg", "SERVER_STATE_FILE": "state"}
    ports = {"METRICS_PORT": free_port(), "STATS_PORT": free_port()}
    given = {name: str(folder / file) for name, file in files.items()} | {"SERVER_STATE_BASE": str(folder)}
    given |= {name: str(port) for name, port in ports.items()}
    return {"RAY_SERVE_ENABLE_HA_PROXY": "1", **{f"RAY_SERVE_HAPROXY_{name}": value for name, value in given.items()}}


class EngineSide:
    """The engine in a process of its own."""

    def __init__(self, model: str, images: Path, threads: int):
        command = [sys.executable, "-P", str(HERE.with_name("serve_engine.py")), model, str(images)]
        self._worker = JsonWorker("the engine", command, _environment(HERE.parents[2], threads))
        about = self._worker.read()
        self.version: str = about["version"]
        self.classes: list[str] = about["classes"]
        self.close = self._worker.close

    def run(
        self,
        classes: Sequence[str],
        threshold: float,
        *,
        batch: int,
        threads: int,
        count: int = 1_000_000,
        seconds: float = 1e9,
        keep: bool = False,
    ) -> dict[str, Any]:
        """``seconds``, ``cpu`` seconds, what each pass ``took``, and with `keep` the instances ``found``."""
        asked = {"classes": classes, "count": count, "batch": batch, "seconds": seconds, "threads": threads}
        return self._worker.ask({**asked, "threshold": threshold, "keep": keep})


class ServerSide:
    """A server of a checkout, with its own Ray."""

    def __init__(
        self,
        name: str,
        root: Path,
        settings: Mapping[str, Any],
        folder: Path,
        threads: int,
        variables: Mapping[str, str],
    ):
        """`settings`: of `ServeSettings`, in plain values; `variables`: of its environment."""
        folder.mkdir(parents=True)
        self.port = free_port()
        path = folder / "settings.json"
        path.write_text(json.dumps({**settings, "http": {**settings.get("http", {}), "port": self.port}}))
        command = [sys.executable, "-P", str(HERE.with_name("serve_worker.py")), str(path)]
        environment = {**_environment(root, threads), **variables}
        self._worker = JsonWorker(name, command, environment, folder / "log.txt", folder)
        self._about: dict[str, str] = {}

    def await_ready(self) -> None:
        self._about = self._worker.read()

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far by the role of processes."""
        found: dict[str, float] = {}
        for command, seconds in cpu_by_command(self._worker.pid).items():
            role = role_of(command)
            found[role] = found.get(role, 0) + seconds
        return found

    def trunk_counts(self) -> tuple[float, float]:
        """(requests, passes) of the trunk so far, as Ray's endpoint has them, `REPORT_S` later at most."""
        with urllib.request.urlopen(self._about["metrics"], timeout=10) as response:
            lines = response.read().decode().splitlines()
        return _sample(lines, _REQUESTS), _sample(lines, _PASSES)

    def close(self) -> None:
        """Ends the server and its Ray."""
        self._worker.finish()


def _sample(lines: Sequence[str], name: str) -> float:
    """The sum of a metric's series of the trunk."""
    return sum(
        float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{") and 'stage="trunk"' in line
    )


class Client:
    """The process that asks servers."""

    def __init__(self, images: Path):
        command = [sys.executable, "-P", str(HERE.with_name("serve_load.py")), str(images)]
        self._worker = JsonWorker("the client", command, os.environ)
        self._next = 0
        self.close = self._worker.close

    def load(
        self,
        server: ServerSide,
        fields: Sequence[Mapping[str, Any]],
        *,
        clients: int,
        count: int,
        seconds: float = 1e9,
        rate: float | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """``seconds``, ``cpu`` seconds of the client, what each request ``took``, and numbers of ``statuses``: `count`
        images that no server has seen, each asked about with all `fields`, by `clients` at once, or as `rate` requests
        that arrive in a second."""
        first, self._next = self._next, self._next + count
        asked = {"port": server.port, "path": "/v1/detect", "fields": list(fields), "first": first, "count": count}
        return self._worker.ask({**asked, "clients": clients, "seconds": seconds, "rate": rate, "seed": seed})
