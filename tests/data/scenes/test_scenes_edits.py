"""Edits of scenes: the picture after an edit differs where the instruction says, and nowhere else."""

import io
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from lumen_ray.data.scenes import edits as scenes_edits
from lumen_ray.data.scenes import render as scenes
from lumen_ray.data.scenes import text as scenes_text
from lumen_ray.data.shards.schema import SCHEMA
from lumen_ray.data.sources.scenes import ScenesSource

SEED, SIDE = 11, 96


@pytest.fixture(scope="module")
def pairs():
    made = [(scenes.render(SEED, i, SIDE), scenes_edits.scene_edit(SEED, i, SIDE)) for i in range(250)]
    return [(before, edit) for before, edit in made if edit is not None]


def named(objects, expression):
    """Indices of the objects an expression fits, computed from colours, shapes, areas and places."""
    words = expression.split()[1:]
    special = words.pop(0) if words[0] not in (*scenes.COLOURS, *scenes.SHAPES) else None
    members = [i for i, o in enumerate(objects) if set(words) <= {o.colour, o.shape}]
    keys = {
        "left": lambda i: objects[i].centre[0],
        "right": lambda i: -objects[i].centre[0],
        "top": lambda i: objects[i].centre[1],
        "bottom": lambda i: -objects[i].centre[1],
        "largest": lambda i: -objects[i].area,
        "smallest": lambda i: objects[i].area,
    }
    return [min(members, key=keys[special])] if special else members


def parse(instruction):
    """(expression, new colour or None)."""
    words = instruction.removeprefix("take away").split()
    removes = instruction.split()[0] in ("remove", "delete", "take")
    words = [w for w in words if w not in ("remove", "delete", "make", "change", "paint", "to")]
    return (" ".join(words), None) if removes else (" ".join(words[:-1]), words[-1])


def test_the_instruction_names_one_object_and_its_change(pairs):
    for before, edit in pairs:
        expression, colour = parse(edit.instruction)
        assert named(before.objects, expression) == [edit.index]
        assert colour == edit.colour
        names = [o.name for o in before.objects]
        if colour is None:
            del names[edit.index]
        else:
            assert colour != before.objects[edit.index].colour
            names[edit.index] = f"{colour} {before.objects[edit.index].shape}"
        assert [o.name for o in edit.after.objects] == names


def test_both_kinds_of_edit_and_all_colours_come_up_in_most_scenes(pairs):
    kinds = Counter(edit.colour for _, edit in pairs)
    assert set(kinds) == {None, *scenes.COLOURS}
    assert min(kinds.values()) > 20
    assert len(pairs) > 230


def test_pixels_outside_the_object_stay_and_those_inside_take_the_new_colour(pairs):
    channel = {"red": 0, "green": 1, "blue": 2}
    for before, edit in pairs:
        obj = before.objects[edit.index]
        near = np.zeros((SIDE, SIDE), bool)
        x1, y1, x2, y2 = map(int, obj.box)
        near[max(y1 - 12, 0) : y2 + 12, max(x1 - 12, 0) : x2 + 12] = True  # hidden parts stick out of the visible box
        assert (before.image == edit.after.image)[~near].all()
        assert (before.image != edit.after.image).any(-1)[obj.mask].mean() > 0.9
        if edit.colour is not None:
            assert edit.after.image[obj.mask].mean(0).argmax() == channel[edit.colour]
            assert (edit.after.objects[edit.index].mask == obj.mask).all()


def test_a_removed_object_uncovers_those_below(pairs):
    uncovered = 0
    for before, edit in pairs:
        if edit.colour is None:
            rest = [o for i, o in enumerate(before.objects) if i != edit.index]
            for old, new in zip(rest, edit.after.objects, strict=True):
                assert (new.mask >= old.mask).all()
                uncovered += new.area > old.area
    assert uncovered > 3


def test_objects_of_one_colour_do_not_touch_after_an_edit(pairs):
    for _, edit in pairs:
        for i, one in enumerate(edit.after.objects):
            for other in edit.after.objects[:i]:
                if one.colour == other.colour:
                    assert other.area == other.full_area or not (one.mask & other.mask).any()
        assert all(o.area >= scenes.MIN_VISIBLE * o.full_area for o in edit.after.objects)


def test_a_row_with_an_edit_is_the_row_without_and_the_edit():
    plain = [o.row for i in range(30) for o in ScenesSource(30, SEED, SIDE).rows(i, None)]
    edited = [o.row for i in range(30) for o in ScenesSource(30, SEED, SIDE, edits=True).rows(i, None)]
    assert any(row["target_image"] for row in edited)
    for before, row in zip(plain, edited, strict=True):
        if row["target_image"] is None:
            assert row == before
            continue
        *messages, message = row["messages"]
        assert message["task"] == row["tasks"][-1] == "edit"
        assert [t["role"] for t in message["turns"]] == ["user"]
        rest = {**row, "messages": messages, "tasks": row["tasks"][:-1], "target_image": None}
        assert rest == before
        target = np.asarray(Image.open(io.BytesIO(row["target_image"])))
        assert target.shape == (SIDE, SIDE, 3)
    assert pa.Table.from_pylist(edited, schema=SCHEMA).to_pylist() == edited


def test_scenes_without_an_expression_have_no_edit(monkeypatch):
    monkeypatch.setattr(scenes_text, "expressions", lambda objects, side: [])
    assert scenes_edits.scene_edit(SEED, 0, SIDE) is None
    row = scenes.scene_row(SEED, 0, SIDE)
    assert scenes_edits.with_edit(row, None) is row


def test_an_object_is_not_painted_as_one_it_touches():
    """Where both other colours touch an object it can only go."""
    seen = 0
    for index in range(400):
        drawn = scenes.sketch(SEED, index, SIDE)
        edit = scenes_edits.scene_edit(SEED, index, SIDE)
        if edit is None or edit.colour is None:
            continue
        inside = drawn.layers[edit.index].inside(SIDE)
        touching = [o for i, o in enumerate(drawn.layers) if i != edit.index and (o.inside(SIDE) & inside).any()]
        seen += len(touching)
        assert edit.colour not in [o.colour for o in touching]
    assert seen > 10
