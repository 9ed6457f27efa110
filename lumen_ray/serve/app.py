"""Builds and runs the Serve application: Ingress -> Trunk -> one deployment per decoder, each scaled separately, or all
of them in one process.

`run` serves from this process; `build` is the import path of Serve config files (see `config_file`)."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lumen_ray import config
from lumen_ray.data.urls import is_url
from lumen_ray.decoders.registry import DECODERS
from lumen_ray.errors import UserError
from lumen_ray.presets import model_folder
from lumen_ray.ray_env import cluster_resources, init_local, shutdown
from lumen_ray.ray_log import log_file, native_lines_in_file, quiet_loggers
from lumen_ray.serve.admission import ingress_options
from lumen_ray.serve.config_file import PROXY_MARGIN_S, check_effective
from lumen_ray.serve.environment import prepare_serve_environment
from lumen_ray.serve.keys import read_keys
from lumen_ray.serve.settings import Http, ServeSettings
from lumen_ray.serve.tracing import check_installed, tracing_config

if TYPE_CHECKING:
    from ray.serve import Application, Deployment

    from lumen_ray.model.settings import ModelSettings

logger = logging.getLogger("ray.serve.lumen")
APP_NAME = "lumen"
#: logical CPUs besides the replicas', for Serve's own actors and other users of this Ray
_SPARE_CPUS = 2


def build_app(settings: ServeSettings) -> Application:
    """The application graph, ready for `ray.serve.run`."""
    prepare_serve_environment()
    from ray import serve

    from lumen_ray.serve.decoder import load_decoder
    from lumen_ray.serve.ingress import Ingress
    from lumen_ray.serve.trunk import load_trunk
    from lumen_ray.serve.versions import DecoderVersions, TrunkVersions

    def deployment(replica: type, name: str, options: dict[str, Any]) -> Deployment:
        # Ray's types have only the form that is a decorator
        return cast("Deployment", serve.deployment(replica, name=name, **(options | grace)))

    # a replica that is stopped finishes its requests, Serve's default is 20 s for that
    grace = {"graceful_shutdown_timeout_s": settings.http.request_timeout_s}
    model = served_folder(settings)
    names = model_settings(settings).decoder_names
    if settings.topology == "one_process":
        from lumen_ray.serve.one_process import OneProcess, options_of

        one = deployment(OneProcess, "OneProcess", options_of(settings, names))
        return one.bind(_with_absolute_paths(settings), model, names)
    decoders = {}
    for name in names:
        options = settings.decoder(name)
        load = partial(load_decoder, dtype=options.dtype)
        decoder = deployment(DecoderVersions, deployment_name(name), options.options())
        decoders[name] = decoder.bind(model, name, options.torch_device, load)
    trunk = deployment(TrunkVersions, "Trunk", settings.trunk.options()).bind(
        model, settings.trunk.torch_device, settings.serving, partial(load_trunk, dtype=settings.trunk.dtype)
    )
    ingress = deployment(Ingress, "Ingress", ingress_options(settings))
    settings = _with_absolute_paths(settings)
    if settings.batches is None:
        return ingress.bind(settings, trunk, decoders)
    from lumen_ray.serve.batches.deployment import BatchesReplica, batches_options

    batches = deployment(BatchesReplica, "Batches", batches_options(settings)).bind(settings, trunk, decoders)
    return ingress.bind(settings, trunk, decoders, batches)


def served_folder(settings: ServeSettings) -> str:
    """The absolute path of the model folder, or its URL; a symlink stays one where the folder is followed."""
    if is_url(settings.model):
        return settings.model
    folder = model_folder(settings.model)
    return str(folder.resolve() if settings.reload is None else folder.absolute())


def _with_absolute_paths(settings: ServeSettings) -> ServeSettings:
    """The settings for replicas, which have another working directory."""
    changed: dict[str, Any] = {"model": served_folder(settings)}
    if settings.auth is not None:
        keys_file = str(Path(settings.auth.keys_file).expanduser().resolve())
        changed["auth"] = settings.auth.model_copy(update={"keys_file": keys_file})
    if settings.batches is not None:
        folder = str(Path(settings.batches.folder).expanduser().resolve())
        changed["batches"] = settings.batches.model_copy(update={"folder": folder})
    return settings.model_copy(update=changed)


def build(args: dict[str, Any]) -> Application:
    """The application of a Serve config file with `import_path: lumen_ray.serve.app:build`.

    `args`: the settings, as of `ServeSettings`. Raises `UserError` for invalid ones, and for an address in `http`: such
    a file has it in `http_options`.
    """
    # Serve passes the mapping as it is: it reads only annotations that are classes, and those of this module are texts
    settings = config.validate(ServeSettings, args, "args")
    check_effective(settings, "args")
    return build_app(settings)


def deployment_name(decoder: str) -> str:
    """The name of the decoder's class."""
    return DECODERS[decoder].class_name


def model_settings(settings: ServeSettings) -> ModelSettings:
    """The settings of the served model, with the decoders that `settings.serving` chooses."""
    from lumen_ray.model.settings import read_settings

    return read_settings(settings.model).choose(settings.serving, settings.model)


