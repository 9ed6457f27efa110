"""The same label job on a local Ray: reading tasks, a pool of model actors, one writer."""

import os
import re
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.label_fakes import FakeEngine, encode, make_picky_engine, picture, write_images

from lumen_ray.data.shards.schema import make_row
from lumen_ray.data.shards.shards import ShardWriter
from lumen_ray.errors import UserError
from lumen_ray.inference.records import TIME_COLUMNS
from lumen_ray.label.pipeline import label

pytestmark = pytest.mark.ray


def rows_of(output):
    paths = sorted((output / "labels").glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path).drop_columns(list(TIME_COLUMNS)).to_pylist()]


def test_ray_and_this_process_write_the_same_labels(local_ray, tmp_path):
    photos = write_images(tmp_path / "photos", 21)
    (photos / "broken.png").write_bytes(b"nothing")
    options = {"tasks": ["segment", "caption"], "classes": ["square"], "fragment_size": 4, "exports": ()}
    seen = []
    summary = label(
        make_picky_engine, photos, tmp_path / "ray", num_actors=2, batch_size=3,
        progress=lambda s: seen.append(s.done), **options,
    )  # fmt: skip
    assert (summary["images"], summary["labelled"], summary["errors"]) == (22, 20, 2)
    assert seen[-1] == 22 and len(seen) == 6  # fragments
    label(make_picky_engine, photos, tmp_path / "here", num_actors=0, **options)
    assert rows_of(tmp_path / "ray") == rows_of(tmp_path / "here")
    errors = [pq.read_table(tmp_path / name / "errors.parquet").to_pylist() for name in ("ray", "here")]
    assert errors[0] == errors[1] and {e["reason"] for e in errors[0]} == {"broken_image", "model_error"}


def test_a_shard_folder_and_resuming(local_ray, tmp_path):
    with ShardWriter(tmp_path / "shards", "part-00000.parquet", rows_per_group=4) as writer:
        for i in range(10):
            writer.write(make_row(f"s{i}", encode(picture(i + 6)), (48, 64), "test"))
    options = {"tasks": ["detect"], "classes": ["square"], "fragment_size": 3, "exports": ()}
    label(FakeEngine, tmp_path / "shards", tmp_path / "out", **options)
    (tmp_path / "out" / "ledger" / "000002.json").unlink()
    summary = label(FakeEngine, tmp_path / "shards", tmp_path / "out", **options)
    assert summary["finished_before"] == 7 and summary["images"] == 10
    assert Counter(r["image_id"] for r in rows_of(tmp_path / "out")) == {f"s{i}": 1 for i in range(10)}


def test_failed_images_are_asked_again(local_ray, tmp_path):
    photos = write_images(tmp_path / "photos", 10)
    (photos / "image005.png").write_bytes(b"nothing")
    options = {"tasks": ["detect"], "classes": ["square"], "fragment_size": 4, "exports": ()}
    assert label(FakeEngine, photos, tmp_path / "out", **options)["errors"] == 1
    (photos / "image005.png").write_bytes(encode(picture(5)))
    summary = label(FakeEngine, photos, tmp_path / "out", retry_errors=True, **options)
    assert (summary["labelled"], summary["errors"], summary["finished_before"]) == (10, 0, 9)
    assert [row["image_id"] for row in rows_of(tmp_path / "out")] == [f"image{n:03d}.png" for n in range(10)]


def test_mistakes_reach_the_caller_as_one_sentence(local_ray, tmp_path):
    photos = write_images(tmp_path / "photos", 2)
    with pytest.raises(
        UserError, match=r"99 actors are too many: the CPUs of the Ray cluster have room for \d+; give at most"
    ):
        label(FakeEngine, photos, tmp_path / "a", tasks=["detect"], classes=["square"], num_actors=99)
    with pytest.raises(UserError, match="no class with keypoints"):  # found out by the actor
        label(FakeEngine, photos, tmp_path / "b", tasks=["pose"], classes=["circle"])


COMMANDS = """
import sys
from lumen_ray import cli
from lumen_ray.serve.app import Server

Server.wait = lambda self: None  # for Ctrl-C
photos, output, port = sys.argv[1:]
assert cli.main(["label", photos, "--output", output]) == 0
assert cli.main(["serve", "--port", port]) == 0
"""
#: the lines of `label` and `serve`
OWN_LINES = (
    r"the bundled weights 'nano' are trained on the drawn shapes .*",
    r"label: starting",
    r"  label: \d+/3.*",
    r"3 images: 3 labelled, 0 errors -> .*; log -> (?P<label_log>\S+)",
    r"serve: starting",
    r"serving \S+ at http://127.0.0.1:\d+ .*; log -> (?P<serve_log>\S+)",
)


def test_label_and_serve_print_no_lines_of_ray(local_ray, tmp_path):
    """The lines of Ray, its C++ core and Ray Serve go to the log that the commands name. The last test: Serve stays."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(write_images(tmp_path / "photos", 3)), str(tmp_path / "out"), str(port)],
        env=os.environ | {"RAY_ADDRESS": local_ray.get_runtime_context().gcs_address},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    logs = {}
    for line in done.stdout.splitlines():
        found = next((match for pattern in OWN_LINES if (match := re.fullmatch(pattern, line))), None)
        assert found, f"not a line of lumen-ray: {line}"
        logs |= found.groupdict()
    assert set(logs) == {"label_log", "serve_log"} and logs["label_log"] == logs["serve_log"]
    assert "Started Serve" in Path(logs["serve_log"]).read_text()
