"""What is made of the rates of two sides."""

import io

import pytest
from rich.console import Console

from lumen_ray.bench.timing import Result, in_turns, table


def test_the_sides_take_turns():
    order = []

    def side(name, rates):
        return lambda: order.append(name) or rates.pop(0)

    rates = in_turns({"a": side("a", [1.0, 2.0]), "b": side("b", [4.0, 5.0])}, 2)
    assert order == ["a", "b", "a", "b"]
    assert rates == {"a": [1.0, 2.0], "b": [4.0, 5.0]}


def test_the_ratio_is_taken_within_each_turn():
    """Here the machine was ten times slower in the second turn; within each turn the sides differ by the same."""
    result = Result("x", "images/s", {"ours": [20.0, 2.0, 30.0], "theirs": [10.0, 1.0, 10.0]}, aim=2.0)
    assert result.ratios == [2.0, 2.0, 3.0]
    report = result.to_json()
    assert report["ratio"] == {"median": 2.0, "low": 2.0, "high": 3.0}
    assert report["reached"] is True
    assert report["sides"]["ours"] == {"median": 20.0, "low": 2.0, "high": 30.0, "turns": [20.0, 2.0, 30.0]}


@pytest.mark.parametrize(("aim", "reached"), [(None, None), (2.01, False), (1.0, True)])
def test_an_aim_is_reached_or_not(aim, reached):
    result = Result("x", "s", {"a": [2.0, 1.0, 3.0], "b": [1.0] * 3}, aim=aim)
    assert result.to_json()["reached"] is result.reached is reached
    word = {None: "there is no aim", False: "missed", True: "reached"}[reached]
    assert word in result.verdict()
    assert "a / b is 2.000 (1.000 - 3.000) over 3 turns" in result.verdict()
    if aim:
        assert result.verdict().endswith(f"the aim is {aim:g}")


def test_the_table_has_every_side_and_leaves_out_what_was_skipped():
    out = Console(file=io.StringIO(), width=160)
    out.print(
        table([Result("speed", "images/s", {"ours": [3.0], "theirs": [2.0]}, 1.0), Result("gpu", "", {}, skipped="no")])
    )
    text = out.file.getvalue()
    assert "ours" in text and "theirs" in text and "1.50 (1.50 - 1.50)" in text
    assert "gpu" not in text
    assert Result("gpu", "", {}, skipped="no").to_json() == {"name": "gpu", "skipped": "no"}
