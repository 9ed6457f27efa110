"""Edits of the synthetic scenes: an instruction, and the same scene rendered again with the change.

Everything else of the picture stays: background, noise, the other objects' places and shades. An instruction names
exactly one object, and what it asks for leaves a scene whose objects can still be told apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lumen_ray.data.scenes import text
from lumen_ray.data.scenes.render import Layer, Scene, Sketch, encode_jpeg, paint, sketch
from lumen_ray.data.shards.schema import make_message

_REMOVE_SHARE = 0.4


@dataclass(frozen=True)
class SceneEdit:
    """`instruction`, e.g. "make the red circle blue"; `index`: the object it names, in the order of the scene before;
    `colour`: its new one, None when it goes; `after`: the scene with the edit done."""

    instruction: str
    index: int
    colour: str | None
    after: Scene


def scene_edit(seed: int, index: int, side: int = 128) -> SceneEdit | None:
    """An edit of scene `index` of the set `seed`, None where no expression names just one of its objects. A pure
    function of its arguments, with a random stream of its own: pictures and texts of the scene do not depend on it."""
    rng = np.random.default_rng([seed, index, 2])
    drawn = sketch(seed, index, side)
    options = text.expressions(drawn.scene().objects, side)
    if not options:
        return None
    expression, chosen = options[rng.integers(len(options))]
    colours = _possible_colours(drawn, chosen)
    if not colours or rng.random() < _REMOVE_SHARE:
        colour, layers = None, [layer for i, layer in enumerate(drawn.layers) if i != chosen]
    else:
        colour = str(rng.choice(colours))
        changed = replace(drawn.layers[chosen], colour=colour, paint=paint(colour, rng))
        layers = [changed if i == chosen else layer for i, layer in enumerate(drawn.layers)]
    instruction = text.edit_instruction(expression, colour, rng)
    return SceneEdit(instruction, chosen, colour, replace(drawn, layers=layers).scene())


def _possible_colours(drawn: Sketch, chosen: int) -> list[str]:
    """Other colours for a layer that no object it touches has: objects of one colour would run into each other."""
    side = len(drawn.background)
    own: Layer = drawn.layers[chosen]
    inside = own.inside(side)
    touched = {o.colour for o in drawn.layers if o is not own and (o.inside(side) & inside).any()}
    return [colour for colour in text.COLOURS if colour != own.colour and colour not in touched]


def with_edit(row: dict[str, Any], edit: SceneEdit | None) -> dict[str, Any]:
    """A scene's row that also trains the task `edit`: its picture is what the edit starts from, `target_image` what it
    leads to. The row itself where there is no edit."""
    if edit is None:
        return row
    message = make_message("edit", edit.instruction, None)
    return {
        **row,
        "tasks": [*row["tasks"], "edit"],
        "messages": [*row["messages"], message],
        "target_image": encode_jpeg(edit.after.image),
    }
