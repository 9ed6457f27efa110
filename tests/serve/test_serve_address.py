"""The address of the server, and its time limit; no Ray."""

import io
import socket
import urllib.error

import pytest
from support.serve_fakes import free_port

from lumen_ray.errors import UserError
from lumen_ray.serve import app


@pytest.fixture
def taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_port_that_another_program_holds(taken):
    with pytest.raises(UserError, match="choose another --port"):
        app.check_port("127.0.0.1", taken)
    with pytest.raises(UserError, match="choose another --port"):
        app._check_joined("127.0.0.1", taken, proxy_runs=False)
    app._check_joined("127.0.0.1", free_port(), proxy_runs=False)


def test_the_proxy_of_a_running_serve_keeps_its_port(taken, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(b"success"))
    app._check_joined("127.0.0.1", taken, proxy_runs=True)


@pytest.mark.parametrize("fault", [None, 404])
def test_a_running_serve_at_another_address(monkeypatch, fault):
    def answer(url, timeout):
        assert url.endswith("/-/healthz")
        raise urllib.error.HTTPError(url, fault, "", {}, io.BytesIO()) if fault else ConnectionRefusedError()

    monkeypatch.setattr("urllib.request.urlopen", answer)
    with pytest.raises(UserError, match="another address"):
        app._check_joined("127.0.0.1", free_port(), proxy_runs=True)


def test_a_server_that_never_gets_ready():
    with pytest.raises(UserError, match="was not ready within 0 s") as caught:
        app.wait_ready(f"http://127.0.0.1:{free_port()}", 0.2)
    assert caught.value.reason == "not_ready"
