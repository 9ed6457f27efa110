"""Label jobs with `dedup`: images with the same bytes are labelled once. `test_duplicates_ray.py` runs them on Ray."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.label_fakes import FakeEngine, encode, make_picky_engine, picture, write_images

from lumen_ray import cli
from lumen_ray.data.images import decode
from lumen_ray.label import content_index
from lumen_ray.label.ledger import Ledger
from lumen_ray.label.perceptual_hash import perceptual_hash
from lumen_ray.label.pipeline import label
from lumen_ray.label.status import label_status, status_lines

OPTIONS = {
    "tasks": ["segment", "caption"],
    "classes": ["square"],
    "num_actors": 0,
    "fragment_size": 4,
    "batch_size": 3,
    "exports": (),
}
OF_ITS_OWN = ("image_id", "path", "duplicate_of", "phash", "labelled_at")


def counted(fails=lambda image: False):
    """An engine factory, and the engines that it has made."""
    engines = []

    def make():
        engines.append(FakeEngine(fails))
        return engines[-1]

    make.__qualname__ = "FakeEngine"  # a job's model is known by it
    return make, engines


def rows_of(output):
    return [row for path in sorted((output / "labels").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def content(rows):
    """Image id -> its rows without the columns that a copy has for itself."""
    found = {}
    for row in rows:
        kept = {name: value for name, value in row.items() if name not in OF_ITS_OWN}
        found.setdefault(row["image_id"], []).append(kept)
    return found


def with_copies(folder, number, copies):
    """`number` different images, and of the first `copies` a second file each, after all of them."""
    write_images(folder, number)
    for i in range(copies):
        shutil.copy(folder / f"image{i:03d}.png", folder / f"z_copy{i:03d}.png")
    return folder


def test_equal_bytes_are_labelled_once_and_have_the_same_labels(tmp_path):
    photos = with_copies(tmp_path / "in", 11, 5)
    make, engines = counted()
    summary = label(make, photos, tmp_path / "out", dedup=True, **OPTIONS)
    assert (summary["images"], summary["labelled"], summary["copied"], summary["errors"]) == (16, 16, 5, 0)
    assert engines[0].images == 11
    label(FakeEngine, photos, tmp_path / "plain", **OPTIONS)
    rows, plain = rows_of(tmp_path / "out"), rows_of(tmp_path / "plain")
    assert content(rows) == content(plain)
    assert {r["image_id"]: r["duplicate_of"] for r in rows if r["duplicate_of"]} == {
        f"z_copy{i:03d}.png": f"image{i:03d}.png" for i in range(5)
    }
    for row in rows:
        assert row["path"] == str(photos / row["image_id"])
        assert row["phash"] == perceptual_hash(decode((photos / row["image_id"]).read_bytes()))
    assert {row["phash"] for row in plain} == {None}
    originals = {row["image_id"]: row["labelled_at"] for row in rows}
    assert all(row["labelled_at"] >= originals[row["duplicate_of"]] for row in rows if row["duplicate_of"])
    status = label_status(tmp_path / "out")
    assert status["copied"] == 5 and "16 of 16 images (100%), 0 errors, 5 copied" in status_lines("out", status)[0]


def test_duplicates_within_a_batch_a_fragment_and_the_next_one(tmp_path):
    photos = tmp_path / "in"
    photos.mkdir()
    for i in range(12):  # batches of 3 in fragments of 4
        (photos / f"{i:02d}.png").write_bytes(encode(picture(0 if i < 6 else i)))
    make, engines = counted()
    summary = label(make, photos, tmp_path / "out", dedup=True, **OPTIONS)
    assert summary["copied"] == 5 and engines[0].images == 7
    rows = rows_of(tmp_path / "out")
    assert {r["duplicate_of"] for r in rows if r["image_id"] < "06"} == {None, "00.png"}
    assert Counter(r["image_id"] for r in rows) == {f"{i:02d}.png": 2 for i in range(12)}


def test_a_duplicate_of_an_image_without_labels_fails_for_itself(tmp_path):
    """Broken ones twice in one fragment and in another; one that the model fails on likewise."""
    photos = write_images(tmp_path / "in", 10)
    for name in ("a0", "a1", "z0"):
        (photos / f"{name}.png").write_bytes(b"nothing")
        (photos / f"{name}5.png").write_bytes(encode(picture(5)))
    summary = label(make_picky_engine, photos, tmp_path / "out", dedup=True, **OPTIONS)
    assert (summary["labelled"], summary["copied"], summary["reasons"]) == (9, 0, {"broken_image": 3, "model_error": 4})
    errors = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert sorted(e["image_id"] for e in errors) == [
        "a0.png", "a05.png", "a1.png", "a15.png", "image005.png", "z0.png", "z05.png",
    ]  # fmt: skip


def test_a_further_run_knows_what_earlier_ones_labelled(tmp_path):
    """Also those without `dedup`, which is no setting that labels depend on."""
    photos = write_images(tmp_path / "in", 6)
    label(FakeEngine, photos, tmp_path / "out", **OPTIONS)
    with_copies(photos, 8, 8)
    make, engines = counted()
    summary = label(FakeEngine, photos, tmp_path / "out", refresh=True, dedup=True, **OPTIONS)
    assert summary["images"] == 16 and summary["copied"] == 8
    write_images(photos, 1, start=20)
    shutil.copy(photos / "z_copy000.png", photos / "zz.png")
    summary = label(make, photos, tmp_path / "out", refresh=True, dedup=True, **OPTIONS)
    assert summary["copied"] == 9 and engines[0].images == 1
    assert {r["duplicate_of"] for r in rows_of(tmp_path / "out") if r["image_id"] == "zz.png"} == {"image000.png"}


def test_hashes_that_agree_in_eight_bytes_are_not_taken_for_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(content_index, "content_keys", lambda digests: np.zeros(len(digests), np.uint64))
    monkeypatch.setattr("lumen_ray.label.duplicates.content_keys", content_index.content_keys)
    photos = with_copies(tmp_path / "in", 9, 3)
    summary = label(FakeEngine, photos, tmp_path / "out", dedup=True, **OPTIONS)
    assert summary["images"] == 12
    label(FakeEngine, photos, tmp_path / "plain", **OPTIONS)
    assert content(rows_of(tmp_path / "out")) == content(rows_of(tmp_path / "plain"))


def test_labels_that_can_no_longer_be_read_are_made_again(tmp_path, monkeypatch):
    photos = write_images(tmp_path / "in", 8)
    label(FakeEngine, photos, tmp_path / "out", dedup=True, **OPTIONS)
    with_copies(photos, 8, 8)
    part, kept = tmp_path / "out" / "labels" / "part-000000.parquet", tmp_path / "kept"
    find = content_index.ContentIndex.find

    def find_and_lose(self, keys):
        found = find(self, keys)
        if part.exists():
            part.rename(kept)
        return found

    monkeypatch.setattr(content_index.ContentIndex, "find", find_and_lose)
    make, engines = counted()
    summary = label(make, photos, tmp_path / "out", refresh=True, dedup=True, **OPTIONS)
    kept.rename(part)
    assert summary["copied"] == 4 and engines[0].images == 4
    found = Counter(r["image_id"] for r in rows_of(tmp_path / "out"))
    assert len(found) == 16 and set(found.values()) == {2}


def test_copies_in_shards_and_with_equal_names(tmp_path):
    from lumen_ray.data.shards.schema import make_row
    from lumen_ray.data.shards.shards import ShardWriter

    for split in ("a", "b"):
        with ShardWriter(tmp_path / "shards", f"{split}-00000.parquet", rows_per_group=4) as writer:
            for i in range(6):
                writer.write(make_row(f"s{i}", encode(picture(i)), (48, 64), "test"))
    summary = label(FakeEngine, tmp_path / "shards", tmp_path / "out", dedup=True, **OPTIONS)
    assert (summary["images"], summary["copied"]) == (12, 6)
    rows = rows_of(tmp_path / "out")
    assert {(r["image_id"], r["duplicate_of"]) for r in rows if r["duplicate_of"]} == {
        (f"s{i}#2", f"s{i}") for i in range(6)
    }
    assert Counter(r["image_id"] for r in rows) == {f"s{i}{end}": 2 for i in range(6) for end in ("", "#2")}


def test_the_command_says_how_many_were_copied(tmp_path, capsys):
    photos = with_copies(tmp_path / "in", 2, 2)
    argv = ["label", str(photos), "--output", str(tmp_path / "out"), "--actors", "0", "--export", "none", "--dedup"]
    assert cli.main([*argv, "--progress", "json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-2]["copied"] == lines[-1]["copied"] == 2
    assert cli.main(argv) == 0
    assert "4 images: 4 labelled (2 copied), 0 errors" in capsys.readouterr().out


DRIVER = """
import sys
from support.label_fakes import FakeEngine
import time
from lumen_ray.label.pipeline import label

