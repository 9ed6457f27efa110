"""Referring expressions: every phrase is of its picture and points to the very objects that it names."""

import json
import pickle
from collections import Counter
from dataclasses import dataclass

from hypothesis import strategies as st
from support.coloured_sets import (
    ColouredSet,
    Expected,
    Picture,
    Place,
    Thing,
    Truth,
    check,
    draw_fates,
    draw_size_keys,
    for_sets,
    pictures,
    places,
    spelled,
    spelled_flag,
    spelled_numbers,
    stored_files,
    thing_at,
)

from lumen_ray.data.images import decode
from lumen_ray.data.sources.refer import ReferSource

CLASSES = ["cat", "dog"]
SHAPES = ("rectangle", "diamond", "turned")


@dataclass
class Target:
    """How a thing is given: box, segmentation and rotation; `is_sound`: whether it can be used."""

    thing: Thing
    parts: dict
    expected: Expected
    is_sound: bool = True


@dataclass
class Phrase:
    """Expressions of one record. `fate`: fine, or why they are rejected; `split`: of the record; `is_listed`: whether
    its image is."""

    picture: Picture
    place: Place
    targets: list
    texts: list
    fate: str = "fine"
    split: str = "train"
    is_listed: bool = True

    @property
    def can_be_used(self):
        return self.fate == "fine" and all(target.is_sound for target in self.targets)


@st.composite
def refer_sets(draw, with_instances):
    made = draw(pictures(CLASSES if with_instances else ["object"], SHAPES))  # records of many have no class
    given = draw(places(made))
    contents = stored_files(made, given)
    fates = draw_fates(draw, made, given, contents, ("broken", "wrong size"))
    box_format = "xywh" if with_instances else draw(st.sampled_from(["xyxy", "xywh", "relative"]))
    phrases = []
    targets = {}
    for picture, place in zip(made, given, strict=True):
        for thing in picture.things:
            targets[thing.key] = draw_target(draw, thing, picture.size, box_format)
        for number in range(draw(st.sampled_from([1, 2, 3, 2, 3] + [0] * with_instances))):
            phrases.append(draw_phrase(draw, picture, place, targets, number))
            if place.twin and phrases[-1].fate == "image":
                phrases[-1].fate = "target"
    options = {"split": draw(st.sampled_from([None, "train"])), "box_format": box_format}
    write = instances_files if with_instances else plain_files
    described, refs = write(draw, made, given, phrases, targets, fates)
    options |= {"refs": [refs]} | ({"instances": "instances.json"} if with_instances else {})
    return ColouredSet(contents | described, truth_of(made, given, phrases, fates, options), options)


def draw_target(draw, thing, size, box_format):
    """A thing's box, mask or both."""
    how = draw(st.sampled_from(["box", "mask", "both"] * 5 + ["bad"]))
    target = Target(thing, {}, Expected(mask=how in ("mask", "both")), how != "bad")
    x1, y1, x2, y2 = thing.extent if how != "box" else thing.box if thing.degrees else thing.extent
    if thing.degrees and how == "box":
        target.parts["rotation"] = draw(st.sampled_from([thing.degrees, str(thing.degrees)]))
        target.expected.mask = True
    values = {"xyxy": [x1, y1, x2, y2], "xywh": [x1, y1, x2 - x1, y2 - y1]}.get(
        box_format, [x1 / size[1], y1 / size[0], x2 / size[1], y2 / size[0]]
    )
    if how != "mask":
        target.parts["bbox"] = spelled_numbers(draw, values)
    if how in ("mask", "both"):
        target.parts["segmentation"] = draw(st.sampled_from([[thing.polygon], thing.rle(size), thing.rle(size, True)]))
    elif how == "bad":
        far = {"relative": [0.5, 0.5, 0.5, 0.7]}.get(box_format, [900, 900, 950, 950])
        target.parts["bbox"] = draw(st.sampled_from([far, [5, 5, 5, 5][: 4 if box_format == "xyxy" else 3]]))
    return target


