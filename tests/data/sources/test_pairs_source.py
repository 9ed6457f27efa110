"""Image-text pairs: all tables and tars give the same rows; broken ones are reported and stop nothing."""

import base64
import csv
import io
import json
import tarfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.language_fakes import damaged, prepared, write_photos
from support.source_fakes import HEIGHT, WIDTH, jpeg
from support.tiny_models import scene_batch

from lumen_ray.data.sources.pairs import PairsSource
from lumen_ray.errors import UserError

NAMES = ["a.jpg", "b.jpg", "c.jpg"]
CAPTIONS = ["a  red\ncircle", 'a "blue" square, small', "ein grüner Kreis"]
PAIRS = list(zip(NAMES, CAPTIONS, strict=True))


def make_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def captions(rows):
    return {row["image_id"]: row["messages"][0]["turns"][1]["content"] for row in rows}


def write_table(folder, suffix, pairs=PAIRS, columns=("image", "caption")):
    path = folder / f"pairs{suffix}"
    records = [dict(zip(columns, pair, strict=True)) for pair in pairs]
    if suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=2)
    else:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
            writer.writerows([columns, *pairs])
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_tables_of_paths(tmp_path, suffix):
    images = write_photos(tmp_path / "images", NAMES)
    rows, rejected, counts = prepared(PairsSource([write_table(tmp_path, suffix)], str(images)))
    assert rejected == []
    assert counts == {"pairs": {"in": 3, "written": 3, "rejected": 0}}
    assert captions(rows) == {name: " ".join(caption.split()) for name, caption in PAIRS}
    for row in rows:
        assert row["image"] == (images / row["image_id"]).read_bytes()
        assert (row["tasks"], row["height"], row["width"]) == (["caption"], HEIGHT, WIDTH)
    scene_batch(rows, ("caption",))


def test_columns_by_option(tmp_path):
    images = write_photos(tmp_path / "images", NAMES)
    path = write_table(tmp_path, ".tsv", columns=("where", "what"))
    rows, _, _ = prepared(PairsSource([path], str(images), "where", "what"))
    assert len(rows) == 3
    with pytest.raises(UserError, match="no column of the usual names for the image; .* columns: where, what"):
        PairsSource([path], str(images)).read_listing()
    (tmp_path / "bare.csv").write_text("".join(f"{name},{number}\n" for number, name in enumerate(NAMES)))
    rows, _, _ = prepared(PairsSource([str(tmp_path / "bare.csv")], str(images), "0", "1", header=False))
    assert captions(rows) == {"a.jpg": "0", "b.jpg": "1", "c.jpg": "2"}


def test_bytes_in_parquet(tmp_path):
    data = [jpeg(), jpeg(30, 30), jpeg()[:300]]
    cells = [{"bytes": data[0], "path": "x.jpg"}, {"bytes": data[1], "path": None}, {"bytes": data[2], "path": "z.jpg"}]
    path = write_table(tmp_path, ".parquet", list(zip(cells, CAPTIONS, strict=True)))
    rows, rejected, counts = prepared(PairsSource([path]))
    assert [row["image_id"] for row in rows] == ["pairs.parquet record 1", "x.jpg"]
    assert [row["image"] for row in rows] == [data[1], data[0]]
    assert counts["pairs"] == {"in": 3, "written": 2, "rejected": 1}
    assert "cannot be read" in rejected[0]["reason"]


TAR = [
    ("000.jpg", jpeg()), ("000.txt", b" a red\n circle "), ("000.json", b'{"caption": "from json", "alt": "other"}'),
    ("001.png", jpeg()), ("001.json", b'{"caption": "a square"}'),
]  # fmt: skip


