"""Which image of a conversation stands where: the order of its images, and the question that shows each.

Images come under keys of the record, under keys of a turn, and as parts of a turn. Each ``<image>`` marker stands for
one of them: a part for its own image, another marker for the next image of the keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lumen_ray.data.pictures import identity
from lumen_ray.data.sources.record_parsing import ImageRef
from lumen_ray.errors import UserError

IMAGE_MARKER = "<image>"
_MARKER_AND_BLANKS = re.compile(rf"\s*{IMAGE_MARKER}\s*")
_MARKERS_ONLY = re.compile(rf"\s*(?:{IMAGE_MARKER}\s*)+")


@dataclass
class Turn:
    """A turn as written. `slots`: the image of each marker in the text, None if a key names it; `beside`: the images
    under keys of the turn."""

    role: str
    text: str
    slots: list[ImageRef | None] = field(default_factory=list)
    beside: list[ImageRef] = field(default_factory=list)


@dataclass(frozen=True)
class PlacedImage:
    """An image, and the question (from 0) from which on it is seen."""

    ref: ImageRef
    question: int


def place_images(listed: Sequence[ImageRef], turns: Sequence[Turn]) -> list[PlacedImage]:
    """The images of a conversation in order; `listed`: those under keys of the record, `turns`: user and assistant in
    turns, whose markers get their images.

    Without any marker all images belong to the first question, those under keys of a turn to that turn. An image that
    is named twice counts twice only if two markers stand for it. Raises `UserError` if the markers do not say which
    image stands where.
    """
    markers = sum(len(turn.slots) for turn in turns)
    images = _distinct([*listed, *images_in(turns)])
    if not images:
        if markers:
            raise UserError("it has an <image> marker or regions but no image", "missing_image")
        return []
    if len(images) == 1 and markers <= 1:
        return [PlacedImage(images[0], 0)]
    for number, turn in enumerate(turns):
        _fill_markers(turn, number)
    _mark_unmarked(turns, listed)
    slots = [slot for turn in turns for slot in turn.slots]
    if not slots:
        return [PlacedImage(ref, 0) for ref in images]
    order = _fill(slots, listed, len(images))
    questions = [number // 2 for number, turn in enumerate(turns) for _ in turn.slots]
    return [PlacedImage(ref, question) for ref, question in zip(order, questions, strict=True)]


def images_in(turns: Iterable[Turn]) -> list[ImageRef]:
    """The images that turns name, in no particular order."""
    return [ref for turn in turns for ref in (*turn.slots, *turn.beside) if ref is not None]


def _fill_markers(turn: Turn, number: int) -> None:
    """Gives the images under keys of a turn to its markers, if it has some."""
    if turn.beside and turn.role != "user":
        raise UserError(f"turn {number}, an answer, has an image; only questions can have some", "marker_in_answer")
    if not turn.beside or None not in turn.slots:
        return
    if (free := turn.slots.count(None)) != len(turn.beside):
        raise _miscounted(f"turn {number}", free, len(turn.beside))
    refs = iter(turn.beside)
    turn.slots = [next(refs) if slot is None else slot for slot in turn.slots]
    turn.beside = []


def _mark_unmarked(turns: Sequence[Turn], listed: Sequence[ImageRef]) -> None:
    """Puts a marker at the beginning of a turn for each image under its keys that has none yet, there or elsewhere."""
    taken = {_key(ref) for turn in turns for ref in turn.slots if ref is not None}
    new = {_key(ref) for turn in turns for ref in turn.beside} - taken
    of_record = {_key(ref) for ref in listed}
    free = sum(turn.slots.count(None) for turn in turns)
    if free and free != len(of_record - taken - new):  # then a marker stands for an image that the turn repeats
        new -= of_record
    for turn in turns:
        mine = [ref for ref in _distinct(turn.beside) if _key(ref) in new]
        if mine and turn.slots:
            raise _unplaced(mine[0])
        turn.slots = [*mine, *turn.slots]
        turn.text = f"{IMAGE_MARKER}\n" * len(mine) + turn.text
        new -= {_key(ref) for ref in mine}


def _fill(slots: Sequence[ImageRef | None], listed: Sequence[ImageRef], number: int) -> list[ImageRef]:
    """The image of each slot. Those without one get the images of the record in order: all of them if there are as many
    as slots, else those that have no slot yet. `number`: of different images, for the message."""
    if len(listed) == len(slots) and all(
        slot is None or _key(slot) == _key(ref) for slot, ref in zip(slots, listed, strict=True)
    ):
        return list(listed)
    taken = {_key(slot) for slot in slots if slot is not None}
    rest = [ref for ref in _distinct(listed) if _key(ref) not in taken]
    free = slots.count(None)
    if len(rest) != free:
        raise _unplaced(rest[0]) if rest and not free else _miscounted("it", len(slots), number)
    refs = iter(rest)
    return [next(refs) if slot is None else slot for slot in slots]


def name_markers(turns: Iterable[Turn], number: int) -> None:
    """Takes the markers of a conversation about `number` images out of its texts.

    The marker of a single image is removed. Of several, a line of markers alone is removed, and any other becomes the
    number of its image, as in "compare image 1 with image 2".
    """
    if number <= 1:
        for turn in turns:
            turn.text = _MARKER_AND_BLANKS.sub("\n", turn.text).strip()
        return
    shown = 0
    for turn in turns:
        lines = []
        for line in turn.text.split("\n"):
            if not _MARKERS_ONLY.fullmatch(line):
                lines.append(_numbered(line, shown))
            shown += line.count(IMAGE_MARKER)
        turn.text = "\n".join(lines).strip()


def _numbered(line: str, shown: int) -> str:
    """The line with its n-th marker as the words "image `shown` + n", apart from the words around it."""
    first, *rest = line.split(IMAGE_MARKER)
    for number, text in enumerate(rest, start=shown + 1):
        before = " " if first[-1:].isalnum() else ""
        after = " " if text[:1].isalnum() else ""
        first += f"{before}image {number}{after}{text}"
    return first


def _key(ref: ImageRef) -> tuple[str, str | None]:
    return identity(ref.name), ref.data


def _distinct(refs: Iterable[ImageRef]) -> list[ImageRef]:
    first: dict[tuple[str, str | None], ImageRef] = {}
    for ref in refs:
        first.setdefault(_key(ref), ref)
    return list(first.values())


def _miscounted(what: str, markers: int, images: int) -> UserError:
    marker, image = "marker" + "s" * (markers != 1), "image" + "s" * (images != 1)
    return UserError(f"{what} has {markers} <image> {marker} for {images} {image}", "image_count")


def _unplaced(ref: ImageRef) -> UserError:
    return UserError(f"it says where other images stand, but not where '{ref.name}' does", "image_order")
