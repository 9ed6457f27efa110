"""Data sets whose pixels say what they show, to find annotations that ended up on a wrong picture.

The red of a pixel is the number of its picture, the green that of its object. Blue tells background (0), object (255)
and the object's keypoints apart. So the check needs no coordinates: it looks at the pixels below a box or a mask.
A `Truth` is what must be in the shards; generators make it together with the files, from the same draws.
"""

import math
import tempfile
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from lumen_ray.data.images import decode
from lumen_ray.data.shards import shards
from lumen_ray.errors import UserError
from support.source_fakes import encoded, prepared, write

CELL = 24  # pixels; every object has a square cell of its own
SIZES = [(48, 72), (72, 48), (48, 96)]  # (height, width)
_STEP, _CLOSE = 16, 7  # between the colours of two numbers; within which a colour is taken for a number's
FILES = {  # suffix: format of Pillow that its files are written in
    ".png": "PNG", ".PNG": "PNG", ".jpg": "JPEG", ".JPG": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".MPO": "JPEG",
    ".apng": "PNG", ".tif": "TIFF", ".TIFF": "TIFF", ".bmp": "BMP", ".gif": "GIF", ".webp": "WEBP", ".ppm": "PPM",
}  # fmt: skip
_WITH_EXIF = ("PNG", "JPEG", "WEBP")
_UNDO = {  # by EXIF orientation: turns the picture as shown into the pixels as stored
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}
#: files that systems leave beside pictures
BESIDE = {".DS_Store": b"Bud1", "._0.png": b"\0\5\26\7", "Thumbs.db": b"\xd0\xcf", "__MACOSX/0.png": b"x"}


def colour(picture, thing=None, blue=None):
    """The colour of a thing on a picture, without one of the picture's background."""
    blue = blue if blue is not None else 0 if thing is None else 255
    return (_STEP * picture + 8, 8 if thing is None else _STEP * thing + 8, blue)


def looks_like(pixels, wanted):
    """Whether each pixel has that colour, bool [H, W]."""
    return (np.abs(pixels.astype(int) - wanted) <= _CLOSE).all(-1)


@dataclass
class Thing:
    """An object drawn on a picture, in the frame that the picture is annotated in.

    `box`: xyxy of the object before it was turned by `degrees`; `corners`: of the object as drawn, (x, y) each;
    `points`: (x, y) of its keypoints, which are drawn as dots.
    """

    picture: int
    number: int
    name: str
    box: tuple
    corners: list
    degrees: float = 0
    points: list = field(default_factory=list)

    @property
    def key(self):
        return self.picture, self.number

    @property
    def xywh(self):
        x1, y1, x2, y2 = self.box
        return [x1, y1, x2 - x1, y2 - y1]

    @property
    def extent(self):
        """The box around the object as drawn, xyxy."""
        xs, ys = zip(*self.corners, strict=True)
        return [min(xs), min(ys), max(xs), max(ys)]

    @property
    def polygon(self):
        return [float(c) for corner in self.corners for c in corner]

    @property
    def is_upright(self):
        """Whether it is a rectangle with upright sides, whose pixels fill its box."""
        return self.degrees == 0 and len({x for x, _ in self.corners}) == 2

    def pixels(self, size):
        """Its pixels, bool [H, W]: those whose centre is inside its corners."""
        y, x = np.mgrid[: size[0], : size[1]] + 0.5
        inside = np.ones(size, bool)
        for (x1, y1), (x2, y2) in zip(self.corners, [*self.corners[1:], self.corners[0]], strict=True):
            inside &= (x2 - x1) * (y - y1) - (y2 - y1) * (x - x1) >= 0
        return inside

    def rle(self, size, compressed=False):
        """Its mask as COCO run lengths."""
        found = coco_mask.encode(np.asfortranarray(self.pixels(size).astype(np.uint8)))
        if compressed:
            return {"size": list(size), "counts": found["counts"].decode()}
        flat = self.pixels(size).T.flatten()
        ends = np.flatnonzero(np.diff(flat)) + 1
        counts = np.diff([0, *ends, flat.size]).tolist()
        return {"size": list(size), "counts": [0, *counts] if flat[0] else counts}


