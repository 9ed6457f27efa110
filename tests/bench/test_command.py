"""`jobs/bench.py`: what is asked for runs, and is written."""

import json

import pytest

from lumen_ray.bench import command
from lumen_ray.bench.timing import Result


@pytest.fixture
def benches(monkeypatch):
    """Two benches that measure nothing."""
    made = {
        "fast": lambda args, folder: [Result("fast", "images/s", {"ours": [3.0], "theirs": [1.0]}, 2.0)],
        "absent": lambda args, folder: [Result("absent", "", {}, skipped="there is nothing here")],
    }
    monkeypatch.setitem(command.KINDS, "train", made)
    return made


def test_every_bench_is_printed_and_written(benches, tmp_path, capsys):
    path = tmp_path / "out.json"
    assert command.main(["train", "--output", str(path)]) == 0
    report = json.loads(path.read_text())
    assert [r["name"] for r in report["results"]] == ["fast", "absent"]
    assert report["results"][0]["reached"] is True
    assert report["machine"]["cores"] > 0 and report["machine"]["packages"]["torch"]
    told = capsys.readouterr().out
    assert "3.00" in told and "absent was left out: there is nothing here" in told


def test_only_some(benches, tmp_path):
    path = tmp_path / "out.json"
    command.main(["train", "--only", "absent", "--output", str(path)])
    assert [r["name"] for r in json.loads(path.read_text())["results"]] == ["absent"]


def test_an_unknown_bench_is_told(benches, tmp_path, capsys):
    path = tmp_path / "out.json"
    assert command.main(["train", "--only", "fsat", "--output", str(path)]) == 2
    assert "did you mean 'fast'" in capsys.readouterr().err
    assert not path.exists()


def test_options_not_given_keep_the_benches_defaults():
    args = command.build_parser().parse_args(["train", "--turns", "2"])
    assert command._set({"turns": args.turns, "steps": args.steps}) == {"turns": 2}