def test_tars(tmp_path):
    tars = [make_tar(tmp_path / "0.tar", TAR), make_tar(tmp_path / "1.tar", TAR[:2])]
    rows, rejected, counts = prepared(PairsSource([str(tmp_path / "*.tar")]))
    assert rejected == []
    assert captions(rows) == {"0.tar/000": "a red circle", "0.tar/001": "a square", "1.tar/000": "a red circle"}
    assert counts == {"pairs": {"in": 3, "written": 3, "rejected": 0}}
    rows, rejected, _ = prepared(PairsSource(tars[:1], caption_key="alt"))
    assert captions(rows) == {"0.tar/000": "other"}
    assert rejected[0]["reason"] == "its json has no 'alt'"


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("9.txt", b"x")], "it has no image (txt)"),
        ([("9.jpg", jpeg())], "it has no caption (jpg)"),
        ([("9.jpg", jpeg()[:200]), ("9.txt", b"x")], "cannot be read"),
        ([("9.jpg", jpeg()), ("9.txt", b"")], "the caption is empty"),
        ([("9.jpg", jpeg()), ("9.txt", b"\xff\xfe")], "not valid UTF-8"),
        ([("9.jpg", jpeg()), ("9.txt", b"a [DET] b")], "reserved token [DET]"),
        ([("9.jpg", jpeg()), ("9.json", b"{")], "its json cannot be read"),
        ([("9.jpg", jpeg()), ("9.json", b'{"caption": 3}')], "the caption must be a text, got 3"),
    ],
)
def test_a_bad_sample_of_a_tar_alone_is_rejected(tmp_path, members, reason):
    rows, rejected, counts = prepared(PairsSource([make_tar(tmp_path / "0.tar", [*TAR[:2], *members, *TAR[3:]])]))
    assert counts["pairs"] == {"in": 3, "written": 2, "rejected": 1}
    assert reason in rejected[0]["reason"]
    assert (rejected[0]["image_id"], rejected[0]["origin"]) == ("0.tar/9", "0.tar member 9")


@given(cut=st.integers(0, 12000))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_tar_keeps_the_samples_before(tmp_path, cut):
    data = open(make_tar(tmp_path / "whole.tar", TAR), "rb").read()  # noqa: SIM115
    (tmp_path / "cut.tar").write_bytes(data[:cut])
    rows, rejected, counts = prepared(PairsSource([str(tmp_path / "cut.tar"), str(tmp_path / "whole.tar")]))
    names = [row["image_id"] for row in rows]
    assert {"whole.tar/000", "whole.tar/001"} <= set(names)
    last = data.index(TAR[-1][1])
    assert ("cut.tar/001" in names) == (cut >= last + len(TAR[-1][1]))
    assert bool(rejected) == (cut < last + 1024)  # up to the end mark, a block behind the last text's block


def test_chunks_and_windows_lose_nothing(tmp_path):
    """More lines than a chunk holds, and a path with odd characters."""
    images = write_photos(tmp_path / "im ages%20#", NAMES)
    pairs = [(NAMES[n % 3], f"caption {n}") for n in range(1100)]
    source = PairsSource([write_table(tmp_path, ".csv", pairs)], str(images))
    listing = source.read_listing()
    assert [r["records"] for r in listing.records] == [512, 512, 76]
    texts = [
        outcome.row["messages"][0]["turns"][1]["content"]
        for record in listing.records
        for outcome in source.rows(record, None)
    ]
    assert texts == [text for _, text in pairs]


def test_everything_in_a_store(tmp_path):
    """Tars, tables and images by URL, with wildcards."""
    write_photos(tmp_path / "images", NAMES)
    make_tar(tmp_path / "0.tar", TAR)
    for suffix in (".csv", ".jsonl", ".parquet"):
        write_table(tmp_path, suffix)
    store = fsspec.filesystem("memory")
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        store.pipe(f"/pairs-test/{path.relative_to(tmp_path)}", path.read_bytes())
    base = "memory://pairs-test"
    try:
        for data, written in ((f"{base}/*.tar", 2), (f"{base}/pairs.csv", 3), (f"{base}/pairs.parquet", 3)):
            rows, rejected, _ = prepared(PairsSource([data], f"{base}/images"))
            assert (len(rows), rejected) == (written, [])
        with pytest.raises(UserError, match="no file matches"):
            PairsSource([f"{base}/*.webp"]).read_listing()
    finally:
        store.rm("/pairs-test", recursive=True)


