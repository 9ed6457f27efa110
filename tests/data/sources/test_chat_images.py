"""Conversations about several images: which image stands where, in every way in which data sets write it."""

import base64
import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.language_fakes import damaged, prepared
from support.source_fakes import jpeg, write
from support.tiny_models import scene_batch

from lumen_ray.data.sources.chat import ChatSource
from lumen_ray.errors import UserError

NAMES = ["a.jpg", "b.jpg", "sub/c.jpg", "d.jpg"]
PHOTOS = {name: jpeg(24 + 8 * number, 40) for number, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    write(folder / "images", PHOTOS | {"broken.jpg": PHOTOS["a.jpg"][:300]})
    return folder


@pytest.fixture
def read(folder, tmp_path):
    def prepare(*records, **options):
        sound = {"id": "sound", "conversations": turns("2 + 2?", "4")}
        (tmp_path / "chat.json").write_text(json.dumps([*records, sound]))
        rows, rejected, _ = prepared(ChatSource([str(tmp_path / "chat.json")], str(folder / "images"), **options))
        return [row for row in rows if row["image_id"] != "sound"], rejected

    return prepare


def turns(*texts):
    return [{"from": "gpt" if n % 2 else "human", "value": text} for n, text in enumerate(texts)]


def image_part(name):
    return {"type": "image_url", "image_url": {"url": name}}


def text_part(text):
    return {"type": "text", "text": text}


def questions(row):
    return [turn["content"] for turn in row["messages"][0]["turns"][::2]]


def names_of(row):
    by_bytes = {data: name for name, data in PHOTOS.items()}
    return [by_bytes[row["image"]], *(by_bytes[image["image"]] for image in row["further_images"])]


TWO = ["a.jpg", "b.jpg"]
WAYS = {
    "lists and markers": ({"images": TWO, "conversations": turns("Compare <image> with <image>", "x")},
                          TWO, [0], ["Compare image 1 with image 2"]),
    "the key image": ({"image": TWO, "conversations": turns("<image><image>\nSame?", "x")}, TWO, [0], ["Same?"]),
    "no markers": ({"images": TWO, "conversations": turns("Same?", "x", "Why?", "y")}, TWO, [0], ["Same?", "Why?"]),
    "a later question": ({"images": TWO, "conversations": turns("<image>\nWhat?", "x", "<image>\nAnd this?", "y")},
                         TWO, [1], ["What?", "And this?"]),
    "first image late": ({"images": TWO, "conversations": turns("Hi", "x", "<image>\n<image>\nSame?", "y")},
                         TWO, [1], ["Hi", "Same?"]),
    "openai parts": ({"messages": [
        {"role": "user", "content": [image_part("b.jpg"), text_part("What?")]}, {"role": "assistant", "content": "x"},
        {"role": "user", "content": [text_part("And"), image_part("a.jpg")]}, {"role": "assistant", "content": "y"}]},
        ["b.jpg", "a.jpg"], [1], ["What?", "And"]),
    "trl parts": ({"images": TWO, "messages": [
        {"role": "user", "content": [{"type": "image"}, text_part("What?"), {"type": "image"}]},
        {"role": "assistant", "content": "x"}]}, TWO, [0], ["What?"]),
    "keys of turns": ({"messages": [
        {"role": "user", "content": "What?", "images": ["b.jpg"]}, {"role": "assistant", "content": "x"},
        {"role": "user", "content": "And <image> or <image>?", "images": ["a.jpg", "d.jpg"]},
        {"role": "assistant", "content": "y"}]},
        ["b.jpg", "a.jpg", "d.jpg"], [1, 1], ["What?", "And image 2 or image 3?"]),
    "the record and a part": ({"image": "a.jpg", "messages": [
        {"role": "user", "content": "<image> What?"}, {"role": "assistant", "content": "x"},
        {"role": "user", "content": [image_part("b.jpg"), text_part("And?")]}, {"role": "assistant", "content": "y"}]},
        TWO, [1], ["image 1 What?", "And?"]),
    "listed and in parts": ({"images": TWO, "messages": [
        {"role": "user", "content": [image_part("b.jpg"), text_part("or"), image_part("a.jpg")]},
        {"role": "assistant", "content": "x"}]}, ["b.jpg", "a.jpg"], [0], ["or"]),
    "under two keys": ({"image": "a.jpg", "images": TWO, "conversations": turns("<image><image>q", "x")},
                       TWO, [0], ["image 1 image 2 q"]),
    "one twice": ({"images": ["a.jpg", "a.jpg"], "conversations": turns("<image> and <image>", "x")},
                  ["a.jpg", "a.jpg"], [0], ["image 1 and image 2"]),
    "one twice in parts": ({"messages": [
        {"role": "user", "content": [image_part("a.jpg"), image_part("a.jpg"), text_part("Same?")]},
        {"role": "assistant", "content": "x"}]}, ["a.jpg", "a.jpg"], [0], ["Same?"]),
    "one listed twice": ({"images": ["a.jpg", "a.jpg"], "conversations": turns("<image>q", "x")}, ["a.jpg"], [], ["q"]),
    "listed twice, marked once each": ({"images": ["a.jpg", "b.jpg", "a.jpg"],
                                        "conversations": turns("<image>, <image>", "x")},
                                       TWO, [0], ["image 1, image 2"]),
    "a key of the turn repeats": ({"image": "a.jpg", "messages": [
        {"role": "user", "content": "<image> q"}, {"role": "assistant", "content": "x"},
        {"role": "user", "content": "r", "images": ["a.jpg"]}, {"role": "assistant", "content": "y"}]},
        ["a.jpg"], [], ["q", "r"]),
    "a key repeats before its marker": ({"messages": [
        {"role": "user", "content": "q", "images": ["a.jpg"]}, {"role": "assistant", "content": "x"},
        {"role": "user", "content": "<image> <image> r", "images": TWO}, {"role": "assistant", "content": "y"}]},
        TWO, [1], ["q", "image 1 image 2 r"]),
    "a key repeats what a marker shows": ({"image": "a.jpg", "messages": [
        {"role": "user", "content": "<image> q"}, {"role": "assistant", "content": "x"},
        {"role": "user", "content": "r", "images": ["a.jpg"]}, {"role": "assistant", "content": "y"},
        {"role": "user", "content": [image_part("b.jpg"), text_part("s")]}, {"role": "assistant", "content": "z"}]},
        TWO, [2], ["image 1 q", "r", "s"]),
    "a key and a marker share the list": ({"images": TWO, "messages": [
        {"role": "user", "content": "q", "images": ["a.jpg"]}, {"role": "assistant", "content": "x"},
        {"role": "user", "content": "<image> r"}, {"role": "assistant", "content": "y"}]},
        TWO, [1], ["q", "image 2 r"]),
    "the system turn": ({"images": TWO, "conversations": [{"from": "system", "value": "See <image>."},
                                                          *turns("And <image>?", "x")]},
                        TWO, [0], ["See image 1.\nAnd image 2?"]),
    "words touch a marker": ({"images": TWO, "conversations": turns("Is<image>like<image>", "x")},
                             TWO, [0], ["Is image 1 like image 2"]),
}  # fmt: skip


@pytest.mark.parametrize(("record", "images", "image_turns", "texts"), WAYS.values(), ids=WAYS)
def test_every_image_has_its_place(read, record, images, image_turns, texts):
    (row,), rejected = read(record)
    assert rejected == []
    assert names_of(row) == images
    assert row["messages"][0]["image_turns"] == image_turns
    assert questions(row) == texts
    sizes = [(image["height"], image["width"]) for image in row["further_images"]]
    assert sizes == [(24 + 8 * NAMES.index(name), 40) for name in images[1:]]


def test_the_example_of_the_page_is_read(read):
    page = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text()
    example = re.search(r"## Conversations about several images.*?```text chat\n(.*?)```", page, re.DOTALL)[1]
    record = json.loads(example.replace("c.jpg", "d.jpg"))
    (row,), rejected = read(record)
    assert rejected == [] and row["messages"][0]["image_turns"] == [0, 1]
    assert questions(row) == ["What differs?", "Is image 3 like image 1?"]


BAD = {
    "too few markers": ({"images": TWO, "conversations": turns("<image> q", "x")},
                        "image_count", "it has 1 <image> marker for 2 images"),
    "too many markers": ({"images": TWO, "conversations": turns("<image> <image> <image>", "x")},
                         "image_count", "it has 3 <image> markers for 2 images"),
    "of a turn": ({"messages": [{"role": "user", "content": "<image> q", "images": TWO},
                                {"role": "assistant", "content": "x"}]},
                  "image_count", "turn 0 has 1 <image> marker for 2 images"),
    "no place for one": ({"image": "a.jpg", "messages": [{"role": "user", "content": [image_part("b.jpg")]},
                                                         {"role": "assistant", "content": "x"}]},
                         "image_order", "not where 'a.jpg' does"),
    "key and part of a turn": ({"messages": [
        {"role": "user", "content": [text_part("q"), image_part("b.jpg")], "images": ["a.jpg"]},
        {"role": "assistant", "content": "x"}]}, "image_order", "not where 'a.jpg' does"),
    "listed and shown in part": ({"images": TWO, "messages": [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "x"},
        {"role": "user", "content": "r", "images": ["a.jpg"]}, {"role": "assistant", "content": "y"}]},
        "image_order", "not where 'b.jpg' does"),
    "an answer": ({"image": "b.jpg", "messages": [{"role": "user", "content": "q"},
                                                  {"role": "assistant", "content": "x", "images": ["a.jpg"]}]},
                  "marker_in_answer", "turn 1, an answer, has an image"),
    "too many": ({"images": NAMES, "conversations": turns("q", "x")},
                 "too_many_images", "it has 4 images, more than the limit of 3 (--max-images)"),
    "regions": ({"images": TWO, "regions": [[0, 0, 5, 5]], "conversations": turns("<region>", "x")},
                "regions_of_several", "a region does not say which image it is on"),
    "only a marker": ({"images": TWO, "conversations": turns("<image>", "x", "<image>q", "y")},
                      "empty_text", "turn 0 is empty"),
    "a third picture": ({"images": TWO, "photo": "d.jpg", "conversations": turns("q", "x")},
                        "other_media", "names another picture"),
}  # fmt: skip


