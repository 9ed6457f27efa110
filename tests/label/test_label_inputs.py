import pytest
from support.label_fakes import encode, picture, write_images

from lumen_ray.data.shards.schema import make_row
from lumen_ray.data.shards.shards import ShardWriter
from lumen_ray.errors import UserError
from lumen_ray.label.inputs import Item, find_inputs, read_bytes


def test_folders_are_searched_and_sorted(tmp_path):
    write_images(tmp_path / "b", 2)
    write_images(tmp_path / "a" / "deep", 1)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "UPPER.JPG").write_bytes(encode(picture(0), "JPEG"))
    ids = [item.image_id for item in find_inputs(tmp_path).items]
    assert ids == ["UPPER.JPG", "a/deep/image000.png", "b/image000.png", "b/image001.png"]
    assert [i.image_id for i in find_inputs(tmp_path, exclude=tmp_path / "b").items] == ids[:2]
    assert len(find_inputs(str(tmp_path / "**" / "*.png")).items) == 3
    assert find_inputs(tmp_path / "UPPER.JPG").items == [Item("UPPER.JPG", str(tmp_path / "UPPER.JPG"))]


def test_every_suffix_that_decodes_is_read_and_the_rest_is_counted(tmp_path):
    for name in ("a.MPO", "b.jfif", "c.Tif", "d.heic", "e.heic", "f.mov", "README", "._a.jpg", ".cache/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = find_inputs(tmp_path)
    assert [item.image_id for item in found.items] == ["a.MPO", "b.jfif", "c.Tif"]
    assert found.left_out == {".heic": 2, ".mov": 1, "no suffix": 1}


def test_shards_are_read_group_by_group_without_text_rows(tmp_path):
    images = [encode(picture(i)) for i in range(5)]
    with ShardWriter(tmp_path, "part-00000.parquet", rows_per_group=2) as writer:
        for i, data in enumerate(images):
            writer.write(make_row(f"s{i}", data, (48, 64), "test"))
        writer.write(make_row("text", None, (0, 0), "test"))
    items = find_inputs(tmp_path).items
    assert [item.image_id for item in items] == ["s0", "s1", "s2", "s3", "s4"]
    assert [data for _, data in read_bytes(items)] == images


def test_unreadable_files_are_reported_one_by_one(tmp_path):
    write_images(tmp_path, 2)
    items = find_inputs(tmp_path).items
    (tmp_path / "image000.png").unlink()
    (_, first), (_, second) = read_bytes(items)
    assert isinstance(first, UserError) and first.reason == "unreadable_file" and isinstance(second, bytes)


@pytest.mark.parametrize(
    ("name", "text"), [("missing", "does not exist"), ("empty", "holds no image"), ("x.parquet", "is not a Parquet")]
)
def test_inputs_that_cannot_be_labelled(tmp_path, name, text):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.parquet").write_text("hello")
    with pytest.raises(UserError, match=text):
        find_inputs(tmp_path / name)
