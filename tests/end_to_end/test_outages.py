"""A cluster whose head is lost while it labels."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.clusters import Cluster, kill_session, kill_tree, wait_for

from lumen_ray.data.scenes.render import encode_jpeg, render
from lumen_ray.label.ledger import Ledger

pytestmark = [pytest.mark.ray, pytest.mark.slow]
COMMAND = str(Path(sys.executable).with_name("lumen-ray"))


def started(cluster, log, *arguments):
    environment = cluster.environment | {"RAY_gcs_rpc_server_reconnect_timeout_s": "20"}  # Ray waits for 60 s
    with open(log, "w") as out:
        return subprocess.Popen(
            [COMMAND, *map(str, arguments)], env=environment, stdout=out, stderr=out, start_new_session=True
        )


def test_a_job_whose_head_was_lost_goes_on_with_the_next_one(tmp_path):
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    for seed in range(1500):
        (scenes / f"{seed:04d}.jpg").write_bytes(encode_jpeg(render(0, seed % 50).image))
    arguments = ["label", scenes, "--classes", "red circle,blue square", "--actors", "2", "--output", tmp_path / "out"]
    ledger, log = Ledger(tmp_path / "out"), tmp_path / "log.txt"
    with Cluster(cpus=2) as first:
        first.add_node()
        job = started(first, log, *arguments)
        try:
            wait_for(lambda: len(ledger.done()) > 3, "the first fragments", process=job)
            kill_tree(first.nodes[0].pid)
            assert job.wait(timeout=180) != 0
            assert "does not answer; this command ends" in log.read_text()
        finally:
            kill_session(job.pid)
    done = ledger.done()
    assert 3 < len(done) < -(-1500 // 32)
    with Cluster(cpus=2) as second:
        job = started(second, log, *arguments)
        try:
            assert job.wait(timeout=300) == 0, log.read_text()[-2000:]
        finally:
            kill_session(job.pid)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["images"], summary["labelled"]) == (1500, 1500)
    assert summary["finished_before"] >= 32 * (len(done) - 1)
    names = [row["image_id"] for table in ledger.tables() for row in table.select(["image_id"]).to_pylist()]
    assert set(names) <= {f"{n:04d}.jpg" for n in range(1500)}
