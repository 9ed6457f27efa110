"""A real Prometheus that scrapes a local Ray, and the queries of the dashboards."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from support.clusters import wait_for
from support.serve_fakes import free_port

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = sorted((ROOT / "cluster" / "grafana").glob("*.json"))
#: variables of Grafana in expressions, and what stands for them
VARIABLES = {"$run": ".*", "$output": ".*", "$session": ".*", "$__rate_interval": "30s"}


def needs(program: str) -> pytest.MarkDecorator:
    """Skips a test where a program of Debian's package `prometheus` is not installed."""
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def panels(dashboard: Path) -> list[dict[str, Any]]:
    """The panels of a dashboard with something to see: no rows."""
    return [panel for panel in json.loads(dashboard.read_text())["panels"] if panel["type"] != "row"]


def queries(dashboard: Path) -> Iterator[tuple[str, str]]:
    """(title of the panel, expression without variables of Grafana) of a dashboard."""
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield panel["title"], without_variables(target["expr"])


def without_variables(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


class Prometheus:
    """Asks a running Prometheus."""

    def __init__(self, port: int):
        self._address = f"http://127.0.0.1:{port}"

    def is_ready(self) -> bool:
        try:
            return urlopen(f"{self._address}/-/ready", timeout=5).status == 200
        except (URLError, ConnectionError):
            return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query: ``metric`` (its labels) and ``value``."""
        with urlopen(f"{self._address}/api/v1/query?{urlencode({'query': expression})}", timeout=10) as response:
            return json.load(response)["data"]["result"]

    def unanswered(self, dashboard: Path) -> list[tuple[str, str]]:
        """The queries of a dashboard that have no data."""
        return [(title, expression) for title, expression in queries(dashboard) if not self.query(expression)]


@contextmanager
def prometheus_of(addresses: list[str], folder: Path) -> Iterator[Prometheus]:
    """A Prometheus that scrapes these addresses every three seconds."""
    config = {
        "global": {"scrape_interval": "3s", "scrape_timeout": "3s"},
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": addresses}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    port = free_port()
    command = [
        *("prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"),
        *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"),
    ]
    process = subprocess.Popen(command)
    try:
        server = Prometheus(port)
        wait_for(server.is_ready, "Prometheus", 60, process)
        yield server
    finally:
        process.terminate()
        process.wait(30)


def metrics_addresses() -> list[str]:
    """Ray's endpoints of the nodes of the cluster that this process is connected to."""
    import ray

    return [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes() if node["Alive"]]