@pytest.mark.parametrize(("record", "rule", "reason"), BAD.values(), ids=BAD)
def test_what_is_not_clear_is_rejected(read, record, rule, reason):
    rows, rejected = read(record, max_images=3)
    assert rows == [] and [r["rule"] for r in rejected] == [rule]
    assert reason in rejected[0]["reason"]


@pytest.mark.parametrize(("bad", "rule", "place"), [("broken.jpg", "broken_image", 1), ("no.jpg", "missing_image", 2),
                                                    ("broken.jpg", "broken_image", 0)])  # fmt: skip
def test_any_image_that_cannot_be_read_rejects_the_record(read, bad, rule, place):
    images = ["a.jpg", "b.jpg"]
    images.insert(place, bad)
    rows, rejected = read({"images": images, "conversations": turns("q", "x")})
    assert rows == [] and [r["kind"] for r in rejected] == ["samples", "conversations"]
    assert rejected[0]["rule"] == rule and rejected[1]["rule"] == "image_rejected"
    assert f"image {place + 1} of 3, '{bad}': " in rejected[0]["reason"]


def test_records_of_the_same_images_share_a_row(read):
    lists = [TWO, ["b.jpg", "a.jpg"], TWO, ["a.jpg"], ["./a.jpg", "b.jpg"]]
    rows, rejected = read(*({"images": images, "conversations": turns("q", str(n))} for n, images in enumerate(lists)))
    assert rejected == []
    answers = {tuple(names_of(row)): [m["turns"][1]["content"] for m in row["messages"]] for row in rows}
    assert answers == {("a.jpg", "b.jpg"): ["0", "2", "4"], ("b.jpg", "a.jpg"): ["1"], ("a.jpg",): ["3"]}
    assert {tuple(names_of(row)): row["image_id"] for row in rows}[("a.jpg",)] == "a.jpg"
    assert len({row["image_id"] for row in rows}) == 3


