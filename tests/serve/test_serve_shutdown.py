"""`lumen-ray serve` on SIGTERM: requests that have begun are answered, others are refused until it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from support.serve_fakes import base64_png, free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture
def process(model_folder, tmp_path):
    """A server's process and its address."""
    port = free_port()
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    command = [sys.executable, "-m", "lumen_ray.cli", "serve", "--model", str(model_folder), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        started = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=log)
        try:
            yield started, f"http://127.0.0.1:{port}", tmp_path / "log"
        finally:
            started.kill()
            started.wait()


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.ray
def test_what_has_begun_is_answered_before_the_server_ends(process):
    server, url, log = process
    wait_for(lambda: "serving " in log.read_text(), 180)
    begun, later = [], []

    def ask(into, tokens):
        try:
            body = {"image": base64_png(), "max_new_tokens": tokens}
            into.append(httpx.post(f"{url}/v1/caption", json=body, timeout=120))
        except httpx.TransportError:
            into.append(None)

    clients = [threading.Thread(target=ask, args=(begun, 1000)) for _ in range(3)]
    for thread in clients:
        thread.start()
    time.sleep(0.3)
    server.send_signal(signal.SIGTERM)
    while server.poll() is None and len(later) < 1000:
        ask(later, 1)
        time.sleep(0.05)
    for thread in clients:
        thread.join()
    assert server.wait(timeout=60) == 0, log.read_text()
    assert [r and r.status_code for r in begun] == [200] * 3, [r and r.text for r in begun]
    codes = [r.status_code if r else None for r in later]
    refused = [r for r in later if r and r.status_code != 200]
    assert refused and {r.status_code for r in refused} == {503}, codes
    assert {r.json()["error"]["reason"] for r in refused} == {"shutting_down"}
    assert all(r.headers["retry-after"] for r in refused)
    assert codes == sorted(codes, key=lambda code: (code is None, code or 0)), codes  # 200, then 503, then nothing
