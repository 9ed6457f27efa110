"""Scores of generated and edited pictures: objects that a detector finds in them against those the prompt describes.

The detector is any callable from pictures to boxes by class; it sees whole pictures and no prompts. With a perfect
detector, a picture of exactly the described objects scores 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from lumen_ray.answer import Answer
from lumen_ray.evaluate.grounding import DECISION_THRESHOLD, HIT_IOU
from lumen_ray.evaluate.scene_captions import caption_attributes
from lumen_ray.structures import Boxes, Size

Detections = Mapping[str, Boxes]  # by class; classes without boxes may be absent
Detector = Callable[[Sequence[np.ndarray]], Sequence[Detections]]  # of uint8 [H, W, 3] pictures
Object = tuple[str, Boxes]  # a class and one box
_SHIFTS = 10


def detections(answer: Answer, threshold: float = DECISION_THRESHOLD) -> dict[str, Boxes]:
    """The `Detections` of an answer to `detect`, above a score threshold."""
    return {p.phrase: p.above(threshold).boxes for p in answer.predictions}


def described(caption: str) -> dict[str, int]:
    """Objects per class of a scene's caption: ``"two red circles ." -> {"red circle": 2}``."""
    return {f"{colour} {shape}": number for (colour, shape), number in caption_attributes(caption).items()}


def score_described(wanted: Mapping[str, int], found: Detections) -> tuple[float, bool]:
    """(share of the described objects that are there, whether the picture has exactly them) of one picture.

    Without described objects the share is 1, and only an empty picture is exact.
    """
    counts = {name: len(boxes) for name, boxes in found.items()}
    number = sum(wanted.values())
    hits = sum(min(n, counts.get(name, 0)) for name, n in wanted.items())
    exact = all(wanted.get(name, 0) == counts.get(name, 0) for name in {*wanted, *counts})
    return (hits / number if number else 1.0), exact