@pytest.mark.parametrize("rejected_too", [False, True])
def test_a_further_image_is_not_guessed_where_another_could_be_meant(read, rejected_too):
    """Both names lack their folder; without it, either could be `b.jpg`."""
    records = [{"images": ["a.jpg", f"cam{n}/b.jpg"], "conversations": turns("q", "x")} for n in (1, 2)]
    (row,), _ = read(records[0])
    assert names_of(row) == TWO
    records[1] |= {"video": "v.mp4"} if rejected_too else {}
    rows, rejected = read(*records)
    assert rows == [] and "ambiguous_image" in {r["rule"] for r in rejected}


def test_the_declared_size_of_one_of_several_images_is_not_used(read):
    (row,), rejected = read({"images": TWO, "height": 7, "width": 9, "conversations": turns("q", "x")})
    assert rejected == [] and (row["height"], row["width"]) == (24, 40)


def test_settings_that_cannot_work(read):
    with pytest.raises(UserError, match="max_images must be at least 1, got 0"):
        read(max_images=0)
    rows, rejected = read({"images": TWO, "conversations": turns("q", "x")}, max_images=1)
    assert rows == [] and rejected[0]["rule"] == "too_many_images"


# -- every way of writing the same conversation gives the same row ----------------------------------------------------


@st.composite
def conversations(draw):
    """(record, names of the images in order, the question of each, texts without their markers)."""
    shown = draw(st.lists(st.lists(st.sampled_from(NAMES), max_size=3), min_size=1, max_size=4))
    flat = [(name, n) for n, names in enumerate(shown) for name in names]
    way = draw(st.sampled_from(["markers", "parts", "keys", "trl"]))
    inline = draw(st.booleans())
    spelled = {name: as_written(name, inline, way) for name in NAMES}
    entries = []
    for n, names in enumerate(shown):
        words = [f"is it {name} in" for name in names]
        entry = {"role": "user"}
        if way in ("parts", "trl"):
            content = []
            for name, text in zip(names, words, strict=True):
                image = image_part(spelled[name]) if way == "parts" else {"type": "image"}
                content += [text_part(text), image]
            entry["content"] = [*content, text_part(f"question {n}")]
        else:
            separator = draw(st.sampled_from([" ", "\n", ""]))
            marked = [f"{text}{separator}<image>{separator}" for text in words]
            entry["content"] = f"{separator}".join([*marked, f"question {n}"])
            if way == "keys" and names:
                entry["images"] = [spelled[name] for name in names]
        entries += [entry, {"role": "assistant", "content": f"answer {n}"}]
    record = {"messages": entries}
    if way in ("markers", "trl") and flat:
        record["images"] = [spelled[name] for name, _ in flat]
    return record, [name for name, _ in flat], [n for _, n in flat]


