"""Shard files and manifests."""

import gc
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lumen_ray.data.scenes import render as scenes
from lumen_ray.data.shards import shards
from lumen_ray.data.shards.join import join
from lumen_ray.data.shards.schema import SCHEMA, make_message, make_row
from lumen_ray.data.shards.statistics import gather
from lumen_ray.errors import UserError


@pytest.fixture(scope="module")
def rows():
    return [scenes.scene_row(0, index, 64) for index in range(10)]


REJECTED = {"kind": "images", "image_id": "x", "origin": "here", "reason": "because", "rule": "broken_image",
            "mend": "save it again"}  # fmt: skip


@pytest.fixture
def folder(tmp_path, rows):
    with shards.ShardWriter(tmp_path, "part-00000.parquet", rows_per_group=4) as writer:
        for row in rows:
            writer.write(row)
    counts = {"images": {"in": 11, "written": 10, "rejected": 1}}
    shards.write_rejected(tmp_path, [REJECTED])
    shards.write_manifest(tmp_path, shards.build_manifest([writer.entry], counts=counts, categories=[{"name": "c"}]))
    return tmp_path


def test_rows_come_back_as_written(folder, rows):
    (file,) = shards.read_manifest(folder)["files"]
    back = [row for i in range(len(file["row_groups"])) for row in shards.read_row_group(folder, file["path"], i)]
    assert back == rows
    assert [len(shards.read_row_group(folder, file["path"], i)) for i in range(3)] == [4, 4, 2]


@pytest.mark.parametrize("numbers", [[0, 1, 2, 3], [2, 0], [3, 2, 1, 0], [1, 1, 3, 3], [3, 0, 1, 2, 3, 0], range(3)])
def test_rows_come_in_the_requested_order(folder, rows, numbers):
    """A step over the end of an epoch may have a row group's last rows and then its first, some of them twice."""
    assert shards.read_row_group(folder, "part-00000.parquet", 1, numbers) == [rows[4 + number] for number in numbers]


def test_manifest_counts_tasks_per_row_group(folder, rows):
    manifest = shards.read_manifest(folder)
    (file,) = manifest["files"]
    assert [group["rows"] for group in file["row_groups"]] == [4, 4, 2]
    for index, group in enumerate(file["row_groups"]):
        part = rows[4 * index : 4 * index + 4]
        tasks = {task for row in part for task in row["tasks"]}
        assert group["tasks"] == {task: sum(task in row["tasks"] for row in part) for task in sorted(tasks)}
    assert manifest["tasks"]["detect"] == 10
    assert manifest["tasks"]["pose"] == sum("pose" in row["tasks"] for row in rows)
    assert manifest["rows"] == file["rows"] == 10
    assert manifest["rejected"] == 1
    assert file["bytes"] == (folder / file["path"]).stat().st_size
    assert list(shards.read_rejected(folder)) == [REJECTED]


def test_the_manifest_counts_the_images_that_show_each_class(tmp_path, rows):
    entries = []
    for number, part in enumerate((rows[:6], rows[6:])):
        with shards.ShardWriter(tmp_path, f"part-{number}.parquet", rows_per_group=4) as writer:
            for row in part:
                writer.write(row)
        entries.append(writer.entry)
    names = [*scenes.CLASSES, "unseen"]
    manifest = shards.build_manifest(entries, categories=[{"name": name, "keypoints": []} for name in names])
    for category in manifest["categories"]:
        shown = sum(any(i["phrase"] == category["name"] for i in row["instances"]) for row in rows)
        assert category["images"] == shown
    assert any(c["images"] for c in manifest["categories"])
    assert all("class_images" not in file for file in manifest["files"]), "a list of 1,200 in every file's entry"


def test_nothing_but_finished_files_is_left(folder, tmp_path):
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "part-00000.parquet", "rejected.parquet"]
    with pytest.raises(RuntimeError), shards.ShardWriter(folder, "part-00001.parquet", 1) as writer:
        writer.write(make_row("a", b"", (1, 1), "test"))
        raise RuntimeError
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("rows_per_group", [1, 8])
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, capfd, rows, rows_per_group):
    """While rows are written or when the file is closed; /dev/full is a disk without room."""
    original = shards._temporary_folder

    def full(folder):
        aside = original(folder)
        (aside / "part.parquet").symlink_to("/dev/full")
        return aside

    monkeypatch.setattr(shards, "_temporary_folder", full)
    words = "part.parquet' cannot be written: the disk is full; free some space"
    with (
        pytest.raises(UserError, match=words) as error,
        shards.ShardWriter(tmp_path, "part.parquet", rows_per_group) as writer,
    ):
        for row in rows[:3]:
            writer.write(row)
    assert error.value.reason == "disk_full" and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    del writer, error
    gc.collect()
    assert capfd.readouterr().err == "", "nothing is tried again when the writer is collected"


def test_a_writer_without_rows_leaves_no_file(tmp_path):
    with shards.ShardWriter(tmp_path / "new", "part.parquet") as writer:
        pass
    assert writer.entry is None
    assert not (tmp_path / "new").exists()


def test_counts_that_do_not_add_up_are_a_bug():
    with pytest.raises(RuntimeError, match="images do not add up: 3 came in, 1 were written and 1 rejected"):
        shards.build_manifest([], counts={"images": {"in": 3, "written": 1, "rejected": 1}})


