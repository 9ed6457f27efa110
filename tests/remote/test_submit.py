"""What is checked before a job is submitted, and what its end means."""

import argparse
from types import SimpleNamespace

import pytest

from lumen_ray import cli
from lumen_ray.errors import UserError
from lumen_ray.remote import command
from lumen_ray.remote.head import Head, JobState, url_of
from lumen_ray.remote.paths import check_visible, shared_folders
from lumen_ray.remote.submit import environment, exit_status
from lumen_ray.remote.working_dir import WorkingDir


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """The working directory of this process: recipe.yaml is packed, shards is not."""
    (tmp_path / "recipe.yaml").write_text("")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.parquet").write_text("")
    (tmp_path / ".rayignore").write_text("shards\n")
    monkeypatch.chdir(tmp_path)
    return WorkingDir.scan(".")


@pytest.mark.parametrize(
    "arguments",
    [
        {"output": "s3://bucket/out", "shards": "gs://bucket/shards"},
        {"output": "/data/out", "recipe": "recipe.yaml", "model": "nano"},
        {"output": "/data", "input": ["/models/a", "/data/b"], "classes": "circle, square", "workers": 2},
        {"output": "/data/out", "input": "photos-that-are-not-here/*.jpg", "init_from": None},
    ],
)
def test_visible(packed, arguments):
    check_visible(arguments, packed, ("/data", "/models"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "out"}, "--output out would be written on a node .*/data or /models"),
        ({"output": "/database"}, "--output /database would be written"),
        ({"output": "/data/../out"}, "--output"),
        ({"shards": "/home/me/shards"}, "cannot see /home/me/shards"),
        ({"shards": "shards"}, "shards is not in the files sent"),
        ({"input": ["/data/a", "/mnt/b"]}, "cannot see /mnt/b"),
    ],
)
def test_invisible(packed, arguments, message):
    with pytest.raises(UserError, match=message):
        check_visible(arguments, packed, ("/data", "/models"))


def test_nothing_is_packed_with_none(packed):
    with pytest.raises(UserError, match="--working-dir none"):
        check_visible({"recipe": "recipe.yaml"}, None, ("/data",))


def test_shared_folders(monkeypatch):
    monkeypatch.delenv("LUMEN_RAY_SHARED", raising=False)
    assert shared_folders([]) == ("/data", "/models")
    monkeypatch.setenv("LUMEN_RAY_SHARED", "/mnt/a:/mnt/b/")
    assert shared_folders([]) == ("/mnt/a", "/mnt/b")
    assert shared_folders(["/c"]) == ("/c",)
    with pytest.raises(UserError, match="absolute"):
        shared_folders(["c"])


def test_environment(monkeypatch):
    monkeypatch.setenv("HERE", "value")
    assert environment(["HERE", "OTHER=a=b", "EMPTY="]) == {"HERE": "value", "OTHER": "a=b", "EMPTY": ""}
    monkeypatch.delenv("HERE")
    with pytest.raises(UserError, match="HERE is not set"):
        environment(["HERE"])
    with pytest.raises(UserError, match="NAME=VALUE"):
        environment(["=x"])


def test_options_are_split_from_the_command():
    options, rest = command.split(["x", "--tasks", "detect", "--address", "http://h:1", "--env", "A", "--env=B=1"])
    assert rest == ["x", "--tasks", "detect"]
    assert (options.address, options.env, options.working_dir) == ("http://h:1", ["A", "B=1"], ".")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--no-wait"], "--no-wait is for jobs on a cluster"),
        (["--job-id", "a"], "--job-id is for jobs"),
        (["--addr", "http://h:1"], "write --address in full"),
        (["--address"], "expected one argument"),
        (["--address", "ray://h:1", "--working-dir", "none"], "dashboard"),
    ],
)
def test_wrong_options(argv, message, capsys):
    assert cli.main(["label", "/data/photos", "--output", "/data/labels", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_command_is_refused_before_the_cluster_is_asked(capsys):
    assert cli.main(["label", "/data/photos", "--address", "http://127.0.0.1:1"]) == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "url"),
    [("head:8265", "http://head:8265"), ("https://head/", "https://head"), ("http://h:1", "http://h:1")],
)
def test_url(address, url):
    assert url_of(address) == url


@pytest.mark.parametrize("address", ["ray://head:10001", "http://", "", "s3://bucket"])
def test_no_url(address):
    with pytest.raises(UserError, match="dashboard"):
        url_of(address)


def test_no_head_answers():
    with pytest.raises(UserError, match="no Ray head answers at http://127.0.0.1:1"):
        Head("127.0.0.1:1")


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", -9, 137), ("STOPPED", None, 130), ("FAILED", None, 1)],
)
def test_exit_status(status, code, expected):
    assert exit_status(JobState("a", status, "command", exit_code=code)) == expected


def test_every_submitted_verb_has_the_options():
    verbs = next(a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    for verb in command.SUBMITTED:
        parser = verbs[verb]
        if verb == "prepare":
            kinds = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
            parser = kinds["scenes"]
        assert "--no-wait" in parser.format_help()


def test_commands_are_printed_as_they_are(monkeypatch, capsys):
    job = JobState("[a]", "SUCCEEDED", "lumen-ray label '[/data]/x' --classes '[red]'", exit_code=0)
    head = SimpleNamespace(jobs=lambda: [job], job=lambda _: job)
    monkeypatch.setattr(command, "_head", lambda _: head)
    for argv in (["jobs", "list"], ["jobs", "status", "[a]"]):
        assert cli.main(argv) == 0
        said = "".join(capsys.readouterr().out.split())
        assert "[/data]/x" in said and "[red]" in said and "[a]" in said
