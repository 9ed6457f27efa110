"""Edit triples: every instruction has its own picture, and that picture's own edited one."""

import csv
import io
import json
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from support.coloured_sets import (
    BESIDE,
    FILES,
    WAYS,
    ColouredSet,
    Picture,
    Place,
    Truth,
    check,
    for_sets,
    picture_in,
    pictures,
    places,
)

from lumen_ray.data.sources.edits import EditsSource

KINDS = [".csv", ".tsv", ".jsonl", ".parquet"]


@dataclass
class Triple:
    """A picture, its edited one, where both lie, and the instruction; `fate`: fine, or why it cannot be used."""

    picture: Picture
    before: Place
    after: Place
    instruction: str
    fate: str = "fine"
    edited: Picture | None = None

    @property
    def can_be_used(self):
        return self.fate == "fine" and self.before.found and self.after.found


def draw_triple(draw, picture, before, number):
    """An edit of a picture."""
    suffix = draw(st.sampled_from(list(FILES)))
    name = f"edited/{picture.number} after {number}{suffix}"
    way = draw(st.sampled_from(["same"] * 10 + list(WAYS)))
    stored = name.rpartition("/")[2] if way in ("other machine", "windows") else name
    after = Place(WAYS[way](name), None if way == "missing" else stored, way != "missing")
    triple = Triple(picture, before, after, f"{number}: make {picture.text} blue")
    triple.fate = draw(st.sampled_from(["fine"] * 10 + ["blank", "broken", "broken after", "shape", "reserved"]))
    if triple.fate in ("blank", "reserved"):
        triple.instruction = {"blank": " ", "reserved": f"{triple.instruction} [DET]"}[triple.fate]
    shown = picture.size[::-1] if picture.as_stored else picture.size
    triple.edited = Picture(picture.number, shown, suffix, version=1)
    if triple.fate == "shape":
        triple.edited.size = shown[::-1]
    return triple


def data_of(triple):
    """The encoded (picture, edited picture)."""
    before, after = triple.picture, triple.edited
    return (
        before.broken if triple.fate == "broken" else before.data,
        after.broken if triple.fate == "broken after" else after.data,
    )


# tables


@st.composite
def tables(draw):
    made = draw(pictures())
    contents = {"images/.DS_Store": b"Bud1"}
    triples = []
    for picture, place in zip(made, draw(places(made)), strict=True):
        first = len(triples)
        for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
            triples.append(draw_triple(draw, picture, place, len(triples)))
        if any(triple.fate == "broken" for triple in triples[first:]):  # the picture that they share
            triples[first:] = [replace(triple, fate="broken") for triple in triples[first:]]
        if len(triples) == first + 1 and not place.twin and draw(st.booleans()):
            same_names(draw, triples[-1])
    for triple in triples:
        for place, data in zip((triple.before, triple.after), data_of(triple), strict=True):
            if place.stored is not None:
                contents[f"images/{place.stored}"] = data
    files = draw(st.sampled_from([["one/data"], ["one/data", "two/data"]]))
    names = []
    for place, name in enumerate(files):
        part = draw(st.permutations(triples[place :: len(files)]))
        names.append(name + draw(st.sampled_from(KINDS)))
        contents[names[-1]] = to_table(draw, names[-1], part)
    return ColouredSet(contents, truth_of(made, triples), {"data": names})


def same_names(draw, triple):
    """Gives both pictures one name in two folders, of which perhaps only one is there, without its folder."""
    name = f"same {triple.picture.number}{triple.picture.suffix}"
    triple.edited.suffix = triple.picture.suffix
    before, after = (Place(f"{folder}/{name}", f"{folder}/{name}") for folder in ("before", "after"))
    layout = draw(st.sampled_from(["both", "flat", "one"]))
    if layout != "both":
        kept, other = draw(st.permutations([before, after]))
        kept.stored = name if layout == "flat" else kept.stored
        kept.found, other.found, other.stored = layout == "one", False, None
    triple.before, triple.after = before, after