def test_verify_finds_damage(folder):
    assert shards.verify(folder) == []
    path = folder / "part-00000.parquet"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert shards.verify(folder) == ["part-00000.parquet does not match its checksum"]
    path.write_bytes(data[:-5])
    assert "bytes, the manifest says" in shards.verify(folder)[0]
    with pytest.raises(UserError, match="is damaged") as error:
        shards.read_row_group(folder, path.name, 0)
    assert error.value.reason == "broken_shards"
    path.unlink()
    assert shards.verify(folder) == ["part-00000.parquet is missing"]
    with pytest.raises(UserError, match="is missing"):
        shards.read_row_group(folder, path.name, 0)


def test_a_missing_row_group(folder):
    with pytest.raises(UserError, match="has 3 row groups"):
        shards.read_row_group(folder, "part-00000.parquet", 3)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"schema_version": 1}'])
def test_other_folders_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError) as error:
        shards.read_manifest(tmp_path)
    assert error.value.reason == "not_shards"
    with pytest.raises(UserError, match="does not exist"):
        shards.read_manifest(tmp_path / "absent")


def test_another_schema_version_is_refused(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(UserError, match="schema version 99, not 1"):
        shards.read_manifest(folder)


def test_rows_per_group_must_be_positive(tmp_path):
    with pytest.raises(UserError, match="rows_per_group"):
        shards.ShardWriter(tmp_path, "part.parquet", rows_per_group=0)


def test_damage_within_a_row_group_is_reported(folder):
    entry = shards.read_manifest(folder)["files"][0]
    path = folder / entry["path"]
    data = bytearray(path.read_bytes())
    data[40 : len(data) // 2] = bytes(len(data) // 2 - 40)
    path.write_bytes(data)
    for read in (lambda: shards.read_row_group(folder, entry["path"], 0), lambda: list(shards.read_rows(folder))):
        with pytest.raises(UserError, match=f"row group 0 of shard file '{entry['path']}' cannot be read") as error:
            read()
        assert error.value.reason == "broken_shards"


def test_changes_name_the_first_images():
    first, later = shards.Changes(), shards.Changes()
    first.add({"boxes clipped": 2, "masks dropped": 0}, {"image_id": "a"})
    first.add({"boxes clipped": 1}, None)
    for name in "bcdefg":
        later.add({"boxes clipped": 1}, {"image_id": name})
    first.merge(later.numbers, later.images)
    assert first.numbers["boxes clipped"] == 9
    assert first.images == {"boxes clipped": ["a", "b", "c", "d", "e"]}


# -- rows of several images -------------------------------------------------------------------------------------------


def several_images_row():
    first, second, third = (scenes.scene_row(0, index, 64)["image"] for index in range(3))
    message = make_message("chat", "image 2 or image 3?", "The second.", image_turns=(0, 0))
    further = [{"image": image, "height": 64, "width": 64} for image in (second, third)]
    return make_row("pair", first, (64, 64), "chat", tasks=["chat"], messages=[message], further_images=further)


def write_older_file(folder, rows):
    """A shard folder as written before rows had further images and messages said when these are seen."""
    with shards.ShardWriter(folder, "part-00000.parquet", rows_per_group=4) as writer:
        for row in rows:
            writer.write(row)
    fields = [field for field in SCHEMA if field.name != "further_images"]
    message = SCHEMA.field("messages").type.value_type
    older = pa.list_(pa.struct([field for field in message if field.name != "image_turns"]))
    fields = [pa.field("messages", older) if field.name == "messages" else field for field in fields]
    plain = [{**row, "messages": [{k: v for k, v in m.items() if k != "image_turns"} for m in row["messages"]]}
             for row in rows]  # fmt: skip
    path = folder / "part-00000.parquet"
    pq.write_table(pa.Table.from_pylist(plain, schema=pa.schema(fields)), path, row_group_size=4)
    entry = writer.entry | {"bytes": path.stat().st_size, "sha256": shards.sha256(path)}
    shards.write_manifest(folder, shards.build_manifest([entry], categories=[{"name": c} for c in scenes.CLASSES]))
    return folder


def test_rows_of_several_images_come_back_as_written(tmp_path):
    row = several_images_row()
    with shards.ShardWriter(tmp_path, "part-00000.parquet") as writer:
        writer.write(row)
    shards.write_manifest(tmp_path, shards.build_manifest([writer.entry]))
    assert list(shards.read_rows(tmp_path)) == [row]
    assert shards.read_row_group(tmp_path, "part-00000.parquet", 0, [0, 0]) == [row, row]


def test_files_written_before_there_were_several_images_are_read(tmp_path, rows):
    folder = write_older_file(tmp_path / "old", rows)
    assert list(shards.read_rows(folder)) == rows
    assert shards.read_row_group(folder, "part-00000.parquet", 1, [1, 0]) == [rows[5], rows[4]]
    read = list(shards.read_rows(folder, ["messages", "further_images"]))
    assert read == [{"messages": row["messages"], "further_images": []} for row in rows]
    assert list(shards.read_rows(folder, ["image_id"])) == [{"image_id": row["image_id"]} for row in rows]
    statistics = gather(folder)
    assert statistics.rows == statistics.image_sides.total() == len(rows)


def test_old_and_new_files_are_joined(tmp_path, rows):
    folders = [write_older_file(tmp_path / "old", rows), tmp_path / "new"]
    with shards.ShardWriter(folders[1], "part-00000.parquet") as writer:
        writer.write(several_images_row())
    shards.write_manifest(folders[1], shards.build_manifest([writer.entry]))
    join(folders, tmp_path / "all")
    assert list(shards.read_rows(tmp_path / "all")) == [*rows, several_images_row()]
    statistics = gather(tmp_path / "all")
    assert statistics.image_sides.total() == len(rows) + 3 and statistics.items["further images"] == 2
