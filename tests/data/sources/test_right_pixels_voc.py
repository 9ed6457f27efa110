"""Pascal VOC: the boxes and masks of every xml file lie on the picture that it was drawn for."""

import math
import unicodedata
from dataclasses import dataclass, field
from urllib.parse import quote
from xml.sax.saxutils import escape

import numpy as np
from hypothesis import strategies as st
from PIL import Image
from support.coloured_sets import (
    ColouredSet,
    Expected,
    Picture,
    Truth,
    beside,
    check,
    draw_name,
    draw_size,
    for_sets,
    lose_twin,
    pictures,
    same_suffix,
    spelled_flag,
)
from support.source_fakes import encoded

from lumen_ray.data.sources.voc import VocSource

CLASSES = ["cat", "dog", "V\u00f6gel"]
#: how a picture belongs to its xml, see `draw_sheets`
WAYS = ["own"] * 8 + ["tag", "bare", "filename", "top", "path", "windows", "decomposed", "quoted", "missing"]
ENCODINGS = ["utf-8", "utf-8", "latin-1", "utf-16"]
BAD_BOXES = [("x", 1, 5, 5), (None, 2, 3, 4), ("nan", 2, 3, 4), (20, 20, 10, 10), (900, 900, 950, 950)]


@dataclass
class Sheet:
    """An xml file and its picture.

    `xml` and `stored`: their names below their folders; `found`: whether the picture is told by the names; `fate`:
    fine, or why the xml or its picture cannot be used; `copied`: names of the objects in another xml of its picture.
    """

    picture: Picture
    xml: str
    stored: str | None
    filename: str = ""
    folder: str = ""
    found: bool = True
    twin: bool = False
    fate: str = "fine"
    copied: set = field(default_factory=set)
    objects: list = field(default_factory=list)

    @property
    def is_read(self):
        return self.fate not in ("not xml", "other split")


@dataclass
class Object:
    """An object of an xml: `fate`: fine, repeated, empty, or why it is lost: lost (its box), flag, nameless; `box`: as
    written, None if turned."""

    name: str
    fate: str
    xml: str
    thing: object = None
    expected: Expected | None = None
    box: tuple | None = None


@st.composite
def voc_sets(draw):
    made = draw(pictures(CLASSES, ("rectangle", "diamond", "turned")))
    first_pixel = draw(st.sampled_from([1, 0]))
    has_split = draw(st.sampled_from([False, False, True]))
    sheets = draw_sheets(draw, made, blanks=not has_split)
    options = {"difficult": draw(st.sampled_from(["crowd", "object"])), "masks": draw(st.booleans())}
    options |= {"split": has_split, "first_pixel": draw(st.sampled_from([None, first_pixel]))}
    contents = beside("images") | {"xml/._0.xml": b"\0\5\26\7"}
    for sheet in sheets:
        if sheet.stored is not None:
            contents[f"images/{sheet.stored}"] = sheet.picture.data
    for sheet in sheets:
        draw_fate(draw, sheet, sheets, contents, has_split)
        for thing in sheet.picture.things:
            draw_objects(draw, sheet, thing, first_pixel, options)
        if draw(st.booleans()) and options["first_pixel"] is not None:
            sheet.objects.append(draw_empty(draw, first_pixel))
    sheets += draw_copies(draw, sheets)
    if options["first_pixel"] is None and first_pixel == 0 and not proves_zero(sheets):
        options["first_pixel"] = 0
    if options["masks"]:
        contents["masks/.DS_Store"] = b"Bud1"
        for sheet in sheets:
            draw_mask(draw, sheet, sheets, contents)
    for sheet in sheets:
        contents[f"xml/{sheet.xml}.xml"] = to_xml(draw, sheet)
    missing = ["missing"] if has_split else []  # an xml that the split lists but that is not there
    if has_split:
        names = [sheet.xml for sheet in sheets if sheet.fate != "other split"]
        contents["split.txt"] = "".join(f"{n}{draw(st.sampled_from(['', ' 1', '  -1']))}\n" for n in names + missing)
    return ColouredSet(contents, truth_of(made, sheets, options, missing), options)