def to_table(draw, name, triples):
    """The content of a table; parquet may hold the pictures' bytes."""
    columns = draw(st.sampled_from([("image", "instruction", "target_image"), ("before", "edit", "after")]))
    rows = [(triple.before.listed, triple.instruction, triple.after.listed) for triple in triples]
    if name.endswith(".jsonl"):
        return "\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows)
    if not name.endswith(".parquet"):
        buffer = io.StringIO()
        writer = csv.writer(buffer, delimiter="\t" if name.endswith(".tsv") else ",")
        writer.writerows([columns, *rows])
        return buffer.getvalue()
    arrays = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)] if rows else [[], [], []]
    if draw(st.booleans()):
        cells = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        data = [data_of(triple) for triple in triples]
        for column, side in ((0, 0), (2, 1)):
            held = [{"bytes": d[side], "path": row[column]} for d, row in zip(data, rows, strict=True)]
            arrays[column] = pa.array(held, cells)
        for triple in triples:
            triple.before = replace(triple.before, found=True)
            triple.after = replace(triple.after, found=True)
    buffer = io.BytesIO()
    pq.write_table(pa.table(arrays, names=columns), buffer, row_group_size=draw(st.sampled_from([1, 100])))
    return buffer.getvalue()


def truth_of(made, triples):
    """What must be in the shards, for tables."""
    truth = Truth(made, came_in={"edits": len(triples)})
    fine = [triple for triple in triples if triple.can_be_used]
    truth.written = {"edits": len(fine)}
    for triple in fine:
        name = triple.before.listed
        truth.ids.setdefault(triple.picture.number, set()).update([name, f"{name}#2", f"{name}#3"])
    truth.answers = sorted(triple.instruction for triple in fine)
    truth.refused = not fine
    return truth


# folders


@st.composite
def folders(draw):
    made = draw(pictures())
    root = draw(st.sampled_from(["data", "deep/data"]))
    contents, triples, truth = {f"{root}/.DS_Store": b"Bud1"}, [], Truth(made)
    held = {}  # folder: its triples, which have one instruction
    for picture in made:
        folder = draw(st.sampled_from(["000", f"00{picture.number}", f"shard/00{picture.number}", ""]))
        triple = draw_triple(draw, picture, Place("", ""), picture.number)
        triple.fate = draw(st.sampled_from([triple.fate] * 8 + ["one side", "two files"]))
        held.setdefault(folder, []).append(triple)
    for folder, inside in held.items():
        prompt = draw(st.sampled_from(["fine"] * 12 + ["none", "not json", "blank"]))
        text = "; ".join(triple.picture.text for triple in inside)
        path = f"{root}/{folder}/".replace("//", "/")
        given = {"not json": "{", "blank": json.dumps({"edit": " "})}.get(prompt, json.dumps({"edit": f"Blue: {text}"}))
        if prompt != "none":
            contents[f"{path}prompt.json"] = given
        contents |= {f"{path}{name}": data for name, data in BESIDE.items() if draw(st.booleans())}
        for triple in inside:
            seed = draw(st.sampled_from(["{}", "12{}", "a_{}"])).format(triple.picture.number)
            add_sides(draw, contents, f"{path}{seed}", triple)
            triple.fate = "fine" if triple.fate in ("blank", "reserved") else triple.fate
            if triple.fate == "fine" and prompt == "fine":
                place = "/".join(part for part in ("data", folder, seed) if part)
                truth.ids[triple.picture.number] = place
                triples.append(f"Blue: {text}")
    truth.came_in = {"edits": len(made)}
    truth.written = {"edits": len(truth.ids)}
    truth.answers, truth.refused = sorted(triples), not triples
    return ColouredSet(contents, truth, {"data": [root]})


def add_sides(draw, contents, path, triple):
    """The files of a triple."""
    before, after = data_of(triple)
    if triple.fate == "one side":
        side = draw(st.sampled_from([0, 1]))
        contents[f"{path}_{side}{triple.picture.suffix}"] = (before, after)[side]
        return
    contents[f"{path}_0{triple.picture.suffix}"] = before
    contents[f"{path}_1{triple.edited.suffix}"] = after
    if triple.fate == "two files":
        contents[f"{path}_1.pgm"] = after


def check_edits(made, images):
    """Every row has the edited picture of its own picture, and all instructions that can be used are there."""

    def source(folder, data):
        return EditsSource([f"{folder}/{name}" for name in data], f"{folder}/images" if images else None)

    rows = check(made, source)
    found = []
    for number, of_it in rows.items():
        for row in of_it:
            assert picture_in(row["target_image"]) == (number, 1), "the edited picture is that of the picture"
            found.append(row["messages"][0]["turns"][0]["content"])
    assert sorted(found) == (made.truth.answers if rows else [])


@for_sets(tables())
def test_edits_of_tables_belong_together(made):
    check_edits(made, images=True)


@for_sets(folders())
def test_edits_of_folders_belong_together(made):
    check_edits(made, images=False)
