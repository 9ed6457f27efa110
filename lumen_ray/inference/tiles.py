"""Large or crowded images in tiles: each tile is an image of its own for the engine, and what several tiles see of one
object becomes one instance.

Slicing with overlap, beside a look at the whole image for objects larger than a tile, is SAHI's scheme (arXiv
2202.06934, sec. 3). Matching differs: SAHI compares whole boxes, of which two halves of a cut object share little. Here
two instances are the same object if they agree on what both tiles see (`_agreement`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lumen_ray.answer import Answer
from lumen_ray.data.windows import Windows
from lumen_ray.errors import UserError
from lumen_ray.inference.protocol import EngineProtocol
from lumen_ray.inference.request import Request
from lumen_ray.inference.second_look import SecondLook
from lumen_ray.structures import Boxes, Keypoints, Masks, Prediction, Size

#: tasks that are answered tile by tile; all others look at the whole image
TILED_TASKS = ("detect", "segment", "pose", "count", "ground")
#: least tile side in pixels
LEAST_TILE = 32
#: instances that agree at least this much (IoU within what both tiles see) are the same object
SAME_OBJECT = 0.5
#: pixels from a tile's inner edge within which a box counts as cut by it
_AT_EDGE = 2.0


@dataclass(frozen=True)
class Tiles:
    """`side`: of a tile in pixels of the stored image; `overlap`: of neighbouring tiles, as a share of the side.

    Objects up to ``side * overlap`` pixels are whole in at least one tile. Raises `UserError` (`invalid_tiles`).
    """

    side: int
    overlap: float = 0.2

    def __post_init__(self) -> None:
        if self.side < LEAST_TILE:
            raise UserError(f"the tile side is {self.side}; give {LEAST_TILE} pixels or more", "invalid_tiles")
        if not 0 <= self.overlap <= 0.8:
            raise UserError(f"the overlap of tiles is {self.overlap}; give a share from 0 to 0.8", "invalid_tiles")

    def windows(self, size: Size) -> list[tuple[int, int, int, int]]:
        """xyxy of the tiles of an image of (height, width) `size`, row by row; those at the end are moved inwards. One
        window for an image that is no larger than a tile."""
        height, width = size
        ys, xs = self._starts(height), self._starts(width)
        return [(x, y, min(x + self.side, width), min(y + self.side, height)) for y in ys for x in xs]

    def _starts(self, length: int) -> list[int]:
        step = max(1, round(self.side * (1 - self.overlap)))
        return [*range(0, max(length - self.side, 0), step), max(length - self.side, 0)]


def run_tiled(
    engine: EngineProtocol | SecondLook,
    image: np.ndarray | Windows,
    requests: Sequence[Request],
    tiles: Tiles,
    *,
    batch_size: int = 8,
    max_per_phrase: int = 300,
    encoded: Any = None,
    **options: Any,
) -> list[Answer]:
    """The answers to requests about one image, uint8 [h, w, 3] or read by window, as of `Engine.run`, which takes the
    `options`.

    Requests of `TILED_TASKS` are also asked about every tile, `batch_size` of them in a pass. `max_per_phrase` bounds
    the instances of each tile, that of a request also those of the image. `encoded`: the whole image as `engine` has
    encoded it.
    """
    size: Size = (image.shape[0], image.shape[1]) if isinstance(image, np.ndarray) else image.size
    windows = tiles.windows(size)
    options["max_per_phrase"] = max_per_phrase
    if encoded is None:
        encoded = [image if isinstance(image, np.ndarray) else image.overview(engine.largest_side)]
    (answers,) = engine.run(encoded, [list(requests)], **options)
    tiled = [request for request in requests if request.task in TILED_TASKS]
    if len(windows) == 1 or not tiled:
        return answers
    by_tile: list[list[Answer]] = []
    for start in range(0, len(windows), batch_size):
        crops = [_crop(image, window) for window in windows[start : start + batch_size]]
        by_tile += engine.run(crops, [tiled] * len(crops), **options)
    merged = []
    numbers = {id(request): number for number, request in enumerate(tiled)}
    for request, whole in zip(requests, answers, strict=True):
        if (number := numbers.get(id(request))) is None:
            merged.append(whole)
            continue
        parts = [found[number] for found in by_tile]
        image_window = (0, 0, size[1], size[0])
        phrases = [
            [_Part(p, image_window, size), *_moved(parts, phrase, windows, size)]
            for phrase, p in enumerate(whole.predictions)
        ]
        merged.append(
            replace(whole, predictions=[merge(found)[: request.max_per_phrase] for found in without_pieces(phrases)])
        )
    return merged


def _crop(image: np.ndarray | Windows, window: tuple[int, int, int, int]) -> np.ndarray:
    if not isinstance(image, np.ndarray):
        return image.read(window)
    x1, y1, x2, y2 = window
    return np.ascontiguousarray(image[y1:y2, x1:x2])


@dataclass(frozen=True)
class _Part:
    """The instances that were found in a `window` (xyxy) of an image of `size`, in pixels of the image."""

    prediction: Prediction
    window: tuple[int, int, int, int]
    size: Size

    @property
    def is_whole(self) -> bool:
        return self.window == (0, 0, self.size[1], self.size[0])


def _moved(
    answers: Sequence[Answer], phrase: int, windows: Sequence[tuple[int, int, int, int]], size: Size
) -> list[_Part]:
    """The instances of a phrase in each tile, in pixels of the whole image."""
    parts = []
    for answer, window in zip(answers, windows, strict=True):
        found, (x, y) = answer.predictions[phrase], window[:2]
        boxes = Boxes(found.boxes.xyxy + np.array([x, y, x, y], np.float32), size)
        masks = keypoints = None
        if found.masks is not None:
            crops = [Masks([rle], found.masks.size).to_arrays()[0] for rle in found.masks.rles]
            masks = Masks.from_crops(crops, [(x, y)] * len(crops), size)
        if found.keypoints is not None:
            keypoints = Keypoints(found.keypoints.xyv + [x, y, 0], found.keypoints.names, size)
        parts.append(_Part(Prediction(found.phrase, boxes, found.scores, masks, keypoints, found.marks), window, size))
    return parts


def without_pieces(phrases: Sequence[Sequence[_Part]]) -> list[list[_Part]]:
    """The parts of each phrase without instances that are cut by their tile and that another tile sees whole as
    something else: half a figure can look like a circle."""
    of, boxes, windows = [], [], []
    for number, parts in enumerate(phrases):
        for part in parts:
            for box in part.prediction.boxes.xyxy if not part.is_whole else ():
                if not _is_cut(box, part):
                    of.append(number)
                    boxes.append(box)
                    windows.append(part.window)
    if not boxes:
        return [list(parts) for parts in phrases]
    owner, uncut, seen = np.array(of), np.stack(boxes), np.array(windows, np.float32)

    def is_piece(number: int, part: _Part, box: np.ndarray) -> bool:
        if part.is_whole or not _is_cut(box, part):
            return False
        agrees = _agreement(box, np.array(part.window, np.float32), uncut, seen) >= SAME_OBJECT
        return bool(agrees.any() and not (agrees & (owner == number)).any())

    kept: list[list[_Part]] = []
    for number, parts in enumerate(phrases):
        kept.append([])
        for part in parts:
            pieces = np.array([is_piece(number, part, box) for box in part.prediction.boxes.xyxy], bool)
            kept[-1].append(replace(part, prediction=part.prediction[np.flatnonzero(~pieces)]))
    return kept


def merge(parts: Sequence[_Part]) -> Prediction:
    """One instance for each object that one or several parts see, best score first.

    An object that a tile sees whole is taken as that tile sees it; one that is cut in all its tiles as the whole image
    shows it or, if it was not found there, as the union of what the tiles see. Its score is the highest of all.
    """
    boxes = np.concatenate([part.prediction.boxes.xyxy for part in parts])
    scores = np.concatenate([part.prediction.scores for part in parts])
    owner = np.repeat(np.arange(len(parts)), [len(part.prediction) for part in parts])
    index = np.concatenate([np.arange(len(part.prediction)) for part in parts])
    windows = np.array([part.window for part in parts], np.float32)
    beside = _neighbours(windows)
    of_part = [np.flatnonzero(owner == part) for part in range(len(parts))]
    groups: list[list[int]] = []
    group_of = np.full(len(boxes), -1)
    for i in np.argsort(-scores, kind="stable").tolist():
        near = np.concatenate([of_part[part] for part in beside[owner[i]]]) if beside[owner[i]] else np.zeros(0, int)
        near = near[(group_of[near] >= 0) & _meet(boxes[i], boxes[near])]
        agreement = _agreement(boxes[i], windows[owner[i]], boxes[near], windows[owner[near]])
        agrees = np.flatnonzero(agreement >= SAME_OBJECT)
        same = group_of[near[agrees[np.argsort(-agreement[agrees], kind="stable")]]].tolist()
        # two instances of one tile are two objects
        group = next((group for group in same if owner[i] not in owner[groups[group]]), len(groups))
        if group == len(groups):
            groups.append([])
        groups[group].append(i)
        group_of[i] = group
    members = [[(int(owner[i]), int(index[i])) for i in group] for group in groups]
    return _joined(parts, members, [float(scores[group[0]]) for group in groups])


def _neighbours(windows: np.ndarray) -> list[list[int]]:
    """For each window [T, 4] the others that it overlaps."""
    return [[int(j) for j in np.flatnonzero(_meet(window, windows)) if j != i] for i, window in enumerate(windows)]


def _meet(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Whether `box` overlaps each of `boxes` [N, 4]."""
    return ((np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])) > 0).all(1)


