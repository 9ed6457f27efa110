"""Outlines of masks for formats that have one polygon per object, such as YOLO's and Roboflow's.

The outline runs along the edges of the pixels, pulled inwards by `INSET`. Its box is then the mask's, and a reader that
cuts coordinates off to whole pixels and draws both edges, as ultralytics does with OpenCV, fills exactly the mask.
Holes are joined to the outline around them by a bridge inside the object, parts by a line between their nearest
corners, which readers draw one pixel wide.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

#: pixels; small against half a pixel, large against the rounding of the coordinates
INSET = 0.05

Loop = np.ndarray  # float64 [N, 2], x and y of the corners in pixels, the mask on the right-hand side (y down)


def one_outline(mask: np.ndarray) -> np.ndarray:
    """The mask, bool [H, W], as one closed polygon, float64 [N, 2] in pixels; [0, 2] for an empty mask."""
    loops = _loops(mask)
    if not loops:
        return np.zeros((0, 2))
    insets = [_inset(loop) for loop in loops]
    areas = [_signed_area(loop) for loop in loops]
    parts = [loop for loop, area in zip(insets, areas, strict=True) if area > 0]
    holes = [loop for loop, area in zip(insets, areas, strict=True) if area < 0]
    for hole in sorted(holes, key=lambda loop: float(loop[:, 0].min())):
        _bridge(parts, hole)
    parts.sort(key=lambda loop: -abs(_signed_area(loop)))
    joined = parts[0]
    for part in parts[1:]:
        joined = _join(joined, part)
    return joined


def _loops(mask: np.ndarray) -> list[Loop]:
    """The closed outlines of a mask: around each part (pixels that touch at a corner are two) and around each hole."""
    padded = np.pad(np.asarray(mask, bool), 1)
    up_left, up_right = padded[:-1, :-1], padded[:-1, 1:]
    low_left, low_right = padded[1:, :-1], padded[1:, 1:]
    count = up_left.astype(np.int8) + up_right + low_left + low_right
    saddle = (up_left == low_right) & (up_right == low_left) & (up_left != up_right)
    ys, xs = np.nonzero((count == 1) | (count == 3))
    sy, sx = np.nonzero(saddle)
    # a saddle is two corners: one of the pixel above it, one of the pixel below; `across`: order in the row
    falls = up_left[sy, sx]  # the pixels are upper left and lower right
    y, x = np.concatenate([ys, sy, sy]), np.concatenate([xs, sx, sx])
    across = np.concatenate([np.zeros(len(ys), int), np.where(falls, 0, 1), np.where(falls, 1, 0)])
    down = np.concatenate([np.zeros(len(ys), int), np.zeros(len(sy), int), np.ones(len(sy), int)])
    beside = _partners(np.lexsort((across, x, y)))
    along = _partners(np.lexsort((down, y, x)))
    return _follow(padded, x, y, beside, along)


def _partners(order: np.ndarray) -> np.ndarray:
    """The other end of each corner's edge; corners of one row or column, in order, are joined two by two."""
    partners = np.empty(len(order), int)
    partners[order[0::2]], partners[order[1::2]] = order[1::2], order[0::2]
    return partners


def _follow(padded: np.ndarray, x: np.ndarray, y: np.ndarray, beside: np.ndarray, along: np.ndarray) -> list[Loop]:
    left = np.ones(len(x), bool)
    loops = []
    points = np.stack([x, y], axis=1).astype(float)
    across, down = beside.tolist(), along.tolist()
    for first in range(len(x)):
        if not left[first]:
            continue
        other = across[first]
        is_top = padded[y[first] + 1, min(x[first], x[other]) + 1]  # the mask is below this edge: walk to the right
        start = first if (x[first] < x[other]) == bool(is_top) else other
        corners, corner = [], start
        while True:
            corners += [corner, across[corner]]
            corner = down[across[corner]]
            if corner == start:
                break
        left[corners] = False
        loops.append(points[corners])
    return loops


def _signed_area(loop: Loop) -> float:
    """Positive for an outline, negative for a hole."""
    x, y = loop[:, 0], loop[:, 1]
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def _inset(loop: Loop) -> Loop:
    """The loop with each edge moved into the mask."""
    forward = np.sign(np.roll(loop, -1, axis=0) - loop)
    normal = np.stack([-forward[:, 1], forward[:, 0]], axis=1)  # to the right of the edge from each corner
    return loop + INSET * (normal + np.roll(normal, 1, axis=0))


def _bridge(loops: list[Loop], hole: Loop) -> None:
    """Joins a hole to the loop on its left, along the middle of a row of pixels that are all of the mask."""
    at = int(hole[:, 0].argmin())
    if hole[(at + 1) % len(hole), 0] != hole[at, 0]:  # the edge begins at the corner before
        at = int((at - 1) % len(hole))
    begin, end = hole[at], hole[(at + 1) % len(hole)]
    row = np.floor(min(begin[1], end[1]) + 0.5) + 0.5
    best: tuple[float, int, int] | None = None
    for number, loop in enumerate(loops):
        following = np.roll(loop, -1, axis=0)
        low, high = np.minimum(loop[:, 1], following[:, 1]), np.maximum(loop[:, 1], following[:, 1])
        there = (loop[:, 0] == following[:, 0]) & (low < row) & (row < high) & (loop[:, 0] < begin[0])
        for corner in np.flatnonzero(there).tolist():
            if best is None or loop[corner, 0] > best[0]:
                best = float(loop[corner, 0]), number, corner
    assert best is not None, "a hole has mask on its left"
    place, number, edge = best
    around = np.concatenate([hole[at + 1 :], hole[: at + 1]])
    bridge = np.array([[place, row], [begin[0], row]])
    loop = loops[number]
    loops[number] = np.concatenate([loop[: edge + 1], bridge, around, bridge[::-1], loop[edge + 1 :]])


def _join(first: Loop, second: Loop) -> Loop:
    """Two loops as one, joined there and back between their nearest corners."""
    distances, nearest = cKDTree(first).query(second)
    b = int(distances.argmin())
    a = int(nearest[b])
    around = np.concatenate([second[b:], second[: b + 1]])
    return np.concatenate([first[: a + 1], around, first[a:]])
