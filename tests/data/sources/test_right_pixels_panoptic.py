"""COCO panoptic: every segment's mask lies on its object, whatever kind of PNG file holds the ids."""

import json
from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import strategies as st
from PIL import Image
from support.coloured_sets import (
    ColouredSet,
    Expected,
    Picture,
    Place,
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
)
from support.source_fakes import encoded

from lumen_ray.data.sources.panoptic import PanopticSource

CLASSES = ["cat", "dog", "sky", "road"]
STUFF = ("sky", "road")
MODES = {"L": 200, "P": 200, "colours": 1 << 24, "I;16": 60_000, "RGB": 1 << 24, "RGBA": 1 << 24}  # largest ids
FATES = ["class", "no id", "zero", "flag", "absent", "repeated id", "elsewhere"]  # of segments that are lost
NOWHERE = ["nowhere", None, 987654]  # ids of no image


@dataclass
class Segments:
    """The annotation of a picture: where its PNG file lies, the file's mode, the ids of the things, the segments that
    are listed, those that are listed `elsewhere`, in a second annotation of the picture, and the classes of the things
    that are lost (None: any)."""

    picture: Picture
    place: Place
    fate: str
    key: object
    mode: str
    ids: dict = field(default_factory=dict)
    listed: list = field(default_factory=list)
    elsewhere: list = field(default_factory=list)
    expected: dict = field(default_factory=dict)
    lost: set = field(default_factory=set)

    @property
    def png(self):
        """The encoded file of ids."""
        ids = np.zeros(self.picture.size, np.int64)
        for thing in self.picture.things:
            if thing.key in self.ids:
                ids[thing.pixels(self.picture.size)] = self.ids[thing.key]
        channels = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        if self.mode in ("L", "P"):
            image = Image.fromarray(ids.astype(np.uint8))
            if self.mode == "P":
                image.putpalette([0, 0, 0] + [v for n in range(1, 256) for v in (n, 255 - n, 255)])  # for the eye
        elif self.mode == "I;16":
            image = Image.fromarray(ids.astype(np.uint16))
        else:
            image = Image.fromarray(channels)
            if self.mode == "colours":
                image = image.convert("P", palette=Image.Palette.ADAPTIVE)
            elif self.mode == "RGBA":
                image.putalpha(255)
        return encoded(image)


@st.composite
def panoptic_sets(draw):
    made = draw(pictures(CLASSES))
    for picture in made:
        if draw(st.sampled_from([False, False, True])):  # nothing but stuff
            picture.things = [replace(thing, name=draw(st.sampled_from(STUFF))) for thing in picture.things]
    given = draw(places(made))
    png_places = draw_png_places(draw, made, given)
    contents = stored_files(made, given)
    fates = draw_fates(draw, made, given, contents, ("broken", "wrong size", "unlisted", "no annotation", "no png"))
    first = draw(st.sampled_from([0, 1, "im-"]))
    found = []
    for picture, place in zip(made, png_places, strict=True):
        key = first + picture.number if isinstance(first, int) else f"{first}{picture.number}"
        segments = Segments(picture, place, fates[picture.number], key, draw(st.sampled_from([*MODES, "P", "colours"])))
        if place.twin and segments.fate == "fine":  # of two similar names, one may be that of an unlisted picture
            segments.fate = draw(st.sampled_from(["fine", "fine", "unlisted"]))
        draw_segments(draw, segments)
        if place.stored is not None and segments.fate != "no png":
            contents[f"segments/{place.stored}"] = segments.png
        found.append(segments)
    contents.setdefault("segments/.DS_Store", b"Bud1")
    stuff = draw(st.sampled_from(["keep", "skip"]))
    images, annotations = to_json(draw, found, given)
    table = [{"id": draw(spelled(n)), "name": name, "isthing": draw(spelled_flag(name not in STUFF))}
             for n, name in enumerate(CLASSES)]  # fmt: skip
    if draw(st.booleans()):  # no class, but the name over all of them
        table = [entry | {"supercategory": "all"} for entry in table] + [{"id": 77, "name": "all", "isthing": 1}]
    data = {"images": images, "annotations": annotations, "categories": table}
    contents["panoptic.json"] = json.dumps(data)
    return ColouredSet(contents, truth_of(made, given, found, data, stuff), {"stuff": stuff})


def draw_png_places(draw, made, given):
    """A name for each picture's PNG file: usually that of the picture."""
    if draw(st.booleans()):
        suffixes = [picture.suffix for picture in made]
        for picture in made:
            picture.suffix = ".png"
        others = draw(places(made))
        for picture, suffix in zip(made, suffixes, strict=True):
            picture.suffix = suffix
        return others
    names = [place.listed.replace("\\", "/").rpartition(".")[0] + ".png" for place in given]
    return [Place(name, name.rpartition("/")[2] if name.startswith(("/", "C:")) else name) for name in names]


