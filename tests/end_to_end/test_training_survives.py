"""Training on Ray whose workers, node, driver and whole job are killed; measured against runs that never were."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from support.clusters import RAY, Cluster, in_session, kill_session, kill_tree, members, train_workers, wait_for
from support.ranks import run_ranks
from support.s3_server import CREDENTIALS, s3_server
from support.train_fakes import make_job, make_recipe, make_shards

from lumen_ray.data import files
from lumen_ray.model.build import build_model
from lumen_ray.train.launch import train_local
from lumen_ray.train.run import checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]

JOB = str(Path(__file__).parents[2] / "jobs" / "train.py")
PATIENCE_S = 600  # with a run of less than half a minute, on a machine that does much else
OPTIONS = {
    "stages": ((26, None), (10, ["lumen"])),
    "checkpoint_every": 4,
    "keep_checkpoints": 0,
    "log_samples": True,
    "workers": 2,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_shards(tmp_path_factory.mktemp("survives"))
    for name, changes in (("fixed", {}), ("elastic", {"min_workers": 1})):
        recipe = make_recipe(folder, **OPTIONS, **changes).model_dump(mode="json")
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def whole(data):
    """The run that was never killed, without Ray."""
    assert run_ranks(make_job(data, data / "whole", **OPTIONS)) == [0, 0]
    return data / "whole"


def arguments(data: Path, recipe: str, run: Path) -> list[str]:
    return [
        sys.executable,
        JOB,
        "--recipe",
        f"{data / recipe}.yaml",
        "--shards",
        str(data / "shards"),
        "--output",
        str(run),
    ]


def drivers(pid: int, run: Path) -> list[psutil.Process]:
    """The processes of a node that run the job's script."""
    started = psutil.Process(pid).children(recursive=True)
    return [p for p in started if p.is_running() and {JOB, str(run)} <= set(p.cmdline())]


def step_of(run: Path) -> int:
    """The step that was written last to the metrics, -1 when there is none."""
    path = run / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else -1


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(36))
    return [line["loss"] for line in lines]


def samples(run: Path, rank: int) -> dict[int, list[list[str]]]:
    """The image ids of each step on a rank, every time it did that step."""
    seen: dict[int, list[list[str]]] = {}
    for line in (run / "samples" / f"{rank}.jsonl").read_text().splitlines():
        entry = json.loads(line)
        seen.setdefault(entry["step"], []).append(entry["image_ids"])
    return seen


def weights(path: Path, data: Path) -> dict[str, torch.Tensor]:
    job = make_job(data, data / "reader", **OPTIONS).job
    model = build_model(job.start.settings, len(job.start.tokenizer))
    checkpoint.load_weights(path, model)
    return model.state_dict()


@pytest.fixture(scope="module")
def survivor(data, whole):
    """A job on two nodes; one of its workers, then a node with the worker on it, then its driver are killed.

    The last steps are done without Ray: a cluster keeps a killed driver's claim on its CPUs for three minutes.
    """
    run = data / "survivor"
    with Cluster() as cluster:
        node = cluster.add_node()
        submit = [RAY, "job", "submit", "--address", f"http://127.0.0.1:{cluster.dashboard}", "--"]
        with open(data / "job.log", "w") as log:
            job = subprocess.Popen(
                submit + arguments(data, "elastic", run), env=cluster.environment, stdout=log, stderr=log
            )
        wait_for(lambda: step_of(run) >= 13, "step 13", process=job)
        on_each_node = [len(train_workers(n.pid)) for n in cluster.nodes]
        for worker in train_workers(node.pid):
            worker.kill()
        wait_for(lambda: step_of(run) < 13, "the restart", process=job)
        wait_for(lambda: step_of(run) >= 18, "step 18", process=job)
        kill_tree(node.pid)
        wait_for(lambda: step_of(run) < 18, "the restart on one node", process=job)
        wait_for(lambda: step_of(run) >= 28, "step 28", process=job)
        for driver in drivers(cluster.nodes[0].pid, run):
            driver.kill()
        assert job.wait(timeout=60) != 0
    assert checkpoint.position(checkpoint.latest(run))["step"] < 36
    train_local(make_job(data, run, **OPTIONS))
    return run, on_each_node


def test_both_nodes_train(survivor):
    assert survivor[1] == [1, 1]