def score_generated(
    prompts: Sequence[Mapping[str, int]], pictures: Sequence[np.ndarray], detect: Detector
) -> dict[str, float | None]:
    """Means over pictures [N] and the objects per class that their prompts describe; None without any.

    ``generate_objects``: share of the described objects found; ``generate_exact``: pictures with all counts right.
    ``.._chance``: the same scored against other prompts, as pictures that ignore their prompt would score.
    """
    found = list(detect(pictures))
    number = len(prompts)
    shifts = range(1, min(_SHIFTS, number - 1) + 1)
    own = [score_described(prompts[i], found[i]) for i in range(number)]
    other = [score_described(prompts[i], found[(i + s) % number]) for s in shifts for i in range(number)]
    return {
        "generate_objects": _mean([share for share, _ in own]),
        "generate_exact": _mean([exact for _, exact in own]),
        "generate_objects_chance": _mean([share for share, _ in other]),
        "generate_exact_chance": _mean([exact for _, exact in other]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


@dataclass
class Changes:
    """The objects that an edit removes, adds and keeps: boxes in pixels of the picture before."""

    gone: list[Object] = field(default_factory=list)
    new: list[Object] = field(default_factory=list)
    kept: list[Object] = field(default_factory=list)


def _in_size(boxes: Boxes, size: Size) -> Boxes:
    """The boxes, scaled with their picture to `size`."""
    y, x = size[0] / boxes.size[0], size[1] / boxes.size[1]
    return Boxes(boxes.xyxy * np.array([x, y, x, y], np.float32), size)


def _matches(a: Boxes, b: Boxes) -> list[tuple[int, int]]:
    """Pairs that overlap by IoU 0.5 or more, each box once, the best overlap first."""
    overlaps, pairs = a.iou(b), []
    while overlaps.size and overlaps.max() >= HIT_IOU:
        i, j = np.unravel_index(overlaps.argmax(), overlaps.shape)
        pairs.append((int(i), int(j)))
        overlaps[i], overlaps[:, j] = -1, -1
    return pairs


def changes(before: Detections, wanted: Detections, size: Size) -> Changes:
    """The differences between the objects of two pictures; objects of one class and place are the same."""
    out = Changes()
    nothing = Boxes(np.zeros((0, 4)), size)
    for name in sorted({*before, *wanted}):
        old, new = (_in_size(found.get(name, nothing), size) for found in (before, wanted))
        pairs = _matches(old, new)
        out.kept += [(name, new[[j]]) for _, j in pairs]
        out.gone += [(name, old[[i]]) for i in range(len(old)) if i not in {i for i, _ in pairs}]
        out.new += [(name, new[[j]]) for j in range(len(new)) if j not in {j for _, j in pairs}]
    return out


@dataclass(frozen=True)
class EditScore:
    """`done`: share of the requested removals and additions made; `kept`: share of the other objects still there, None
    without others; `extra`: objects that were not requested; `background`: mean change (0..1) of the pixels outside
    the removed and added objects."""

    done: float
    kept: float | None
    extra: int
    background: float

    @property
    def exact(self) -> bool:
        return self.done == 1 and self.kept in (None, 1) and not self.extra


def score_edit(asked: Changes, made: Detections, before: np.ndarray, picture: np.ndarray) -> EditScore | None:
    """The score of one edit; None if no change was requested.

    `made`: the detections in `picture`, uint8 [h, w, 3], of any size; `before` uint8 [H, W, 3].
    """
    if not asked.gone and not asked.new:
        return None
    size = (before.shape[0], before.shape[1])
    scaled = {name: _in_size(boxes, size) for name, boxes in made.items()}

    def there(item: Object) -> bool:
        name, box = item
        return name in scaled and bool((box.iou(scaled[name]) >= HIT_IOU).any())

    results = [not there(item) for item in asked.gone] + [there(item) for item in asked.new]
    kept = [there(item) for item in asked.kept]
    left = [item for item in asked.gone if there(item)]  # not done, but not extra either
    known = asked.new + asked.kept + left
    extra = sum(
        not any(name == other and box.iou(boxes[[i]])[0, 0] >= HIT_IOU for other, box in known)
        for name, boxes in scaled.items()
        for i in range(len(boxes))
    )
    changed = [box for _, box in asked.gone + asked.new]
    return EditScore(float(np.mean(results)), _mean(kept), extra, _change(before, picture, changed))


def _change(before: np.ndarray, picture: np.ndarray, boxes: Sequence[Boxes]) -> float:
    """Mean absolute difference, 0..1, of two pictures outside boxes of the first; 0 if the boxes cover all of it."""
    height, width = picture.shape[:2]
    resized = Image.fromarray(before).resize((width, height), Image.Resampling.BILINEAR)
    outside = np.ones((height, width), bool)
    for box in boxes:
        x1, y1, x2, y2 = _in_size(box, (height, width)).xyxy[0]
        outside[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = False
    difference = np.abs(np.asarray(resized, np.float32) - picture)[outside] / 255
    return float(difference.mean()) if len(difference) else 0.0


def score_edits(
    before: Sequence[np.ndarray], wanted: Sequence[np.ndarray], pictures: Sequence[np.ndarray], detect: Detector
) -> dict[str, float | None]:
    """Means over edits [N], from pictures before, their targets `wanted`, and the model's `pictures`.

    ``edit_done``: edits done in full; ``edit_kept``: share of the other objects kept; ``edit_exact``: done, nothing
    else lost and nothing added; ``edit_background``: change elsewhere; ``edit_judged``: share of edits whose change the
    detector finds in `wanted`, over which the other means are taken. None without any.
    """
    found = [list(detect(group)) for group in (before, wanted, pictures)]
    scores = [
        score_edit(changes(old, new, (start.shape[0], start.shape[1])), made, start, picture)
        for old, new, made, start, picture in zip(*found, before, pictures, strict=True)
    ]
    judged = [score for score in scores if score is not None]
    return {
        "edit_done": _mean([score.done == 1 for score in judged]),
        "edit_kept": _mean([score.kept for score in judged if score.kept is not None]),
        "edit_exact": _mean([score.exact for score in judged]),
        "edit_background": _mean([score.background for score in judged]),
        "edit_judged": _mean([score is not None for score in scores]),
    }