@dataclass
class Picture:
    """A picture with its things. `size`: (height, width) of the frame it is annotated in, which is that of the stored
    pixels if `as_stored`, else that of the picture as shown, after the EXIF rotation `orientation`."""

    number: int
    size: tuple
    suffix: str = ".png"
    things: list = field(default_factory=list)
    orientation: int = 1
    as_stored: bool = False
    version: int | None = None

    @property
    def canvas(self):
        """What is drawn, uint8 [H, W, 3], in the frame of the annotations."""
        pixels = np.zeros((*self.size, 3), np.uint8)
        pixels[:] = colour(self.number, self.version, blue=0)
        for thing in self.things:
            pixels[thing.pixels(self.size)] = colour(*thing.key)
            for place, (x, y) in enumerate(thing.points):
                left, top = int(x) - 1, int(y) - 1
                pixels[top : top + 3, left : left + 3] = colour(*thing.key, blue=dot(place))
        return pixels

    @property
    def data(self):
        """The encoded file."""
        pixels = self.canvas if self.as_stored else _UNDO[self.orientation](self.canvas)
        options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(FILES[self.suffix], {})
        if self.orientation != 1:
            exif = Image.Exif()
            exif[0x0112] = self.orientation
            options = options | {"exif": exif}
        return encoded(Image.fromarray(np.ascontiguousarray(pixels)), FILES[self.suffix], **options)

    @property
    def broken(self):
        """The beginning of the file (of a TIFF so little that Pillow gives no warning)."""
        return self.data[: 4 if FILES[self.suffix] == "TIFF" else 40]

    @property
    def text(self):
        """Words that name the picture."""
        return f"picture {self.number}."


def dot(place):
    """The blue of the keypoint with this number."""
    return 255 - 32 * (place + 1)


