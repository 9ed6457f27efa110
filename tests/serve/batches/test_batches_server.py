"""Batches on a local Ray with a nano model: replicas that are killed, and a server that is killed and started again."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import openai
import psutil
import pytest
import yaml
from PIL import Image
from support.chat_fakes import line, read_lines
from support.serve_fakes import free_port

from lumen_ray.label.batch.job import answer_batch

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.ray


def picture(seed: int) -> str:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def requests(number: int) -> str:
    """Lines of chats with and without an image, some of which a server refuses."""
    lines = []
    for n in range(number):
        images = [picture(n)] if n % 2 else []
        more = {"logit_bias": {"1": 2}} if n % 10 == 9 else {"max_tokens": 16 + n % 3}
        lines.append(line(f"id {n}", f"what is number {n} ?", *images, **more))
    return "\n".join(lines)


class Server:
    """`lumen-ray serve` in a process of its own."""

    def __init__(self, folder: Path, model: Path):
        self.port, self.log = free_port(), folder / "log"
        replica = {"num_cpus": 0.5, "max_ongoing_requests": 8}
        settings = {
            "model": str(model),
            "http": {"port": self.port},
            "batches": {"folder": str(folder / "batches"), "in_flight": 4},
            "ingress": {"num_cpus": 0.1},
            "trunk": replica,
        }
        (folder / "serve.yaml").write_text(yaml.safe_dump(settings))
        self.config = folder / "serve.yaml"
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="any", max_retries=4)

    def start(self) -> None:
        path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
        command = [sys.executable, "-m", "lumen_ray.cli", "serve", "--config", str(self.config)]
        self.log.write_text("")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=log)
        wait_for(lambda: "serving " in self.log.read_text() or self.process.poll() is not None, 180)
        assert self.process.poll() is None, self.log.read_text()

    def kill(self) -> None:
        """All of it, as when its machine is gone."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(below, 30)

    def kill_replica(self, name: str) -> None:
        below = psutil.Process(self.process.pid).children(recursive=True)
        (replica,) = [process for process in below if f"ServeReplica:lumen:{name}" in " ".join(process.cmdline())]
        replica.kill()


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def server(tmp_path_factory, model_folder):
    made = Server(tmp_path_factory.mktemp("batches"), model_folder)
    made.start()
    yield made
    made.kill()


def create(server, text):
    sent = server.client.files.create(file=("requests.jsonl", text.encode()), purpose="batch")
    return server.client.batches.create(
        input_file_id=sent.id, endpoint="/v1/chat/completions", completion_window="24h"
    ).id


def answered(server, batch_id, least):
    wait_for(lambda: server.client.batches.retrieve(batch_id).request_counts.completed >= least, 120)


def finished(server, batch_id):
    ended = ("completed", "failed", "cancelled", "expired")
    wait_for(lambda: server.client.batches.retrieve(batch_id).status in ended, 180)
    return server.client.batches.retrieve(batch_id)


def rows(server, file_id):
    return [json.loads(row) for row in server.client.files.content(file_id).text.splitlines()]


def what_counts(row):
    """A line of output without ids and times."""
    body = (row["response"] or {}).get("body", {})
    kept = {name: body.get(name) for name in ("choices", "usage", "model", "lumen")}
    error = {name: body.get("error", {}).get(name) for name in ("code", "message", "param")}
    return row["custom_id"], (row["response"] or {}).get("status_code"), kept, error, row["error"]


def test_killed_replicas_lose_and_double_no_line(server, tmp_path, model_folder):
    """The output is that of `lumen-ray label --input-jsonl`."""
    text = requests(100)
    batch_id = create(server, text)
    answered(server, batch_id, 1)
    server.kill_replica("Batches")
    answered(server, batch_id, 33)
    server.kill_replica("Trunk")
    batch = finished(server, batch_id)
    assert batch.status == "completed", batch
    assert batch.request_counts.model_dump() == {"total": 100, "completed": 90, "failed": 10}
    path = tmp_path / "requests.jsonl"
    path.write_text(text)
    summary = answer_batch(model_folder, path, tmp_path / "out", num_actors=0)
    for file_id, name in ((batch.output_file_id, "output"), (batch.error_file_id, "errors")):
        expected = read_lines(tmp_path / "out" / f"{name}.jsonl")
        got = rows(server, file_id)
        assert list(map(what_counts, got)) == list(map(what_counts, expected))
    assert batch.usage.total_tokens == summary["usage"]["total_tokens"]


def test_a_batch_is_cancelled_and_its_files_are_deleted(server):
    batch_id = create(server, requests(300))
    answered(server, batch_id, 1)
    assert server.client.batches.cancel(batch_id).status == "cancelling"
    batch = finished(server, batch_id)
    got = rows(server, batch.output_file_id) + rows(server, batch.error_file_id)
    assert batch.status == "cancelled" and sorted(row["custom_id"] for row in got) == sorted(
        f"id {n}" for n in range(300)
    )
    assert batch_id in [found.id for found in server.client.batches.list(limit=1)]
    files = [batch.input_file_id, batch.output_file_id, batch.error_file_id]
    assert set(files) <= {found.id for found in server.client.files.list()}
    assert all(server.client.files.delete(file_id).deleted for file_id in files)
    assert not set(files) & {found.id for found in server.client.files.list()}


@pytest.mark.slow
def test_a_killed_server_goes_on_when_it_is_started_again(server):
    batch_id = create(server, requests(150))
    answered(server, batch_id, 1)
    server.kill()
    server.start()
    between = server.client.batches.retrieve(batch_id)
    assert between.status == "in_progress" and between.request_counts.completed < 135
    batch = finished(server, batch_id)
    assert batch.request_counts.model_dump() == {"total": 150, "completed": 135, "failed": 15}
    answers, errors = rows(server, batch.output_file_id), rows(server, batch.error_file_id)
    assert [row["custom_id"] for row in answers] == [f"id {n}" for n in range(150) if n % 10 != 9]
    assert [row["custom_id"] for row in errors] == [f"id {n}" for n in range(150) if n % 10 == 9]
