"""Draws answers on images: boxes with labels, translucent masks, skeletons, and a strip of text below."""

from __future__ import annotations

import colorsys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lumen_ray.answer import Answer
from lumen_ray.keypoints import known_edges
from lumen_ray.structures import Prediction

Colour = tuple[int, int, int]
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

#: Images whose longer side is shorter are enlarged by a whole factor, so that labels stay readable,
MIN_SIDE = 320
#: to about this side.
TARGET_SIDE = 512
MASK_ALPHA = 0.35
KEYPOINT_SCORE = 0.3
#: Above this many instances labels are smaller, and only the first of a phrase keeps its words where they are wider
#: than its box; the others are known by their colour.
CROWDED = 10


#: hue of a colour word, so that the tag of a "red circle" is red
_HUES = {
    "red": 0.0,
    "orange": 0.08,
    "yellow": 0.14,
    "green": 0.36,
    "cyan": 0.51,
    "blue": 0.6,
    "purple": 0.76,
    "pink": 0.92,
}
#: (saturation, value) of the first, second, ... phrase with the same colour word
_SHADES = ((0.85, 0.93), (0.95, 0.66), (0.6, 1.0), (0.75, 0.8))


def palette(phrases: Sequence[str]) -> dict[str, Colour]:
    """A distinct colour (RGB, 0..255) per phrase, in order.

    A phrase with one colour word gets a shade of that colour; the others get hues a golden angle apart.
    """
    colours: dict[str, Colour] = {}
    used: Counter[float | None] = Counter()
    for phrase in dict.fromkeys(phrases):
        words = [word for word in phrase.lower().split() if word in _HUES]
        named = _HUES[words[0]] if len(words) == 1 else None
        nth = used[named]
        used[named] += 1
        hue = (0.55 + nth * 0.381966) % 1 if named is None else (named + 0.015 * nth) % 1
        saturation, value = _SHADES[(nth if named is not None else nth % 2) % len(_SHADES)]
        red, green, blue = (round(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value))
        colours[phrase] = red, green, blue
    return colours


def draw(
    image: np.ndarray,
    answers: Answer | Prediction | Sequence[Answer | Prediction],
    *,
    edges: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    colours: Mapping[str, Colour] | None = None,
    score_threshold: float = 0.0,
    labels: bool = True,
    scores: bool = True,
) -> np.ndarray:
    """Draws answers on a copy of `image` (uint8 [H, W, 3] RGB): uint8 [H', W', 3].

    Images smaller than `MIN_SIDE` are enlarged by a whole factor; text answers add a strip below the image.

    edges: class -> pairs of 0-based keypoint indices to join, by default `known_edges` of the keypoint names.
    colours: phrase -> RGB, for phrases that need the same colour in several pictures; the others get `palette`'s.
    score_threshold: instances below it are left out. scores: whether labels have them; annotations have none.
    """
    items = [answers] if isinstance(answers, Answer | Prediction) else list(answers)
    predictions = [p for item in items for p in (item.predictions if isinstance(item, Answer) else [item])]
    predictions = [p.above(score_threshold) for p in predictions]
    texts = [_strip_text(item) for item in items if isinstance(item, Answer) and item.text is not None]
    palette_ = {**palette([p.phrase for p in predictions]), **(colours or {})}

    scale = upscale_factor((image.shape[0], image.shape[1]))
    canvas = Image.fromarray(np.ascontiguousarray(image))
    canvas = canvas.resize((canvas.width * scale, canvas.height * scale), Image.Resampling.LANCZOS)
    canvas = _draw_masks(canvas, predictions, palette_, scale)
    pen = _Pen(canvas, scale, crowded=sum(map(len, predictions)) > CROWDED)
    for p in predictions:
        pen.boxes(p, palette_[p.phrase])
    for p in predictions:
        if p.keypoints is not None:
            pen.keypoints(p, palette_[p.phrase], (edges or {}).get(p.phrase) or known_edges(p.keypoints.names))
    if labels:
        for p in predictions:
            pen.labels(p, palette_[p.phrase], scores)
    return np.asarray(_with_strip(canvas, texts) if texts else canvas)


def upscale_factor(size: tuple[int, int]) -> int:
    """The whole factor by which an image of `size` (height, width) is enlarged before drawing."""
    side = max(size)
    return max(1, round(TARGET_SIDE / side)) if side < MIN_SIDE else 1


def _strip_text(answer: Answer) -> str:
    return f"{answer.task}: {answer.text}" if answer.task != "chat" else str(answer.text)


def _font(size: int) -> _Font:
    return ImageFont.load_default(size)


