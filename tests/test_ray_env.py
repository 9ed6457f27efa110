"""How Ray starts, and what stays behind in a process when it ends."""

import os
import socket
import sys

import pytest

from lumen_ray.errors import UserError
from lumen_ray.ray_env import _check_reachable, init_local, prepare_environment, shutdown


def test_serve_forgets_the_cluster_that_has_ended(monkeypatch):
    """The next local cluster counts its jobs from 1 again, so that Serve would take an old client for one of it."""
    prepare_environment()
    from ray.serve import context

    monkeypatch.setattr(context, "_global_client", object())
    monkeypatch.setattr(context, "_global_client_job_id", "01000000")
    assert "ray.serve" in sys.modules
    shutdown()
    assert context._global_client is None and context._global_client_job_id is None


def test_what_the_user_has_set_wins(monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    prepare_environment()
    assert os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "300"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_at_which_no_cluster_answers_is_reported(monkeypatch, scheme):
    prepare_environment()
    import ray

    def init(**settings):
        raise AssertionError("Ray would try for many minutes")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
        _check_reachable(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"no Ray cluster answers at RAY_ADDRESS={address}; start one") as error:
        init_local()
    assert error.value.reason == "ray_unreachable"
    _check_reachable("auto")


@pytest.mark.parametrize(
    "message",
    [
        "The current node timed out during startup. Some of the raylet failed",
        "Timed out waiting for file /tmp/ray/session_1/gcs_server_port_3afc",
    ],
)
@pytest.mark.parametrize("failures", [1, 2])
def test_a_start_that_takes_too_long_is_tried_once_more(monkeypatch, message, failures):
    prepare_environment()
    import ray

    started = []

    def init(**settings):
        started.append(settings)
        if len(started) <= failures:
            raise RuntimeError(message)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if failures == 1:
        init_local()
    else:
        with pytest.raises(UserError, match="Ray did not start in time .* run the command again .*--actors 0") as error:
            init_local()
        assert error.value.reason == "ray_start"
    assert len(started) == 2 and started[0] == started[1]


def test_other_errors_of_a_start_are_not_tried_again(monkeypatch):
    prepare_environment()
    import ray

    started = []

    def init(**settings):
        started.append(settings)
        raise ValueError("no such setting")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match="no such setting"):
        init_local()
    assert len(started) == 1