def draw_phrase(draw, picture, place, targets, number):
    """Expressions that name their objects by number."""
    named = [targets[thing.key] for thing in picture.things if draw(st.sampled_from([True, True, False]))]
    numbers = "".join(f" {target.thing.number}" for target in named)
    texts = [f"{number}{letter}: objects{numbers} of {picture.text}" for letter in "ab"[: draw(st.integers(1, 2))]]
    phrase = Phrase(picture, place, named, texts)
    phrase.fate = draw(st.sampled_from(["fine"] * 10 + ["blank", "no text", "target", "image", "marked"]))
    if phrase.fate == "blank":
        phrase.texts = [" "]
    elif phrase.fate == "no text":
        phrase.texts = []
    elif phrase.fate == "marked" and not named:
        phrase.fate = "fine"
    phrase.split = draw(st.sampled_from(["train", "train", "val"] if place.twin else ["train"] * 8 + ["val", None]))
    return phrase


def to_sentences(draw, phrase):
    """The keys of a record with its texts."""
    if not phrase.texts:
        return draw(st.sampled_from([{}, {"sentences": []}]))
    if len(phrase.texts) == 1 and draw(st.booleans()):
        return {draw(st.sampled_from(["expression", "sent", "caption"])): phrase.texts[0]}
    return {"sentences": draw(st.sampled_from([phrase.texts, [{"sent": text, "raw": "x"} for text in phrase.texts]]))}


def to_file(draw, records, names=("refs.json", "refs.jsonl")):
    """({name: content}, name) of a file of records."""
    name = draw(st.sampled_from(names))
    if name.endswith(".p"):
        return {name: pickle.dumps(records, protocol=2)}, name
    if name.endswith(".jsonl"):
        return {name: "\ufeff" + "\r\n".join(map(json.dumps, records)) + "\n\n"}, name
    return {name: json.dumps(draw(st.sampled_from([records, {"refs": records}])))}, name