def picture_in(data):
    """(number, version) of the picture in an encoded file, by the colour of its background."""
    pixels = decode(data)
    red, green = np.unique(pixels[pixels[..., 2] < 64][:, :2].astype(int) // _STEP, axis=0).T
    assert len(red) == 1, "the background has one colour"
    return int(red[0]), int(green[0])


# strategies of pictures


@st.composite
def things_of(draw, picture, classes, shapes, keypoints):
    """Up to five things on a picture, each in a cell of its own. `keypoints`: number of them by class."""
    height, width = picture.size
    cells = [(x, y) for y in range(0, height - CELL + 1, CELL) for x in range(0, width - CELL + 1, CELL)]
    for number, (x, y) in enumerate(draw(st.lists(st.sampled_from(cells), max_size=5, unique=True))):
        name, shape = draw(st.sampled_from(classes)), draw(st.sampled_from(shapes))
        half_w, half_h = draw(st.integers(4, 9)), draw(st.integers(4, 9))
        if shape != "rectangle":  # large enough that its outline has a small share of its pixels
            half_w, half_h = {"diamond": (11, 9), "turned": (9, 6)}[shape]
        cx, cy = x + CELL // 2, y + CELL // 2
        if shape == "rectangle":  # also at the very edge of the image
            cx, cy = x + half_w + draw(st.integers(0, 4)), y + half_h + draw(st.integers(0, 4))
        box = (cx - half_w, cy - half_h, cx + half_w, cy + half_h)
        thing = Thing(picture.number, number, name, box, [box[:2], (box[2], box[1]), box[2:], (box[0], box[3])])
        if shape == "diamond":
            thing.corners = [(cx, box[1]), (box[2], cy), (cx, box[3]), (box[0], cy)]
        elif shape == "turned":
            thing.degrees = draw(st.sampled_from([30, 90, 45.5, 120, 340, -20]))
            turn = math.radians(thing.degrees)  # clockwise, as y points down
            thing.corners = [
                (cx + (px - cx) * math.cos(turn) - (py - cy) * math.sin(turn),
                 cy + (px - cx) * math.sin(turn) + (py - cy) * math.cos(turn))
                for px, py in thing.corners
            ]  # fmt: skip
        thing.points = [(cx - 2.5 + 3 * i, cy + 0.5) for i in range(keypoints.get(name, 0))]
        picture.things.append(thing)


@st.composite
def pictures(draw, classes=(), shapes=("rectangle", "diamond"), keypoints=None, least=1, most=4, frames=True):
    """Pictures with things of `classes`. `frames`: some are annotated in the frame of the stored pixels."""
    made = []
    for number in range(draw(st.sampled_from([*range(least + 1, most + 1), least]))):
        suffix = draw(st.sampled_from(list(FILES)))
        picture = Picture(number, draw(st.sampled_from(SIZES)), suffix)
        if FILES[suffix] in _WITH_EXIF:
            picture.orientation = draw(st.sampled_from([1, 1, 1, 1, 6, 8, 5, 7, 6, 8, 2, 3, 4]))
            picture.as_stored = picture.orientation > 4 and frames and draw(st.sampled_from([True, True, False]))
        if classes:
            draw(things_of(picture, classes, shapes, keypoints or {}))
        made.append(picture)
    return made


# strategies of names


@dataclass
class Place:
    """The name that annotations give a picture, and where its file lies below the image folder, None if it is missing.

    `found`: whether the listed name must lead to the file; `twin`: whether another listed name is similar.
    """

    listed: str
    stored: str | None
    found: bool = True
    twin: bool = False


STEMS = ["{}", "frame {}", "caf\u00e9 {}", "v1.{}", "100% {}"]
FOLDERS = ["", "cam1/", "day one/cam\u00e9/"]


def draw_name(draw, picture):
    """(folder, stem) of a name for a picture's file."""
    return draw(st.sampled_from(FOLDERS)), draw(st.sampled_from(STEMS)).format(picture.number)


def _moved(name):
    return name.rpartition("/")[2]


WAYS = {  # a name as listed for a file of that name
    "same": lambda name: name,
    "dot": lambda name: "./" + name,
    "backslash": lambda name: name.replace("/", "\\"),
    "quoted": quote,
    "composed": lambda name: unicodedata.normalize("NFC", name),
    "decomposed": lambda name: unicodedata.normalize("NFD", name),
    "suffix case": lambda name: name[: name.rindex(".")] + name[name.rindex(".") :].swapcase(),
    "other machine": lambda name: "/home/ann/" + _moved(name),
    "windows": lambda name: "C:\\data\\" + _moved(name),
    "missing": lambda name: name,
}


@st.composite
def places(draw, made, ways=tuple(WAYS), twins=True):
    """A `Place` for each picture. `twins`: two of the pictures may have names that could be taken for one another, in
    which case only a file at the very name that is listed may be taken."""
    given = []
    for picture in made:
        name = "".join(draw_name(draw, picture)) + picture.suffix
        name = unicodedata.normalize(draw(st.sampled_from(["NFC", "NFD"])), name)
        way = draw(st.sampled_from(["same"] * 10 + list(ways)))
        listed = WAYS[way](name)
        stored = name
        if way in ("other machine", "windows"):
            stored = _moved(name)
        given.append(Place(listed, None if way == "missing" else stored, way != "missing"))
    if twins and len(made) > 1 and draw(st.sampled_from([True, True, False])):
        same_suffix(*made[:2])
        given[:2] = draw(twin_places(made[0].suffix))
    return given


def same_suffix(first, second):
    """Makes two pictures files of one suffix."""
    second.suffix = first.suffix
    if FILES[first.suffix] not in _WITH_EXIF:
        second.orientation, second.as_stored = 1, False


@st.composite
def twin_places(draw, suffix):
    """The places of two pictures of equal bare names."""
    style = draw(st.sampled_from(["cameras", "cameras", "cameras", "top and camera", "respelt"]))
    listed = {
        "cameras": [f"cam1/0001{suffix}", f"cam2/0001{suffix}"],
        "top and camera": [f"0001{suffix}", f"cam2/0001{suffix}"],
        "respelt": [f"no 1{suffix}", f"no%201{suffix}"],
    }[style]
    twins = [Place(name, name, twin=True) for name in draw(st.permutations(listed))]
    lose_twin(draw, twins)
    return twins


def lose_twin(draw, twins):
    """Perhaps takes away the file of one of two twins; that of the other may then lie at the top. Each of the two is
    `stored` at its own name."""
    layout = draw(st.sampled_from(["flat", "flat", "one", "both"]))
    if layout == "both":
        return
    kept, other = draw(st.permutations(twins))
    top = _moved(kept.stored)
    if layout == "flat" and top != other.stored:
        kept.stored, kept.found = top, kept.stored == top
    other.stored, other.found = None, False


def stored_files(made, given):
    """The files of the image folder as {name: bytes}: the pictures, and what systems leave beside them."""
    pairs = zip(made, given, strict=True)
    return beside("images") | {f"images/{place.stored}": picture.data for picture, place in pairs if place.stored}


def beside(folder):
    """The files that systems leave in a folder of pictures, as {name: bytes}."""
    return {f"{folder}/{name}": data for name, data in BESIDE.items()}


def draw_fates(draw, made, given, contents, kinds):
    """By picture number whether it can be used: fine, missing, or one of `kinds`, of which broken ones are damaged."""
    fates = {}
    for picture, place in zip(made, given, strict=True):
        fate = draw(st.sampled_from(["fine"] * 4 * len(kinds) + list(kinds)))
        if fate == "broken" and place.stored is not None:
            contents[f"images/{place.stored}"] = picture.broken
        fates[picture.number] = fate if place.found else "missing"
    return fates


# spellings of values


def spelled(value):
    """An id or a whole number in the types that tools write it in."""
    if isinstance(value, str):
        return st.sampled_from([value, f" {value} "])
    return st.sampled_from([value, float(value), str(value), f"{value}.0"])


def spelled_flag(value):
    return st.sampled_from([1, "1", True, "true"] if value else [0, None, "0", False, "false", ""])


def spelled_numbers(draw, values):
    """A list of numbers as numbers or as texts."""
    return [str(v) for v in values] if draw(st.booleans()) else [float(v) for v in values]


def draw_size(draw, picture, fate, needed=False):
    """The (height, width) that annotations declare: wrong if that is the picture's `fate`, None if they need none."""
    if fate == "wrong size":
        return 7, 9
    return picture.size if needed or draw(st.booleans()) else None


def draw_size_keys(draw, picture, fate, needed=False):
    """The keys `height` and `width` of an image entry, by `draw_size`."""
    size = draw_size(draw, picture, fate, needed)
    if size is None:
        return {}
    height, width = (draw(spelled(side)) for side in size)
    return {"height": height, "width": width}


# the truth, and the check


@dataclass
class Expected:
    """How a thing must come out: `mask`: whether it has one; `visible`: v of its keypoints."""

    mask: bool = False
    crowd: bool = False
    visible: list | None = None


@dataclass
class Truth:
    """What must be in the shards.

    `ids`: image id of each picture that must have a row, by number, or the ids that its rows may have (None: any).
    `things`: those that must be instances, by key. `classes`: those that a picture's row must have, since nothing of
    them was lost; `known`: all classes that there are. `adrift`: keys of things whose annotation names no picture:
    their class must leave the pictures without an object of it. `texts`: number of messages or phrases of each picture.
    `answers`: texts that must be there, as the source's test compares them. `came_in` and `written`: number of records
    by kind. `refused`: whether the whole input must be refused.
    """

    pictures: list
    ids: dict = field(default_factory=dict)
    things: dict = field(default_factory=dict)
    classes: dict = field(default_factory=dict)
    known: set = field(default_factory=set)
    adrift: set = field(default_factory=set)
    texts: dict = field(default_factory=dict)
    answers: dict = field(default_factory=dict)
    came_in: Counter = field(default_factory=Counter)
    written: Counter = field(default_factory=Counter)
    refused: bool = False


@dataclass
class ColouredSet:
    """A data set: its files, its truth, and the options of its source."""

    contents: dict
    truth: Truth
    options: dict = field(default_factory=dict)

    def _repr_pretty_(self, printer, cycle):
        """How hypothesis shows a failing example: texts whole, pictures by their size."""
        for name, data in self.contents.items():
            if isinstance(data, bytes) and name.endswith(".xml"):
                data = data.decode("utf-16" if data[:1] == b"\xff" else "utf-8", "replace")
            printer.text(f"\n{name}: {data if isinstance(data, str) else f'{len(data)} bytes'}")
        printer.text(f"\noptions: {self.options}\ntruth: {self.truth}\n")


def for_sets(sets):
    """Decorates a test that takes a data set as `made`: it runs for 60 of them, the same ones every time."""

    def decorate(test):
        settings = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
        return settings(hypothesis.given(made=sets)(test))

    return decorate


def check(made, make_source):
    """Prepares the set and compares its rows with the truth. `make_source`: the source of a folder and the options.

    Returns the rows by picture number.
    """
    truth = made.truth
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "in", made.contents)
        source = make_source(f"{folder}/in", **made.options)
        if truth.refused:
            with pytest.raises(UserError):
                prepared(source, f"{folder}/out")
            return {}
        rows, rejected, counts = prepared(source, f"{folder}/out")
        stored = shards.read_manifest(f"{folder}/out")["rows"]
    assert len(rows) == stored, "image ids are unique"
    assert all(record["rule"] and record["mend"] and record["reason"] and record["origin"] for record in rejected)
    by_picture = {}
    for name, row in rows.items():
        by_picture.setdefault(None if row["image"] is None else check_row(truth, name, row), []).append(row)
    assert set(by_picture) - {None} == set(truth.ids), "every picture that can be used has a row, and no other"
    none = {"in": 0, "written": 0}
    assert {kind: counts.get(kind, none)["in"] for kind in truth.came_in} == dict(truth.came_in)
    assert {kind: counts.get(kind, none)["written"] for kind in truth.written} == dict(truth.written)
    return by_picture