def test_sources_that_cannot_work_are_refused(tmp_path):
    for data, images, message in (
        ("absent.tar", None, "does not exist"),
        ("absent*.csv", None, "no file matches"),
        ("absent.csv", None, "does not exist"),
        ("absent.xlsx", None, "not a known kind of table"),
        ("x.csv", "absent", "image folder"),
    ):
        with pytest.raises(UserError, match=message):
            PairsSource([str(tmp_path / data)], images and str(tmp_path / images)).read_listing()
    path = write_table(tmp_path, ".csv")
    with pytest.raises(UserError, match="give its folder as --images"):
        prepared(PairsSource([path]))


@given(records=damaged([{"image": name, "caption": text} for name, text in PAIRS]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_records_never_stop_the_job(tmp_path, records):
    images = write_photos(tmp_path / "images", [*NAMES, "sound.jpg"])
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, [*records, {"image": "sound.jpg", "caption": "sound"}])))
    rows, _, _ = prepared(PairsSource([str(path)], str(images)))
    assert captions(rows)["sound.jpg"] == "sound"
    scene_batch(rows, ("caption",))


def test_real_photos(test_data, tmp_path):
    folder = test_data / "coco_photos"
    data = json.loads((folder / "annotations" / "captions_train.json").read_text())
    names = {i["id"]: i["file_name"] for i in data["images"]}
    first = {names[a["image_id"]]: a["caption"] for a in data["annotations"]}
    path = write_table(tmp_path, ".tsv", list(first.items()), ("filepath", "title"))
    members = []
    for name, text in first.items():
        members.append((name, (folder / "images" / name).read_bytes()))
        members.append((f"{name[:-4]}.txt", text.encode()))
    tar = make_tar(tmp_path / "00000.tar", members)
    flat, rejected, _ = prepared(PairsSource([path], str(folder / "images")))
    tarred, rejected_too, counts = prepared(PairsSource([tar]))
    assert rejected == rejected_too == []
    assert counts["pairs"]["written"] == len(first)
    assert [row["image"] for row in flat] == [row["image"] for row in tarred]
    assert list(captions(flat).values()) == list(captions(tarred).values())


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_no_caption_lands_on_another_folders_picture(tmp_path, suffix):
    images = write_photos(tmp_path / "images", NAMES)
    first = NAMES[0]
    pairs = [(f"cam1/{first}", "one"), (f"cam2/{first}", "two"), (f"cam1/{NAMES[1]}", "three"), (NAMES[2], "four")]
    rows, rejected, _ = prepared(PairsSource([write_table(tmp_path, suffix, pairs)], str(images)))
    assert captions(rows) == {f"cam1/{NAMES[1]}": "three", NAMES[2]: "four"}
    assert [r["rule"] for r in rejected] == ["ambiguous_image"] * 2


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_rows_of_one_image_have_ids_of_their_own(tmp_path, suffix):
    images = write_photos(tmp_path / "images", NAMES)
    (tmp_path / "more").mkdir()
    pairs = [(NAMES[n % 2], f"caption {n}") for n in range(600)]
    tables = [write_table(tmp_path, suffix, pairs), write_table(tmp_path / "more", suffix, pairs[:1])]
    rows, rejected, _ = prepared(PairsSource(tables, str(images)))
    assert rejected == [] and len(rows) == 601
    found = captions(rows)
    assert len(found) == 601
    assert (found[NAMES[0]], found[f"{NAMES[0]}#300"], found[f"{NAMES[1]}#2"]) == (
        "caption 0",
        "caption 598",
        "caption 3",
    )
    assert found[f"{NAMES[0]}#301"] == "caption 0"


