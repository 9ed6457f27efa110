"""Image-text pairs: every caption stays with its picture, in tables of any kind and in tars."""

import csv
import io
import json
import tarfile
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from support.coloured_sets import (
    ColouredSet,
    Picture,
    Place,
    Truth,
    check,
    draw_fates,
    for_sets,
    pictures,
    places,
    stored_files,
)

from lumen_ray.data.sources.pairs import PairsSource

KINDS = [".csv", ".tsv", ".jsonl", ".parquet"]


@dataclass
class Pair:
    """A record of a table. `texts`: captions that must be written, none if the record must be rejected."""

    picture: Picture
    place: Place
    image: object
    caption: object
    texts: int
    has_name: bool = True


# tables


@st.composite
def tables(draw):
    made = draw(pictures())
    given = draw(places(made))
    contents = stored_files(made, given)
    fates = draw_fates(draw, made, given, contents, ("broken",))
    files = draw(st.sampled_from([["one/data"], ["one/data", "two/data"], ["one/data", "more"]]))
    kinds = {name: draw(st.sampled_from(KINDS)) for name in files}
    held = {name: [] for name in files}
    with_bytes = {name for name in files if kinds[name] == ".parquet" and draw(st.booleans())}
    for picture, place in zip(made, given, strict=True):
        for _ in range(draw(st.integers(1, 3))):
            name = draw(st.sampled_from(files))
            held[name].append(draw_pair(draw, picture, place, kinds[name], name in with_bytes, fates[picture.number]))
    for name, pairs in held.items():
        contents |= to_table(draw, name, kinds[name], draw(st.permutations(pairs)), name in with_bytes)
    pairs = [pair for pairs in held.values() for pair in pairs]
    return ColouredSet(contents, truth_of_tables(made, pairs), {"data": [n + kinds[n] for n in files]})


def draw_pair(draw, picture, place, kind, with_bytes, fate):
    """A picture with one or more captions; some cannot be used."""
    image, usable = place.listed, fate == "fine"
    pair = Pair(picture, place, image, "", 0)
    if with_bytes:
        pair.has_name = place.twin or draw(st.booleans())  # else nobody knows that another name is similar
        broken = draw(st.sampled_from([False, False, False, False, True]))
        pair.image = {"bytes": picture.broken if broken else picture.data, "path": image if pair.has_name else None}
        usable = not broken
    elif kind == ".jsonl" and draw(st.booleans()):
        pair.image = {"path": image}
    text = f"This is {picture.text}"
    captions = {"plain": text, "blanks": f" This \n is\t{picture.text} ", "quoted": f'"{text}", he said', "blank": " "}
    captions |= {"json": json.dumps([text, text]), "mark": "\ufeff" + text, "reserved": f"{text} [DET]"}
    kinds = ["plain"] * 6 + ["blanks", "quoted", "json", "mark", "blank", "reserved"]
    if kind == ".jsonl":
        captions |= {"list": [text, " ", text], "missing": None, "number": 3}
        kinds += ["list", "missing", "number"]
    chosen = draw(st.sampled_from(kinds))
    pair.caption = captions[chosen]
    bad = chosen in ("blank", "reserved", "missing", "number") or not usable
    pair.texts = 0 if bad else 2 if chosen in ("json", "list") else 1
    return pair


def to_table(draw, name, kind, pairs, with_bytes):
    """The table as {name: content}."""
    image, caption = draw(st.sampled_from([("image", "caption"), ("file_name", "text"), ("path", "title")]))
    records = [{"n": n, image: pair.image, caption: pair.caption} for n, pair in enumerate(pairs)]
    buffer = io.StringIO()
    if kind == ".jsonl":
        lines = [json.dumps(record) for record in records]
        if draw(st.booleans()):
            lines.insert(draw(st.integers(0, len(lines))), "")
        buffer.write("\ufeff" + "\r\n".join(lines))
    elif kind == ".parquet":
        return {name + kind: parquet(draw, records, image, caption, with_bytes)}
    else:
        buffer.write(draw(st.sampled_from(["", "\ufeff"])))
        writer = csv.writer(buffer, delimiter="\t" if kind == ".tsv" else ",")
        writer.writerows([["n", image, caption], *(record.values() for record in records)])
    return {name + kind: buffer.getvalue().encode()}


