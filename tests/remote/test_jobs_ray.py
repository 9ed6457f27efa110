"""Verbs as jobs of a real head that asks for a token, by the command itself."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest
import yaml
from support.clusters import Cluster, wait_for
from support.label_fakes import encode, picture
from support.s3_server import CREDENTIALS, s3_server

from lumen_ray.cluster.render import render
from lumen_ray.cluster.request import RenderRequest
from lumen_ray.data.files import read_text, write_bytes

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def head():
    with Cluster(cpus=2, token="a-token-of-at-least-32-characters-long") as cluster:
        yield cluster


@pytest.fixture
def run(head, tmp_path):
    """A command in a folder of its own, in a shell with the cluster's token; its result."""
    environment = {name: value for name, value in head.environment.items() if name != "RAY_ADDRESS"}
    address = f"http://127.0.0.1:{head.dashboard}"
    environment |= {"RAY_API_SERVER_ADDRESS": address, "LUMEN_RAY_SHARED": str(tmp_path)}

    def run(*argv, **changed):
        if argv[0] != "jobs":
            argv = (*argv, "--address", address)
        command = [sys.executable, "-m", "lumen_ray.cli", *argv]
        folder = tmp_path / "here"
        folder.mkdir(exist_ok=True)
        return subprocess.run(
            command, env=environment | changed, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )

    run.environment, run.address, run.folder = environment, address, tmp_path
    return run


def scenes(run, *more):
    output = str(run.folder / "shards")
    return run("prepare", "scenes", "--num", "16", "--workers", "0", "--output", output, *more)


def test_a_job_from_start_to_end(run):
    done = scenes(run, "--job-id", "scenes", "--env", "LUMEN_TEST=1")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "lumen-ray jobs logs scenes" in done.stdout
    assert "detect 16" in done.stdout  # of the job's own log
    assert list((run.folder / "shards").glob("*.parquet"))

    jobs = json.loads(run("jobs", "list", "--json").stdout)
    assert [(job["job_id"], job["status"], job["exit_code"]) for job in jobs if job["job_id"] == "scenes"] == [
        ("scenes", "SUCCEEDED", 0)
    ]
    assert "scenes" in run("jobs", "list").stdout
    assert "SUCCEEDED, " in run("jobs", "status", "scenes").stdout.replace(", exit status 0", "")
    assert "detect 16" in run("jobs", "logs", "scenes").stdout
    assert "had ended" in run("jobs", "stop", "scenes").stdout

    again = scenes(run, "--job-id", "scenes")
    assert (again.returncode, "already has a job 'scenes'" in again.stderr) == (2, True)
    unknown = run("jobs", "logs", "scense")
    assert (unknown.returncode, "did you mean 'scenes'" in unknown.stderr) == (2, True)


def test_the_command_of_a_rendered_job_runs_as_it_is(run):
    """As KubeRay's submitter does: `ray job submit ... -- ENTRYPOINT` in a shell."""
    with s3_server("lumen") as url:
        for i in range(2):
            write_bytes(url(f"set/photos/{i}.png"), encode(picture(i)))
        files = render(RenderRequest("nano", 0, url("set"), ("label",), overlay="kind"))
        entrypoint = yaml.safe_load(files["label.yaml"])["spec"]["entrypoint"]
        environment = shlex.quote(json.dumps({"env_vars": CREDENTIALS}))
        command = f"ray job submit --address {run.address} --runtime-env-json {environment} -- {entrypoint}"
        done = subprocess.run(["bash", "-c", command], env=run.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        summary = json.loads(read_text(url("set/labels/summary.json")))
    assert (summary["images"], summary["errors"]) == (2, 0)


def test_the_working_directory_and_the_exit_status_of_a_job_that_fails(run):
    here = run.folder / "here"
    here.mkdir()
    (here / "list.txt").write_text("a.jpg\n")
    (here / "secret").mkdir()
    (here / "secret" / "key").write_text("")
    (here / ".rayignore").write_text("secret\n")
    labelled = run("label", "list.txt", "--output", str(run.folder / "labels"), "--max-errors", "0")
    assert "left out: secret" in labelled.stdout
    assert labelled.returncode == 2
    assert "limit of 0" in labelled.stdout  # the list was read where the job ran, and its image is missing
    assert "Traceback" not in labelled.stdout + labelled.stderr


def test_no_wait_and_stop(run):
    output = str(run.folder / "many")
    started = run(
        "prepare", "scenes", "--num", "200000", "--workers", "0", "--output", output, "--job-id", "many", "--no-wait"
    )
    assert started.returncode == 0, started.stderr
    wait_for(lambda: "RUNNING" in run("jobs", "status", "many").stdout, "the job's start")
    assert run("jobs", "stop", "many").returncode == 0
    wait_for(lambda: "STOPPED" in run("jobs", "status", "many").stdout, "the job's end")


def test_ctrl_c_leaves_a_job_running_without_a_terminal(run):
    command = [sys.executable, "-m", "lumen_ray.cli", "prepare", "scenes", "--num", "200000", "--workers", "0"]
    command += ["--output", str(run.folder / "more"), "--job-id", "left", "--address", run.address]
    process = subprocess.Popen(
        command, env=run.environment, cwd=run.folder, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background commands ignore it
    )  # fmt: skip
    wait_for(lambda: "RUNNING" in run("jobs", "status", "left").stdout, "the job's start", process=process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, "job left goes on" in said) == (130, True)
    assert "RUNNING" in run("jobs", "status", "left").stdout
    run("jobs", "stop", "left")


def test_a_wrong_token(run):
    refused = run("jobs", "list", RAY_AUTH_TOKEN="another-token-of-at-least-32-characters")
    assert refused.returncode == 2
    assert refused.stderr.startswith("lumen-ray: the cluster at") and "token" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    none = run("jobs", "list", RAY_AUTH_MODE="disabled")
    assert (none.returncode, "token" in none.stderr) == (2, True)


def test_another_version_of_python(run, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import platform\nplatform.python_version = lambda: '3.99.0'\n")
    path = os.pathsep.join([str(tmp_path), run.environment.get("PYTHONPATH", "")])
    other = run("jobs", "list", PYTHONPATH=path)
    assert (other.returncode, "has Python 3." in other.stderr and "3.99.0" in other.stderr) == (2, True), other.stderr
