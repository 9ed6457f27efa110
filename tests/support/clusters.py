"""Ray clusters of several nodes on one machine, each a `ray start --block` of its own that can be killed."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from lumen_ray.ray_env import prepare_environment

RAY = str(Path(sys.executable).with_name("ray"))


def wait_for(condition: Callable[[], object], what: str, seconds: float = 300, process: subprocess.Popen | None = None):
    """Waits until `condition()` is true and returns it; fails after `seconds`, or when `process` ends before."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not come about in {seconds:g} s"
        assert process is None or process.poll() is None, f"the process ended before {what}"
        time.sleep(0.05)
    return found


def kill_tree(pid: int) -> None:
    """`kill -9` of a process and all it has started."""
    try:
        root = psutil.Process(pid)
        group = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for process in group:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(group, timeout=20)


def members(session: int) -> list[psutil.Process]:
    """The living processes of a session, also those whose parents are dead."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def kill_session(session: int) -> None:
    """`kill -9` of all processes of a session, also of those that start others meanwhile."""

    def gone() -> bool:
        for process in members(session):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return not members(session)

    wait_for(gone, "the end of all processes", 60)


@contextmanager
def in_session(command: list[str], environment: dict[str, str], **pipes: object) -> Iterator[subprocess.Popen]:
    """A process with a session of its own, of which nothing is left after the block."""
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    try:
        yield process
    finally:
        kill_session(process.pid)
        process.wait()


def train_workers(pid: int) -> list[psutil.Process]:
    """Ray Train's workers among the processes that `pid` has started."""
    return descendants(pid, "RayTrainWorker")


def descendants(pid: int, name: str) -> list[psutil.Process]:
    """The processes that `pid` and those it has started have started, with `name` in their command line."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def free_ports() -> Iterator[int]:
    """Ports that nobody listens on, outside the range Ray takes its workers' ports from, each once and in an order of
    its own, since other processes look for theirs at the same time."""
    for port in random.SystemRandom().sample(range(21000, 30000), 9000):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) != 0:
                yield port


class Cluster:
    """A head node with its dashboard (where jobs are submitted), and more nodes on demand. A context manager."""

    def __init__(self, cpus: int = 1, token: str | None = None):
        self.cpus, self.token = cpus, token
        self.nodes: list[subprocess.Popen] = []
        self._ports = free_ports()
        self.port, self.dashboard, self.client = (next(self._ports) for _ in range(3))
        self.folder = Path(tempfile.mkdtemp(prefix="lr", dir="/tmp"))  # sockets' paths must be short

    @property
    def environment(self) -> dict[str, str]:
        """For processes that use the cluster."""
        prepare_environment()
        quick_death = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "10"}
        address = {"RAY_ADDRESS": f"127.0.0.1:{self.port}"}
        threads = {"OMP_NUM_THREADS": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token} if self.token else {}
        # commands of jobs look for Python there, as in an activated environment
        path = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        return os.environ | quick_death | address | threads | token | path

    def _start(self, *options: str) -> subprocess.Popen:
        common = ["--block", f"--num-cpus={self.cpus}", "--object-store-memory=100000000", "--disable-usage-stats"]
        names = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export",
                 "node-manager", "object-manager")  # fmt: skip
        ports = [f"--{name}-port={next(self._ports)}" for name in names]
        ports += ["--min-worker-port=0", "--max-worker-port=0"]
        environment = {k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"}
        log = open(self.folder / f"node{len(self.nodes)}.log", "w")  # noqa: SIM115  belongs to the process
        process = subprocess.Popen(
            [RAY, "start", *options, *common, *ports], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        self.nodes.append(process)
        said = Path(log.name).read_text
        wait_for(lambda: "Ray runtime started" in said() or process.poll() is not None, "the node's start")
        assert process.poll() is None, said()
        return process

    def __enter__(self) -> Cluster:
        try:
            self._start_head()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_head(self) -> None:
        self._start(
            "--head", f"--port={self.port}", f"--dashboard-port={self.dashboard}", f"--temp-dir={self.folder}",
            "--include-dashboard=true", f"--ray-client-server-port={self.client}",
        )  # fmt: skip

    def add_node(self) -> subprocess.Popen:
        return self._start(f"--address=127.0.0.1:{self.port}")

    def __exit__(self, *error: object) -> None:
        for node in reversed(self.nodes):
            kill_tree(node.pid)
        shutil.rmtree(self.folder, ignore_errors=True)