def check_row(truth, name, row):
    """The number of the picture in a row whose id, size, instances, classes and texts belong to it."""
    pixels = decode(row["image"])
    number, version = picture_in(row["image"])
    assert version == 0, "it is no edited picture"
    picture = truth.pictures[number]
    assert number in truth.ids, "it is a picture that can be used"
    ids = truth.ids[number] if isinstance(truth.ids[number], set) else {truth.ids[number]}
    assert name in ids or None in ids, "the row's id is that of its picture"
    assert (row["height"], row["width"]) == pixels.shape[:2]
    found = {check_instance(truth, picture, pixels, instance) for instance in row["instances"]}
    assert len(found) == len(row["instances"]), "no object is there twice"
    wanted = {key for key in truth.things if key[0] == number}
    assert found == wanted, "exactly the objects whose annotation can be used are there"
    for thing in picture.things:
        some = {instance["phrase"] for instance in row["instances"]} if thing.key in truth.adrift else set()
        complete = thing.name in row["classes"] and thing.name not in some
        assert not complete or thing.key in found, "no class of a lost object is taken for complete"
    assert truth.classes.get(number, set()) <= set(row["classes"]), "no class leaves without a loss"
    assert set(row["classes"]) <= truth.known
    for message in row["messages"]:
        assert picture.text in " ".join(turn["content"] for turn in message["turns"]), "a text is of its picture"
    for phrase in row["phrases"]:
        assert picture.text in phrase["phrase"], "a phrase is of its picture"
    if number in truth.texts:
        assert len(row["messages"]) + len(row["phrases"]) == truth.texts[number]
    return number


