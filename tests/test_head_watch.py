import socket

import pytest
from support.clusters import wait_for

from lumen_ray import head_watch


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(head_watch, "PERIOD_S", 0.02)
    monkeypatch.setattr(head_watch, "_say", lines.append)
    yield lines
    head_watch.stop()


def test_a_head_that_is_lost_and_comes_back(said):
    server = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{server.getsockname()[1]}"
    head_watch.start(address)
    server.close()
    wait_for(lambda: said, "the first line", 10)
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2])), backlog=128):
        wait_for(lambda: len(said) > 1, "the second line", 10)
    lost, back = said[:2]
    assert lost.startswith(f"the head of the Ray cluster at {address} does not answer; this command ends in about")
    assert back == f"the head of the Ray cluster at {address} answers again"


def test_nothing_is_said_after_leaving_the_cluster(said):
    with socket.create_server(("127.0.0.1", 0)) as server:
        head_watch.start(f"127.0.0.1:{server.getsockname()[1]}")
    watch = head_watch._watch
    head_watch.stop()
    watch.join(10)
    assert not watch.is_alive() and not said
