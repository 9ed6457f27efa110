"""The bench of labelling: small, but with every side that it has."""

from pathlib import Path

import pytest

from lumen_ray.bench import label
from lumen_ray.bench.command import KINDS, build_parser, check
from lumen_ray.bench.timing import SidesDiffer
from lumen_ray.errors import UserError


@pytest.fixture
def small_photographs(monkeypatch):
    monkeypatch.setattr(label, "LARGE_SIZE", (600, 400))


def test_a_worker_is_measured_against_a_bare_loop(tmp_path, small_photographs):
    plain, large, many = label.bench(tmp_path, turns=2, images=6, large=3)
    assert plain.equal == "the number of instances" and list(plain.rates) == ["worker", "bare loop"]
    assert large.details["peak_memory_grown"] >= 0 and many.aim == pytest.approx(0.625)
    for result in (plain, large, many):
        assert len(result.ratios) == 2 and min(result.ratios) > 0


def test_sides_that_find_something_else_are_not_compared(tmp_path):
    worker = label._Worker(tmp_path / "out", "nano", 1)
    paths = label.write_scenes(tmp_path / "scenes", 2)
    requests = worker.requests("detect")
    with pytest.raises(SidesDiffer, match="the worker finds"):
        worker.check_equal(paths, [label.decode(paths[0].read_bytes())], requests)


def test_the_command_needs_a_checkout():
    args = build_parser().parse_args(["label", "--only", "command"])
    with pytest.raises(UserError, match="name the other one with --against"):
        check(args, {"command": KINDS["label"]["command"]})


@pytest.mark.ray
def test_the_command_is_measured_in_both_checkouts(tmp_path):
    here = str(Path(__file__).parents[2])
    running, whole = label.bench_command(tmp_path, against=here, turns=1, images=96)
    assert min(running.ratios) > 0 and min(whole.ratios) > 0
    assert set(running.details["driver_ms_per_image"]) == {label.THIS, label.OTHER}
