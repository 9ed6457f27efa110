"""Synthetic mixed-task scenes: coloured shapes and stick figures, fully annotated, a pure function of (seed, index).

The built-in default data set: it needs no download and trains every task. Shapes are drawn by signed distance, so
colours are antialiased and masks exact: a pixel belongs to an object if its centre lies inside.
"""

from __future__ import annotations

import colorsys
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from lumen_ray.data.scenes import text
from lumen_ray.data.scenes.region_questions import region_questions_of
from lumen_ray.data.scenes.text import CLASSES, COLOURS, SHAPES
from lumen_ray.data.shards.schema import make_row
from lumen_ray.keypoints import FIGURE_KEYPOINTS
from lumen_ray.structures import Masks

#: class -> names of its keypoints
SKELETONS: dict[str, tuple[str, ...]] = dict.fromkeys(("figure", *(f"{c} figure" for c in COLOURS)), FIGURE_KEYPOINTS)

MIN_VISIBLE = 0.75  # an object keeps at least this share of its pixels
_SIZES = {"figure": (32, 52), "circle": (22, 48), "square": (22, 48), "triangle": (26, 52)}  # pixels at side 128
_HUES = {"red": (0.99, 0.025), "green": (0.34, 0.05), "blue": (0.61, 0.035)}  # centre, half width
#: of scenes with 1, 2, ... 5 objects; from single objects a model learns which words belong to which appearance
_NUMBER_SHARES = (0.35, 0.25, 0.2, 0.12, 0.08)
_REGION_KINDS = ("box", "point", "scribble", "polygon", "mask")
_REGION_SHARES = (0.6, 0.1, 0.1, 0.1, 0.1)


@dataclass
class SceneObject:
    """One drawn object. `mask`: bool [side, side], visible pixels; `full_area`: pixels with hidden ones; `keypoints`:
    float32 [5, 3] (x, y, v) in pixels, or None."""

    colour: str
    shape: str
    mask: np.ndarray
    full_area: int
    keypoints: np.ndarray | None = None

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def area(self) -> int:
        """Number of visible pixels."""
        return int(self.mask.sum())

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The tight box of the visible pixels, xyxy, far edge exclusive."""
        xs, ys = np.flatnonzero(self.mask.any(0)), np.flatnonzero(self.mask.any(1))
        return float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the box's centre."""
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2


@dataclass
class Scene:
    """`image`: uint8 [side, side, 3] RGB; `objects` in drawing order (later ones on top)."""

    image: np.ndarray
    objects: list[SceneObject]


@dataclass(frozen=True)
class Layer:
    """One object before composition. `coverage`: float32 in 0..1 of the pixels at (rows, columns); `paint`: RGB float32
    [3] in 0..1; `keypoints`: float32 [5, 3] of a figure."""

    colour: str
    shape: str
    rows: slice
    columns: slice
    coverage: np.ndarray
    paint: np.ndarray
    keypoints: np.ndarray | None

    def inside(self, side: int) -> np.ndarray:
        """The pixels whose centre lies inside the object, hidden ones included: bool [side, side]."""
        pixels = np.zeros((side, side), bool)
        pixels[self.rows, self.columns] = self.coverage >= 0.5
        return pixels


@dataclass(frozen=True)
class Sketch:
    """The components of a scene. `background` and `noise`: float32 [side, side, 3] in 0..1; `layers` bottom first.

    The same sketch with other layers is an edit of the scene that changes nothing else.
    """

    background: np.ndarray
    layers: list[Layer]
    noise: np.ndarray

    def scene(self) -> Scene:
        """Composes the layers."""
        side = len(self.background)
        canvas = self.background.copy()
        objects: list[SceneObject] = []
        for layer in self.layers:
            _lay(layer, objects, side)
            at, alpha = (layer.rows, layer.columns), layer.coverage[..., None]
            canvas[at] = canvas[at] * (1 - alpha) + layer.paint * alpha
        for obj in objects:
            _mark_hidden_keypoints(obj, side)
        canvas += self.noise
        return Scene((np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8), objects)


def _polygon_distance(xy: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside) of points [h, w, 2] to a convex polygon [n, 2], vertices clockwise."""
    edges = np.roll(vertices, -1, axis=0) - vertices
    normals = np.stack([edges[:, 1], -edges[:, 0]], 1) / np.linalg.norm(edges, axis=1, keepdims=True)
    return np.max(xy @ normals.T - (vertices * normals).sum(1), axis=-1)


def _capsule_distance(xy: np.ndarray, start: np.ndarray, end: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance (negative inside) of points [h, w, 2] to the segment start-end thickened by `radius`."""
    axis = end - start
    along = np.clip((xy - start) @ axis / (axis @ axis), 0, 1)
    return np.linalg.norm(xy - start - along[..., None] * axis, axis=-1) - radius