@dataclass
class Server:
    """A running application at `url`. `log`: the file with the lines of Ray and Ray Serve in this process;
    `longest_request_s`: how long a request may take."""

    url: str
    started_ray: bool
    log: Path
    longest_request_s: float = 60

    def stop(self) -> None:
        """Refuses new requests, finishes those that have begun, and ends the application, as well as Serve and Ray if
        `run` started them; else they go on for their other users. Ctrl-C ends it at once."""
        with native_lines_in_file():
            try:
                self._drain()
            except KeyboardInterrupt:
                pass
            finally:
                self.end()

    def end(self) -> None:
        """Ends the application, whatever it is doing."""
        from ray import serve

        with native_lines_in_file():
            if self.started_ray:
                shutdown()  # without deleting first: until that was done, Serve's proxy would answer 404
            else:
                serve.delete(APP_NAME)

    def _drain(self) -> None:
        """Closes the ingress; returns when it has answered all requests, or no longer answers itself."""
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        until = time.monotonic() + self.longest_request_s + PROXY_MARGIN_S
        ingress = None
        try:
            ingress = serve.get_app_handle(APP_NAME)
            # asked again, since a replica may have been added
            while sum(ingress.broadcast("close").results(timeout_s=10)) and time.monotonic() < until:
                time.sleep(0.2)
            time.sleep(0.5)  # until the proxy has passed the last answers on
        except (RayError, RayServeException, TimeoutError):
            logger.warning("the ingress does not answer; requests that have begun may be lost", exc_info=True)
        finally:
            if ingress is not None:
                ingress.shutdown()  # it reports to the controller from a thread, which would start another Ray later

    def wait(self) -> None:
        """Blocks until SIGINT or SIGTERM. Only for the main thread."""
        done = threading.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda *_: done.set())
        with native_lines_in_file():
            while not done.wait(1):
                pass
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C once more ends `stop` at once


def run(settings: ServeSettings, blocking: bool = True, timeout_s: float = 300) -> Server:
    """Starts the application and returns once `/readyz` answers 200.

    Joins the Ray that this process is connected to, or that `RAY_ADDRESS` names; else starts one on this machine, with
    logical CPUs counted from the settings. With `blocking` it serves until SIGINT or SIGTERM and stops everything it
    started. Raises `UserError` for a missing model folder, a port in use, a machine or Ray too small for them, and
    if the application is not ready after `timeout_s`.
    """
    model_folder(settings.model)  # raises before Ray starts
    if settings.auth is not None:
        read_keys(settings.auth.keys_file)
    if settings.tracing is not None:
        check_installed()
    if settings.batches is not None:
        from lumen_ray.serve.batches.file_store import check_folder

        check_folder(settings.batches)
    started = _join_ray(settings)
    url = f"http://{_reachable(settings.http.host)}:{settings.http.port}"
    server = Server(url, started, log_file(), settings.http.request_timeout_s)
    try:
        with native_lines_in_file():
            _deploy(settings)
            wait_ready(server.url, timeout_s)
    except BaseException:
        server.end()
        raise
    if blocking:
        print(
            f"serving {settings.model} at {server.url} (page at /, API documentation at /docs); Ctrl-C ends it; "
            f"log -> {server.log}",
            flush=True,
        )
        server.wait()
        server.stop()
    return server


def _join_ray(settings: ServeSettings) -> bool:
    """Connects to Ray and checks that address and deployments fit; returns whether it started a local Ray."""
    prepare_serve_environment()
    import ray

    started = not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")
    decoders = model_settings(settings).decoder_names
    if started:
        check_port(settings.http.host, settings.http.port)
        settings.check_memory(decoders, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    from ray import serve

    init_local(num_cpus=settings.logical_cpus(decoders) + _SPARE_CPUS)
    quiet_loggers()  # Serve's exists since its import above
    try:
        settings.check_room(decoders, cluster_resources())
    except UserError:
        if started:
            shutdown()
        raise
    if not started:
        _check_joined(settings.http.host, settings.http.port, bool(serve.status().proxies))
    return started


def _deploy(settings: ServeSettings) -> None:
    """Starts Serve where it does not run yet, and the application on it."""
    from ray import serve

    http: Http = settings.http
    options = {"host": http.host, "port": http.port, "request_timeout_s": http.request_timeout_s + PROXY_MARGIN_S}
    # Serve's access log has a line for every call of every deployment; `access.Access` writes one for a request
    logging = {"log_level": "WARNING", "enable_access_log": False, "encoding": http.log_encoding}
    serve.start(http_options=options, logging_config=logging, tracing_config=tracing_config(settings.tracing))
    serve.run(build_app(settings), name=APP_NAME, route_prefix="/", blocking=False, logging_config=logging)


def wait_ready(url: str, timeout_s: float) -> None:
    """Returns once `url`/readyz answers 200; raises `UserError` if it does not within `timeout_s` seconds."""
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
        f"{url} was not ready within {timeout_s:.0f} s; see Ray's logs in {log_file().parent}, or give it more CPUs "
        f"(last answer: {' '.join(state.split())[:300]})",
        "not_ready",
    )


def check_port(host: str, port: int) -> None:
    """Raises `UserError` if the address cannot be bound."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another --port (http.port)", "port_taken"
            ) from None


def _check_joined(host: str, port: int, proxy_runs: bool) -> None:
    """Raises `UserError` if the Serve of a shared Ray has another address, or there is none and the port is in use."""
    if not proxy_runs:
        check_port(host, port)
    elif not _proxy_answers(f"http://{_reachable(host)}:{port}"):
        raise UserError(
            f"this Ray's Serve already listens on another address than {host}:{port}; give its http.host and http.port",
            "other_address",
        )


def _proxy_answers(url: str) -> bool:
    """Whether a Serve proxy answers at `url`; one without routes answers 503."""
    try:
        with urllib.request.urlopen(f"{url}/-/healthz", timeout=10):
            return True
    except urllib.error.HTTPError as error:
        return error.code == 503
    except OSError:
        return False


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
