"""Builds and runs the Serve application: Ingress -> Trunk -> one deployment per decoder, each scales by itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lumen_ray.decoders.registry import DECODERS
from lumen_ray.errors import UserError
from lumen_ray.presets import model_folder
from lumen_ray.ray_env import cluster_resources, init_local, prepare_environment, shutdown
from lumen_ray.serve.settings import ServeSettings

if TYPE_CHECKING:
    from ray.serve import Application

    from lumen_ray.model.settings import ModelSettings

APP_NAME = "lumen"
#: logical CPUs beside the replicas, for Serve's own actors and whoever shares the machine's Ray
_SPARE_CPUS = 2


def prepare_serve_environment() -> None:
    """Settings that Ray reads when it is imported; call before anything imports ray. What the user has set wins."""
    prepare_environment()
    # Replicas report their load every second (default 10), so that upscale_delay_s is what decides.
    os.environ.setdefault("RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")
    os.environ.setdefault("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")


def build_app(settings: ServeSettings) -> Application:
    """The application graph, ready for `ray.serve.run` or a Serve config file."""
    prepare_serve_environment()
    from ray import serve

    from lumen_ray.serve.decoder import DecoderReplica, load_decoder
    from lumen_ray.serve.ingress import Ingress
    from lumen_ray.serve.trunk import TrunkReplica, load_trunk

    model = str(model_folder(settings.model).resolve())
    trunk = serve.deployment(TrunkReplica, name="Trunk", **settings.trunk.options())
    ingress = serve.deployment(Ingress, name="Ingress", **settings.ingress.options())
    decoders, has = {}, model_settings(settings)
    for name in has.decoder_names:
        part = settings.decoder(name)
        deployment = serve.deployment(DecoderReplica, name=deployment_name(name), **part.options())
        decoders[name] = deployment.bind(model, name, part.torch_device, partial(load_decoder, dtype=part.dtype))
    load = partial(load_trunk, dtype=settings.trunk.dtype)
    bound = trunk.bind(model, settings.trunk.torch_device, settings.serving, load)
    return ingress.bind(settings, bound, decoders, has.serving)


def deployment_name(decoder: str) -> str:
    """The name of the decoder's class."""
    return DECODERS[decoder].class_name


def model_settings(settings: ServeSettings) -> ModelSettings:
    """What the served model is made of, with the decoders that `settings.serving` chooses."""
    from lumen_ray.model.settings import read_settings

    return read_settings(settings.model).choose(settings.serving, settings.model)


@dataclass
class Server:
    """A running application. `url` is where it answers."""

    url: str
    started_ray: bool

    def stop(self) -> None:
        """Ends the application; Serve and Ray too if `run` started them, else they go on for their other users."""
        from ray import serve

        serve.delete(APP_NAME)
        if self.started_ray:
            shutdown()

    def wait(self) -> None:
        """Blocks until SIGINT or SIGTERM. Only for the main thread."""
        done = threading.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda *_: done.set())
        while not done.wait(1):
            pass


def run(settings: ServeSettings, blocking: bool = True, timeout_s: float = 300) -> Server:
    """Starts the application and returns once `/readyz` answers 200.

    Joins the Ray that this process is connected to, or that `RAY_ADDRESS` names; else starts one on this machine, with
    logical CPUs counted from the settings. With `blocking` it serves until SIGINT or SIGTERM and stops everything it
    started. Raises `UserError` for a missing model folder, a port that is taken, a Ray that cannot hold the
    deployments, and when `timeout_s` was not enough.
    """
    model_folder(settings.model)  # one that is missing is told before Ray starts
    prepare_serve_environment()
    import ray
    from ray import serve

    started = not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")
    http = settings.http
    if started:
        check_port(http.host, http.port)
    decoders = model_settings(settings).decoder_names
    init_local(num_cpus=settings.logical_cpus(decoders) + _SPARE_CPUS)
    try:
        settings.check_room(decoders, cluster_resources())
    except UserError:
        if started:
            shutdown()
        raise
    if not started:
        _check_joined(http.host, http.port, bool(serve.status().proxies))
    server = Server(f"http://{_reachable(http.host)}:{http.port}", started)
    try:
        # The proxy's limit lies above ours, so that a slow request gets our error body.
        options = {"host": http.host, "port": http.port, "request_timeout_s": http.request_timeout_s + 10}
        serve.start(http_options=options, logging_config={"log_level": "WARNING", "enable_access_log": False})
        logging = {"log_level": "INFO" if http.access_log else "WARNING", "enable_access_log": http.access_log}
        serve.run(build_app(settings), name=APP_NAME, route_prefix="/", blocking=False, logging_config=logging)
        wait_ready(server.url, timeout_s)
    except BaseException:
        server.stop()
        raise
    if blocking:
        print(
            f"serving {settings.model} at {server.url} (page at /, API documentation at /docs); Ctrl-C ends it",
            flush=True,
        )
        server.wait()
        server.stop()
    return server


def wait_ready(url: str, timeout_s: float) -> None:
    """Returns when `url`/readyz answers 200; `UserError` when it does not within `timeout_s` seconds."""
    end = time.monotonic() + timeout_s
    state = "no answer"
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=10) as response:
                state = response.read().decode()
                if json.loads(state)["ready"]:
                    return
        except urllib.error.HTTPError as error:
            state = error.read().decode(errors="replace")
        except OSError as error:
            state = str(error)
        time.sleep(0.1)
    raise UserError(
        f"{url} was not ready within {timeout_s:.0f} s; look into Ray's logs or give it more CPUs "
        f"(last answer: {' '.join(state.split())[:300]})",
        "not_ready",
    )


def check_port(host: str, port: int) -> None:
    """Raises `UserError` when nobody could listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another --port (http.port)", "port_taken"
            ) from None


def _check_joined(host: str, port: int, proxy_runs: bool) -> None:
    """On a Ray that others use: its Serve keeps the address it was started with; without one the port must be free."""
    if not proxy_runs:
        check_port(host, port)
    elif not _proxy_answers(f"http://{_reachable(host)}:{port}"):
        raise UserError(
            f"this Ray's Serve already listens on another address than {host}:{port}; give its http.host and http.port",
            "other_address",
        )


def _proxy_answers(url: str) -> bool:
    """Whether a Serve proxy is at `url`; one without routes answers 503."""
    try:
        with urllib.request.urlopen(f"{url}/-/healthz", timeout=10):
            return True
    except urllib.error.HTTPError as error:
        return error.code == 503
    except OSError:
        return False


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
