"""Conversations: every text is of its picture, and every region lies on the object that the text says."""

import base64
import json
import re
from dataclasses import dataclass, field

from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from support.coloured_sets import (
    ColouredSet,
    Picture,
    Place,
    Truth,
    check,
    check_box,
    check_mask,
    draw_fates,
    draw_size_keys,
    for_sets,
    pictures,
    places,
    spelled_numbers,
    stored_files,
    thing_at,
)

from lumen_ray.data.images import decode
from lumen_ray.data.sources.chat import ChatSource

BAD = {  # records that must be rejected, by what is wrong with them
    "video": {"video": "clip.mp4"},
    "audio": {"audio_path": "a.wav"},
    "two images": {"image": "a.png", "images": ["b.png"]},
    "no turns": {"conversations": []},
    "no answer": {"conversations": [{"from": "human", "value": "What?"}]},
    "blank": {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": " "}]},
    "region": {"regions": [[900, 900, 950, 950]]},
    "markers": {"regions": [[1, 1, 9, 9], [1, 1, 9, 9]]},
}


@dataclass
class Talk:
    """A record of a conversation. `place` and `picture` are None for one about text alone; `inline`: whether the record
    holds the picture's bytes; `key`: what records of the same row have in common."""

    record: dict
    picture: Picture | None = None
    place: Place | None = None
    fate: str = "fine"
    inline: bool = False
    key: object = None
    ids: set = field(default_factory=set)


@st.composite
def chat_sets(draw):
    made = draw(pictures(["object"]))
    given = draw(places(made))
    contents = stored_files(made, given)
    fates = draw_fates(draw, made, given, contents, ("broken", "wrong size"))
    box_format = draw(st.sampled_from(["xyxy", "xywh", "relative"]))
    talks = [draw_text_alone(draw, number) for number in range(draw(st.integers(0, 2)))]
    for picture, place in zip(made, given, strict=True):
        for number in range(draw(st.integers(1, 3))):
            talks.append(draw_talk(draw, picture, place, fates[picture.number], box_format, number))
    talks = draw(st.permutations(talks))
    records = [talk.record for talk in talks]
    if draw(st.booleans()):
        contents["chat.json"] = json.dumps(draw(st.sampled_from([records, {"data": records}])))
        names = ["chat.json"]
    else:
        half = len(records) // 2
        parts = {"chat.jsonl": records[:half], "more.jsonl": records[half:]}
        contents |= {name: "\ufeff" + "\r\n\n".join(map(json.dumps, part)) for name, part in parts.items()}
        names = list(parts)
    options = {"names": names, "box_format": box_format}
    return ColouredSet(contents, truth_of(made, talks, fates), options)


def draw_text_alone(draw, number):
    """A record without picture."""
    turns = [{"role": "user", "content": f"Question {number}"}, {"role": "assistant", "content": "Yes."}]
    record = draw(st.sampled_from([{}, {"id": number}, {"id": float(number)}, {"id": "same"}])) | {"messages": turns}
    fate = draw(st.sampled_from(["fine", "fine", "picture", "marker"]))
    if fate == "picture":
        record |= draw(st.sampled_from([{"photo": "cat.jpg"}, {"image_id": 7}, {"audio": "a.wav"}, {"file": "x.png"}]))
    elif fate == "marker":
        turns[0]["content"] = draw(st.sampled_from(["<image>\nWhat?", "<video> What?", '<img src="a.jpg"> What?']))
    return Talk(record, fate=fate)


def draw_talk(draw, picture, place, picture_fate, box_format, number):
    """A conversation about a picture, with some of its things as regions."""
    talk = Talk({}, picture, place, draw(st.sampled_from(["fine"] * 12 + list(BAD))))
    if place.twin and talk.fate == "two images":
        talk.fate = "video"  # which lists the name, so that it is known to be similar
    things = [thing for thing in picture.things if draw(st.sampled_from([True, True, False]))]
    record = talk.record = {"regions": [region(draw, thing, picture.size, box_format) for thing in things]}
    if not things and draw(st.booleans()):
        del record["regions"]
    question, answer = draw_words(draw, things, picture, number)
    if draw(st.sampled_from([False, False, True])):
        record["system"] = draw(st.sampled_from(["", "Be brief."]))
    value = draw_image(draw, talk, picture_fate)
    if draw(st.booleans()):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        more = [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
        record["conversations"] = turns + draw(st.sampled_from([[], more]))
        record |= value
    else:
        if "image" in value and draw(st.booleans()) and not isinstance(value["image"], list):
            parts = [{"type": "image", **value}, {"type": "text", "text": question.replace("<image>", "")}]
        else:
            record |= value
            parts = question
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        record["messages"] = [{"role": "system", "content": "Be brief."}] * draw(st.integers(0, 1)) + turns
    record |= draw_size_keys(draw, picture, picture_fate, picture.as_stored)
    if talk.fate in BAD:
        if "conversations" in BAD[talk.fate]:
            record.pop("messages", None)
        record |= BAD[talk.fate]
        if talk.fate == "region":
            record["regions"] = [[0.5, 0.5, 0.5, 0.5] if box_format == "relative" else [900, 900, 950, 950]]
            record["conversations"] = [{"from": "human", "value": "<region>?"}, {"from": "gpt", "value": "Yes."}]
            record.pop("messages", None)
        elif talk.fate == "markers":
            record["conversations"] = [{"from": "human", "value": "<region>?"}, {"from": "gpt", "value": "Yes."}]
            record.pop("messages", None)
            record |= value
    if talk.fate in ("no turns", "no answer", "blank", "region"):
        record |= value
    return talk


def draw_image(draw, talk, picture_fate):
    """The keys that name the picture or hold its bytes."""
    name, data = talk.place.listed, talk.picture.data
    talk.key, talk.ids = name, {name, f"{name}#2"}  # numbered if a record with its bytes has the same name
    how = draw(st.sampled_from(["name", "list", "images", "path", "name", "list", "images", "bytes", "url"]))
    if how in ("bytes", "url") and picture_fate == "fine" and not talk.place.twin:
        talk.inline, code = True, base64.b64encode(data).decode()
        talk.key = ("inline", name)
        if how == "url":
            talk.key = ("url", name)
            talk.ids = {None}
            return {"image": f"data:image/png;base64,{code}"}
        return {"image": {"bytes": code, "path": name}}
    return {
        "list": {"image": [name]},
        "images": {"images": [name]},
        "path": {"image": {"path": name, "bytes": None}},
    }.get(how, {"image": name})


def region(draw, thing, size, box_format):
    """A region on a thing."""
    x1, y1, x2, y2 = thing.extent
    sides = (size[1], size[0]) if box_format == "relative" else (1, 1)
    box = [v / side for v, side in zip((x1, y1, x2, y2), sides * 2, strict=True)]
    if box_format == "xywh":
        box = [x1, y1, x2 - x1, y2 - y1]
    point = [(x1 + x2) / 2 / sides[0], (y1 + y2) / 2 / sides[1]]
    return draw(
        st.sampled_from(
            [
                spelled_numbers(draw, box) if draw(st.booleans()) else box,
                {"bbox": box},
                {"segmentation": [thing.polygon]},
                {"segmentation": thing.rle(size), "bbox": box},
                {"segmentation": {"size": [7, 9], "counts": [63]}, "bbox": box},
                {"mask": thing.rle(size, compressed=True)},
                thing.rle(size, compressed=True),
                {"point": point},
                {"polygon": [[x / sides[0], y / sides[1]] for x, y in thing.corners]},
                {"scribble": [*point, point[0] + 1 / sides[0], point[1]]},
            ]
        )
    )


def draw_words(draw, things, picture, number):
    """(question, answer): every mention of a region is followed by the number of its thing."""
    image = draw(st.sampled_from(["<image>\n", "", " <image> "]))
    said = f"{number}: of {picture.text}"
    how = draw(st.sampled_from(["plain", "numbered", "unmentioned"]))
    order = draw(st.permutations(range(len(things)))) if how == "numbered" else range(len(things))
    if how == "unmentioned":
        listed = "".join(f" {thing.number}" for thing in things)
        return f"{image}{said} regions{listed};", "Yes."
    marks = {"plain": "<region> (object {1})", "numbered": "<region{0}> (object {1})"}[how]
    mentions = ", ".join(marks.format(place + 1, things[place].number) for place in order)
    answer = f"Yes, <region{order[0] + 1}>." if how == "numbered" and things else "Yes."
    return f"{image}{said} {mentions}", answer


def truth_of(made, talks, fates):
    """What must be in the shards."""
    truth = Truth(made)
    fine = [
        t for t in talks if t.fate == "fine" and (t.picture is None or t.inline or fates[t.picture.number] == "fine")
    ]
    truth.came_in = {"conversations": len(talks)}
    rows = {talk.key if talk.key is not None else id(talk) for talk in fine}
    truth.written = {"conversations": len(fine), "samples": len(rows)}
    for talk in fine:
        if talk.picture is not None:
            truth.ids.setdefault(talk.picture.number, set()).update(talk.ids)
    truth.refused = not fine
    return truth


def check_regions(made, rows):
    """Every region that a text refers to lies on the object whose number it says."""
    for number, found in rows.items():
        for row in found if number is not None else []:
            picture, pixels = made.truth.pictures[number], decode(row["image"])
            for message in row["messages"]:
                text = "\n".join(turn["content"] for turn in message["turns"] if turn["role"] == "user")
                wanted = [int(n) for n in re.findall(r"<region> \(object (\d+)\)", text)]
                if listed := re.search(r" regions([\d ]*);", text):
                    wanted = [int(n) for n in listed[1].split()]
                assert text.count("<region>") == len(message["regions"]) == len(wanted)
                assert "<image>" not in text
                for place, thing_number in zip(message["regions"], wanted, strict=True):
                    check_region(picture, pixels, row["regions"][place], thing_number)


def check_region(picture, pixels, region, wanted):
    (thing,) = (thing for thing in picture.things if thing.number == wanted)
    if region["kind"] == "mask":
        check_mask(thing, pixels, region["mask"])
        assert coco_mask.area(region["mask"]) > 0
        return
    points = region["points"]
    middle = (sum(points[::2]) / len(points[::2]), sum(points[1::2]) / len(points[1::2]))
    assert thing_at(picture, pixels, *middle) is thing
    if region["kind"] == "box":
        check_box(thing, pixels, points)


@for_sets(chat_sets())
def test_texts_and_regions_belong_to_their_pictures(made):
    def source(folder, names, **options):
        return ChatSource([f"{folder}/{name}" for name in names], f"{folder}/images", **options)

    check_regions(made, check(made, source))