def _figure_parts(rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """A pose in units of the figure's height, centre at the origin: keypoints [5, 2] and its limbs (start, end)."""
    head, neck, shoulder, hip = np.array([[0, -0.36], [0, -0.26], [0, -0.16], [0, 0.12]])
    raised = np.radians(rng.uniform(-60, 60, 2))
    spread = np.radians(rng.uniform(10, 38, 2))
    side = np.array([-1, 1])
    hands = shoulder + 0.34 * np.stack([side * np.cos(raised), np.sin(raised)], 1)
    feet = hip + 0.36 * np.stack([side * np.sin(spread), np.cos(spread)], 1)
    limbs = [(neck, hip), *((shoulder, hand) for hand in hands), *((hip, foot) for foot in feet)]
    return np.stack([head, *hands, *feet]), limbs


def _draw(shape: str, size: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    """Coverage float32 [p, p] in 0..1 of one object on a patch, and for figures its keypoints [5, 2] in the patch."""
    angle = np.radians(rng.uniform(-15, 15) if shape == "figure" else rng.uniform(-22, 22))
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])  # for row vectors
    patch = int(np.ceil(size * 1.35)) + 2
    centre = patch / 2 + rng.uniform(-0.5, 0.5, 2)
    pixel = np.arange(patch) + 0.5
    xy = np.stack(np.meshgrid(pixel, pixel), -1) - centre
    keypoints = None
    if shape == "circle":
        distance = np.linalg.norm(xy, axis=-1) - size / 2
    elif shape == "figure":
        points, limbs = _figure_parts(rng)
        points = points * size @ rotation
        distance = np.linalg.norm(xy - points[0], axis=-1) - 0.135 * size
        for start, end in limbs:
            part = _capsule_distance(xy, start * size @ rotation, end * size @ rotation, 0.06 * size)
            distance = np.minimum(distance, part)
        keypoints = points + centre
    else:
        corners = {"square": (-135, -45, 45, 135), "triangle": (-90, 30, 150)}[shape]
        radius = size * (0.62 if shape == "square" else 0.6)
        turns = np.radians(corners)
        vertices = radius * np.stack([np.cos(turns), np.sin(turns)], 1) @ rotation
        distance = _polygon_distance(xy, vertices)
    return np.clip(0.5 - distance, 0, 1).astype(np.float32), keypoints


def paint(colour: str, rng: np.random.Generator) -> np.ndarray:
    """A jittered shade of a colour, float32 [3] in 0..1."""
    centre, half_width = _HUES[colour]
    hue = (centre + rng.uniform(-half_width, half_width)) % 1
    return np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.7, 1.0), rng.uniform(0.6, 0.95)), np.float32)