def test_tars_of_one_name_have_ids_of_their_own(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    tars = [make_tar(tmp_path / folder / "0.tar", TAR[:2]) for folder in "ab"]
    rows, _, _ = prepared(PairsSource(tars))
    assert [row["image_id"] for row in rows] == ["a/0.tar/000", "b/0.tar/000"]


def test_a_repeated_key_gives_two_rows_and_scattered_members_say_so(tmp_path):
    rows, rejected, _ = prepared(PairsSource([make_tar(tmp_path / "0.tar", [*TAR[:2], *TAR[:2]])]))
    assert (sorted(captions(rows)), rejected) == (["0.tar/000", "0.tar/000#2"], [])
    scattered = [
        ("0.jpg", jpeg()),
        ("1.jpg", jpeg()),
        ("0.txt", b"a"),
        ("1.txt", b"b"),
        ("2.jpg", jpeg()),
        ("2.txt", b"c"),
    ]
    rows, rejected, _ = prepared(PairsSource([make_tar(tmp_path / "1.tar", scattered)]))
    assert list(captions(rows).values()) == ["c"]
    assert [r["rule"] for r in rejected] == ["missing_text"] * 2 + ["scattered_tar"] * 2
    with pytest.raises(UserError, match="none of 4 pairs can be used; the first, 2.tar member 0 .*it has no caption"):
        prepared(PairsSource([make_tar(tmp_path / "2.tar", scattered[:4])]))


def test_captions_of_a_list_and_with_a_byte_order_mark(tmp_path):
    members = [("0.jpg", jpeg()), ("0.json", "\ufeff{\"caption\": [\"a\", \"b\"]}".encode()),
               ("frame.001.jpg", jpeg()), ("frame.001.txt", "\ufeffred".encode())]  # fmt: skip
    rows, rejected, _ = prepared(PairsSource([make_tar(tmp_path / "0.tar", members)]))
    assert rejected == []
    texts = {row["image_id"]: [m["turns"][1]["content"] for m in row["messages"]] for row in rows}
    assert texts == {"0.tar/0": ["a", "b"], "0.tar/frame.001": ["red"]}


def test_names_in_a_column_of_categories(tmp_path):
    """A column that pandas wrote as categories holds its texts in a dictionary."""
    images = write_photos(tmp_path / "images", NAMES)
    names = [f"cam1/{NAMES[0]}", f"cam2/{NAMES[0]}", NAMES[1], NAMES[1]]
    column = pa.array(names).dictionary_encode()
    pq.write_table(pa.table({"image": column, "caption": ["a", "b", "c", "d"]}), tmp_path / "t.parquet")
    rows, rejected, _ = prepared(PairsSource([str(tmp_path / "t.parquet")], str(images)))
    assert captions(rows) == {NAMES[1]: "c", f"{NAMES[1]}#2": "d"}
    assert [r["rule"] for r in rejected] == ["ambiguous_image"] * 2


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_other_spellings_of_paths_are_found(tmp_path, suffix):
    images = write_photos(tmp_path / "images", ["s/a b.jpg", "t/a b.jpg"])
    pairs = [("s\\a b.jpg", "one"), ("t/a%20b.JPG", "two")]
    rows, rejected, _ = prepared(PairsSource([write_table(tmp_path, suffix, pairs)], str(images)))
    assert rejected == [] and captions(rows) == dict(pairs)


def test_images_in_records_of_json(tmp_path):
    data = base64.b64encode(jpeg()).decode()
    pictures = [{"bytes": data}, [NAMES[0]], f"data:image/png;base64,{data}", [None]]
    records = [{"image": image, "caption": text} for image, text in zip(pictures, "abcd", strict=True)]
    images = write_photos(tmp_path / "images", NAMES)
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, records)))
    rows, rejected, _ = prepared(PairsSource([str(tmp_path / "t.jsonl")], str(images)))
    assert sorted(captions(rows).values()) == ["a", "b", "c"]
    assert [r["rule"] for r in rejected] == ["invalid_image"]


def test_two_pictures_of_a_key_and_a_tar_without_members(tmp_path):
    two = [("0.jpg", jpeg()), ("0.png", jpeg()), ("0.txt", b"a"), *TAR[:2]]
    rows, rejected, _ = prepared(PairsSource([make_tar(tmp_path / "0.tar", two)]))
    assert len(rows) == 1 and rejected[0]["rule"] == "several_images"
    with pytest.raises(UserError, match="none of 1 pairs can be used; the first, 1.tar: the tar has no members"):
        prepared(PairsSource([make_tar(tmp_path / "1.tar", [("._0.jpg", b"x")])]))
