"""`jobs/bench.py`: the chosen benches run, and their results are written."""

import json
import os
import platform
from datetime import UTC, datetime

import pytest
import torch

from lumen_ray.bench import command, kinds
from lumen_ray.bench.timing import Result, SidesDiffer


def made(*results):
    """A bench that measures nothing."""
    return command.Bench(lambda args, folder: list(results), lambda args: None)


@pytest.fixture
def benches(monkeypatch):
    found = {
        "fast": made(Result("fast", "images/s", {"ours": [3.0], "theirs": [1.0]}, 2.0)),
        "absent": made(Result("absent", "", {}, skipped="there is nothing here")),
    }
    monkeypatch.setitem(command.KINDS, "train", found)
    return found


@pytest.fixture
def never(monkeypatch):
    """The real benches with their checks, which fail when one is run."""

    def run(args, folder):
        raise AssertionError("a bench was run")

    found = {name: command.Bench(run, bench.check) for name, bench in command.KINDS["train"].items()}
    monkeypatch.setitem(command.KINDS, "train", found)


def test_sides_that_differ_are_reported_and_the_other_results_kept(benches, tmp_path, capsys):
    def differs(args, folder):
        yield Result("first", "images/s", {"ours": [3.0], "theirs": [1.0]})
        raise SidesDiffer("the second differs by 3")

    benches["half"] = command.Bench(differs, lambda args: None)
    benches["last"] = made(Result("last", "images/s", {"ours": [3.0], "theirs": [1.0]}))
    path = tmp_path / "out.json"
    assert command.main(["train", "--only", "half,last", "--output", str(path)]) == 0
    first, half, last = json.loads(path.read_text())["results"]
    assert (first["name"], last["name"]) == ("first", "last")
    assert half == {"name": "half", "failed": "the second differs by 3", "reached": False}
    assert "half failed: the second differs by 3" in capsys.readouterr().out
    assert command.main(["train", "--only", "half", "--check", "--output", str(path)]) == 1


def test_every_bench_is_printed_and_written(benches, tmp_path, capsys):
    path = tmp_path / "out.json"
    assert command.main(["train", "--output", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["results"] == [
        {
            "name": "fast",
            "unit": "images/s",
            "sides": {
                "ours": {"median": 3.0, "low": 3.0, "high": 3.0, "turns": [3.0]},
                "theirs": {"median": 1.0, "low": 1.0, "high": 1.0, "turns": [1.0]},
            },
            "ratio": {"median": 3.0, "low": 3.0, "high": 3.0},
            "aim": 2.0,
            "reached": True,
            "equal": "",
            "budget": "",
        },
        {"name": "absent", "skipped": "there is nothing here"},
    ]
    printed = capsys.readouterr().out
    assert "fast: reached: ours / theirs is 3.000 (3.000 - 3.000) over 1 turn; the aim is 2" in printed
    assert "absent was left out: there is nothing here" in printed


def test_the_report_says_when_and_on_what(benches, tmp_path):
    path = tmp_path / "out.json"
    before = datetime.now(UTC).replace(microsecond=0)
    command.main(["train", "--output", str(path)])
    report = json.loads(path.read_text())
    assert before <= datetime.fromisoformat(report["date"]) <= datetime.now(UTC)
    assert report["machine"]["cores"] == os.cpu_count()
    assert report["machine"]["processor"] == command.processor()
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert report["machine"]["packages"]["torch"] == torch.__version__


def test_the_processor_is_named(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Some CPU: 9 GHz\nmodel name\t: Other\n")
    assert command.processor(tmp_path / "cpuinfo") == "Some CPU: 9 GHz"
    assert command.processor(tmp_path / "absent") == (platform.processor() or platform.machine())


@pytest.mark.parametrize(
    ("aim", "skipped", "options", "status"),
    [(2.0, "", [], 0), (4.0, "", [], 0), (2.0, "", ["--check"], 0), (4.0, "", ["--check"], 1),
     (None, "", ["--check"], 0), (4.0, "no such device", ["--check"], 0)],
)  # fmt: skip
def test_an_aim_that_is_missed_is_the_exit_status_with_check(monkeypatch, tmp_path, aim, skipped, options, status):
    slow = Result("slow", "images/s", {} if skipped else {"a": [3.0], "b": [1.0]}, aim, skipped=skipped)
    other = Result("fast", "images/s", {"a": [3.0], "b": [1.0]}, 1.0)
    monkeypatch.setitem(command.KINDS, "train", {"slow": made(slow), "fast": made(other)})
    assert command.main(["train", "--output", str(tmp_path / "out.json"), *options]) == status


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--turns", "0"], "--turns 0 must be 1 or more"),
        (["--workers", "0"], "--workers 0 must be 1 or more"),
        (["--threads", "-1"], "--threads -1 must be 1 or more"),
        (["--steps", "0"], "--steps 0 must be 1 or more"),
        (["--batch-size", "0"], "--batch-size 0 must be 1 or more"),
        (["--only", "pipeline", "--steps", "30"], "give 57 or more"),
        (["--only", "input", "--steps", "16"], "give a multiple of 16, such as 48"),
        (["--batch-size", "12"], "must be a multiple of 8 rows"),
        (["--workers", "4", "--batch-size", "16"], "times 4 workers"),
        (["--shards", "absent"], "'absent' does not exist"),
        (["--model", "absent"], "model folder 'absent' does not exist"),
        (["--preset", "smal"], "did you mean 'small'"),
        (["--only", ","], "names no bench"),
        (["--output", "absent/out.json"], "there is no folder 'absent'"),
        (["--output", "."], "is a folder"),
    ],
)
def test_options_that_cannot_work_are_reported_before_the_first_bench(
    never, tmp_path, monkeypatch, capsys, options, why
):
    monkeypatch.chdir(tmp_path)
    assert command.main(["train", *options]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("bench: ") and printed.count("\n") == 1 and why in printed
    assert list(tmp_path.iterdir()) == []


def test_the_decoders_have_benches_of_their_own(monkeypatch, tmp_path, capsys):
    fast = made(Result("fast", "images/s", {"ours": [3.0], "theirs": [1.0]}, 1.0))
    monkeypatch.setitem(command.KINDS, "decoders", {"fast": fast, "memory": command.KINDS["decoders"]["memory"]})
    path = tmp_path / "out.json"
    assert command.main(["decoders", "--only", "fast", "--output", str(path)]) == 0
    assert json.loads(path.read_text())["kind"] == "decoders"
    assert command.main(["decoders", "--preset", "nanoo", "--output", str(path)]) == 2
    assert "did you mean 'nano'" in capsys.readouterr().err


def test_what_has_one_side_is_reported_without_a_ratio():
    assert Result("memory/a", "MiB", {"a step": [3.25]}).verdict() == "memory/a: a step 3.2 (3.2 - 3.2) MiB"


def test_only_some(benches, tmp_path):
    path = tmp_path / "out.json"
    command.main(["train", "--only", "absent", "--output", str(path)])
    assert [r["name"] for r in json.loads(path.read_text())["results"]] == ["absent"]


def test_an_unknown_bench_is_reported(benches, tmp_path, capsys):
    path = tmp_path / "out.json"
    assert command.main(["train", "--only", "fsat", "--output", str(path)]) == 2
    assert "did you mean 'fast'" in capsys.readouterr().err
    assert not path.exists()


def test_options_not_given_keep_the_benches_defaults():
    args = command.build_parser().parse_args(["train", "--turns", "2"])
    assert kinds._set({"turns": args.turns, "steps": args.steps}) == {"turns": 2}