def thing_at(picture, pixels, x, y):
    """The thing of the picture that is drawn at a place."""
    at = pixels[int(y), int(x)]
    for thing in picture.things:
        if looks_like(at[:2], colour(*thing.key)[:2]) and at[2] > 64:
            return thing
    raise AssertionError(f"at {x}, {y} of picture {picture.number} is no object of it, but the colour {at}")


def region_of(thing, pixels):
    """The pixels of a thing with its keypoints, bool [H, W]."""
    return looks_like(pixels[..., :2], colour(*thing.key)[:2]) & (pixels[..., 2] > 64)


def check_instance(truth, picture, pixels, instance):
    """The key of the thing that an instance lies on, with box, mask and keypoints."""
    x1, y1, x2, y2 = instance["box"]
    thing = thing_at(picture, pixels, (x1 + x2) / 2, (y1 + y2) / 2)
    assert thing.key in truth.things, "only an object whose annotation can be used is there"
    assert instance["phrase"] == thing.name
    check_box(thing, pixels, instance["box"])
    expected = truth.things[thing.key]
    assert instance["crowd"] == expected.crowd
    assert (instance["mask"] is not None) == expected.mask
    if expected.mask:
        check_mask(thing, pixels, instance["mask"])
    assert (instance["keypoints"] is not None) == (expected.visible is not None)
    if expected.visible is not None:
        check_keypoints(thing, pixels, instance["keypoints"], expected.visible)
    return thing.key


def check_box(thing, pixels, box):
    """A box must be that of the thing's pixels: exactly that of a rectangle, else to 1.5 pixels."""
    ys, xs = np.nonzero(region_of(thing, pixels))
    drawn = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert np.abs(np.subtract(box, drawn)).max() <= (0.05 if thing.is_upright else 1.5), (box, drawn)


def check_mask(thing, pixels, mask):
    """A mask must cover the thing's pixels: exactly those of a rectangle, else most."""
    region = region_of(thing, pixels)
    covered = coco_mask.decode(mask).astype(bool)
    assert covered.shape == region.shape
    overlap = (covered & region).sum() / (covered | region).sum()
    assert overlap > (0.98 if thing.is_upright else 0.85), overlap


def check_keypoints(thing, pixels, keypoints, visible):
    """Keypoints must be as visible as given and lie on their dots."""
    assert keypoints[2::3] == visible
    for place, (x, y, v) in enumerate(zip(keypoints[::3], keypoints[1::3], visible, strict=True)):
        if v:
            assert looks_like(pixels[int(y), int(x)], colour(*thing.key, blue=dot(place))), "a keypoint is on its dot"