class Slow(FakeEngine):
    def run(self, *args, **kwargs):
        time.sleep(0.1)
        return super().run(*args, **kwargs)

Slow.__qualname__ = "FakeEngine"
label(Slow, sys.argv[1], sys.argv[2], tasks=["segment", "caption"], classes=["square"], num_actors=0, fragment_size=4,
      batch_size=3, exports=(), dedup=True)
"""


def test_a_killed_job_leaves_nothing_missing_or_doubled(tmp_path):
    photos, out = with_copies(tmp_path / "in", 30, 30), tmp_path / "out"
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    ledger = Ledger(out)
    for at_least in (3, 9):
        job = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(photos), str(out)],
            env=os.environ | {"PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        ends = time.monotonic() + 120
        while len(ledger.done()) < at_least:
            assert job.poll() is None, job.stderr.read()[-2000:]
            assert time.monotonic() < ends
            time.sleep(0.02)
        job.send_signal(signal.SIGKILL)
        job.communicate()
    make, engines = counted()
    summary = label(make, photos, out, dedup=True, **OPTIONS)
    assert summary["finished_before"] >= 36 and (summary["images"], summary["copied"]) == (60, 30)
    rows = rows_of(out)
    assert Counter(r["image_id"] for r in rows) == {
        f"{name}{i:03d}.png": 2 for i in range(30) for name in ("image", "z_copy")
    }
    label(FakeEngine, photos, tmp_path / "plain", **OPTIONS)
    assert content(rows) == content(rows_of(tmp_path / "plain"))


def test_the_hash_is_that_of_the_imagehash_library():
    imagehash = pytest.importorskip("imagehash")
    rng = np.random.default_rng(0)
    for size in ((48, 64), (7, 200), (1, 1), (333, 100)):
        noise = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize(size[::-1])
        assert perceptual_hash(np.asarray(noise)) == str(imagehash.phash(noise))
