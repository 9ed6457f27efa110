"""Files and batches in a temporary folder, answered by a fake model in this process."""

from __future__ import annotations

import pytest
from support.batch_fakes import BatchServer

from lumen_ray.data import claim
from lumen_ray.serve.batches import runner


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Without the pauses that are for other processes."""
    monkeypatch.setattr(claim, "SETTLE_S", 0.0)
    monkeypatch.setattr(runner, "_AGAIN_S", 0.01)


@pytest.fixture
def batch_server(tmp_path) -> BatchServer:
    return BatchServer(tmp_path / "batches")
