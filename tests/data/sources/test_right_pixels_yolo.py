"""YOLO labels: every line lies on the object of the picture that the label file belongs to."""

import posixpath
import unicodedata
from dataclasses import dataclass, field

from hypothesis import strategies as st
from support.coloured_sets import (
    ColouredSet,
    Expected,
    Picture,
    Truth,
    beside,
    check,
    draw_name,
    for_sets,
    pictures,
    same_suffix,
)

from lumen_ray.data.sources.yolo import YoloSource

CLASSES = ["cat", "no", "007"]  # yaml would read the last two as False and 7
LAYOUTS = ["split", "export", "two folders", "list", "folders"]


@dataclass
class Labels:
    """A picture with its label file. `image`, `label`: their names; `id`: the image id; `fate`: fine, or why the
    picture cannot be used; `lines`: of the label file, which is missing if they are None; `unknown`: how many of them
    have no known class."""

    picture: Picture
    name: str
    image: str = ""
    label: str = ""
    id: str = ""
    fate: str = "fine"
    lines: list | None = field(default_factory=list)
    things: dict = field(default_factory=dict)
    lost: set = field(default_factory=set)
    unknown: int = 0


@st.composite
def yolo_sets(draw):
    points = draw(st.sampled_from([None, None, 2, 3]))  # numbers of a keypoint, None for boxes and outlines
    shapes = ("rectangle", "diamond") if points else ("rectangle", "diamond", "turned")
    made = draw(pictures(CLASSES, shapes, dict.fromkeys(CLASSES, 2) if points else {}, frames=False))
    layout = draw(st.sampled_from(LAYOUTS))
    found = [Labels(picture, name) for picture, name in zip(made, draw_names(draw, made), strict=True)]
    for labels in found:
        place(draw, labels, layout)
        labels.fate = draw(st.sampled_from(["fine"] * 15 + ["broken", "not text", "two pictures"]))
        for thing in labels.picture.things:
            draw_line(draw, labels, thing, points)
        if draw(st.booleans()):
            middle = " 0.5 0.5" * (2 if points == 2 else 0) + " 0.5 0.5 2" * (2 if points == 3 else 0)
            labels.lines.append(draw(st.sampled_from(["0 0.5 0.5 0 0.1", "1 0.25 0.5 0.1 0.0"])) + middle)
        if not labels.lines and labels.fate != "not text" and draw(st.booleans()):
            labels.lines = None
    contents = {}
    for labels in found:
        contents |= beside(posixpath.dirname(labels.image))
        write_files(draw, labels, contents)
    if mark_ambiguous(found[:2]):  # then the others have label files, since a set without any is refused
        for labels in found[2:]:
            if labels.lines is None:
                labels.lines, contents[labels.label] = [], b""
    given, options = describe(draw, found, layout, points)
    return ColouredSet(contents | given, truth_of(made, found, layout), options)


def draw_names(draw, made):
    """The names of the pictures; two of them may have equal bare names, or names that differ only in Unicode form."""
    names = ["".join(draw_name(draw, picture)) + picture.suffix for picture in made]
    kind = draw(st.sampled_from(["none", "cameras", "forms"])) if len(made) > 1 else "none"
    if kind != "none":
        same_suffix(*made[:2])
    if kind == "cameras":
        names[:2] = [f"{folder}0001{made[0].suffix}" for folder in draw(st.permutations(["cam1/", "cam2/"]))]
    elif kind == "forms":
        names[:2] = [unicodedata.normalize(form, f"caf\u00e9{made[0].suffix}") for form in ("NFC", "NFD")]
        if draw(st.booleans()):
            made[1].things = []  # and perhaps no label file, which is not the other's then
    return names


def place(draw, labels, layout):
    """Where the picture and its label file lie, and the picture's id."""
    image, label = {
        "split": ("images/train", "labels/train"),
        "export": ("train/images", "train/labels"),
        "list": ("images", "labels"),
        "folders": ("pics", "marks"),
    }.get(layout, ("", ""))
    labels.id = labels.name
    if layout == "two folders":
        root = draw(st.sampled_from(["one", "two"]))
        image, label = f"{root}/images", f"{root}/labels"
        labels.id = f"{image}/{labels.name}"
    labels.image = f"{image}/{labels.name}"
    labels.label = f"{label}/{posixpath.splitext(labels.name)[0]}.txt"
    if layout == "list":
        labels.id = labels.image