def test_until_the_node_is_lost_the_bits_are_those_of_a_run_that_was_never_killed(survivor, whole, data):
    assert losses(survivor[0])[:16] == losses(whole)[:16]
    ours, theirs = (weights(run / "checkpoints" / "0000016-s0", data) for run in (survivor[0], whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_one_worker_goes_on_with_the_same_loss_curve_and_no_sample_skipped_or_repeated(survivor, whole):
    assert losses(survivor[0]) == pytest.approx(losses(whole), rel=1e-4, abs=1e-4)
    first, second = samples(whole, 0), samples(whole, 1)
    alone = 0
    for step, tries in samples(survivor[0], 0).items():
        both = first[step][0] + second[step][0]
        assert all(ids in (first[step][0], both) for ids in tries)
        alone += tries[-1] == both
    assert samples(survivor[0], 0).keys() == set(range(36))
    assert alone >= 16  # the steps after the newest checkpoint before the node was lost
    assert all(ids == second[step][0] for step, tries in samples(survivor[0], 1).items() for ids in tries)


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory):
    """Environment of a process that starts a Ray of its own."""
    folder = tempfile.mkdtemp(prefix="lr", dir="/tmp")  # sockets' paths must be short
    ours = {"RAY_TMPDIR": folder, "OMP_NUM_THREADS": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    yield {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | ours
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(data, local_ray):
    """The run that was never killed, on a local Ray."""
    run = data / "undisturbed"
    with in_session(arguments(data, "fixed", run), local_ray) as driver:
        assert driver.wait(timeout=PATIENCE_S) == 0
    assert len(tries(run)) == 1
    return run


def tries(run: Path) -> list[int]:
    """The step at which each try began; each has a file for TensorBoard."""
    return sorted(int(path.suffix[1:]) for path in (run / "tensorboard").glob("events*"))


def check_same(run: Path, whole: Path) -> None:
    """The same weights to the bit, the same losses, and the same samples in every try."""
    assert (run / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    assert losses(run) == losses(whole)
    for rank in (0, 1):
        ours, theirs = samples(run, rank), samples(whole, rank)
        assert sorted(ours) == sorted(theirs) == list(range(36))
        assert all(again == theirs[step][0] for step, seen in ours.items() for again in seen)


def test_a_run_on_ray_ends_with_the_bits_of_one_without(undisturbed, whole):
    check_same(undisturbed, whole)


def kill_a_worker(driver: subprocess.Popen) -> None:
    first, second = train_workers(driver.pid)
    second.kill()


#: what is killed; the driver's Ray ends by itself when the driver is dead, which takes it some seconds
KILLS = {
    "a worker": kill_a_worker,
    "the driver": subprocess.Popen.kill,
    "the whole job": lambda driver: kill_session(driver.pid),
}


@pytest.mark.parametrize("killed", KILLS)
def test_killed_after_a_checkpoint_a_run_ends_with_the_same_bits(data, local_ray, undisturbed, killed):
    run = data / killed.replace(" ", "-")
    command = arguments(data, "fixed", run)
    with in_session(command, local_ray) as driver:
        saved = checkpoint.start_step(wait_for(lambda: checkpoint.latest(run), "a checkpoint", process=driver))
        KILLS[killed](driver)
        assert checkpoint.start_step(checkpoint.latest(run)) < 26  # in the midst of the first stage
        if killed == "a worker":
            assert driver.wait(timeout=PATIENCE_S) == 0
        else:
            assert driver.wait(timeout=60) == -signal.SIGKILL
            with in_session(command, local_ray) as again:
                assert again.wait(timeout=PATIENCE_S) == 0
            wait_for(lambda: not members(driver.pid), "the end of the dead driver's Ray", 60)
    first, *more = tries(run)
    assert first == 0 and more and all(0 < saved <= step < 36 for step in more)
    check_same(run, undisturbed)


def test_a_job_whose_run_is_in_a_bucket_is_killed_and_ends_with_the_same_bits(data, local_ray, undisturbed):
    pytest.importorskip("moto", reason="needs moto[server]")
    with s3_server("runs") as url:
        command, environment = arguments(data, "fixed", url("one")), local_ray | CREDENTIALS
        with in_session(command, environment) as driver:
            wait_for(lambda: checkpoint.latest(url("one")), "a checkpoint", process=driver)
            kill_session(driver.pid)
        assert checkpoint.start_step(checkpoint.latest(url("one"))) < 36
        with in_session(command, environment) as again:
            assert again.wait(timeout=PATIENCE_S) == 0
        weights = files.read_bytes(url("one/model/model.safetensors"))
        lines = files.read_text(url("one/metrics.jsonl")).splitlines()
    assert weights == (undisturbed / "model" / "model.safetensors").read_bytes()
    assert [json.loads(line)["loss"] for line in lines] == losses(undisturbed)
