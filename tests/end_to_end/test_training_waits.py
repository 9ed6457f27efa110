"""A run that Ray lets wait says what for: Ray's own tables are read for it, which other releases may change."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.clusters import Cluster, in_session, wait_for
from support.train_fakes import make_recipe, make_shards

pytestmark = [pytest.mark.ray, pytest.mark.slow]

JOB = str(Path(__file__).parents[2] / "jobs" / "train.py")

#: holds the CPU until it is told to let go, then what a killed run had asked for until it is told to forget that
HOLDER = """
import ray
from ray.data._internal.cluster_autoscaler import ResourceRequestPriority, get_or_create_autoscaling_coordinator

class Holder:
    pass

ray.init()
coordinator = get_or_create_autoscaling_coordinator()
high = ResourceRequestPriority.HIGH
ray.get(coordinator.request_resources.remote("train-killed", [{"CPU": 1}], expire_after_s=3600, priority=high))
holder = ray.remote(num_cpus=1)(Holder).remote()
ray.get(holder.__ray_ready__.remote())
print("held", flush=True)
input()
ray.kill(holder)
input()
ray.get(coordinator.cancel_request.remote("train-killed"))
input()
"""


def test_a_run_says_what_it_waits_for(tmp_path):
    make_shards(tmp_path)
    recipe = make_recipe(tmp_path, stages=((2, None),), workers=2, min_workers=1).model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run, log = tmp_path / "run", tmp_path / "log"
    options = ["--recipe", str(tmp_path / "recipe.yaml"), "--shards", str(tmp_path / "shards"), "--output", str(run)]

    def waits() -> list[str]:
        return [line.strip() for line in log.read_text().splitlines() if "waiting for resources" in line]

    with Cluster(cpus=1) as cluster, open(log, "w") as file:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with in_session([sys.executable, "-c", HOLDER], cluster.environment, **pipes) as holder:
            assert holder.stdout.readline() == "held\n"
            train = [sys.executable, JOB, *options]
            with in_session(train, cluster.environment, stdout=file, stderr=file) as driver:
                wait_for(waits, "what it waits for", process=driver)
                print("let go", file=holder.stdin, flush=True)
                wait_for(lambda: len(waits()) > 1, "what it waits for then", process=driver)
                print("forget", file=holder.stdin, flush=True)
                assert driver.wait(timeout=300) == 0, log.read_text()
    used, kept = waits()
    prefix = "train tiny: waiting for resources for a worker with 0.75 CPU: "
    assert used.startswith(prefix + "the cluster has 0 of 1 CPU free")
    assert kept.startswith(prefix + "Ray still reserves them for a killed run")
