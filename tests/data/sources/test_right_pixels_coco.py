"""COCO json: every annotation lies on the object it was drawn for, and none gets lost in silence."""

import json
from dataclasses import dataclass

from hypothesis import strategies as st
from support.coloured_sets import (
    ColouredSet,
    Expected,
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
)

from lumen_ray.data.sources.coco import CocoSource

CLASSES = ["cat", "dog", "person"]
ROOT = "animals"  # no class, but the name over all of them that Roboflow writes
POINTS = {"person": 2}
BAD_MASKS = ["x", [[1, 2, 3]], [["a"] * 6], {"size": [7, 9], "counts": [0, 63]}, [[1e6, 0, 1e6, 1e6, 0, 1e6]]]
BAD_BOXES = [None, [], "x", [1, 2, 3], [5, 5, -3, -3], [5, 5, "wide", 3], [None, 1, 2, 3], [900, 900, 5, 5]]


class File:
    """A json file: `table`: its classes by category id; `ids`: the image ids of the pictures it lists, by number."""

    def __init__(self, draw, table, numbers):
        self.table = table
        first, kind = draw(st.sampled_from([0, 1, 40])), draw(st.sampled_from([int, "im-{}".format]))
        self.ids = {number: kind(first + place) for place, number in enumerate(numbers)}
        self.images, self.annotations = [], []

    def add_image(self, draw, picture, key, name, fate="fine"):
        entry = {"id": draw(spelled(key)), "file_name": name}
        self.images.append(entry | draw_size_keys(draw, picture, fate, picture.as_stored))

    def category_of(self, name):
        return next(key for key, listed in self.table.items() if listed == name)

    def to_json(self, root):
        table = [] if root is None else [{"id": root, "name": ROOT, "supercategory": "none"}]
        for key, name in self.table.items():
            points = {"keypoints": ["head", "foot"], "skeleton": [[1, 2]]} if name in POINTS else {}
            table.append({"id": key, "name": name, "supercategory": "none" if root is None else ROOT} | points)
        categories = {"categories": table} if self.table else {}
        return json.dumps({"images": self.images, "annotations": self.annotations} | categories)


@dataclass
class Note:
    """An annotation and what must become of it. `fate`: fine, repeated, merged (into one of an earlier file), empty,
    lost, or why it is lost: class (unknown), image (unknown), second id (of its image)."""

    file: File
    picture: int
    name: str
    fate: str
    entry: dict
    thing: Thing | None = None
    expected: Expected | None = None


@st.composite
def coco_sets(draw):
    made = draw(pictures(CLASSES, ("rectangle", "diamond", "turned"), POINTS))
    given = draw(places(made))
    files = draw_files(draw, [picture.number for picture in made])
    contents = stored_files(made, given)
    fates = draw_fates(draw, made, given, contents, ("broken", "wrong size"))
    notes = []
    for picture, place in zip(made, given, strict=True):
        lists = [file for file in files if picture.number in file.ids]
        for file in lists:
            name = place.listed if file is lists[0] else same_file(draw, place.listed)
            file.add_image(draw, picture, file.ids[picture.number], name, fates[picture.number])
        for file in lists:
            if not file.table:
                notes += draw_captions(draw, picture, file)
        tables = [file for file in lists if file.table]
        for thing in picture.things:
            can = [file for file in tables if thing.name in file.table.values()]
            if can:
                notes += draw_notes(draw, thing, picture, place, can)
        if tables and draw(st.booleans()):
            notes.append(draw_empty(draw, picture, draw(st.sampled_from(tables))))
    for note in notes:
        note.file.annotations.append(note.entry)
    root = draw(st.sampled_from([None, 0, 77]))
    root = root if root is None or root not in files[0].table else 78
    names = [f"{n}.json" for n in range(len(files))]
    contents |= {name: file.to_json(root) for name, file in zip(names, files, strict=True)}
    usable = {number for number, fate in fates.items() if fate == "fine"}
    return ColouredSet(contents, truth_of(made, given, usable, files, notes), {"names": names})


def draw_files(draw, numbers):
    """One or two files of objects, and perhaps one of captions; each lists some of the pictures."""
    first = draw(st.sampled_from([0, 1, 5]))
    where = [draw(st.sampled_from(["both", "both", "first", "second"])) for _ in numbers]
    if draw(st.sampled_from([False, False, True])):
        files = [File(draw, dict(enumerate(CLASSES, first)), numbers)]
    else:
        names = draw(st.sampled_from([["dog", "cat", "person"], ["person", "dog"], ["person"]]))
        placed = list(zip(numbers, where, strict=True))
        files = [
            File(draw, dict(enumerate(CLASSES, first)), [n for n, place in placed if place != "second"]),
            File(draw, dict(enumerate(names, 3)), [n for n, place in placed if place != "first"]),
        ]
    if draw(st.booleans()):
        files.append(File(draw, {}, numbers))
    return files