def _draw_masks(
    canvas: Image.Image, predictions: Sequence[Prediction], colours: Mapping[str, Colour], scale: int
) -> Image.Image:
    """Blends each mask with its phrase's colour and outlines it."""
    pixels = np.asarray(canvas).astype(np.float32)
    for p in predictions:
        if p.masks is None:
            continue
        colour = np.asarray(colours[p.phrase], np.float32)
        for mask in p.masks.to_arrays():
            mask = mask.repeat(scale, 0).repeat(scale, 1)
            if mask.shape != pixels.shape[:2]:
                raise ValueError(f"mask of {mask.shape} (enlarged) does not fit an image of {pixels.shape[:2]}")
            pixels[mask] = pixels[mask] * (1 - MASK_ALPHA) + colour * MASK_ALPHA
            pixels[_outline(mask, max(1, scale // 2))] = colour * 0.7
    return Image.fromarray(pixels.round().astype(np.uint8))


def _outline(mask: np.ndarray, width: int) -> np.ndarray:
    """The pixels of `mask` (bool [H, W]) within `width` of its border."""
    inner = mask
    for _ in range(width):
        padded = np.pad(inner, 1)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


class _Pen:
    """Draws on an enlarged canvas in the coordinates of the original image."""

    def __init__(self, canvas: Image.Image, scale: int, crowded: bool):
        self.canvas, self.scale, self.crowded = canvas, scale, crowded
        self.draw = ImageDraw.Draw(canvas)
        side = max(canvas.size)
        self.width = max(2, round(side / 220))
        self.font = _font(max(11, round(side / (46 if crowded else 36))))
        self._taken: list[tuple[float, float, float, float]] = []

    def boxes(self, prediction: Prediction, colour: Colour) -> None:
        width, height = self.canvas.size
        for box in prediction.boxes.xyxy * self.scale:
            x1, y1, x2, y2 = (float(v) for v in box)
            x2, y2 = max(x1, min(x2, width) - 1), max(y1, min(y2, height) - 1)
            # a dark hairline keeps the box visible on a background of the same colour
            self.draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(20, 20, 20), width=1)
            self.draw.rectangle((x1, y1, x2, y2), outline=colour, width=self.width)

    def labels(self, prediction: Prediction, colour: Colour, scores: bool = True) -> None:
        """Phrase and score on a filled tag; a tag that would cover another is moved."""
        ink = _ink(colour)
        for i, (box, score) in enumerate(zip(prediction.boxes.xyxy * self.scale, prediction.scores, strict=True)):
            text = f"{prediction.phrase} {score:.2f}" if scores else prediction.phrase
            if self.crowded and i > 0 and self.font.getlength(text) > box[2] - box[0]:
                if not scores:
                    continue
                text = f"{score:.2f}"
            left, top, right, bottom = self.draw.textbbox((0, 0), text, font=self.font)
            width, height = right - left + 6, bottom - top + 5
            x, y = self._place(box, width, height)
            self.draw.rectangle((x, y, x + width, y + height), fill=colour)
            self.draw.text((x + 3 - left, y + 2 - top), text, fill=ink, font=self.font)

    def _place(self, box: np.ndarray, width: float, height: float) -> tuple[float, float]:
        """The first free spot among: above, inside at the top, below, inside at the bottom; else the first."""
        x1, y1, _, y2 = (float(v) for v in box)
        x = min(max(0.0, x1), max(0.0, self.canvas.width - width - 1))
        lowest = max(0.0, self.canvas.height - height - 1)
        options = [min(max(0.0, y), lowest) for y in (y1 - height, y1, y2, y2 - height)]
        spots = [(x, y, x + width, y + height) for y in options]
        spot = next((s for s in spots if not any(_overlap(s, t) for t in self._taken)), spots[0])
        self._taken.append(spot)
        return spot[0], spot[1]

    def keypoints(self, prediction: Prediction, colour: Colour, edges: Sequence[tuple[int, int]]) -> None:
        """Joints as dots with a white rim, bones as lines; joints with scores below `KEYPOINT_SCORE` are left out."""
        assert prediction.keypoints is not None
        radius = self.width * 1.4
        for xyv in prediction.keypoints.xyv:
            shown = xyv[:, 2] >= KEYPOINT_SCORE
            points = xyv[:, :2] * self.scale
            for a, b in edges:
                if shown[a] and shown[b]:
                    line = [tuple(points[a].tolist()), tuple(points[b].tolist())]
                    self.draw.line(line, fill=(255, 255, 255), width=self.width + 2)
                    self.draw.line(line, fill=colour, width=self.width)
            for (x, y), visible in zip(points.tolist(), shown, strict=True):
                if visible:
                    area = (x - radius, y - radius, x + radius, y + radius)
                    self.draw.ellipse(area, fill=colour, outline=(255, 255, 255), width=max(1, self.width // 2))


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _ink(colour: Colour) -> Colour:
    """Black or white, whichever reads better on `colour`."""
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return (15, 15, 15) if luminance > 150 else (255, 255, 255)


def _with_strip(canvas: Image.Image, texts: Sequence[str]) -> Image.Image:
    """The canvas with the text answers written on a dark strip below it."""
    size = max(13, round(canvas.width / 36))
    font = _font(size)
    per_line = max(10, int((canvas.width - 2 * size) / font.getlength("abcdefghijklmnopqrstuvwxyz ") * 27))
    lines = [line for text in texts for line in (textwrap.wrap(text, per_line) or [""])]
    step = round(size * 1.35)
    out = Image.new("RGB", (canvas.width, canvas.height + step * len(lines) + size), (24, 26, 30))
    out.paste(canvas, (0, 0))
    pen = ImageDraw.Draw(out)
    for i, line in enumerate(lines):
        pen.text((size, canvas.height + size // 2 + i * step), line, fill=(240, 240, 240), font=font)
    return out