def _agreement(box: np.ndarray, window: np.ndarray, boxes: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """IoU of `box` with each of `boxes` [N, 4] within what the windows of both see; float32 [N]."""
    low, high = np.maximum(window[:2], windows[:, :2]), np.minimum(window[2:], windows[:, 2:])
    first = np.concatenate([np.clip(box[:2], low, high), np.clip(box[2:], low, high)], axis=1)
    other = np.concatenate([np.clip(boxes[:, :2], low, high), np.clip(boxes[:, 2:], low, high)], axis=1)
    sides = np.minimum(first[:, 2:], other[:, 2:]) - np.maximum(first[:, :2], other[:, :2])
    overlap = np.clip(sides, 0, None).prod(1)
    areas = [np.clip(b[:, 2:] - b[:, :2], 0, None).prod(1) for b in (first, other)]
    union = areas[0] + areas[1] - overlap
    overlap[(high <= low).any(1)] = 0
    return np.where(union > 0, overlap / np.maximum(union, 1e-9), 0).astype(np.float32)


def _joined(
    parts: Sequence[_Part], members: Sequence[Sequence[tuple[int, int]]], scores: Sequence[float]
) -> Prediction:
    """The prediction with an instance for each group. `members`: (part, instance) pairs, best score first; `scores`: of
    the instances."""
    size, first = parts[0].size, parts[0].prediction
    boxes, rles, points = [], [], []
    marks: dict[str, list[float]] = {name: [] for part in parts for name in part.prediction.marks}
    for group in members:
        taken = _seen_best(parts, group)
        found = np.stack([parts[p].prediction.boxes.xyxy[i] for p, i in taken])
        boxes.append(np.concatenate([found[:, :2].min(0), found[:, 2:].max(0)]))
        if first.masks is not None:
            rles += Masks([_masks(parts[p]).rles[i] for p, i in taken], size).union().rles
        if first.keypoints is not None:
            part, i = taken[0]
            keypoints = parts[part].prediction.keypoints
            assert keypoints is not None, "all tiles answer the same request"
            points.append(keypoints.xyv[i])
        for name, values in marks.items():
            values.append(max(float(parts[p].prediction.marks[name][i]) for p, i in taken))
    return Prediction(
        first.phrase,
        Boxes(np.stack(boxes) if boxes else np.zeros((0, 4), np.float32), size),
        scores,
        None if first.masks is None else Masks(rles, size),
        None if first.keypoints is None else Keypoints(points, first.keypoints.names, size),
        marks,
    )


def _seen_best(parts: Sequence[_Part], group: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The members of a group that the instance is made of."""
    tiles = [member for member in group if not parts[member[0]].is_whole]
    whole = [member for member in group if parts[member[0]].is_whole]
    uncut = [(p, i) for p, i in tiles if not _is_cut(parts[p].prediction.boxes.xyxy[i], parts[p])]
    return uncut[:1] or whole or tiles


def _is_cut(box: np.ndarray, part: _Part) -> bool:
    """Whether a box reaches an edge of its window that is not one of the image's."""
    x1, y1, x2, y2 = part.window
    edges = np.array([x1 > 0, y1 > 0, x2 < part.size[1], y2 < part.size[0]])
    return bool((edges & (np.abs(box - np.array(part.window)) <= _AT_EDGE)).any())


def _masks(part: _Part) -> Masks:
    assert part.prediction.masks is not None, "all tiles answer the same request"
    return part.prediction.masks
