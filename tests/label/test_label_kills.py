"""`kill -9` at random moments of label jobs: with output in a folder and in a bucket, on one machine and on two nodes.

    pytest -m slow -s tests/label/test_label_kills.py

`LUMEN_KILLS` is the number of kills of each test (default 30), `LUMEN_KILLS_SEED` the seed of what is killed when.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from support.clusters import Cluster, kill_session, kill_tree, members, wait_for
from support.s3_server import s3_server

from lumen_ray.data.scenes.render import encode_jpeg, render
from lumen_ray.inference.records import TIME_COLUMNS
from lumen_ray.label.ledger import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.ray]
KILLS, SEED = int(os.environ.get("LUMEN_KILLS", "30")), int(os.environ.get("LUMEN_KILLS_SEED", "0"))
IMAGES = 4000
COMMAND = [str(Path(sys.executable).with_name("lumen-ray")), "label"]
OPTIONS = ["--tasks", "detect,count", "--classes", "red circle,blue square,green triangle", "--actors", "2"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder of hard links to 64 different scenes."""
    folder = tmp_path_factory.mktemp("kills") / "scenes"
    folder.mkdir()
    originals = []
    for seed in range(64):
        originals.append(folder / f"{seed:05d}.jpg")
        originals[-1].write_bytes(encode_jpeg(render(0, seed).image))
    for number in range(64, IMAGES):
        os.link(originals[number % 64], folder / f"{number:05d}.jpg")
    return folder


def rows_of(output):
    """Image id -> label rows without what differs between equal runs."""
    found = {}
    for table in Ledger(output).tables():
        for row in table.drop_columns(list(TIME_COLUMNS)).to_pylist():
            found.setdefault(row["image_id"], []).append(row)
    return found


class Job:
    """`lumen-ray label`, started again whenever its driver was killed. `nodes`: where it runs on a cluster."""

    def __init__(self, source, output, log, nodes=None):
        self.ledger, self.nodes, self._log = Ledger(output), nodes, log
        self._command = [*COMMAND, str(source), *OPTIONS, "--output", output, "--export", "none"]
        self._environment = dict(os.environ) if nodes is None else nodes.cluster.environment
        self.start()

    def start(self):
        with open(self._log, "a") as log:
            self.driver = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def end(self):
        kill_session(self.driver.pid)
        self.driver.wait()

    def is_done(self):
        return self.driver.poll() is not None

    def processes(self):
        """Ray's workers of the job."""
        roots = [*members(self.driver.pid)]
        for node in () if self.nodes is None else self.nodes.alive():
            with suppress(psutil.NoSuchProcess):
                roots += psutil.Process(node.pid).children(recursive=True)
        return [process for process in roots if _title(process).startswith("ray::")]

    def kill(self, kind, chance):
        """Kills a process of the `kind`, or all; returns whether there was one."""
        if kind in ("actor", "other worker"):
            workers = [p for p in self.processes() if ("LabelActor" in _title(p)) == (kind == "actor")]
            if not workers:
                return False
            with suppress(psutil.NoSuchProcess):
                chance.choice(workers).kill()
        elif kind == "node":
            self.nodes.replace()
        else:
            if kind == "driver":
                os.kill(self.driver.pid, signal.SIGKILL)
                time.sleep(chance.uniform(0, 2))  # its workers live on for a while
            self.end()
            self.start()
        return True


class Nodes:
    """Two nodes beside the head, which are killed and replaced."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.workers = [cluster.add_node(), cluster.add_node()]

    def alive(self):
        return self.workers

    def replace(self):
        gone = self.workers.pop(0)
        kill_tree(gone.pid)
        self.workers.append(self.cluster.add_node())


def _title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextmanager
def two_nodes():
    with Cluster(cpus=2) as cluster:
        yield Nodes(cluster)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("store", ["folder", "bucket"])
def test_kills_at_random_moments_leave_nothing_missing_and_nothing_doubled(scenes, tmp_path, store, nodes):
    chance = random.Random(f"{SEED} {store} {nodes}")
    kinds = ["driver", "actor", "other worker", "group"] if nodes == 1 else ["driver", "actor", "node"]
    with ExitStack() as stack:
        if store == "bucket":
            pytest.importorskip("moto", reason="needs moto[server]")
        place = stack.enter_context(s3_server("kills")) if store == "bucket" else lambda key: str(tmp_path / key)
        cluster = stack.enter_context(two_nodes()) if nodes == 2 else None

        def started(name):
            job = Job(scenes, place(name), tmp_path / "log.txt", cluster)
            stack.callback(job.end)
            return job

        undisturbed = started("undisturbed")
        wait_for(undisturbed.is_done, "the end of the undisturbed job", 900)
        expected = rows_of(undisturbed.ledger.output)
        assert len(expected) == IMAGES, (tmp_path / "log.txt").read_text()[-2000:]

        killed, rounds = Counter(), 0
        while sum(killed.values()) < KILLS:
            job, rounds = started(f"round{rounds}"), rounds + 1
            while sum(killed.values()) < KILLS:
                known = len(job.ledger.done())
                wait_for(lambda job=job, known=known: job.is_done() or len(job.ledger.done()) > known, "a fragment")
                time.sleep(chance.uniform(0, 3))
                if job.is_done():
                    break
                kind = chance.choice(kinds)
                killed[kind] += job.kill(kind, chance)
            wait_for(job.is_done, "the end of the job", 900)
            if job.driver.returncode != 0:
                job.start()
                wait_for(job.is_done, "the end of the job", 900)
            assert job.driver.returncode == 0, (tmp_path / "log.txt").read_text()[-2000:]
            assert rows_of(job.ledger.output) == expected
            totals = job.ledger.totals()
            assert (totals["images"], totals["errors"]) == (IMAGES, 0)
    print(f"{store}, {nodes} nodes: {dict(killed)} in {rounds} jobs of {IMAGES} images")