def draw_segments(draw, segments):
    """The segments of a picture's things, sound ones and others."""
    picture = segments.picture
    for thing in picture.things:
        most = MODES[segments.mode] - 1
        number = draw(st.integers(1, 200)) if most < 256 else draw(st.sampled_from([1, 255, 256, 300, 50_000, most]))
        while number in segments.ids.values():
            number = number % most + 1
        segments.ids[thing.key] = number
        expected = Expected(mask=True, crowd=draw(st.sampled_from([False, False, True])))
        bbox = draw(st.sampled_from(["box", "box", None, "x", [1, 2], [0, 0, 0, 0]]))
        bbox = "box" if segments.mode in ("P", "colours") else bbox  # boxes and areas tell indices from colours
        entry = {
            "id": draw(spelled(number)),
            "category_id": draw(spelled(CLASSES.index(thing.name))),
            "bbox": spelled_numbers(draw, tight_xywh(thing.pixels(picture.size))) if bbox == "box" else bbox,
            "iscrowd": draw(spelled_flag(expected.crowd)),
            "area": int(thing.pixels(picture.size).sum()),
        }
        fate = draw(st.sampled_from(["fine"] * 10 + FATES))
        if fate == "class":
            entry["category_id"] = draw(st.sampled_from([99, None, "cat", ""]))
        elif fate in ("no id", "zero", "absent"):
            entry["id"] = {"no id": None, "zero": 0, "absent": 9_999_999}[fate]
        elif fate == "flag":
            entry["iscrowd"] = "maybe"
        listed = segments.elsewhere if fate == "elsewhere" else segments.listed
        listed += [entry, dict(entry)] if fate == "repeated id" else [entry]
        if fate == "fine":
            segments.expected[thing.key] = expected
        else:  # an id that the json does not list could be of any class
            segments.lost.add(None if fate in ("class", "no id", "zero") else thing.name)
        if fate in ("absent", "elsewhere"):
            del segments.ids[thing.key]
    unlisted = len(segments.ids) > sum(entry["id"] not in (None, 0) for entry in segments.listed)
    if segments.mode in ("P", "colours") and picture.things and (unlisted or not segments.expected):
        segments.mode = "RGB"  # nothing would tell indices from colours


def tight_xywh(pixels):
    """The box of a mask, x, y, width, height."""
    ys, xs = np.nonzero(pixels)
    left, top = int(xs.min()), int(ys.min())
    return [left, top, int(xs.max()) + 1 - left, int(ys.max()) + 1 - top]


def to_json(draw, found, given):
    """The lists of images and annotations; some pictures are listed or annotated twice."""
    images, annotations = [], []
    for segments, place in zip(found, given, strict=True):
        picture = segments.picture
        entry = {"id": draw(spelled(segments.key)), "file_name": place.listed}
        images.append(entry | draw_size_keys(draw, picture, segments.fate))
        if segments.fate == "no annotation" and not segments.place.twin:
            continue
        named = {"image_id": draw(spelled(segments.key)), "file_name": segments.place.listed}
        if segments.fate in ("no annotation", "unlisted"):
            named["image_id"] = draw(st.sampled_from(NOWHERE))
        annotations.append(named | {"segments_info": segments.listed})
        if segments.elsewhere:
            again = f"again-{picture.number}" if draw(st.booleans()) else named["image_id"]
            images += [{"id": again, "file_name": place.listed}] * (again != named["image_id"])
            annotations.append(named | {"image_id": again, "segments_info": segments.elsewhere})
        elif draw(st.sampled_from([False, False, False, False, True])):  # another image has the same PNG file
            images.append({"id": f"other-{picture.number}", "file_name": f"other/{picture.number}.png"})
            annotations.append(named | {"image_id": f"other-{picture.number}", "segments_info": segments.listed[:1]})
    return images, annotations


def name_of(segment):
    """The class of a listed segment, None if it is unknown."""
    key = segment["category_id"]
    return CLASSES[int(float(key))] if key not in (99, None, "cat", "") else None


def truth_of(made, given, found, data, stuff):
    """What must be in the shards."""
    truth = Truth(made, known=set(CLASSES))
    names = [name for name in CLASSES if stuff == "keep" or name not in STUFF]
    for segments, place in zip(found, given, strict=True):
        if segments.fate != "fine" or not segments.place.found:
            continue
        number = segments.picture.number
        truth.ids[number] = place.listed
        for thing in segments.picture.things:
            if thing.key in segments.expected and thing.name in names:
                truth.things[thing.key] = segments.expected[thing.key]
        truth.classes[number] = set() if None in segments.lost else set(names) - segments.lost
    listed = [(entry["image_id"] in NOWHERE, name_of(segment)) for entry in data["annotations"]
              for segment in entry["segments_info"] if name_of(segment) in (None, *names)]  # fmt: skip
    truth.came_in = {"images": len(data["images"]), "annotations": len(listed)}
    truth.written = {"images": len(truth.ids), "annotations": len(truth.things)}
    truth.refused = not truth.ids or 2 * sum(lost or name is None for lost, name in listed) > len(listed)
    return truth


@for_sets(panoptic_sets())
def test_segments_lie_on_their_objects(made):
    def source(folder, stuff):
        return PanopticSource(f"{folder}/panoptic.json", f"{folder}/segments", f"{folder}/images", stuff)

    check(made, source)