def draw_sheets(draw, made, blanks):
    """The names of each picture and its xml; two of them may have equal bare names."""
    sheets = []
    for picture in made:
        folder, stem = draw_name(draw, picture)
        if not blanks:  # a list of a split ends a name at a blank
            folder, stem = folder.replace(" ", "_"), stem.replace(" ", "_")
        name = stem + picture.suffix
        sheets.append(
            {
                "own": Sheet(picture, folder + stem, folder + name, draw(st.sampled_from([name, "", "old name.jpg"]))),
                "tag": Sheet(picture, stem, folder + name, name, folder.rstrip("/")),
                "bare": Sheet(picture, folder + stem, name),
                "filename": Sheet(picture, f"{folder}x{picture.number}", folder + name, name),
                "top": Sheet(picture, f"{folder}x{picture.number}", name, name),
                "path": Sheet(picture, f"x{picture.number}", folder + name, folder.replace("/", "\\") + name),
                "windows": Sheet(picture, f"x{picture.number}", name, f"C:\\data\\{name}"),
                "decomposed": Sheet(picture, folder + unicodedata.normalize("NFD", stem), folder + name),
                "quoted": Sheet(picture, folder + quote(stem), folder + name),
                "missing": Sheet(picture, folder + stem, None, name, found=False),
            }[draw(st.sampled_from(WAYS))]
        )
    if len(made) > 1 and draw(st.booleans()):
        sheets[:2] = draw_twins(draw, *made[:2])
    return sheets


def draw_twins(draw, first, second):
    """Two xml files of equal bare names, each in a folder of its own or one at the top."""
    same_suffix(first, second)
    stems = draw(st.permutations(draw(st.sampled_from([["cam1/0001", "cam2/0001"], ["0001", "cam2/0001"]]))))
    filename = draw(st.sampled_from(["", "0001" + first.suffix, "cam"]))
    twins = []
    for picture, stem in zip((first, second), stems, strict=True):
        own = stem + picture.suffix
        twins.append(Sheet(picture, stem, own, own if filename == "cam" else filename, twin=True))
        twins[-1].folder = draw(st.sampled_from(["", stem.rpartition("/")[0]]))
    lose_twin(draw, twins)
    return twins


def draw_fate(draw, sheet, sheets, contents, has_split):
    """Damages the xml, its picture or its file name in some way."""
    fates = ["not xml", "broken", "wrong size", "other picture", "two pictures"] + ["other split"] * has_split
    sheet.fate = draw(st.sampled_from(["fine"] * 20 + fates + ["other picture"]))
    if sheet.twin and sheet.fate == "fine":
        sheet.fate = draw(st.sampled_from(["fine", "fine", "fine", "not xml"] + ["other split"] * has_split))
    if sheet.fate == "broken" and sheet.stored is not None:
        contents[f"images/{sheet.stored}"] = sheet.picture.broken
    elif sheet.fate == "two pictures":
        others = [f"{sheet.xml}{suffix}" for suffix in (".bmp", ".gif")]
        if sheet.twin or any(f"images/{name}" in contents for name in others):
            sheet.fate = "fine"
        else:
            sheet.filename = ""
            contents |= {f"images/{name}": Picture(9, (48, 72)).data for name in others}
    elif sheet.fate == "other picture":
        others = [o.stored for o in sheets if o is not sheet and not o.twin and o.stored == o.xml + o.picture.suffix]
        if sheet.stored != sheet.xml + sheet.picture.suffix or sheet.twin or not others:
            sheet.fate = "fine"
        else:
            sheet.filename = draw(st.sampled_from(others))


