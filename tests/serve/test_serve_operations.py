"""A server with keys on a local Ray: overload, numbers at Ray's endpoint, logs, and an ingress replica that dies."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import httpx
import pytest
from support.clusters import descendants
from support.serve_fakes import base64_png, free_port

from lumen_ray.serve.app import run
from lumen_ray.serve.keys import new_key
from lumen_ray.serve.metrics import METRICS
from lumen_ray.serve.settings import Auth, Autoscaling, Deployment, Http, ServeSettings, TrunkDeployment

pytestmark = pytest.mark.ray
ONE = Autoscaling(min_replicas=1, max_replicas=1)


@pytest.fixture(scope="module")
def key_and_server(model_folder, tmp_path_factory):
    key, line = new_key("alice")
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    path.write_text(line)
    settings = ServeSettings(
        model=str(model_folder),
        http=Http(port=free_port(), request_timeout_s=30, access_log=True, log_encoding="JSON"),
        auth=Auth(keys_file=str(path)),
        ingress=Deployment(num_cpus=0.5, max_ongoing_requests=64, autoscaling=ONE),
        trunk=TrunkDeployment(num_cpus=0.5, max_ongoing_requests=8, max_queued_requests=8),
    )
    server = run(settings, blocking=False)
    yield key, server
    server.end()


@pytest.fixture
def client(key_and_server):
    key, server = key_and_server
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
        yield client


def ask(client, new_tokens=4):
    return client.post("/v1/caption", json={"image": base64_png(), "max_new_tokens": new_tokens})


def during(work, count, do):
    """The result of `do` while `count` threads repeat `work`."""
    is_over = threading.Event()

    def repeat():
        while not is_over.is_set():
            work()

    threads = [threading.Thread(target=repeat) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        return do()
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def test_overload_leaves_the_server_ready(client):
    statuses = []

    def look():
        time.sleep(1)
        looks = []
        for _ in range(8):
            start = time.monotonic()
            looks.append((client.get("/readyz").status_code, time.monotonic() - start))
            time.sleep(0.3)
        return looks

    looks = during(lambda: statuses.append(ask(client, 200).status_code), 30, look)
    assert {200, 503} <= set(statuses), "the queue was never full"
    assert [status for status, _ in looks] == [200] * 8, looks


def test_ray_exports_what_trunk_decoder_and_ingress_measure(client):
    import ray

    assert client.post("/v1/detect", json={"image": base64_png(), "classes": ["red circle"]}).status_code == 200
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    until = time.monotonic() + 60
    wanted = ('ray_lumen_ray_batch_size_count{.*stage="trunk"', 'stage="lumen"', 'task="detect"', 'key="alice"')
    while missing := [part for part in wanted if part.split("{.*")[-1] not in (text := httpx.get(url).text)]:
        assert time.monotonic() < until, missing
        time.sleep(0.5)
    exported = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ray_lumen_ray_")}
    assert exported <= {f"ray_{metric.name}" for metric in METRICS}


def test_the_log_of_the_ingress_has_a_line_in_json(client):
    from ray._private import worker

    given = client.get("/v1/tasks", headers={"X-Request-ID": "operations-0123"})
    assert given.headers["x-request-id"] == "operations-0123"
    folder = Path(worker._global_node.get_logs_dir_path()) / "serve"
    until, found = time.monotonic() + 20, []
    while not found:  # it is written after the answer
        assert time.monotonic() < until
        time.sleep(0.1)
        lines = [line for path in folder.glob("replica_lumen_Ingress*.log") for line in path.read_text().splitlines()]
        found = [json.loads(line) for line in lines if "operations-0123" in line]
    (line,) = found
    assert (line["route"], line["status"], line["key"], line["method"]) == ("/v1/tasks", 200, "alice", "GET")


def test_a_request_whose_ingress_replica_dies_gets_the_envelope(client):
    """Serve's HTTP server said "Internal Server Error" in plain text."""
    (replica,) = descendants(os.getpid(), "lumen:Ingress")
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(ask(client, 1000))) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    os.kill(replica.pid, 9)
    for thread in threads:
        thread.join()
    lost = [answer for answer in answers if answer.status_code != 200]
    assert lost, "all were answered before"
    for answer in lost:
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], answer.headers["retry-after"]) == (503, "unavailable", "1")
        assert error["request_id"] == answer.headers["x-request-id"]