def _background(side: int, rng: np.random.Generator) -> np.ndarray:
    """A soft light grey gradient, float32 [side, side, 3] in 0..1."""
    ends = rng.uniform(0.6, 1.0, (2, 1)) + rng.uniform(-0.03, 0.03, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    t = np.float32(np.cos(angle)) * ramp[None, :] + np.float32(np.sin(angle)) * ramp[:, None]
    t = (t - t.min()) / np.ptp(t)
    ends = np.clip(ends, 0, 1).astype(np.float32)
    return ends[0] + t[..., None] * (ends[1] - ends[0])


def _fits(inside: np.ndarray, rows: slice, columns: slice, colour: str, objects: list[SceneObject]) -> bool:
    """Whether a new object fits there: it hides little of the others and touches none of the same colour."""
    for other in objects:
        hidden = int((other.mask[rows, columns] & inside).sum())
        if hidden and (other.colour == colour or other.area - hidden < MIN_VISIBLE * other.full_area):
            return False
    return True


def _place(
    coverage: np.ndarray, colour: str, objects: list[SceneObject], side: int, rng: np.random.Generator
) -> tuple[slice, slice, np.ndarray, np.ndarray] | None:
    """A free place for a patch: rows, columns, cropped coverage, offset (x, y) of the patch; None after 12 tries."""
    ys, xs = np.flatnonzero(coverage.any(1)), np.flatnonzero(coverage.any(0))
    crop = coverage[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    height, width = crop.shape
    for _ in range(12):
        y, x = int(rng.integers(0, side - height + 1)), int(rng.integers(0, side - width + 1))
        rows, columns = slice(y, y + height), slice(x, x + width)
        if _fits(crop >= 0.5, rows, columns, colour, objects):
            return rows, columns, crop, np.array([x - xs[0], y - ys[0]])
    return None


def sketch(seed: int, index: int, side: int = 128) -> Sketch:
    """The components of scene `index` of the set `seed`: 1 to 5 layers. Deterministic."""
    rng = np.random.default_rng([seed, index])
    background = _background(side, rng)
    layers: list[Layer] = []
    objects: list[SceneObject] = []
    number = 1 + int(rng.choice(5, p=_NUMBER_SHARES))
    for _ in range(number):
        if objects and rng.random() < 0.35:  # repeat a class, for counts above 1 and phrases like "the left one"
            model = objects[rng.integers(len(objects))]
            colour, shape = model.colour, model.shape
        else:
            colour, shape = COLOURS[rng.integers(3)], SHAPES[rng.integers(4)]
        size = rng.uniform(*_SIZES[shape]) * side / 128 * (1 if number < 4 else 0.9)
        coverage, keypoints = _draw(shape, size, rng)
        if (place := _place(coverage, colour, objects, side, rng)) is None:
            continue
        rows, columns, crop, offset = place
        if keypoints is not None:
            keypoints = np.concatenate([keypoints + offset, np.full((5, 1), 2.0)], 1).astype(np.float32)
        layers.append(Layer(colour, shape, rows, columns, crop, paint(colour, rng), keypoints))
        _lay(layers[-1], objects, side)
    noise = rng.standard_normal(background.shape, dtype=np.float32) * np.float32(rng.uniform(0.005, 0.025))
    return Sketch(background, layers, noise)


def _lay(layer: Layer, objects: list[SceneObject], side: int) -> None:
    """Adds the layer's object on top of `objects` and removes the pixels it hides from their masks."""
    inside = layer.inside(side)
    for other in objects:
        other.mask &= ~inside
    keypoints = None if layer.keypoints is None else layer.keypoints.copy()
    objects.append(SceneObject(layer.colour, layer.shape, inside, int(inside.sum()), keypoints))


def render(seed: int, index: int, side: int = 128) -> Scene:
    """Renders scene `index` of the set `seed`: 1 to 5 objects on a `side` x `side` image. Deterministic."""
    return sketch(seed, index, side).scene()


def _mark_hidden_keypoints(obj: SceneObject, side: int) -> None:
    """Sets v = 1 for keypoints covered by another object."""
    if obj.keypoints is not None:
        x, y = np.clip(obj.keypoints[:, :2].astype(int), 0, side - 1).T
        obj.keypoints[:, 2] = np.where(obj.mask[y, x], 2, 1)


def _region(obj: SceneObject, rle: dict[str, Any], side: int, rng: np.random.Generator) -> dict[str, Any]:
    """A visual prompt for the object: mostly a slightly loose box."""
    kind = _REGION_KINDS[rng.choice(len(_REGION_KINDS), p=_REGION_SHARES)]
    if kind == "mask":
        return {"kind": kind, "points": None, "mask": rle}
    if kind == "box":
        loose = np.array(obj.box) + rng.integers(-2, 3, 4)
        points: np.ndarray = np.clip(loose, 0, side)
    else:
        ys, xs = np.nonzero(obj.mask)
        inside = np.stack([xs, ys], 1) + 0.5
        if kind == "polygon":  # the object's support points in 8 directions
            turns = np.arange(8) * np.pi / 4
            directions = np.stack([np.cos(turns), np.sin(turns)])
            points = inside[np.argmax(inside @ directions, axis=0)]
        else:
            points = inside[rng.choice(len(inside), 1 if kind == "point" else 4, replace=False)]
            points = points[np.argsort(points[:, 0])]
    return {"kind": kind, "points": [float(p) for p in np.ravel(points)], "mask": None}


def encode_jpeg(image: np.ndarray) -> bytes:
    """JPEG bytes (quality 95, no chroma subsampling) of uint8 [H, W, 3]; with noise, smaller and faster than PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def scene_row(
    seed: int, index: int, side: int = 128, grounded_captions: bool = False, region_questions: bool = False
) -> dict[str, Any]:
    """The shard row (`shards.schema`) of one scene, annotated for every task. A pure function of its arguments.

    `grounded_captions`: with a chat more, `text.grounded_caption`; `region_questions`: with chats that ask whether a
    box shows a class. Everything else is the same as without.
    """
    scene = render(seed, index, side)
    objects = scene.objects
    rng = np.random.default_rng([seed, index, 1])  # a separate stream: changed texts do not change the images
    rles = Masks.from_arrays(np.stack([o.mask for o in objects])).rles
    instances = [
        {
            "phrase": o.name,
            "box": list(o.box),
            "mask": rle,
            "keypoints": None if o.keypoints is None else [float(k) for k in o.keypoints.ravel()],
            "crowd": False,
            "area": float(o.area),
        }
        for o, rle in zip(objects, rles, strict=True)
    ]
    described = rng.permutation(len(objects))[: int(rng.integers(1, 3))]
    regions = [_region(objects[i], rles[i], side, rng) for i in described]
    messages = [text.caption_message(objects, rng), *text.questions(objects, side, rng)]
    messages += [text.region_message(objects[i], number, rng) for number, i in enumerate(described)]
    if rng.random() < 0.3:
        messages.append(text.chat(objects, rng))
    if grounded_captions:
        messages.append(text.grounded_caption(objects))
    if region_questions:
        asked = region_questions_of(objects, len(regions), side, np.random.default_rng([seed, index, 3]))
        regions, messages = regions + asked[0], messages + asked[1]
    tasks = ["detect", "segment", "count", "ground", "refer"]
    tasks += ["pose"] if any(o.keypoints is not None for o in objects) else []
    tasks += sorted({message["task"] for message in messages})
    return make_row(
        f"scene-{seed}-{index:07d}",
        encode_jpeg(scene.image),
        (side, side),
        "scenes",
        tasks=tasks,
        classes=list(CLASSES),
        instances=instances,
        phrases=[*text.refer_phrases(objects, side, rng), *text.ground_phrases(objects)],
        messages=messages,
        regions=regions,
    )