def same_file(draw, name):
    """The name, perhaps as another text for the same file."""
    return name if name.startswith(("/", "C:")) else draw(st.sampled_from([name, f"./{name}"]))


def draw_notes(draw, thing, picture, place, files):
    """The annotations of a thing in one of the files, or in both."""
    file, key = draw(st.sampled_from(files)), f"again-{picture.number}"
    entry, expected = sound_annotation(draw, thing, picture.size)
    entry |= {"image_id": draw(spelled(file.ids[picture.number]))}
    entry |= {"category_id": draw(spelled(file.category_of(thing.name)))}
    note = Note(file, picture.number, thing.name, "fine", entry, thing, expected)
    note.fate = draw(st.sampled_from(["fine"] * 12 + ["lost", "class", "image", "image", "second id"]))
    if note.fate == "lost":
        entry |= {"bbox": draw(st.sampled_from(BAD_BOXES)), "segmentation": draw(st.sampled_from([None, *BAD_MASKS]))}
        if draw(st.booleans()):
            entry |= {"iscrowd": draw(st.sampled_from([2, "maybe", [1]])), "bbox": thing.xywh}
    elif note.fate == "class":
        entry["category_id"] = draw(st.sampled_from([999, None, "", "cat", True]))
    elif note.fate == "image":
        entry["image_id"] = draw(st.sampled_from([987654, None, "nowhere", "", True]))
    elif note.fate == "second id":
        entry["image_id"] = key
        if key not in [image["id"] for image in file.images]:
            file.images.append({"id": key, "file_name": same_file(draw, place.listed)})
    if note.fate != "fine":
        return [note]
    notes = [note]
    if draw(st.sampled_from([False, False, True])):
        again = entry | {"bbox": [other_type(value) for value in entry["bbox"]]} if entry["bbox"] else dict(entry)
        notes.append(Note(file, picture.number, thing.name, "repeated", again))
    if file is not files[-1] and has_numbers(entry["bbox"]) and draw(st.booleans()):
        again = entry | {"image_id": files[1].ids[picture.number], "category_id": files[1].category_of(thing.name)}
        if thing.points and "keypoints" not in entry:
            again["keypoints"], expected.visible = [c for x, y in thing.points for c in (x, y, 2)], [2, 2]
        notes.append(Note(files[1], picture.number, thing.name, "merged", again))
    return notes


def has_numbers(box):
    """Whether a box has four numbers, perhaps as texts."""
    numbers = [v for v in box if v is not None and str(v).replace(".", "").lstrip("-").isdigit()] if box else []
    return len(numbers) == len(box or ()) == 4


def other_type(value):
    """The number in another type."""
    return f"{value}.0" if isinstance(value, int) else f"{value}0" if isinstance(value, float) else value


