"""FLOPs are compared with those that torch counts, which knows neither oneDNN's products nor attention in blocks."""

import pytest

from lumen_ray import cpu_linear
from lumen_ray.trunk.branch_blocks import BranchBlocks


@pytest.fixture(autouse=True)
def _plain_products(monkeypatch):
    monkeypatch.setattr(cpu_linear, "_HAS_ONEDNN", False)
    monkeypatch.setattr(BranchBlocks, "of", classmethod(lambda *_: None))
