"""A trunk whose model is stuck, on a local Ray: seen at `/readyz`, then replaced."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import httpx
import pytest
from support.serve_fakes import base64_png, free_port

from lumen_ray.serve.app import run
from lumen_ray.serve.settings import Http, ServeSettings, TrunkDeployment


@pytest.fixture
def server(model_folder, monkeypatch):
    """Its trunk never ends a pass for the class "stuck"."""
    from lumen_ray.serve.trunk import load_trunk

    def load(*args, **fields):  # a local function, since replicas cannot import this module
        stage = load_trunk(*args, **fields)
        links = stage.links

        def stuck_links(images, requests, **more):
            if any("stuck" in request.phrases for row in requests for request in row):
                with stage.loop.turn():
                    time.sleep(1000)
            return links(images, requests, **more)

        stage.links = stuck_links
        return stage

    monkeypatch.setattr("lumen_ray.serve.trunk.load_trunk", load)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    settings = ServeSettings(
        model=str(model_folder),
        http=Http(port=free_port(), request_timeout_s=4),
        trunk=TrunkDeployment(num_cpus=0.5, not_ready_after_s=1, replace_after_s=5),
    )
    running = run(settings, blocking=False)
    yield running
    running.end()


@pytest.mark.ray
def test_a_stuck_trunk_is_not_ready_until_it_is_replaced(server):
    stuck = []

    def ask(name: str) -> httpx.Response:
        body = {"image": base64_png(), "classes": [name]}
        return httpx.post(f"{server.url}/v1/detect", json=body, timeout=60)

    def wait_for(status: int) -> dict[str, bool]:
        until = time.monotonic() + 90
        while (response := httpx.get(f"{server.url}/readyz", timeout=30)).status_code != status:
            assert time.monotonic() < until, response.text
            time.sleep(0.1)
        return response.json()["deployments"]

    wait_for(200)
    client = threading.Thread(target=lambda: stuck.append(ask("stuck")))
    client.start()
    assert wait_for(503) == {"trunk": False, "lumen": True}
    wait_for(200)
    client.join()
    assert stuck[0].status_code == 504 and ask("red circle").status_code == 200
