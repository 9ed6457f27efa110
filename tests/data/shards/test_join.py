"""Shard folders joined into one."""

import json

import pytest

from lumen_ray import api, cli
from lumen_ray.data.shards.join import join
from lumen_ray.data.shards.shards import read_manifest, read_rows
from lumen_ray.errors import UserError


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Scenes, and text alone."""
    root = tmp_path_factory.mktemp("parts")
    api.prepare("scenes", root / "scenes", num=12, rows_per_group=4, workers=0)
    turns = [{"from": "human", "value": "What is 1 + 1?"}, {"from": "gpt", "value": "2"}]
    lines = [json.dumps({"id": f"t{i}", "conversations": turns}) for i in range(5)] + ["{}"]
    (root / "text.jsonl").write_text("\n".join(lines))
    api.prepare("chat", root / "text", conversations=[str(root / "text.jsonl")], rows_per_group=4, workers=0)
    return root / "scenes", root / "text"


def test_the_rows_of_all_folders_are_in_the_joined_one(parts, tmp_path, capsys):
    assert cli.main(["data", "join", *map(str, parts), "--output", str(tmp_path / "all")]) == 0
    assert "17 rows in 2 files" in capsys.readouterr().out
    rows = [row for part in parts for row in read_rows(part)]
    assert list(read_rows(tmp_path / "all")) == rows
    manifest, [scenes, text] = read_manifest(tmp_path / "all"), [read_manifest(part) for part in parts]
    assert manifest["categories"] == scenes["categories"]
    assert manifest["tasks"] == scenes["tasks"] | {"chat": scenes["tasks"]["chat"] + text["tasks"]["chat"]}
    assert manifest["rejected"] == text["rejected"] == 1
    assert manifest["counts"] == scenes["counts"] | text["counts"]
    assert [part["kind"] for part in manifest["origin"]["parts"]] == ["scenes", "chat"]


def test_classes_are_counted_together(parts, tmp_path):
    api.prepare("scenes", tmp_path / "more", num=4, seed=1, workers=0)
    joined = join([parts[0], tmp_path / "more"], tmp_path / "all")
    images = [{c["name"]: c["images"] for c in read_manifest(f)["categories"]} for f in (parts[0], tmp_path / "more")]
    assert {c["name"]: c["images"] for c in joined["categories"]} == {k: images[0][k] + images[1][k] for k in images[0]}


def test_what_cannot_be_joined_is_refused(parts, tmp_path):
    with pytest.raises(UserError, match="occurs twice"):
        join([parts[0], parts[0]], tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    with pytest.raises(UserError, match="already contains shards"):
        join(parts, parts[0])
    with pytest.raises(UserError, match="does not exist"):
        join([parts[0], tmp_path / "nowhere"], tmp_path / "all")
    api.prepare("scenes", tmp_path / "other", num=4, seed=1, workers=0)
    manifest = read_manifest(tmp_path / "other")
    posed = next(category for category in manifest["categories"] if category["keypoints"])
    posed["keypoints"] = posed["keypoints"][::-1]
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="another keypoints"):
        join([parts[0], tmp_path / "other"], tmp_path / "all")
