"""Objects of annotations -> instances of a row: box, mask and keypoints, each dropped alone if it cannot be used.

An unusable mask or keypoint costs that part, which is counted in `Outcome.changed`; the box and the image's class stay.
A box without area is taken from the mask; without a mask there is nothing to find, and the record is rejected without
consequences for the image. Any other object without a usable box is lost: its class leaves the row's `classes`, because
the image is no longer annotated exhaustively for it. If the class is unknown, all classes leave.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lumen_ray.data import rle as rle_tools
from lumen_ray.data.frames import AnnotationFrame
from lumen_ray.data.shards.schema import make_row
from lumen_ray.data.sources.base import Outcome, Rejected, perception_tasks, reject
from lumen_ray.data.sources.record_parsing import reserved_token, to_box
from lumen_ray.data.values import flag, number, numbers
from lumen_ray.errors import UserError
from lumen_ray.structures import Boxes, Size

Instance = dict[str, Any]  # an entry of a row's `instances`, see `shards.schema`
_CLIPPED = 1e-3  # pixels; less is rounding
#: counted for images that EXIF turns, where nothing shows whether their annotations were made before or after
ASSUMED = "images turned by EXIF, their annotations read as made after the turn"


class ObjectList:
    """Collects the objects of one image in the order of its annotations.

    `annotated`: the classes of the data set that the image is annotated for, exhaustively.
    """

    def __init__(self, image_id: str, frame: AnnotationFrame, annotated: Iterable[str]):
        self.image_id, self.frame = image_id, frame
        self.instances: list[Instance] = []
        self.rejected: list[Rejected] = []
        self.changed: Counter[str] = Counter()
        self._annotated = list(annotated)
        self._lost: set[str] = set()
        self._seen: set[Any] = set()

    def add(self, name: str | None, origin: str, **parts: Any) -> None:
        """Adds an object of class `name`, or rejects the record at `origin`; `parts`: keywords of `make_instance`.

        A repeat (same class, box, mask and keypoints) is rejected; its class stays.
        """
        try:
            if not name:
                raise UserError("it has no class", "unknown_category")
            made, changed = make_instance(name, self.frame, **parts)
            key = repr([made[part] for part in ("phrase", "box", "mask", "keypoints", "crowd")])
            if key in self._seen:
                raise UserError("it repeats an earlier object: same class, box, mask and keypoints", "repeated")
        except UserError as error:
            self.reject(name, origin, error)
            return
        self._seen.add(key)
        self.instances.append(made)
        self.changed += changed

    def reject(self, name: str | None, origin: str, error: UserError) -> None:
        """Rejects an object of class `name`, None if its class is not known."""
        self.rejected.append(reject("annotations", self.image_id, origin, error))
        if error.reason not in ("empty_box", "repeated"):
            self._lost |= {name} if name else set(self._annotated)

    def lose(self, what: str, number: int = 1) -> None:
        """Counts objects that are in the image but not in its annotations: they could be of any class."""
        self.changed[what] += number
        self._lost |= set(self._annotated)

    @property
    def classes(self) -> list[str]:
        """The classes for which the image is still annotated exhaustively."""
        return [name for name in self._annotated if name not in self._lost and not reserved_token(name)]

    def outcome(
        self, image: bytes, source: str, messages: Sequence[dict[str, Any]] = (), tasks: Sequence[str] = ()
    ) -> Outcome:
        """The outcome of the image; `messages` and their `tasks` go into the row beside the objects."""
        row = make_row(
            self.image_id,
            image,
            self.frame.rotated_size,
            source,
            tasks=perception_tasks(self.classes, self.instances) + list(tasks),
            classes=self.classes,
            instances=self.instances,
            messages=list(messages),
        )
        self.changed[ASSUMED] += bool(self.frame.assumed and self.instances)
        return Outcome(row, {"annotations": len(self.instances)}, self.rejected, changed=dict(+self.changed))


def make_instance(
    name: str,
    frame: AnnotationFrame,
    *,
    bbox: Any = None,
    box_format: str = "xywh",
    segmentation: Any = None,
    keypoints: Any = None,
    num_keypoints: int = 0,
    crowd: Any = False,
    area: Any = None,
    rotation: Any = None,
) -> tuple[Instance, Counter[str]]:
    """(instance in the EXIF-rotated frame, counts of what was cut or dropped) of an annotation.

    All parts are as found in the file, in the frame of the annotations: `bbox` of format `box_format`; `segmentation`:
    polygons or run lengths; `keypoints`: flat x, y, v of `num_keypoints` points; `crowd`: a flag; `area`: square
    pixels, by default that of the mask or, without one, of the box; `rotation`: degrees by which the box is turned
    clockwise about its centre (CVAT). Raises `UserError` if there is no usable box, with the reason ``empty_box`` for
    one without area.
    """
    if token := reserved_token(name):
        raise UserError(f"its category '{name}' contains the reserved token {token}; rename it", "reserved_token")
    is_crowd = flag(crowd, "iscrowd")
    changed: Counter[str] = Counter()
    mask, bad = read_mask(segmentation, frame.size)
    changed["masks dropped"] += bad and mask is None
    changed["mask parts dropped"] += bad if mask is not None else 0
    corners = turned_corners(bbox, box_format, rotation, frame.size)
    if corners:
        turned = [min(corners[::2]), min(corners[1::2]), max(corners[::2]), max(corners[1::2])]
        if mask is None or _is_rectangle(mask, bbox, box_format, frame.size):
            mask = read_mask([corners], frame.size)[0]
            bbox, box_format, area = turned, "xyxy", None
            changed["turned rectangles"] += 1
        elif _has_extent(mask, turned, "xyxy", frame.size):
            bbox, box_format, area = turned, "xyxy", None
            changed["turned rectangles"] += 1
        # any other mask is as it was drawn, and the attribute means something else
    try:
        box = to_box(bbox, box_format, frame.size)
        changed["boxes clipped"] += _is_clipped(bbox, box_format, box, frame.size)
    except UserError:
        if mask is None:
            raise
        box, area = to_box(rle_tools.tight_xywh(mask), "xywh", frame.size), None
        changed["boxes taken from masks"] += bbox is not None
    points = _keypoints(keypoints, num_keypoints, frame.size, changed)
    given = number(area)
    if given is None or given <= 0 or changed["mask parts dropped"]:
        given = rle_tools.area(mask) if mask is not None else (box[2] - box[0]) * (box[3] - box[1])
    made = {"phrase": name, "box": box, "mask": mask, "keypoints": points, "crowd": is_crowd, "area": float(given)}
    return frame.rotated(made), +changed


def read_mask(segmentation: Any, size: Size) -> tuple[rle_tools.Rle | None, int]:
    """(mask, number of parts that cannot be used) of a COCO segmentation for an image of `size` (height, width).

    A segmentation is a list of polygons, run lengths, a list of either, or one flat polygon; points may be pairs. The
    mask is None if nothing usable is left, or if it covers no pixel.
    """
    if segmentation is None or segmentation == [] or segmentation == {}:
        return None, 0
    masks: list[rle_tools.Rle] = []
    bad = 0
    for part in _mask_parts(segmentation):
        try:
            found = rle_tools.check_rle(part, size) if isinstance(part, dict) else rle_tools.from_polygon(part, size)
        except UserError:
            bad += 1
        else:
            masks.append(found)
    mask = rle_tools.merge(masks) if masks else None
    if mask is None or rle_tools.area(mask) == 0:
        return None, max(bad, 1)
    return mask, bad


def _mask_parts(segmentation: Any) -> list[Any]:
    if not isinstance(segmentation, list):
        return [segmentation]
    if numbers(segmentation) is not None:
        return [segmentation]
    pairs = [numbers(part) for part in segmentation]
    if len(pairs) > 2 and all(pair is not None and len(pair) == 2 for pair in pairs):
        return [segmentation]  # one polygon as (x, y) pairs
    return segmentation


def turned_corners(bbox: Any, box_format: str, rotation: Any, size: Size) -> list[float] | None:
    """The corners x, y, x, y, ... of a box turned clockwise by `rotation` degrees about its centre; None if it is not
    turned. A rotation that is not a number is another attribute of that name."""
    degrees = number(rotation)
    values = numbers(bbox)
    if degrees is None or degrees % 360 == 0 or values is None or len(values) != 4:
        return None
    x1, y1, x2, y2 = values
    if box_format == "xywh":
        x2, y2 = x1 + x2, y1 + y2
    elif box_format == "relative":
        x1, y1, x2, y2 = x1 * size[1], y1 * size[0], x2 * size[1], y2 * size[0]
    if x2 <= x1 or y2 <= y1:
        return None
    return rotated_corners((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, math.radians(degrees))


def rotated_corners(cx: float, cy: float, width: float, height: float, angle: float) -> list[float]:
    """The corners of a rectangle turned by `angle` radians, clockwise in an image whose y axis points down."""
    cos, sin = math.cos(angle), math.sin(angle)
    corners = [(-width, -height), (width, -height), (width, height), (-width, height)]
    # rounded, so that a quarter turn does not leave a corner a rounding error outside the image
    return [round(c, 6) for dx, dy in corners
            for c in (cx + (dx * cos - dy * sin) / 2, cy + (dx * sin + dy * cos) / 2)]  # fmt: skip


def _is_rectangle(mask: rle_tools.Rle, bbox: Any, box_format: str, size: Size) -> bool:
    """Whether the mask is the box itself, not turned: some exporters write rectangles as polygons, too."""
    if not _has_extent(mask, bbox, box_format, size):
        return False
    x1, y1, x2, y2 = to_box(bbox, box_format, size)
    return abs(rle_tools.area(mask) - (x2 - x1) * (y2 - y1)) <= 2 * (x2 - x1 + y2 - y1)


def _has_extent(mask: rle_tools.Rle, bbox: Any, box_format: str, size: Size) -> bool:
    """Whether the tight box of the mask is `bbox`, to 1.5 pixels."""
    try:
        box = to_box(bbox, box_format, size)
    except UserError:
        return False
    tight = to_box(rle_tools.tight_xywh(mask), "xywh", size)
    return bool(np.abs(np.subtract(tight, box)).max() <= 1.5)


def _is_clipped(bbox: Any, box_format: str, box: list[float], size: Size) -> bool:
    values = numbers(bbox)
    assert values is not None, "to_box has read it"
    if box_format == "xywh":
        values = Boxes.from_xywh(values, size).xyxy[0].tolist()
    elif box_format == "relative":
        values = [v * side for v, side in zip(values, (size[1], size[0]) * 2, strict=True)]
    return bool(np.abs(np.subtract(values, box)).max() > _CLIPPED)


def _keypoints(values: Any, number_of: int, size: Size, changed: Counter[str]) -> list[float] | None:
    """Flat x, y, v in pixels of the annotations' frame; None if none is labelled.

    A point outside the image becomes unlabelled, as does one whose numbers cannot be used.
    """
    if not values:
        return None
    if not isinstance(values, list | tuple) or len(values) != 3 * number_of:
        changed["keypoints dropped"] += 1 if not isinstance(values, list | tuple) else max(1, len(values) // 3)
        return None
    height, width = size
    points: list[float] = []
    for place in range(0, len(values), 3):
        x, y, v = (number(value) for value in values[place : place + 3])
        point = [0.0, 0.0, 0.0]
        if v not in (0, 1, 2) or (v and (x is None or y is None)):
            changed["keypoints dropped"] += 1
        elif v and x is not None and y is not None:
            if 0 <= x <= width and 0 <= y <= height:
                point = [float(x), float(y), float(v)]
            else:
                changed["keypoints outside the image"] += 1
        points += point
    return points if any(points[2::3]) else None