def instances_files(draw, made, given, phrases, targets, fates):
    """A COCO file with all pictures and things, and refs that point into it."""
    first, images, annotations, records = draw(st.integers(0, 2)), [], [], []
    for picture, place in zip(made, given, strict=True):
        key = first + picture.number
        entry = {"id": draw(spelled(key)), "file_name": place.listed}
        images.append(entry | draw_size_keys(draw, picture, fates[picture.number], picture.as_stored))
        images += draw(st.sampled_from([[], [], [{"id": f"again-{key}", "file_name": place.listed}]]))
        for thing in picture.things:
            entry = {"id": draw(spelled(100 * key + thing.number)), "image_id": draw(spelled(key)), "category_id": 1}
            entry |= {"category_id": draw(spelled(CLASSES.index(thing.name))), **targets[thing.key].parts}
            if "rotation" in entry and draw(st.booleans()):
                entry["attributes"] = {"rotation": entry.pop("rotation")}
            annotations.append(entry)
    again = {entry["id"] for entry in images if str(entry["id"]).startswith("again")}
    for phrase in phrases:
        key = first + phrase.picture.number
        ids = [draw(spelled(100 * key + target.thing.number)) for target in phrase.targets]
        record = {"image_id": draw(spelled(key)), "split": phrase.split, **to_sentences(draw, phrase)}
        if not ids:
            ids = draw(st.sampled_from([[], [-1]]))
            record["no_target"] = draw(spelled_flag(True))
        if phrase.fate == "image":
            record["image_id"] = draw(st.sampled_from([987654, None, *again]))
            phrase.is_listed = record["image_id"] in again
        elif phrase.fate == "target":
            other = [a["id"] for a in annotations if int(float(a["id"])) // 100 != key]
            ids = [*ids, draw(st.sampled_from([99_999, *other]))]
            record.pop("no_target", None)
            ids = [n for n in ids if n != -1]
        elif phrase.fate == "marked":
            record["no_target"] = draw(spelled_flag(True))
        record["ann_id"] = ids[0] if len(ids) == 1 and draw(st.booleans()) else ids
        records.append(record)
    table = [{"id": draw(spelled(n)), "name": name} for n, name in enumerate(CLASSES)]
    data = {"images": images, "annotations": annotations, "categories": table}
    described, name = to_file(draw, records, ("refs.json", "refs.jsonl", "refs(unc).p"))
    return {"instances.json": json.dumps(data)} | described, name


def plain_files(draw, made, given, phrases, targets, fates):
    """Records with their own boxes and masks."""
    records = []
    for phrase in phrases:
        name = phrase.place.listed
        kinds = {tuple(sorted(target.parts)) for target in phrase.targets}
        if len(kinds) > 1 or any("rotation" in kind for kind in kinds):  # a record has the same parts for all
            phrase.targets, kinds = phrase.targets[:1], {tuple(sorted(phrase.targets[0].parts))}
            phrase.texts = [relabelled(text, phrase) for text in phrase.texts]
        images = [{"image": name}, {"img_path": name}, {"images": [name]}, {"image": {"path": name}}]
        record = {**draw(st.sampled_from(images)), "split": phrase.split, **to_sentences(draw, phrase)}
        for key in kinds.pop() if kinds else ():
            values = [target.parts[key] for target in phrase.targets]
            record[key] = values[0] if len(values) == 1 else values
        if "rotation" not in record and "bbox" in record and len(phrase.targets) > 1:
            record["bboxes"] = record.pop("bbox")
        if "segmentation" in record and len(phrase.targets) == 1 and isinstance(record["segmentation"], list):
            record["segmentation"] = draw(st.sampled_from([record["segmentation"], [record["segmentation"]]]))
        if not phrase.targets:
            record |= draw(st.sampled_from([{"no_target": "1"}, {"bboxes": []}]))
        record |= draw_size_keys(draw, phrase.picture, fates[phrase.picture.number], phrase.picture.as_stored)
        if phrase.fate == "image":
            record |= draw(st.sampled_from([{"images": [name, "another.png"]}, {"image": ["a.png", "b.png"]}]))
        elif phrase.fate == "target":
            record["bbox"] = draw(st.sampled_from(["x", [1, 2, "x", 4], 17]))
            record.pop("segmentation", None)
        elif phrase.fate == "marked":
            record["no_target"] = draw(spelled_flag(True))
        records.append(record)
    return to_file(draw, records)


def relabelled(text, phrase):
    """The text with the numbers of the phrase's objects."""
    if not text.strip():
        return text
    numbers = "".join(f" {target.thing.number}" for target in phrase.targets)
    return f"{text.partition(':')[0]}: objects{numbers} of {phrase.picture.text}"


def truth_of(made, given, phrases, fates, options):
    """What must be in the shards."""
    truth = Truth(made)
    texts, unlisted = Counter(), 0
    for phrase in phrases:
        if options["split"] == "train" and phrase.split == "val":
            continue
        nameless = options["split"] == "train" and phrase.split is None  # rejected as a whole
        number = 1 if nameless else max(1, len(phrase.texts))
        truth.came_in["expressions"] += number
        unlisted += number * (not phrase.is_listed and not nameless)
        if nameless or not phrase.can_be_used or fates[phrase.picture.number] != "fine":
            continue
        texts[phrase.picture.number] += len(phrase.texts)
        truth.ids[phrase.picture.number] = {phrase.place.listed}
        for target in phrase.targets:
            truth.things[target.thing.key] = target.expected
    truth.texts = dict(texts)
    truth.written = {"images": len(texts), "expressions": texts.total()}
    some = any(phrase.split == "train" for phrase in phrases) if options["split"] else bool(phrases)
    truth.refused = not truth.ids or not some or 2 * unlisted > truth.came_in["expressions"]
    return truth


def check_phrases(made, rows):
    """The instances of every phrase are the objects whose numbers it says."""
    for number, (row,) in rows.items():
        picture, pixels = made.truth.pictures[number], decode(row["image"])
        for phrase in row["phrases"]:
            assert phrase["task"] == "refer"
            wanted = phrase["phrase"].partition("objects")[2].partition("of")[0].split()
            boxes = [row["instances"][i]["box"] for i in phrase["instances"]]
            there = [thing_at(picture, pixels, (x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in boxes]
            assert sorted(str(thing.number) for thing in there) == sorted(wanted)


def check_set(made):
    def source(folder, refs, instances=None, **options):
        paths = [f"{folder}/{name}" for name in refs]
        return ReferSource(paths, f"{folder}/images", instances and f"{folder}/{instances}", **options)

    check_phrases(made, check(made, source))


@for_sets(refer_sets(with_instances=True))
def test_refs_point_to_their_objects(made):
    check_set(made)


@for_sets(refer_sets(with_instances=False))
def test_plain_records_point_to_their_objects(made):
    check_set(made)
