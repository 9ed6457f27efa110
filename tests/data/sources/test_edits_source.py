"""Edit triples: folders and tables give rows of both images and the instruction; such rows train nothing else."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from support.language_fakes import damaged, prepared
from support.source_fakes import jpeg, write
from support.tiny_models import scene_batch

from lumen_ray.data.scenes import render as scenes
from lumen_ray.data.sources.edits import EditsSource
from lumen_ray.errors import UserError
from lumen_ray.tasks import UNDERSTANDING

BEFORE, AFTER = jpeg(40, 60), jpeg(20, 30)
PROMPT = json.dumps({"caption": "a dog", "edit": "make it a  cat", "output": "a cat"})


@pytest.fixture
def folder(tmp_path):
    """Two prompts, three triples, as the InstructPix2Pix data lies."""
    contents = {"seeds.json": "[]", "0001/prompt.json": PROMPT, "0002/prompt.json": PROMPT, "0001/metadata.jsonl": "{}"}
    for name in ("0001/7", "0001/12", "0002/7"):
        contents |= {f"{name}_0.jpg": BEFORE, f"{name}_1.jpg": AFTER}
    return write(tmp_path / "data", contents)


def test_folders(folder):
    rows, rejected, counts = prepared(EditsSource([str(folder)]))
    assert rejected == []
    assert counts == {"edits": {"in": 3, "written": 3, "rejected": 0}}
    assert [row["image_id"] for row in rows] == ["data/0001/12", "data/0001/7", "data/0002/7"]
    for row in rows:
        assert (row["image"], row["target_image"], row["tasks"]) == (BEFORE, AFTER, ["edit"])
        assert (row["height"], row["width"]) == (40, 60)
        (message,) = row["messages"]
        assert (message["task"], message["turns"]) == ("edit", [{"role": "user", "content": "make it a cat"}])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"0001/9_0.jpg": BEFORE}, "its image after the edit is missing"),
        ({"0001/9_1.jpg": AFTER}, "its image before the edit is missing"),
        ({"0001/9_0.jpg": BEFORE, "0001/9_1.jpg": AFTER[:300]}, "the edited image: the image cannot be read"),
        ({"0001/9_0.jpg": BEFORE[:300], "0001/9_1.jpg": AFTER}, "cannot be read"),
        ({"0001/9_0.jpg": BEFORE, "0001/9_1.jpg": jpeg(30, 30)}, "has 60x40 pixels, the edited one 30x30"),
        ({"0003/9_0.jpg": BEFORE, "0003/9_1.jpg": AFTER}, "there is no prompt.json beside it"),
        ({"0003/prompt.json": PROMPT}, "no images SEED_0"),
        ({"0003/prompt.json": "{", "0003/9_0.jpg": BEFORE, "0003/9_1.jpg": AFTER}, "prompt.json cannot be read"),
        ({"0003/prompt.json": "{}", "0003/9_0.jpg": BEFORE, "0003/9_1.jpg": AFTER}, "the instruction must be a text"),
        ({"0003/prompt.json": '{"edit": "[SEG]"}', "0003/9_0.jpg": BEFORE, "0003/9_1.jpg": AFTER}, "reserved token"),
    ],
)
def test_a_bad_triple_alone_is_rejected(folder, change, reason):
    rows, rejected, counts = prepared(EditsSource([str(write(folder, change))]))
    (record,) = rejected
    assert reason in record["reason"]
    assert record["origin"].startswith("data/000")
    assert counts["edits"] == {"in": 4, "written": 3, "rejected": 1}


@pytest.mark.parametrize(("sizes", "written"), [("same", 1), ("aspect", 2), ("any", 3)])
def test_sizes_by_rule(tmp_path, sizes, written):
    contents = {"p/prompt.json": PROMPT}
    for number, size in enumerate([(40, 60), (20, 30), (30, 30)]):
        contents |= {f"p/{number}_0.jpg": BEFORE, f"p/{number}_1.jpg": jpeg(*size)}
    rows, rejected, _ = prepared(EditsSource([str(write(tmp_path / "data", contents))], sizes=sizes))
    assert (len(rows), len(rejected)) == (written, 3 - written)


def test_shapes_are_compared_in_the_rotated_frame(tmp_path):
    turned = jpeg(60, 40, orientation=6)
    contents = {"p/prompt.json": PROMPT, "p/1_0.jpg": BEFORE, "p/1_1.jpg": turned}
    rows, rejected, _ = prepared(EditsSource([str(write(tmp_path / "data", contents))], sizes="same"))
    assert rejected == []


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_tables(tmp_path, suffix):
    images = write(tmp_path / "images", {"a.jpg": BEFORE, "b.jpg": AFTER})
    path = tmp_path / f"edits{suffix}"
    records = [{"source_img": "a.jpg", "instruction": "x", "target_img": "b.jpg"},
               {"source_img": "b.jpg", "instruction": "y", "target_img": "absent.jpg"}]  # fmt: skip
    if suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    elif suffix == ".csv":
        path.write_text("\n".join(",".join(row) for row in (records[0], *(r.values() for r in records))))
    else:
        cells = [{"original_image": {"bytes": BEFORE, "path": "a.jpg"}, "edit_prompt": "x", "edited_prompt": "no",
                  "edited_image": {"bytes": AFTER, "path": "b.jpg"}},
                 {"original_image": {"bytes": BEFORE, "path": "c.jpg"}, "edit_prompt": "y", "edited_prompt": "no",
                  "edited_image": {"bytes": None, "path": "absent.jpg"}}]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(cells), path)
    rows, rejected, counts = prepared(EditsSource([str(path)], str(images)))
    assert counts["edits"] == {"in": 2, "written": 1, "rejected": 1}
    assert "the edited image: the image file 'absent.jpg' is missing" in rejected[0]["reason"]
    assert (rows[0]["image_id"], rows[0]["image"], rows[0]["target_image"]) == ("a.jpg", BEFORE, AFTER)
    assert rows[0]["messages"][0]["turns"][0]["content"] == "x"


def test_rows_of_edits_leave_other_tasks_alone(folder):
    rows, _, _ = prepared(EditsSource([str(folder)]))
    batch = scene_batch([rows[0], scenes.scene_row(0, 0, 64)], UNDERSTANDING)
    assert set(batch.layout.branch_ids[0].tolist()) == {-1}
    assert batch.tasks


def test_sources_that_cannot_work_are_refused(tmp_path, folder):
    for source, message in (
        (EditsSource([str(folder)], sizes="near"), "sizes 'near' is not one of: same, aspect, any"),
        (EditsSource([str(write(tmp_path / "empty", {"x.txt": b""}))]), "has no prompt.json"),
        (EditsSource([str(tmp_path / "absent")]), "not a known kind of table"),
        (EditsSource([str(folder)], str(tmp_path / "absent")), "image folder"),
    ):
        with pytest.raises(UserError, match=message):
            source.read_listing()
    (tmp_path / "t.csv").write_text("image,instruction\na,b\n")
    with pytest.raises(UserError, match="no column of the usual names for the target; give --target-column"):
        EditsSource([str(tmp_path / "t.csv")]).read_listing()


RECORDS = [{"image": "a.jpg", "instruction": "x", "target": "b.jpg"}] * 3


@given(records=damaged(RECORDS))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_records_never_stop_the_job(tmp_path, records):
    images = write(tmp_path / "images", {"a.jpg": BEFORE, "b.jpg": AFTER, "sound.jpg": BEFORE})
    sound = {"image": "sound.jpg", "instruction": "sound", "target": "b.jpg"}
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, [*records, sound])))
    rows, _, _ = prepared(EditsSource([str(tmp_path / "t.jsonl")], str(images)))
    assert "sound.jpg" in [row["image_id"] for row in rows]


def test_real_photos(test_data, tmp_path):
    """Every photo as an edit of itself."""
    images = test_data / "coco_photos" / "images"
    names = sorted(path.name for path in images.iterdir())
    lines = [json.dumps({"image": n, "instruction": "keep it", "edited_image": n}) for n in names]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    rows, rejected, counts = prepared(EditsSource([str(tmp_path / "t.jsonl")], str(images), sizes="same"))
    assert rejected == []
    assert counts["edits"]["written"] == len(names)
    assert all(row["image"] == row["target_image"] for row in rows)


def test_no_side_is_the_other_sides_picture(tmp_path):
    lines = ["image,instruction,target_image", *["before/1.jpg,x,after/1.jpg"] * 2]
    pictures = {"before/1.jpg": BEFORE, "before/2.jpg": BEFORE, "after/1.jpg": AFTER, "after/2.jpg": AFTER}
    write(tmp_path, pictures | {"t.csv": "\n".join(lines)})
    table = str(tmp_path / "t.csv")
    rows, rejected, _ = prepared(EditsSource([table], str(tmp_path)))
    assert rejected == [] and [row["image_id"] for row in rows] == ["before/1.jpg", "before/1.jpg#2"]
    assert all((row["image"], row["target_image"]) == (BEFORE, AFTER) for row in rows)
    with pytest.raises(UserError, match="the image file 'before/1.jpg' is missing, and other listed"):
        prepared(EditsSource([table], str(tmp_path / "before")))


def test_a_side_that_is_there_twice_and_hidden_files(folder):
    write(folder, {"0001/7_0.png": BEFORE, "0001/._8_0.jpg": b"x", "0001/8_0.JPG": BEFORE, "0001/8_1.jfif": AFTER})
    rows, rejected, _ = prepared(EditsSource([str(folder)]))
    assert "data/0001/8" in [row["image_id"] for row in rows]
    assert [r["reason"] for r in rejected] == ["its image before the edit is there more than once: 7_0.jpg, 7_0.png"]
