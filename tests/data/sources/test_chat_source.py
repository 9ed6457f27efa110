"""Conversations: turns, markers, regions, text-only records, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.language_fakes import damaged, prepared, write_photos
from support.source_fakes import HEIGHT, WIDTH, jpeg
from support.tiny_models import scene_batch, tiny_tokenizer

from lumen_ray.data.sources.chat import ChatSource
from lumen_ray.errors import UserError
from lumen_ray.trunk.layout import IGNORE

NAMES = ["a.jpg", "b.jpg"]
SQUARE = [[5, 5, 25, 5, 25, 25, 5, 25]]


def chat(*texts, image="a.jpg", **more):
    turns = [{"from": "gpt" if n % 2 else "human", "value": text} for n, text in enumerate(texts)]
    return {"id": "c1", "conversations": turns, **({"image": image} if image else {}), **more}


@pytest.fixture
def make(tmp_path):
    images = write_photos(tmp_path / "images", NAMES)

    def write(records, name="chat.json", with_images=True, **changes):
        lines = name.endswith(".jsonl")
        (tmp_path / name).write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
        return ChatSource([str(tmp_path / name)], str(images) if with_images else None, **changes)

    return write


def texts(message):
    return [turn["content"] for turn in message["turns"]]


@pytest.mark.parametrize("name", ["chat.json", "chat.jsonl"])
def test_conversations_of_an_image_share_a_row(make, name):
    records = [
        chat("<image>\nWhat is it?", "A *cat*.\n\n- small", "Sure?", "Yes."),
        {"id": 7, "image": ["a.jpg"], "messages": [
            {"role": "system", "content": "Be short."}, {"role": "user", "content": "Colour?\n<image>"},
            {"role": "assistant", "content": "red"}]},
        chat("Two and two?", "Four.", image=None, id="text-1"),
    ]  # fmt: skip
    rows, rejected, counts = prepared(make(records, name))
    assert rejected == []
    assert counts == {
        "samples": {"in": 2, "written": 2, "rejected": 0},
        "conversations": {"in": 3, "written": 3, "rejected": 0},
    }
    pictured, text = rows
    assert [texts(m) for m in pictured["messages"]] == [
        ["What is it?", "A *cat*.\n\n- small", "Sure?", "Yes."],
        ["Be short.\nColour?", "red"],
    ]
    assert (pictured["image_id"], pictured["tasks"]) == ("a.jpg", ["chat"])
    assert (text["image_id"], text["image"], text["messages"][0]["task"]) == ("text-1", None, "chat")


def test_every_answer_of_a_conversation_is_learned(make):
    rows, _, _ = prepared(make([chat("red ?", "circle", "blue ?", "square"), chat("green ?", "red", image=None)]))
    batch = scene_batch(rows, ("chat",))
    tokenizer = tiny_tokenizer()
    ids = tokenizer.ids
    expected = [
        ids["<user>"], *tokenizer.encode("red ?"), ids["<assistant>"], *tokenizer.encode("circle"), ids["<eos>"],
        ids["<user>"], *tokenizer.encode("blue ?"), ids["<assistant>"], *tokenizer.encode("square"), ids["<eos>"],
    ]  # fmt: skip
    assert batch.layout.input_ids[0, : len(expected)].tolist() == expected
    labels = batch.layout.labels[0]
    answers = [*tokenizer.encode("circle"), ids["<eos>"], *tokenizer.encode("square"), ids["<eos>"]]
    assert labels[labels != IGNORE].tolist() == answers
    assert batch.has_image.tolist() == [True, False]


def test_regions_of_every_kind(make):
    regions = [
        [10, 5, 30, 35],
        {"bbox": [1, 2, 3, 4]},
        {"segmentation": SQUARE},
        {"point": [7, 8]},
        {"scribble": [[1, 1], [9, 9]]},
        {"polygon": [1, 1, 9, 1, 9, 9]},
    ]
    question = " ".join(["<region>"] * len(regions))
    rows, rejected, _ = prepared(
        make([chat(question, "shapes", regions=regions), chat("<region>?", "x", bbox=[0, 0, 5, 5])])
    )
    assert rejected == []
    row = rows[0]
    assert [r["kind"] for r in row["regions"]] == ["box", "box", "mask", "point", "scribble", "polygon", "box"]
    assert [m["regions"] for m in row["messages"]] == [[0, 1, 2, 3, 4, 5], [6]]
    assert row["regions"][0]["points"] == [10, 5, 30, 35]
    assert row["regions"][2]["mask"]["size"] == [HEIGHT, WIDTH]
    assert row["regions"][3]["points"] == [7, 8]
    batch = scene_batch(rows, ("chat",))
    assert len(batch.region_masks) == 7


@pytest.mark.parametrize(
    ("box_format", "box", "point"),
    [("xyxy", [15, 10, 30, 20], [15, 10]), ("xywh", [15, 10, 15, 10], [15, 10]),
     ("relative", [0.25, 0.25, 0.5, 0.5], [0.25, 0.25])],
)  # fmt: skip
def test_box_formats(make, box_format, box, point):
    record = chat("<region> <region>", "x", regions=[box, {"point": point}])
    rows, _, _ = prepared(make([record], box_format=box_format))
    assert [r["points"] for r in rows[0]["regions"]] == [[15, 10, 30, 20], [15, 10]]


def test_numbered_regions(make):
    """As in Osprey: names in questions and answers, and regions that no question names."""
    annotation = [{"segmentation": SQUARE, "bbox": [5, 5, 20, 20]}, {"bbox": [1, 1, 9, 9]}, {"bbox": [2, 2, 9, 9]}]
    record = {
        "file_name": "coco/a.jpg", "height": HEIGHT, "width": WIDTH, "annotation": annotation,
        "conversations": [
            {"from": "human", "value": "Is <region2> left of <region 1>? And <region2>?"},
            {"from": "gpt", "value": "<region2> is, <region3> is not."},
        ],
    }  # fmt: skip
    rows, rejected, _ = prepared(make([record]))
    assert rejected == []
    message = rows[0]["messages"][0]
    assert texts(message) == [
        "regions in the image: region3 <region>.\nIs region2 <region> left of region1 <region>? And region2?",
        "region2 is, region3 is not.",
    ]
    assert message["regions"] == [2, 1, 0]
    assert [r["kind"] for r in rows[0]["regions"]] == ["mask", "box", "box"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (chat("<image> q", "a", image=["a.jpg", "b.jpg"]), "it has 1 <image> marker for 2 images"),
        (chat("q <region>", "a", image=["a.jpg", "b.jpg"], regions=[[0, 0, 5, 5]]), "it has regions and 2 images"),
        (chat("<image> <image> q", "a"), "2 <image> markers for 1 image"),
        (chat("<image> q", "a", image=None), "no image"),
        (chat("q"), "the last question has no answer"),
        (chat("q", "a", "q"), "the last question has no answer"),
        (chat("q", ""), "turn 1 is empty"),
        (chat("<image>", "a"), "turn 0 is empty"),
        (chat("q", "[SEG] a"), "turn 1 contains the reserved token [SEG]"),
        (chat("<user> q", "a"), "turn 0 contains the reserved token <user>"),
        (chat("q <region>", "a"), "1 <region> markers for 0 regions"),
        (chat("q", "a <region>", regions=[[0, 0, 5, 5]]), "an answer has <region>"),
        (chat("q <region>", "a", regions=[[0, 0, 5, 5], [0, 0, 6, 6]]), "1 <region> markers for 2 regions"),
        (chat("q <region4>", "a", regions=[[0, 0, 5, 5]]), "names <region4> but has 1 regions"),
        (chat("q <region1>", "a"), "names <region1> but has no regions"),
        (chat("q <region>", "a", regions=[[0, 0, 5]]), "a region must be"),
        (chat("q <region>", "a", regions=[[90, 90, 95, 95]]), "outside the image of 60x40"),
        (chat("q <region>", "a", regions=[{"point": [90, 1]}]), "lies outside"),
        ({"image": "a.jpg"}, "no list of turns"),
        ({"image": "a.jpg", "conversations": [{"from": "gpt", "value": "hi"}]}, "user and assistant must alternate"),
        ({"image": "a.jpg", "conversations": [{"from": "cat", "value": "hi"}]}, "turn 0 needs"),
        (5, "must be a mapping"),
    ],
)
def test_a_bad_conversation_alone_is_rejected(make, bad, reason):
    rows, rejected, counts = prepared(make([chat("q", "a"), bad]))
    (record,) = rejected
    assert reason in record["reason"]
    assert record["origin"] == "chat.json record 1"
    assert counts["conversations"] == {"in": 2, "written": 1, "rejected": 1}
    assert len(rows[0]["messages"]) == 1


def test_lines_that_are_no_json(make, tmp_path):
    source = make([chat("q", "a")], "chat.jsonl")
    with open(tmp_path / "chat.jsonl", "ab") as file:
        file.write(b'\n{"id": 3, \n\n\xff\xfe\n')
    rows, rejected, counts = prepared(source)
    assert counts["conversations"] == {"in": 3, "written": 1, "rejected": 2}
    assert [r["origin"] for r in rejected] == ["chat.jsonl line 2", "chat.jsonl line 4"]


def test_declared_sizes_of_the_stored_pixels(make, tmp_path):
    (tmp_path / "images" / "a.jpg").write_bytes(jpeg(orientation=6))
    record = chat("<region> <region>", "x", regions=[[10, 5, 30, 35], {"point": [10, 5]}], height=HEIGHT, width=WIDTH)
    rows, _, _ = prepared(make([record]))
    assert (rows[0]["height"], rows[0]["width"]) == (WIDTH, HEIGHT)
    assert [r["points"] for r in rows[0]["regions"]] == [[5, 10, 35, 30], [35, 10]]


def test_settings_that_cannot_work_are_refused(make, tmp_path):
    with pytest.raises(UserError, match="task 'detect' is not one of: chat"):
        make([], task="detect").read_listing()
    with pytest.raises(UserError, match="box format"):
        make([], box_format="yolo").read_listing()
    with pytest.raises(UserError, match="image folder"):
        ChatSource([], str(tmp_path / "absent")).read_listing()
    assert "give the folder" in make([chat("q", "a")], with_images=False).read_listing().rejected[0]["reason"]


def test_another_task(make):
    rows, _, _ = prepared(make([chat("describe <region> .", "a cat", bbox=[0, 0, 9, 9])], task="region_caption"))
    assert rows[0]["tasks"] == [rows[0]["messages"][0]["task"]] == ["region_caption"]


RECORDS = [
    chat("<image>\nq", "a", "q", "a"),
    chat("<region> <region>", "a", regions=[[1, 2, 3, 4], {"segmentation": SQUARE}], height=HEIGHT, width=WIDTH),
    chat("<region1>", "<region2>", regions=[{"bbox": [1, 2, 3, 4]}, {"point": [1, 2]}]),
    chat("q", "a", image=None),
]


@given(records=damaged(RECORDS), relative=st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_records_never_stop_the_job(make, records, relative):
    sound = chat("sound", "b", image="b.jpg")
    rows, _, _ = prepared(make([*records, sound], box_format="relative" if relative else "xyxy"))
    assert ["sound", "b"] in [texts(m) for row in rows for m in row["messages"]]
    scene_batch(rows, ("chat",))


def test_real_photos(test_data, tmp_path):
    """Real captions and boxes as conversations about regions."""
    folder = test_data / "coco_photos"
    data = json.loads((folder / "annotations" / "instances_train.json").read_text())
    names = {i["id"]: i["file_name"] for i in data["images"]}
    records = [
        chat("<image>\nWhat is <region>?", str(a["category_id"]), image=f"train2017/{names[a['image_id']]}",
             regions=[{"segmentation": a["segmentation"]} if n % 2 else a["bbox"]])
        for n, a in enumerate(data["annotations"])
    ]  # fmt: skip
    (tmp_path / "chat.json").write_text(json.dumps(records))
    source = ChatSource([str(tmp_path / "chat.json")], str(folder / "images"), box_format="xywh")
    rows, rejected, counts = prepared(source)
    assert rejected == []
    assert counts["conversations"]["written"] == len(records)
    assert counts["samples"]["written"] == len({a["image_id"] for a in data["annotations"]})
    assert np.unique([r["kind"] for row in rows for r in row["regions"]]).tolist() == ["box", "mask"]


def test_boxes_of_fractions_are_told(make):
    turns = [{"from": "human", "value": "<image> what is <region>?"}, {"from": "gpt", "value": "a cell"}]
    records = [{"image": NAMES[0], "conversations": turns, "regions": [[0.1, 0.2, 0.5, 0.7]]}]
    (note,) = make(records).read_listing().notes
    assert "--box-format relative" in note
    assert make(records, box_format="relative").read_listing().notes == []


def test_the_image_of_a_rejected_record_is_no_other_records(make):
    turns = [{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "a cell"}]
    records = [{"image": f"cam{n}/{NAMES[0]}", "conversations": turns} for n in (1, 2)]
    records[1]["video"] = "clip.mp4"
    records.append({"image": NAMES[1], "conversations": turns})
    rows, rejected, _ = prepared(make(records))
    assert [row["image_id"] for row in rows] == [NAMES[1]]
    assert {"ambiguous_image", "other_media"} <= {r["rule"] for r in rejected}