def draw_objects(draw, sheet, thing, first_pixel, options):
    """The objects of an xml for a thing."""
    crowd = draw(st.sampled_from([False, False, True]))
    expected = Expected(mask=thing.degrees != 0, crowd=crowd and options["difficult"] == "crowd")
    made = Object(thing.name, "fine", "", thing, expected)
    made.fate = draw(st.sampled_from(["fine"] * 10 + ["lost", "flag", "nameless", "repeated"]))
    difficult = draw(spelled_flag(crowd))
    difficult = draw(st.sampled_from(["maybe", "2"])) if made.fate == "flag" else difficult
    more = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    if draw(st.booleans()):
        more += (
            "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>"
        )
    x1, y1, x2, y2 = thing.extent if thing.degrees == 0 else thing.box
    made.box = (x1 + first_pixel, y1 + first_pixel, x2, y2)
    if thing.degrees and draw(st.booleans()):
        made.box = None
        turned = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, math.radians(thing.degrees)]
        place = tags("robndbox", ("cx", "cy", "w", "h", "angle"), turned)
    else:
        if thing.degrees:
            attribute = f"<name>rotation</name><value>{thing.degrees}</value>"
            more += f"<attributes><attribute>{attribute}</attribute></attributes>"
        if made.fate == "lost":
            made.box = draw(st.sampled_from(BAD_BOXES))
        shown = draw(st.sampled_from(["{}", " {} ", "{}.0"]))
        place = tags("bndbox", ("xmin", "ymin", "xmax", "ymax"), made.box, shown)
    if made.fate == "lost" and made.box is None:
        made.fate = "fine"
    name = {"nameless": draw(st.sampled_from(["", "<name> </name>"]))}.get(made.fate, f"<name> {thing.name}</name>")
    made.xml = f"<object>{name}<pose>Left</pose>{more}{place}</object>"
    sheet.objects.append(made)
    if made.fate == "repeated":
        made.fate = "fine"
        sheet.objects.append(Object(made.name, "repeated", made.xml, box=made.box))


def draw_copies(draw, sheets):
    """Second xml files of pictures, which hold some of their objects."""
    copies = []
    for sheet in sheets:
        can = sheet.stored == sheet.xml + sheet.picture.suffix and sheet.found and sheet.fate == "fine"
        can = can and all(found.thing is not None for found in sheet.objects)
        if can and draw(st.sampled_from([False, False, False, True])):
            copy = Sheet(sheet.picture, f"copy{sheet.picture.number}", None, sheet.stored, found=False, fate="copy")
            copy.objects, sheet.objects = sheet.objects[:1], sheet.objects[1:]
            sheet.copied = {found.name if found.fate != "nameless" else "" for found in copy.objects}
            copies.append(copy)
    return copies


def tags(name, keys, values, shown="{}"):
    inside = "".join(f"<{k}>{shown.format(v)}</{k}>" for k, v in zip(keys, values, strict=True) if v is not None)
    return f"<{name}>{inside}</{name}>"


def draw_empty(draw, first_pixel):
    """A box without area, where nothing is drawn."""
    name = draw(st.sampled_from(CLASSES))
    box = (9 + first_pixel, 9, 9, 14)
    place = tags("bndbox", ("xmin", "ymin", "xmax", "ymax"), box)
    return Object(name, "empty", f"<object><name>{name}</name>{place}</object>", box=box)


def proves_zero(sheets):
    """Whether a box that is read has a coordinate 0."""
    boxes = [found.box for sheet in sheets if sheet.is_read for found in sheet.objects if found.box is not None]
    return any(0 in box[:2] for box in boxes if all(isinstance(v, int | float) for v in box))