def parquet(draw, records, image, caption, with_bytes):
    """A parquet file of one or more row groups, perhaps with names as a dictionary, as pandas writes categories."""
    names = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if with_bytes else pa.string()
    columns = {
        "n": pa.array([record["n"] for record in records], pa.int64()),
        image: pa.array([record[image] for record in records], names),
        caption: pa.array([record[caption] for record in records], pa.string()),
    }
    if not with_bytes:
        kind = draw(
            st.sampled_from([pa.string(), pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
        )
        columns[image] = columns[image].cast(kind)
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=draw(st.sampled_from([1, 2, 100])))
    return buffer.getvalue()


def truth_of_tables(made, pairs):
    """What must be in the shards."""
    truth = Truth(made)
    truth.came_in = {"pairs": len(pairs)}
    truth.written = {"pairs": sum(pair.texts > 0 for pair in pairs)}
    for pair in pairs:
        if pair.texts:
            ids = truth.ids.setdefault(pair.picture.number, set())
            ids |= {f"{pair.place.listed}{n}" for n in ("", "#2", "#3")} if pair.has_name else {None}
    truth.refused = not truth.ids
    truth.answers = sorted((pair.picture.number, pair.texts) for pair in pairs if pair.texts)
    return truth


def check_captions(made, make_source):
    """Every picture has as many rows with as many captions as were given."""
    rows = check(made, make_source)
    found = [(number, len(row["messages"])) for number, of_it in rows.items() for row in of_it]
    assert sorted(found) == (made.truth.answers if rows else [])


@for_sets(tables())
def test_captions_of_tables_stay_with_their_pictures(made):
    def source(folder, data):
        return PairsSource([f"{folder}/{name}" for name in data], f"{folder}/images")

    check_captions(made, source)


# tars


@st.composite
def tars(draw):
    made = draw(pictures(least=2, most=6))
    truth = Truth(made, came_in={"pairs": 0}, written={"pairs": 0})
    names = draw(st.sampled_from([["0.tar"], ["0.tar", "1.tar"], ["a/0.tar", "b/0.tar"], ["0.tgz"]]))
    members = {name: [] for name in names}
    keys, last = {name: [] for name in names}, {}  # of each tar: keys of its samples, members of the last one
    answers = []
    for picture in made:
        name = draw(st.sampled_from(names))
        key = draw(st.sampled_from(["{:06}", "cam1/{:04}", "./day one/frame.{:03}", "caf\u00e9 {}"])).format(
            picture.number
        )
        again = draw(st.sampled_from([key, key, key, *keys[name]]))
        sample, texts = draw_sample(draw, picture, again)
        if keys[name] and again == keys[name][-1] and extensions(sample) != extensions(last[name]):
            sample, texts = draw_sample(draw, picture, key)  # side by side, the two would be one sample
            again = key
        key, last[name] = again, sample
        keys[name].append(key)
        members[name] += sample
        truth.came_in["pairs"] += 1
        if texts:
            shown = names[0].rpartition("/")[2] if len(set(names)) == 1 else name
            plain = key.removeprefix("./")
            truth.ids[picture.number] = {f"{shown}/{plain}", *(f"{shown}/{plain}#{n}" for n in range(2, 7))}
            truth.written["pairs"] += 1
            answers.append((picture.number, texts))
    truth.answers, truth.refused = sorted(answers), not answers
    truth.came_in["pairs"] += sum(not found for found in members.values())  # an empty tar is rejected, as one
    contents = {name: tar(draw, found, name) for name, found in members.items()}
    return ColouredSet(contents, truth, {"data": names})


def draw_sample(draw, picture, key):
    """(members of a sample, number of captions that must be written)."""
    text = f"This is {picture.text}"
    image = (key + picture.suffix, picture.data)
    hidden = [(f"{key.rpartition('/')[0] or '.'}/._{key.rpartition('/')[2]}{picture.suffix}", b"\0\5\26\7")]
    captions = {
        "txt": [(key + ".txt", f" {text}\n".encode())],
        "mark": [(key + ".txt", b"\xef\xbb\xbf" + text.encode())],
        "json": [(key + ".json", json.dumps({"caption": text, "n": 1}).encode())],
        "list": [(key + ".json", b"\xef\xbb\xbf" + json.dumps({"caption": [text, text]}).encode())],
        "both": [(key + ".txt", text.encode()), (key + ".json", b"not json")],
        "blank": [(key + ".txt", b" \n")],
        "not text": [(key + ".txt", b"\xff\xfe")],
        "no key": [(key + ".json", json.dumps({"title": text}).encode())],
        "broken": [(key + ".txt", text.encode())],
    }
    kind = draw(st.sampled_from(["txt", "txt", "txt", *captions]))
    image = (image[0], picture.broken) if kind == "broken" else image
    sample = draw(st.permutations([image, *captions[kind]]))
    if draw(st.booleans()):
        sample = hidden + sample
    return sample, {"txt": 1, "mark": 1, "json": 1, "list": 2, "both": 1}.get(kind, 0)


def extensions(sample):
    return {name.rpartition(".")[2].lower() for name, _ in sample}


def tar(draw, members, name):
    """The tar file, with an entry for its folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if name.endswith("gz") else "w") as file:
        folder = tarfile.TarInfo("./day one")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
        for member, data in members:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@for_sets(tars())
def test_captions_of_tars_stay_with_their_pictures(made):
    check_captions(made, lambda folder, data: PairsSource([f"{folder}/{name}" for name in data]))
