"""Edits of the synthetic scenes: an instruction, and the scene rendered again with the change.

The rest of the image stays the same: background, noise, positions and shades of the other objects. An instruction
refers to exactly one object, and in the edited scene objects that touch still differ in colour.
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
    """`instruction`, e.g. "make the red circle blue"; `index`: of its object in the scene before; `colour`: the new
    one, None if the object is removed; `after`: the edited scene."""

    instruction: str
    index: int
    colour: str | None
    after: Scene


def scene_edit(seed: int, index: int, side: int = 128) -> SceneEdit | None:
    """An edit of scene `index` of the set `seed`, None if no expression matches exactly one object. A pure function of
    its arguments, with a separate random stream, so that images and texts of the scene do not depend on it."""
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
    """New colours for a layer, without those of objects that it touches, which would merge with it."""
    side = len(drawn.background)
    layer: Layer = drawn.layers[chosen]
    inside = layer.inside(side)
    touched = {other.colour for other in drawn.layers if other is not layer and (other.inside(side) & inside).any()}
    return [colour for colour in text.COLOURS if colour != layer.colour and colour not in touched]


def with_edit(row: dict[str, Any], edit: SceneEdit | None) -> dict[str, Any]:
    """A scene's row that also trains the task `edit`, with the edited scene as `target_image`. Without an edit, the row
    itself."""
    if edit is None:
        return row
    message = make_message("edit", edit.instruction, None)
    return {
        **row,
        "tasks": [*row["tasks"], "edit"],
        "messages": [*row["messages"], message],
        "target_image": encode_jpeg(edit.after.image),
    }
