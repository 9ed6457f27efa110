import csv
import io
import json
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.label_fakes import FakeListing, encode, picture, write_images

from lumen_ray.data import files
from lumen_ray.data.shards.schema import make_row
from lumen_ray.data.shards.shards import ShardWriter
from lumen_ray.errors import UserError
from lumen_ray.label.inputs import Item, Reader, read_bytes
from lumen_ray.label.listing import Listing
from lumen_ray.label.pipeline import label
from lumen_ray.label.plan import Plan


def test_folders_are_searched_and_sorted(tmp_path):
    write_images(tmp_path / "b", 2)
    write_images(tmp_path / "a" / "deep", 1)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "UPPER.JPG").write_bytes(encode(picture(0), "JPEG"))
    ids = [item.image_id for item in Listing(tmp_path)]
    assert ids == ["UPPER.JPG", "a/deep/image000.png", "b/image000.png", "b/image001.png"]
    assert [i.image_id for i in Listing(tmp_path, tmp_path / "b")] == ids[:2]
    assert len(list(Listing(tmp_path / "**" / "*.png"))) == 3
    assert list(Listing(tmp_path / "UPPER.JPG")) == [Item("UPPER.JPG", str(tmp_path / "UPPER.JPG"))]


def test_every_suffix_that_decodes_is_read_and_the_rest_is_counted(tmp_path):
    for name in ("a.MPO", "b.jfif", "c.Tif", "d.heic", "e.heic", "f.mov", "README", "._a.jpg", ".cache/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = Listing(tmp_path)
    assert [item.image_id for item in found] == ["a.MPO", "b.jfif", "c.Tif"]
    assert found.left_out == {".heic": 2, ".mov": 1, "no suffix": 1}


def test_shards_are_read_group_by_group_without_text_rows(tmp_path):
    images = [encode(picture(i)) for i in range(5)]
    with ShardWriter(tmp_path, "part-00000.parquet", rows_per_group=2) as writer:
        for i, data in enumerate(images):
            writer.write(make_row(f"s{i}", data, (48, 64), "test"))
        writer.write(make_row("text", None, (0, 0), "test"))
    items = list(Listing(tmp_path))
    assert [item.image_id for item in items] == ["s0", "s1", "s2", "s3", "s4"]
    assert [data for _, data in read_bytes(items)] == images


def test_unreadable_files_are_reported_one_by_one(tmp_path):
    write_images(tmp_path, 2)
    items = list(Listing(tmp_path))
    (tmp_path / "image000.png").unlink()
    (_, first), (_, second) = read_bytes(items)
    assert isinstance(first, UserError) and first.reason == "missing_file" and isinstance(second, bytes)


@pytest.mark.parametrize(
    ("name", "text"), [("missing", "does not exist"), ("empty", "holds no image"), ("x.parquet", "is not a Parquet")]
)
def test_inputs_that_cannot_be_labelled(tmp_path, name, text):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.parquet").write_text("hello")
    with pytest.raises(UserError, match=text):
        list(Listing(tmp_path / name))


def read(source, **options):
    """id -> bytes, or the reason of an error."""
    found = {item.image_id: data for item, data in read_bytes(list(Listing(source, **options)))}
    return {name: data.reason if isinstance(data, UserError) else data for name, data in found.items()}


def images_of(folder, number=3):
    write_images(folder, number)
    return {f"image{i:03d}.png": encode(picture(i)) for i in range(number)}


def test_the_order_is_that_of_whole_paths(tmp_path):
    names = ["a.png", "a/b.png", "a/c/d.png", "a-b/e.png", "a0.png", "b.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"x")
    assert [item.image_id for item in Listing(tmp_path)] == sorted(names)


def test_globs_look_no_deeper_than_they_say(tmp_path, monkeypatch):
    for name in ("a.png", "x/b.png", "x/y/c.png", "x/.hidden/d.png", "n.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)

    def ids(pattern):
        return [item.image_id for item in Listing(pattern)]

    assert ids("*.png") == ["a.png"] and ids("*/*.png") == ["x/b.png"]
    assert ids("**/*.png") == ["a.png", "x/b.png", "x/y/c.png"] and ids("x/**/*.png") == ["x/b.png", "x/y/c.png"]
    assert ids(str(tmp_path / "x" / "[!c].png")) == [str(tmp_path / "x" / "b.png")]
    for pattern in ("*.jpg", "nowhere/*.png"):
        with pytest.raises(UserError, match="holds no image"):
            ids(pattern)


def test_a_folder_of_any_size_is_listed_in_sorted_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("lumen_ray.data.walk.SORTED_BLOCK", 4)
    images = images_of(tmp_path, 11)
    assert sorted(item.image_id for item in Listing(tmp_path)) == list(images)


def test_a_text_file_lists_paths_and_urls(tmp_path):
    images = images_of(tmp_path / "photos", 2)
    files.write_bytes("memory://listing/c.png", images["image001.png"])
    absolute = tmp_path / "photos" / "image001.png"
    (tmp_path / "list.txt").write_text(f"photos/image000.png\r\n\n{absolute}\nmemory://listing/c.png\nphotos/no.png\n")
    assert read(tmp_path / "list.txt") == {
        "photos/image000.png": images["image000.png"],
        str(absolute): images["image001.png"],
        "memory://listing/c.png": images["image001.png"],
        "photos/no.png": "missing_file",
    }


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_records_name_images_and_their_ids(tmp_path, suffix):
    images = images_of(tmp_path, 2)
    records = [
        {"image_id": 7, "note": 'a "quoted"\nline', "file_name": "image000.png"},
        {"image_id": 8, "note": "", "file_name": "image001.png"},
        {"image_id": 9, "note": "no image", "file_name": ""},
    ]
    path = tmp_path / f"records{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join([*map(json.dumps, records), "{broken", "[1]"]))
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(records[0]), delimiter="\t" if suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(records)
        path.write_text(text.getvalue())
    found = read(path)
    assert {name: found[name] for name in "789"} == {
        "7": images["image000.png"], "8": images["image001.png"], "9": "invalid_record",
    }  # fmt: skip
    assert [reason for name, reason in found.items() if name not in "789"] == ["invalid_record"] * (
        2 if suffix == ".jsonl" else 0
    )


@pytest.mark.parametrize("kind", ["bytes", "struct", "path"])
def test_tables_hold_images_or_their_paths(tmp_path, kind):
    images = images_of(tmp_path, 3)
    if kind == "path":
        column, expected = pa.array(images), list(images.values())
    elif kind == "bytes":
        column, expected = pa.array([*list(images.values())[:2], None]), [*list(images.values())[:2], "no_image"]
    else:
        column = pa.array([{"bytes": data, "path": name} for name, data in images.items()])
        expected = list(images.values())
    table = pa.table({"label": [1, 2, 3], "image": column})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    found = read(tmp_path / "t.parquet")
    assert list(found.values()) == expected
    assert list(found) == (list(images) if kind == "path" else ["t.parquet#0", "t.parquet#1", "t.parquet#2"])
    pq.write_table(table.append_column("id", pa.array(["x", "y", "z"])), tmp_path / "t.parquet")
    assert list(read(tmp_path / "t.parquet")) == ["x", "y", "z"]
    (tmp_path / "folder").mkdir()
    os.rename(tmp_path / "t.parquet", tmp_path / "folder" / "t.parquet")
    assert len(read(tmp_path / "folder")) == 3


def test_the_column_can_be_named(tmp_path):
    images = images_of(tmp_path, 1)
    pq.write_table(pa.table({"Photo": list(images.values()), "n": [1]}), tmp_path / "t.parquet")
    assert list(read(tmp_path / "t.parquet", column="Photo").values()) == list(images.values())
    with pytest.raises(UserError, match="no column of images .* --image-column, of: Photo, n"):
        read(tmp_path / "t.parquet")
    with pytest.raises(UserError, match="no column 'Phot'; did you mean 'Photo'"):
        read(tmp_path / "t.parquet", column="Phot")


def write_tar(path, images):
    with tarfile.open(path, "w") as tar:
        for name, data in images.items():
            for member, content in ((name, data), (name.replace(".png", ".json"), b"{}")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_members_of_a_tar_are_read_where_they_are(tmp_path):
    images = {f"a/{i}.png": encode(picture(i)) for i in range(3)}
    write_tar(tmp_path / "x.tar", images)
    listing = Listing(tmp_path)
    assert {item.image_id: data for item, data in read_bytes(list(listing))} == images
    assert not listing.left_out  # each belongs to an image
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: whole.index(images["a/2.png"]) + 20])
    found = read(tmp_path / "x.tar")
    assert list(found.values())[:2] == list(images.values())[:2] and found["x.tar"] == "invalid_record"


def test_members_of_samples_without_an_image_are_left_out(tmp_path):
    names = ["a.cls", "a.json", "a.png", "a.txt", "b.json", "b.txt", "c.png", "d.txt"]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    listing = Listing(tmp_path / "x.tar")
    assert [item.image_id for item in listing] == ["a.png", "c.png"]
    assert listing.left_out == {".json": 1, ".txt": 2}


def test_a_compressed_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(UserError, match="compressed.*unpack it to a plain .tar"):
        read(tmp_path / "x.tar.gz")


def test_a_bucket_is_an_input(tmp_path):
    images = images_of(tmp_path, 3)
    for name, data in images.items():
        files.write_bytes(f"memory://listing-bucket/in/deep/{name}", data)
    files.write_bytes("memory://listing-bucket/in/z.txt", b"x")
    listing = Listing("memory://listing-bucket/in")
    assert {item.image_id: data for item, data in read_bytes(list(listing))} == {
        f"deep/{n}": d for n, d in images.items()
    }
    assert listing.left_out == {".txt": 1}
    assert len(read("memory://listing-bucket/in/**/*.png")) == 3


def test_every_faulty_record_is_recorded(tmp_path):
    images = images_of(tmp_path, 1)
    (tmp_path / "r.csv").write_text("path\nimage000.png\n \n \n\n \n")
    plan = Plan(str(tmp_path / "ledger"), 8)
    (fragment,) = plan.fragments(Listing(tmp_path / "r.csv"))
    found = [data if isinstance(data, bytes) else data.reason for _, data in read_bytes(fragment.items)]
    assert found == [images["image000.png"], *["invalid_record"] * 3]
    assert len({item.image_id for item in fragment.items}) == 4


def test_records_of_one_file_are_images_of_their_own(tmp_path):
    images_of(tmp_path, 1)
    (tmp_path / "r.csv").write_text("id,path\nA,image000.png\nB,image000.png\nA,image000.png\n")
    listing = Listing(tmp_path / "r.csv")
    (fragment,) = Plan(str(tmp_path / "ledger"), 8).fragments(listing)
    assert [item.image_id for item in fragment.items] == ["A", "B"] and listing.left_out == {"listed again": 1}


def test_many_images_of_one_id_are_planned_in_time(tmp_path):
    """Each gets the next number: a thousand tars that all count from 0 are nothing unusual."""
    items = [Item("0.png", f"/{n}.tar", offset=512, length=1) for n in range(3000)]
    plan = Plan(str(tmp_path), 1000)
    names = [item.image_id for fragment in plan.fragments(FakeListing(items)) for item in fragment.items]
    assert names == ["0.png", *(f"0.png#{n}" for n in range(2, 3001))]


def test_an_archive_beside_pictures_hides_none(tmp_path):
    images = images_of(tmp_path, 2)
    write_tar(tmp_path / "backup.tar", {"a.png": b"x"})
    listing = Listing(tmp_path)
    assert [item.image_id for item in listing] == list(images) and listing.left_out == {".tar": 1}


def test_a_damaged_table_among_others_is_one_error(tmp_path):
    images = images_of(tmp_path / "x", 2)
    pq.write_table(pa.table({"image": list(images.values())}), tmp_path / "a.parquet")
    (tmp_path / "b.PARQUET").write_bytes(b"")
    found = read(tmp_path)
    assert list(found.values()) == [*images.values(), "invalid_record"]


def test_long_and_broken_records_of_a_csv_do_not_end_it(tmp_path):
    images = images_of(tmp_path, 3)
    rows = ["path,note", "image000.png," + "x" * 200_000, "image001.png,", "image002.png,y"]
    (tmp_path / "r.csv").write_text("\n".join(rows))
    assert read(tmp_path / "r.csv") == images


def test_records_that_name_no_path_at_first(tmp_path):
    images = images_of(tmp_path, 1)
    (tmp_path / "r.jsonl").write_text('{"note": 1}\n{"path": "image000.png"}\n')
    assert list(read(tmp_path / "r.jsonl").values()) == ["invalid_record", images["image000.png"]]
    (tmp_path / "r.jsonl").write_text('{"note": 1}\n')
    with pytest.raises(UserError, match="no column of images .* --image-column, of: note"):
        read(tmp_path / "r.jsonl")


@pytest.mark.parametrize(
    ("path", "reason"), [("https://example.org/a.png", "web_address"), ("a\0b.png", "unreadable_file")]
)
def test_addresses_that_cannot_be_read_are_recorded(tmp_path, path, reason):
    (tmp_path / "list.txt").write_text(f"{path}\n")
    assert list(read(tmp_path / "list.txt").values()) == [reason]


def test_file_urls_are_paths(tmp_path):
    images = images_of(tmp_path, 1)
    (tmp_path / "list.txt").write_text(f"file://{tmp_path}/image000.png\n")
    assert list(read(tmp_path / "list.txt").values()) == list(images.values())


def test_what_is_passed_over_is_counted(tmp_path):
    images_of(tmp_path / "in", 1)
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in", target_is_directory=True)
    (tmp_path / "in" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    listing = Listing(tmp_path / "in")
    assert len(list(listing)) == 1 and listing.left_out == {"link to a folder": 1, "broken link": 1}


def make_job(folder):
    write_images(folder / "gallery", 2)
    (folder / "job.json").write_text("{}")
    (folder / "ledger").mkdir()


def test_the_output_of_an_earlier_job_is_passed_over(tmp_path):
    images = images_of(tmp_path, 2)
    make_job(tmp_path / "out")
    write_images(tmp_path / "own", 1)
    (tmp_path / "own" / "job.json").write_text("{}")  # no ledger: not ours
    listing = Listing(tmp_path)
    assert [item.image_id for item in listing] == [*images, "own/image000.png"]
    assert listing.left_out == {"folder of labels": 1, ".json": 1}
    assert len(list(Listing(tmp_path / "**" / "*.png"))) == 3
    for source in ("out", "out/**/*.png"):
        with pytest.raises(UserError, match="is an output folder of `lumen-ray label`; give the images"):
            list(Listing(tmp_path / source))


def test_the_output_of_an_earlier_job_in_a_bucket_is_passed_over():
    image = encode(picture(0))
    for name in ("a.png", "out/job.json", "out/ledger/0.json", "out/x.png"):
        files.write_bytes(f"memory://listing-job/in/{name}", image)
    listing = Listing("memory://listing-job/in")
    assert [item.image_id for item in listing] == ["a.png"] and listing.left_out == {"folder of labels": 1}
    with pytest.raises(UserError, match="is an output folder"):
        list(Listing("memory://listing-job/in/out"))


@pytest.mark.parametrize("source", [".", "*.png", "../in", "**/*.png"])
def test_the_output_is_not_the_input(tmp_path, monkeypatch, source):
    images = images_of(tmp_path / "in", 1)
    monkeypatch.chdir(tmp_path / "in")
    with pytest.raises(UserError, match="is the input; give a folder of its own"):
        label(None, source, tmp_path / "in", tasks=["caption"], num_actors=0)
    assert sorted(os.listdir(tmp_path / "in")) == list(images)


def test_a_list_may_have_comments(tmp_path):
    images = images_of(tmp_path, 2)
    (tmp_path / "#x.png").write_bytes(images["image001.png"])
    (tmp_path / "list.txt").write_text("# drawn\nimage000.png\n./#x.png\n")
    assert list(read(tmp_path / "list.txt")) == ["image000.png", "./#x.png"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.org/a.jpg", "is a web address, which is neither read nor written; download it"),
        ("s4://box/x", r"'s4://' is no kind of store; did you mean 's3://'\? give a local path, .*s3://, gs://, az://"),
        ("req.jsonl", "is a batch file of chat requests, .*give it as --input-jsonl"),
        ("semicolons.csv", "are separated by ';'; write it with commas"),
        ("tabs.csv", "are separated by a tab; .*as .tsv"),
    ],
)
def test_inputs_that_are_something_else(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "req.jsonl").write_text('{"custom_id": "a", "method": "POST", "body": {}}\n')
    (tmp_path / "semicolons.csv").write_text("path;note\na.png;x\n")
    (tmp_path / "tabs.csv").write_text("path\tnote\na.png\tx\n")
    with pytest.raises(UserError, match=message):
        list(Listing(source))


def test_a_web_address_is_no_output(tmp_path):
    with pytest.raises(UserError, match="'https://example.org/x' is a web address, which is neither"):
        label(None, images_of(tmp_path, 1) and tmp_path, "https://example.org/x", tasks=["caption"], num_actors=0)


@pytest.mark.parametrize(("source", "output"), [("s3:/box/in", "out"), ("in", "s3:/box/out")])
def test_a_url_with_a_slash_too_few_is_no_folder(tmp_path, monkeypatch, source, output):
    monkeypatch.chdir(tmp_path)
    images_of(tmp_path / "in", 1)
    with pytest.raises(UserError, match=r"put 's3:/box.*' is no URL; did you mean 's3://box/.*'\?"):
        label(None, source, output, tasks=["caption"], num_actors=0)
    assert os.listdir(tmp_path) == ["in"]


def test_a_missing_file_of_a_list_says_where_its_path_begins(tmp_path):
    (tmp_path / "list.txt").write_text(f"no.png\n{tmp_path}/neither.png\n")
    (_, relative), (_, absolute) = read_bytes(list(Listing(tmp_path / "list.txt")))
    assert "(relative paths of a list or table begin at its own folder)" in str(relative)
    assert relative.reason == "missing_file" and "relative" not in str(absolute)


def test_a_pattern_that_is_none_is_one_sentence(tmp_path):
    images_of(tmp_path, 1)
    with pytest.raises(UserError, match="not a pattern of file names"):
        list(Listing(str(tmp_path / "[z-a]*.png")))


def test_a_row_group_is_read_once_for_a_fragment(tmp_path, monkeypatch):
    images = images_of(tmp_path, 9)
    pq.write_table(pa.table({"image": list(images.values())}), tmp_path / "t.parquet")
    reader, opened = Reader(), []
    monkeypatch.setattr(files, "open_input", lambda path, real=files.open_input: opened.append(path) or real(path))
    items = list(Listing(tmp_path / "t.parquet"))
    opened.clear()
    found = [data for start in range(0, 9, 2) for _, data in read_bytes(items[start : start + 2], reader)]
    assert found == list(images.values()) and len(opened) == 1
