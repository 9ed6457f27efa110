"""Whatever is damaged in a set, in any format: no crash, and what came in is what was written and what was rejected."""

import copy
import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.source_fakes import coco_set, panoptic_set, prepared, voc_set, write, yolo_set

from lumen_ray.data.sources.coco import CocoSource
from lumen_ray.data.sources.panoptic import PanopticSource
from lumen_ray.data.sources.voc import VocSource
from lumen_ray.data.sources.yolo import YoloSource
from lumen_ray.errors import UserError

SETS = {
    "coco": (coco_set(), lambda d: CocoSource([f"{d}/instances.json", f"{d}/captions.json"], f"{d}/images")),
    "panoptic": (panoptic_set(), lambda d: PanopticSource(f"{d}/panoptic.json", f"{d}/segments", f"{d}/images")),
    "voc": (voc_set(), lambda d: VocSource(f"{d}/xml", f"{d}/images", f"{d}/split.txt", f"{d}/masks")),
    "yolo boxes": (yolo_set(), lambda d: YoloSource(f"{d}/data.yaml")),
    "yolo segments": (yolo_set("segments"), lambda d: YoloSource(f"{d}/data.yaml")),
    "yolo poses": (yolo_set("poses"), lambda d: YoloSource(f"{d}/data.yaml")),
}
ODD = [
    None,
    True,
    -1,
    0,
    3,
    0.5,
    1e300,
    float("nan"),
    float("inf"),
    10**30,
    "",
    "x",
    "<region>",
    "../x",
    [],
    {},
    [None],
]
ODD_WORDS = [
    "",
    "nan",
    "-1",
    "0",
    "1.5",
    "1e999",
    "x",
    "<",
    "&#0;",
    "[DET]",
    "\ud83e\udd80",
    "9" * 400,
    "[",
    ": ",
    "../x",
]


def places(value, path=()):
    """Paths to every value of a json document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def damage_json(draw, text):
    data = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(data))))
        if not path:
            continue
        holder = data
        for key in path[:-1]:
            holder = holder[key]
        if draw(st.booleans()):
            holder[path[-1]] = copy.deepcopy(draw(st.sampled_from(ODD)))  # or a list may come to hold itself
        else:
            del holder[path[-1]]
    return json.dumps(data)


def damage_words(draw, text):
    words = re.split(r"(\W)", text)
    for _ in range(draw(st.integers(1, 3))):
        words[draw(st.integers(0, len(words) - 1))] = draw(st.sampled_from(ODD_WORDS))
    return "".join(words)


def damage_bytes(draw, data):
    data = bytearray(data if isinstance(data, bytes) else data.encode())
    if not data or draw(st.booleans()):
        return bytes(data[: draw(st.integers(0, len(data)))])
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@st.composite
def damaged(draw, contents):
    contents = dict(contents)
    for name in draw(st.lists(st.sampled_from(sorted(contents)), min_size=1, max_size=3, unique=True)):
        how = draw(st.sampled_from(["words", "words", "bytes", "remove"]))
        if how == "remove":
            del contents[name]
        elif how == "bytes" or isinstance(contents[name], bytes):
            contents[name] = damage_bytes(draw, contents[name])
        else:
            text = (damage_json if name.endswith(".json") else damage_words)(draw, contents[name])
            contents[name] = text.encode("utf-8", "surrogatepass")
    return contents


@pytest.mark.parametrize("name", SETS)
def test_an_undamaged_set_loses_nothing(name, tmp_path):
    contents, source = SETS[name]
    rows, rejected, counts = prepared(source(write(tmp_path / "in", contents)), tmp_path / "out")
    assert rejected == []
    assert counts["images"]["in"] == len(rows) == sum("images/" in n for n in contents)
    assert counts["annotations"]["written"] > 0


@pytest.mark.parametrize("name", SETS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damage_is_rejected_and_counted(name, data):
    contents, source = SETS[name]
    changed = data.draw(damaged(contents))
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "in", changed)
        try:
            rows, rejected, _ = prepared(source(f"{folder}/in"), f"{folder}/out")
        except UserError as error:
            assert "\n" not in str(error)
            return
    assert all(r["reason"] and r["origin"] for r in rejected)
    for row in rows.values():
        for instance in row["instances"]:
            x1, y1, x2, y2 = instance["box"]
            assert 0 <= x1 < x2 <= row["width"] and 0 <= y1 < y2 <= row["height"]