def as_written(name, inline, way):
    """An image as a record names it: a file name, or its bytes as a data URL or with their name."""
    if not inline:
        return name
    code = base64.b64encode(PHOTOS[name]).decode()
    return f"data:image/jpeg;base64,{code}" if way == "parts" else {"bytes": code, "path": name}


@given(made=st.lists(conversations(), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_way_of_writing_a_conversation_gives_its_images_in_order(folder, made):
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "chat.jsonl"
        records = [{"id": f"record {n}"} | record for n, (record, _, _) in enumerate(made)]
        for n, record in enumerate(records):
            record["messages"][-1]["content"] += f" of record {n}"
        path.write_text("\n".join(map(json.dumps, records)))
        rows, rejected, _ = prepared(ChatSource([str(path)], str(folder / "images"), max_images=12))
    assert rejected == []
    found = {m["turns"][-1]["content"].split()[-1]: (row, m) for row in rows for m in row["messages"]}
    assert len(found) == len(made)
    for n, (_, names, at) in enumerate(made):
        row, message = found[str(n)]
        if not names:
            assert row["image"] is None and row["further_images"] == message["image_turns"] == []
            continue
        assert names_of(row) == names and message["image_turns"] == at[1:]
        texts = [turn["content"] for turn in message["turns"][::2]]
        assert all(f"question {q}" in text and "<image>" not in text for q, text in enumerate(texts))
        if len(names) > 1:  # what is named before a number is the image of that number
            mentions = re.findall(r"is it (\S+) in image (\d+)", " ".join(texts))
            assert all(names[int(number) - 1] == name for name, number in mentions)
    scene_batch(rows, ("chat",))


RECORDS = [record for record, *_ in WAYS.values()]


@given(records=damaged(RECORDS))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_records_never_stop_the_job(read, records):
    rows, _ = read(*records)
    for row in rows:
        assert all(len(m["image_turns"]) == len(row["further_images"]) for m in row["messages"])
        assert all(m["image_turns"] == sorted(m["image_turns"]) for m in row["messages"])
