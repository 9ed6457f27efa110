"""The export of exact and near duplicates."""

import csv
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.label_fakes import FakeEngine, encode, picture, write_images

from lumen_ray import cli
from lumen_ray.errors import UserError
from lumen_ray.label.exporters.export import export
from lumen_ray.label.ledger import Ledger
from lumen_ray.label.pipeline import label

OPTIONS = {"tasks": ["detect"], "classes": ["square"], "num_actors": 0, "fragment_size": 4, "exports": ()}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Three scenes; of the first also a copy of the file, a larger one, and a JPEG twice."""
    folder = tmp_path_factory.mktemp("duplicates")
    photos = folder / "in"
    photos.mkdir()
    rng = np.random.default_rng(0)
    scenes = [Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((60, 45)) for _ in range(3)]
    for name, scene in zip("abc", scenes, strict=True):
        scene.save(photos / f"{name}.png")
    shutil.copy(photos / "a.png", photos / "d.png")
    scenes[0].save(photos / "e.jpg", quality=50)
    scenes[0].resize((120, 90)).save(photos / "f.png")
    shutil.copy(photos / "e.jpg", photos / "g.jpg")
    (photos / "broken.png").write_bytes(b"nothing")
    label(FakeEngine, photos, folder / "out", dedup=True, **OPTIONS)
    return folder / "out"


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_groups_of_exact_and_near_duplicates(labelled, tmp_path, capsys):
    argv = ["label", "export", str(labelled), "--format", "duplicates,report", "--output", str(tmp_path / "x")]
    assert cli.main(argv) == 0
    assert "duplicates: 5 images" in capsys.readouterr().out
    rows = read(tmp_path / "x" / "duplicates" / "duplicates.csv")
    assert [(r["group"], r["image_id"], r["relation"]) for r in rows] == [
        ("1", "a.png", "first"), ("1", "d.png", "exact"), ("1", "e.jpg", "near"), ("1", "f.png", "near"),
        ("1", "g.jpg", "exact"),
    ]  # fmt: skip
    stored = {r["image_id"]: r for r in pq.read_table(labelled / "labels").to_pylist()}
    assert all((r["sha256"], r["phash"]) == tuple(stored[r["image_id"]][c] for c in ("sha256", "phash")) for r in rows)
    assert [int(r["distance"]) <= 6 for r in rows] == [True] * 5 and rows[1]["distance"] == "0"
    summary = json.loads((tmp_path / "x" / "duplicates" / "summary.json").read_text())
    assert summary == {"images": 7, "without_phash": 0, "near_distance": 6, "groups": 1, "exact": 2, "near": 2}
    page = (tmp_path / "x" / "report.html").read_text()
    assert "<dt>exact duplicates</dt><dd>2</dd>" in page and "<dt>near duplicates</dt><dd>2</dd>" in page


def test_labels_without_perceptual_hashes_have_exact_duplicates_only(tmp_path):
    photos = write_images(tmp_path / "in", 3)
    shutil.copy(photos / "image001.png", photos / "z.png")
    (photos / "z.jpg").write_bytes(encode(picture(1), "JPEG"))
    label(FakeEngine, photos, tmp_path / "out", **OPTIONS)
    found = export(tmp_path / "out", ["duplicates", "report"])
    assert found["duplicates"]["images"] == 2 and "with --dedup to find near" in found["duplicates"]["note"]
    rows = read(tmp_path / "out" / "duplicates" / "duplicates.csv")
    assert [(r["image_id"], r["relation"], r["distance"]) for r in rows] == [
        ("image001.png", "first", ""), ("z.png", "exact", ""),
    ]  # fmt: skip
    assert "exact duplicates" not in (tmp_path / "out" / "report.html").read_text()
    for part in (tmp_path / "out" / "labels").iterdir():
        pq.write_table(pq.read_table(part).drop_columns(["sha256", "phash", "duplicate_of"]), part)
    with pytest.raises(UserError, match="from before hashes of images were recorded") as caught:
        export(tmp_path / "out", ["duplicates"])
    assert caught.value.reason == "no_hashes"
    export(tmp_path / "out", ["report"])


def test_a_distance_that_is_none(labelled, capsys):
    argv = ["label", "export", str(labelled), "--format", "duplicates", "--near-distance", "40"]
    assert cli.main(argv) == 2
    assert "near_distance is 40" in capsys.readouterr().err


def test_a_damaged_part_is_named(tmp_path):
    label(FakeEngine, write_images(tmp_path / "in", 2), tmp_path / "out", **OPTIONS)
    (tmp_path / "out" / "labels" / "part-000000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"part-000000.parquet' is damaged .*remove '.*000000.json'"):
        Ledger(tmp_path / "out").table(0)