def sound_annotation(draw, thing, size):
    """(an annotation of the thing that can be used, how it must come out)."""
    expected = Expected(crowd=draw(st.sampled_from([False, False, False, True])))
    entry = {"iscrowd": draw(spelled_flag(expected.crowd)), "bbox": spelled_numbers(draw, thing.xywh)}
    if draw(st.booleans()):
        entry["area"] = draw(st.sampled_from([12.5, "40", 0, None, "large"]))
    how = draw(st.sampled_from(["box", "polygon", "pairs", "halves", "rle", "codes", "bad part", "bad mask", "no box"]))
    if thing.degrees and how in ("box", "halves", "bad mask"):  # as CVAT writes it: the box, and how it is turned
        turn = {"rotation": draw(st.sampled_from([thing.degrees, str(thing.degrees), thing.degrees + 360]))}
        entry |= draw(st.sampled_from([turn, {"attributes": turn | {"occluded": False}}]))
        if how == "halves":  # with the box that is not turned as a polygon, too
            x1, y1, x2, y2 = thing.box
            entry["segmentation"] = [[x1, y1, x2, y1, x2, y2, x1, y2]]
        elif how == "bad mask":
            entry["segmentation"] = draw(st.sampled_from(BAD_MASKS))
        expected.mask = True
    else:
        if thing.degrees:
            x1, y1, x2, y2 = thing.extent
            entry["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        expected.mask = how not in ("box", "bad mask")
        entry["segmentation"] = segmentation(draw, thing, size, how)
        if how == "no box":
            entry["bbox"] = draw(st.sampled_from([*BAD_BOXES, [*thing.box[:2], 0, 0]]))
    expected.visible = draw_keypoints(draw, thing, entry)
    return entry, expected


def segmentation(draw, thing, size, how):
    """The thing's outline or mask."""
    if how == "box":
        return draw(st.sampled_from([None, [], {}]))
    if how == "bad mask":
        return draw(st.sampled_from(BAD_MASKS))
    if how in ("rle", "codes"):
        return thing.rle(size, compressed=how == "codes")
    if how == "pairs":
        return [[list(corner) for corner in thing.corners]]
    if how == "halves" and thing.is_upright:
        x1, y1, x2, y2 = thing.box
        middle = (y1 + y2) // 2
        return [[x1, y1, x2, y1, x2, middle, x1, middle], [x1, middle, x2, middle, x2, y2, x1, y2]]
    bad = [draw(st.sampled_from([[1, 2, 3], "x", {"size": [7, 9], "counts": [63]}]))] if how == "bad part" else []
    return draw(st.permutations([spelled_numbers(draw, thing.polygon), *bad]))


def draw_keypoints(draw, thing, entry):
    """Adds keypoints to an annotation; the visibility with which they must come out, None without any."""
    how = draw(st.sampled_from(["none", "none", "all", "hidden", "one", "null", "outside", "zero", "short", "long"]))
    if how == "none":
        return None
    points = [[x, y, 1 if how == "hidden" else 2] for x, y in thing.points or [(3, 3)]]
    points[0] = {"one": [0, 0, 0], "null": [None, 3, 2], "outside": [-9, 3, 2]}.get(how, points[0])
    points = {"zero": [[0, 0, 0] for _ in points], "short": [[5, 5]], "long": [*points, [5, 5, 2]]}.get(how, points)
    flat = [value for point in points for value in point]
    entry["keypoints"] = flat if None in flat else spelled_numbers(draw, flat)
    if not thing.points:  # its class has no names for them
        return None
    return {"all": [2, 2], "hidden": [1, 1], "zero": None, "short": None, "long": None}.get(how, [0, 2])


def draw_empty(draw, picture, file):
    """A box without area, where nothing is drawn."""
    there = [thing.name for thing in picture.things if thing.name in file.table.values()]
    name = draw(st.sampled_from(there or list(file.table.values())))
    entry = {"id": 3, "image_id": file.ids[picture.number], "category_id": file.category_of(name)}
    box = draw(st.sampled_from([[5, 5, 0, 0], ["5", "5", "0", 4], [5, 5, 4, 0.0]]))
    return Note(file, picture.number, name, "empty", entry | {"bbox": box})


def draw_captions(draw, picture, file):
    """Captions of a picture, with the number of texts in them as `expected`."""
    texts = [f"This is {picture.text}", f"Look, {picture.text}"]
    values = {"text": texts[0], "list": [*texts, " "], "json": json.dumps(texts), "blank": " ", "number": 3}
    notes = []
    for kind in draw(st.lists(st.sampled_from(list(values)), max_size=2)):
        number = {"text": 1, "list": 2, "json": 2}.get(kind, 0)
        entry = {"image_id": draw(spelled(file.ids[picture.number])), "caption": values[kind]}
        notes.append(Note(file, picture.number, "", "fine" if number else "empty", entry, expected=number))
    return notes


def truth_of(made, given, usable, files, notes):
    """What must be in the shards."""
    truth = Truth(made, known=set(CLASSES))
    listed = {id_ for file in files for id_ in file.ids}
    for picture, place in zip(made, given, strict=True):
        if picture.number in listed & usable:
            truth.ids[picture.number] = place.listed
    again = sum(str(image["id"]).startswith("again-") for file in files for image in file.images)
    truth.came_in = {"images": len(listed) + again, "annotations": sum(note.fate != "merged" for note in notes)}
    truth.written["images"] = len(truth.ids)
    truth.texts = dict.fromkeys(truth.ids, 0)
    for note in notes:
        if note.fate == "fine" and note.picture in truth.ids:
            truth.written["annotations"] += 1
            if note.thing is None:
                truth.texts[note.picture] += note.expected
            else:
                truth.things[note.thing.key] = note.expected
    truth.adrift = {note.thing.key for note in notes if note.fate == "image"}
    for number in truth.ids:
        of_it = [note for note in notes if note.picture == number]
        lost = {note.name for note in of_it if note.fate in ("lost", "second id")}
        lists = [file for file in files if number in file.ids]
        # an object of an unknown image could be on any image of its file
        lost |= {note.name for note in notes if note.fate == "image" and note.file in lists}
        unknown = any(note.fate == "class" for note in of_it)
        truth.classes[number] = set() if unknown else {n for file in lists for n in file.table.values()} - lost
    unlisted = [sum(note.file is file and note.fate in ("class", "image") for note in notes) for file in files]
    total = [len(file.annotations) for file in files]
    truth.refused = not truth.ids or any(2 * n > m for n, m in zip(unlisted, total, strict=True))
    truth.refused |= 2 * sum(unlisted) > truth.came_in["annotations"]
    return truth


@for_sets(coco_sets())
def test_annotations_lie_on_their_objects(made):
    check(made, lambda folder, names: CocoSource([f"{folder}/{name}" for name in names], f"{folder}/images"))
