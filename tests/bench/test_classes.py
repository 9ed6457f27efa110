"""The bench of class counts: both checkouts are asked the same, and must find the same."""

from pathlib import Path

import pytest

from lumen_ray.bench import classes
from lumen_ray.bench.timing import SidesDiffer
from lumen_ray.errors import UserError

ROOT = Path(__file__).parents[2]


def test_both_sides_are_measured(monkeypatch):
    monkeypatch.setattr(classes, "SECONDS", 0.05)
    results = list(classes.bench(against=str(ROOT), turns=2, counts=(1, 14)))
    assert [result.name for result in results] == ["1 classes", "14 classes"]
    for result in results:
        assert list(result.rates) == [classes.THIS, classes.OTHER]
        assert len(result.ratios) == 2 and min(result.ratios) > 0 and result.equal
        assert min(result.details["peak_memory"].values()) > 1 << 26


@pytest.mark.parametrize("other", [[], [["cat", [0.9], [[0, 0, 9, 8]]]], [["cat", [0.8], [[0, 0, 9, 9]]]]])
def test_checkouts_that_find_something_else_are_not_compared(other):
    found = [["cat", [0.9], [[0, 0, 9, 9]]]]
    classes._check_equal([found, found], 1)
    with pytest.raises(SidesDiffer, match="with 1 classes"):
        classes._check_equal([found, other], 1)


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="give the folder of a checkout"):
        classes.check(str(tmp_path))
    classes.check(None)