def draw_line(draw, labels, thing, points):
    """The line of a thing, or of two that are equal."""
    height, width = labels.picture.size
    fate = draw(st.sampled_from(["fine"] * 12 + ["repeated", "class", "word", "pixels", "short"]))
    key = str(CLASSES.index(thing.name)) + draw(st.sampled_from(["", ".0"]))
    x1, y1, x2, y2 = thing.extent
    as_outline = not points and (thing.degrees != 0 or draw(st.booleans()))
    if as_outline:
        numbers = [c / side for corner in thing.corners for c, side in zip(corner, (width, height), strict=True)]
    else:
        numbers = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
    visible = [2, 2] if points else None
    if points:
        hidden = draw(st.sampled_from([None, "first", "all", "one is 1"]))
        visible = {"first": [0, 2], "all": None, "one is 1": [1, 2]}.get(hidden, [2, 2])
        if points == 2 and hidden == "one is 1":
            visible = [2, 2]
        for place, (x, y) in enumerate(thing.points):
            v = visible[place] if visible else 0
            numbers += [x / width, y / height] if v else [0, 0]
            numbers += [v] * (points == 3)
    if fate == "class":
        key = draw(st.sampled_from(["9", "-1", "cat", "0.5"]))
        labels.lost.update(CLASSES)
        labels.unknown += 1
    words = [draw(st.sampled_from(["{:.6f}", "{!r}", "{:.9f}"])).format(number) for number in numbers]
    if fate == "word":
        words[1] = "x"
    elif fate == "pixels":
        words[0] = "31"
    elif fate == "short":
        words = words[:3]
    if fate in ("word", "pixels", "short"):
        labels.lost.add(thing.name)
    blank = draw(st.sampled_from([" ", "\t", "  "]))
    labels.lines.append(blank.join([key, *words]))
    if fate == "repeated":
        labels.lines.append(" ".join([key, *(word + "0" * ("e" not in word and "." in word) for word in words)]))
    if fate in ("fine", "repeated"):
        labels.things[thing.key] = Expected(mask=as_outline, visible=visible)


def write_files(draw, labels, contents):
    """Adds the picture and its label file to the contents."""
    contents[labels.image] = labels.picture.broken if labels.fate == "broken" else labels.picture.data
    if labels.fate == "two pictures":
        contents[posixpath.splitext(labels.image)[0] + ".pgm"] = Picture(9, (48, 72)).data
    if labels.lines is None:
        return
    folder, base = posixpath.split(labels.label)
    spellings = [base, base, base[:-4] + ".TXT"] + [unicodedata.normalize("NFD", base)] * (base != "caf\u00e9.txt")
    labels.label = name = f"{folder}/{draw(st.sampled_from(spellings))}"
    end, blank = draw(st.sampled_from(["\n", "\r\n"])), draw(st.sampled_from(["", "\n"]))
    text = blank + "".join(line + end for line in labels.lines)
    start = draw(st.sampled_from([b"", b"", b"\xef\xbb\xbf"]))
    contents[name] = start + text.encode() + b"\xff\xfe" * (labels.fate == "not text")


def mark_ambiguous(twins):
    """Whether it cannot be told which of two pictures a label file belongs to: if their names differ only in Unicode
    form, and neither has a label file of exactly its name."""
    alike = len({unicodedata.normalize("NFC", labels.image) for labels in twins}) < len(twins)
    given = [labels for labels in twins if labels.lines is not None]
    if not alike or not given or any(labels.label.endswith(".txt") for labels in given):
        return False
    for labels in twins:
        labels.fate = "ambiguous" if labels.fate != "two pictures" else labels.fate
    return True


def describe(draw, found, layout, points):
    """(files that describe the data set, options of the source)."""
    if layout == "folders":
        options = {"images": "pics", "labels": "marks", "classes": "classes.txt"}
        if not points:
            return {"classes.txt": "\r\n".join(CLASSES) + "\n\n"}, options
    places = {"split": "images/train", "export": "../train/images", "list": "train.txt", "folders": "pics"}
    where = places.get(layout) or [f"{r}/images" for r in ("one", "two")]
    lines = [draw(st.sampled_from(["path: .", "", "path: ''"])), f"val: images/val\ntrain: {where}".replace("'", "")]
    if draw(st.booleans()):
        lines.append("names: [cat, no, 007]")
    else:
        lines += ["names:", *(f"  {key}: {name}" for key, name in enumerate(CLASSES))]
    lines.append(draw(st.sampled_from(["nc: 3", "nc: '3'", "nc: 3.0", ""])))
    if points:
        lines.append(f"kpt_shape: [2, {points}]")
    given = {"data.yaml": "\n".join(lines), "images/val/0.png": Picture(9, (48, 72)).data}
    if layout == "two folders":
        given |= {f"{root}/images/readme.md": "" for root in ("one", "two")}
    if layout == "list":
        listed = [draw(st.sampled_from(["", "./"])) + labels.image for labels in found]
        listed += [posixpath.splitext(labels.image)[0] + ".pgm" for labels in found if labels.fate == "two pictures"]
        given["train.txt"] = "\n".join(listed) + "\n"
    options = {"data": "data.yaml"} | ({"labels": "marks"} if layout == "folders" else {})
    return given, options


def truth_of(made, found, layout):
    """What must be in the shards."""
    truth = Truth(made, known=set(CLASSES))
    truth.came_in = {"images": len(found), "annotations": 0}
    for labels in found:
        truth.came_in["images"] += labels.fate == "two pictures"
        if labels.fate in ("fine", "broken"):
            truth.came_in["annotations"] += len(labels.lines or [])
        if labels.fate == "fine":
            number = labels.picture.number
            truth.ids[number] = labels.id
            truth.things |= labels.things
            truth.classes[number] = set(CLASSES) - labels.lost
    truth.written = {"images": len(truth.ids), "annotations": len(truth.things)}
    unknown = sum(labels.unknown for labels in found if labels.fate == "fine")
    truth.refused = not truth.ids or all(labels.lines is None for labels in found)
    truth.refused |= 2 * unknown > truth.came_in["annotations"]
    return truth


@for_sets(yolo_sets())
def test_lines_lie_on_their_objects(made):
    check(made, lambda folder, **names: YoloSource(**{key: f"{folder}/{name}" for key, name in names.items()}))