def draw_mask(draw, sheet, sheets, contents):
    """The mask file of an xml: below its own path, or by its bare name, which may be that of another xml."""
    kinds = ["flat", "own"] if sheet.twin else ["own", "own", "flat", "none", "another size", "one too many"]
    kind = draw(st.sampled_from(kinds))
    if kind == "none" or any(found.fate == "repeated" for found in sheet.objects):
        return
    name = sheet.xml if kind != "flat" else sheet.xml.rpartition("/")[2]
    if f"masks/{name}.png" in contents or any(o.xml == name for o in sheets if o is not sheet):
        return
    labels = np.zeros(sheet.picture.size, np.uint8)
    for place, found in enumerate(sheet.objects, start=1):
        if found.thing is not None:
            pixels = found.thing.pixels(labels.shape)
            near = np.any([np.roll(pixels, step, axis) for step in (-1, 1) for axis in (0, 1)], axis=0)
            labels[near & (labels == 0)] = 255
            labels[pixels] = place
    labels = labels[:20] if kind == "another size" else labels
    if kind == "one too many":
        labels[0, -1] = len(sheet.objects) + 1
    image = Image.fromarray(labels)
    if draw(st.booleans()):
        image.putpalette([255 - v // 3 for v in range(768)])
    contents[f"masks/{name}.png"] = encoded(image)
    if kind in ("own", "flat") and not (kind == "flat" and sheet.twin and name != sheet.xml):
        for found in sheet.objects:
            if found.expected is not None:
                found.expected.mask = True
            if found.fate == "lost":
                found.fate = "fine"  # its box is that of its mask


def to_xml(draw, sheet):
    """The xml file."""
    if sheet.fate == "not xml":
        return b"<annotation><object></annotation>"
    size = draw_size(draw, sheet.picture, sheet.fate, sheet.picture.as_stored)
    shown = ""
    if size is not None:
        shown = f"<size><width>{size[1]}</width><height> {size[0]}.0</height><depth>3</depth></size>"
    encoding = draw(st.sampled_from(ENCODINGS))
    names = f"<folder>{escape(sheet.folder)}</folder><filename> {escape(sheet.filename)}</filename>"
    text = f"<annotation>{names}{shown}{''.join(found.xml for found in sheet.objects)}</annotation>"
    return f'<?xml version="1.0" encoding="{encoding}"?>{text}'.encode(encoding)


def truth_of(made, sheets, options, missing):
    """What must be in the shards."""
    truth = Truth(made)
    listed = [sheet for sheet in sheets if sheet.fate != "other split"]
    read = [sheet for sheet in sheets if sheet.is_read]
    truth.known = {found.name for sheet in read for found in sheet.objects if found.fate != "nameless"}
    truth.came_in = {"images": len(listed) + len(missing), "annotations": sum(len(s.objects) for s in read)}
    for sheet in read:
        if not sheet.found or sheet.fate != "fine":
            continue
        number = sheet.picture.number
        truth.ids[number] = sheet.stored
        lost = {found.name for found in sheet.objects if found.fate in ("lost", "flag")} | sheet.copied
        nameless = any(found.fate == "nameless" for found in sheet.objects) or "" in sheet.copied
        truth.classes[number] = set() if nameless else truth.known - lost
        truth.things |= {found.thing.key: found.expected for found in sheet.objects if found.fate == "fine"}
    truth.written = {"images": len(truth.ids), "annotations": len(truth.things)}
    unknown = [o for s in read if s.picture.number in truth.ids for o in s.objects if o.fate == "nameless"]
    truth.refused = not truth.ids or 2 * len(unknown) > truth.came_in["annotations"]
    # the xml of a twin may name the other's picture: that one is then not known to be complete
    twins = [sheet for sheet in read if sheet.twin]
    for sheet in twins:
        for other in twins:
            if other is not sheet and not other.found:
                truth.classes.get(sheet.picture.number, set()).clear()
    return truth


@for_sets(voc_sets())
def test_objects_lie_on_their_pictures(made):
    def source(folder, split, masks, **options):
        paths = {"split": f"{folder}/split.txt" if split else None, "masks": f"{folder}/masks" if masks else None}
        return VocSource(f"{folder}/xml", f"{folder}/images", **paths, **options)

    check(made, source)
