"""Helpers for all sources: json, texts, image names, boxes and masks of records, as pure functions.

Every check raises a `UserError` whose message becomes the record's reason in `rejected.parquet`.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lumen_ray.data import files, urls
from lumen_ray.data.pictures import bare_key
from lumen_ray.data.values import id_key, numbers
from lumen_ray.errors import UserError
from lumen_ray.structures import Boxes, Size
from lumen_ray.trunk.tokenizer import SPECIAL_TOKENS

Record = dict[str, Any]
#: xyxy and xywh are in pixels of the stored image; relative is xyxy as fractions of its sides, 0..1
BOX_FORMATS = ("xyxy", "xywh", "relative")
IMAGE_KEYS = ("image", "file_name", "img_path", "image_path", "img", "filename", "images")
IMAGE_ID_KEYS = ("image_id", "imageId")
LINE_SUFFIXES = (".jsonl", ".ndjson")


def load_json(location: str) -> Any:
    """The value of a json file. Raises `UserError` if it is missing or not json."""
    if not files.is_file(location):
        raise UserError(f"annotation file '{urls.shown(location)}' does not exist", "missing_annotations")
    try:
        return json.loads(files.read_text(location))
    except (ValueError, RecursionError) as error:
        hint = "; rename a file of one record per line to .jsonl" if "Extra data" in str(error) else ""
        why = f"annotation file '{urls.shown(location)}' is not valid json: {error}{hint}"
        raise UserError(why, "invalid_annotations") from None


def load_records(location: str, keys: Sequence[str] = ()) -> list[tuple[str, Any]]:
    """The (origin, record) pairs of a json file (a list, a mapping with a list under one of `keys`, or a mapping of ids
    to records) or of a jsonl file. A line that is not json gives a `UserError` in the record's place.

    Raises `UserError` if the file is missing or not json at all.
    """
    if location.lower().endswith(LINE_SUFFIXES) and files.is_file(location):
        lines = files.read_bytes(location).removeprefix(b"\xef\xbb\xbf").split(b"\n")
        name = urls.base_name(location)
        return [(f"{name} line {n}", parse_line(line)) for n, line in enumerate(lines, start=1) if line.strip()]
    return records_in(load_json(location), location, keys)


def records_in(data: Any, location: str, keys: Sequence[str] = ()) -> list[tuple[str, Any]]:
    """The (origin, record) pairs in the value of a json file, as in `load_records`."""
    name = urls.base_name(location)
    if isinstance(data, dict):
        found = next((data[key] for key in keys if isinstance(data.get(key), list)), None)
        if found is None and data and all(isinstance(value, dict) for value in data.values()):
            return [(f"{name} record {key}", {"id": key} | value) for key, value in data.items()]
        data = found
    if not isinstance(data, list):
        expected = "a list of records" + "".join(f" or a list '{key}'" for key in keys)
        raise UserError(f"annotation file '{urls.shown(location)}' must contain {expected}", "invalid_annotations")
    return [(f"{name} record {n}", record) for n, record in enumerate(data)]


def parse_line(line: bytes) -> Any:
    """The json value of a line, or a `UserError` if it is not json."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return UserError(f"the line is not valid json: {error}", "invalid_record")


def as_mapping(record: Any) -> Record:
    """The record itself. Raises `UserError` if it is not a mapping."""
    if isinstance(record, UserError):
        raise record
    if not isinstance(record, dict):
        raise UserError(f"the record must be a mapping, got {short(record)}", "invalid_record")
    return record


def first_of(record: Record, keys: Iterable[str]) -> Any:
    """The first value that is not None under one of `keys`; None if there is none."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


def reserved_token(text: str) -> str | None:
    """The first token of the prompt layout in a text, where it would be taken for layout; None if there is none."""
    return next((token for token in SPECIAL_TOKENS if token in text), None)


def clean_text(value: Any, what: str, *, allowed: Sequence[str] = (), keep_lines: bool = False) -> str:
    """`value` as a text with runs of white space collapsed (`keep_lines`: only stripped at both ends).

    A byte order mark at its start, which files joined by other tools leave in the middle, is removed. Raises
    `UserError` if it is not a text, is empty, cannot be encoded (half a surrogate pair), or contains a token of the
    prompt layout that is not `allowed`. `what` names it in the message, e.g. ``"the caption"``.
    """
    if not isinstance(value, str):
        raise UserError(f"{what} must be a text, got {short(value)}", "invalid_text")
    value = value.lstrip("\ufeff")
    text = value.strip() if keep_lines else " ".join(value.split())
    if not text:
        raise UserError(f"{what} is empty", "empty_text")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise UserError(f"{what} is not valid UTF-8 text", "invalid_text")
    bare = text
    for allowed_token in allowed:
        bare = bare.replace(allowed_token, "")
    if token := reserved_token(bare):
        raise UserError(f"{what} contains the reserved token {token}", "reserved_token")
    return text


def short(value: Any) -> str:
    """Any value, abbreviated for a message: pickles can hold lists that contain themselves, json huge numbers."""
    if isinstance(value, int) and abs(value) > 1 << 64:
        return "a huge number"
    if value is None or isinstance(value, bool | int | float | str):
        text = repr(value)
        return text if len(text) <= 80 else text[:77] + "..."
    if isinstance(value, list | tuple) and all(v is None or isinstance(v, bool | int | float | str) for v in value):
        return str([v if not isinstance(v, int) or abs(v) < 1 << 64 else "a huge number" for v in value[:12]])[:80]
    return f"a {type(value).__name__}"


def caption_texts(value: Any) -> list[str]:
    """The captions in a value: a text, a list of texts, or such a list written as json or by Python. Blank ones and
    nulls are left out.

    Raises `UserError` if one of them is not a text that can be used, or if there is none.
    """
    if isinstance(value, str):
        value = _written_list(value.lstrip("\ufeff ")) or value
    if isinstance(value, list | tuple):
        value = [t for t in value if t is not None and not (isinstance(t, str) and not t.strip("\ufeff \t\r\n"))]
        return [clean_text(text, "the caption") for text in value or [""]]
    text = clean_text(value, "the caption")
    if text.lower() == "nan":  # as pandas writes a missing one
        raise UserError("the caption is empty: nan", "empty_text")
    return [text]


def _written_list(text: str) -> list[str | None] | None:
    """The texts of a list in a text; None if it is not such a list."""
    if not text.startswith("["):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and any(found) and all(t is None or isinstance(t, str) for t in found):
            return found
    return None


@dataclass(frozen=True)
class ImageRef:
    """An image as a record gives it: `name`, and `data`, its encoded bytes in base64 if the record contains them."""

    name: str
    data: str | None = None


def image_ref(record: Record, pattern: str | None = None, keys: Sequence[str] = IMAGE_KEYS) -> ImageRef | None:
    """The image of a record: the value under one of `keys` (a name, ``{path or bytes}``, a data URL, or a list of one
    of them), else `pattern` filled with its `image_id`.

    None for a record without an image. Raises `UserError` for several images or an invalid name.
    """
    found = [ref for key in keys if (ref := _as_image(record.get(key))) is not None]
    for other in found[1:]:
        if bare_key(other.name) != bare_key(found[0].name):
            raise UserError(f"the record names two images, '{found[0].name}' and '{other.name}'", "several_images")
    if found:
        return found[0]
    number = first_of(record, IMAGE_ID_KEYS)
    return None if number is None or pattern is None else ImageRef(fill_pattern(pattern, number))


def image_refs(record: Record) -> list[ImageRef]:
    """The images of a record in their order: the values under one of `IMAGE_KEYS`, each as in `image_ref`, or a list
    of any number of them.

    Further keys may repeat all or some of the images. Raises `UserError` if they name others, or for an invalid name.
    """
    found = {key: refs for key in IMAGE_KEYS if (refs := _as_images(record.get(key)))}
    if not found:
        return []
    longest = max(found, key=lambda key: len(found[key]))
    names = [bare_key(ref.name) for ref in found[longest]]
    for key, refs in found.items():
        others = [bare_key(ref.name) for ref in refs]
        if not set(others) <= set(names) or (len(others) == len(names) and others != names):
            raise UserError(
                f"the keys '{longest}' and '{key}' name different images, so their order is unknown", "image_order"
            )
    return found[longest]


def named_images(record: Any) -> list[ImageRef]:
    """The images that a rejected record names under `IMAGE_KEYS`, as far as they can be read."""
    found: list[ImageRef] = []
    for key in IMAGE_KEYS if isinstance(record, dict) else ():
        with suppress(UserError):
            found += _as_images(record.get(key))
    return found


def named_image(record: Any) -> ImageRef | None:
    """The image that a rejected record names, if any: its file must not be taken for another record's image."""
    if isinstance(record, dict):
        with suppress(UserError):
            return image_ref(record)
    return None


def _as_image(value: Any) -> ImageRef | None:
    if isinstance(value, list | tuple) and len(value) > 1:
        raise UserError(f"the record has {len(value)} images; one image per record is supported", "several_images")
    return next(iter(_as_images(value)), None)


def _as_images(value: Any) -> list[ImageRef]:
    if not isinstance(value, list | tuple):
        return [] if (ref := _single_image(value)) is None else [ref]
    found = [_single_image(item) for item in value]
    if None in found:
        raise UserError("the record has a place for an image but no image in it", "invalid_image")
    return [ref for ref in found if ref is not None]


def _single_image(value: Any) -> ImageRef | None:
    data = None
    if isinstance(value, dict):
        data, value = value.get("bytes"), first_of(value, ("path", "file_name", "filename", "url"))
        if data is None and not value:
            raise UserError("the image must be a name, or have a path or bytes", "invalid_image")
    if isinstance(value, str) and (match := _DATA_URL.match(value)):
        data, value = value[match.end() :], None
    if data is not None:
        return _inline_image(value, data)
    return None if value is None or value == "" else ImageRef(check_name(value))


_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)


def _inline_image(name: Any, data: Any) -> ImageRef:
    try:
        content = base64.b64decode(data if isinstance(data, str) else b"!", validate=True)
    except ValueError:
        raise UserError("the image's bytes must be base64", "invalid_image") from None
    return ImageRef(check_name(name or f"image-{hashlib.sha256(content).hexdigest()[:16]}"), data)


def check_name(value: Any) -> str:
    """A file name. Raises `UserError` if it is not a text, or a web address."""
    name = clean_text(value, "the image's name", allowed=SPECIAL_TOKENS, keep_lines=True)
    if re.match(r"^(https?|data):", name):
        raise UserError("the image is a web address; download the images first and give their folder", "remote_image")
    if "\0" in name:
        raise UserError("the image's name contains a null character", "invalid_text")
    return name


def fill_pattern(pattern: str, image_id: Any) -> str:
    """``("COCO_train2014_%012d.jpg", 9) -> "COCO_train2014_000000000009.jpg"``; use `%s` for ids that are texts."""
    key = id_key(image_id)
    value: Any = key if "%s" in pattern or key is None or not re.fullmatch(r"-?[0-9]{1,18}", key) else int(key)
    try:
        if value is None:
            raise TypeError
        return check_name(pattern % value)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        why = f"the image id {short(image_id)} does not fit the pattern '{pattern}'"
        raise UserError(why, "invalid_image_id") from None


def check_pattern(pattern: str | None) -> None:
    """Raises `UserError` if the pattern does not take exactly one image id."""
    try:
        fits = pattern is None or (pattern % 1) != pattern
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise UserError(
            f"image pattern '{pattern}' must contain the image id once, e.g. 'COCO_train2014_%012d.jpg' or '%s.jpg'",
            "invalid_config",
        )


def check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    """Raises `UserError` if `value` is not one of `choices`; `what` names it in the message."""
    if value not in choices:
        raise UserError(f"{what} '{value}' is not one of: {', '.join(choices)}", "invalid_config")


def is_numbers(values: Any) -> bool:
    """Whether `values` is a list of finite numbers, see `values.numbers`."""
    return numbers(values) is not None


def to_box(values: Any, box_format: str, size: Size) -> list[float]:
    """A box of `box_format` -> xyxy in pixels of the image of `size` (height, width), clipped to it.

    Raises `UserError`: `empty_box` if it has no area though its sides are not negative, `invalid_box` if it is
    malformed, inverted or outside the image.
    """
    box = numbers(values)
    if box is None or len(box) != 4:
        raise UserError(f"a box must be four finite numbers ({box_format}), got {short(values)}", "invalid_box")
    if box_format == "xywh":
        boxes = Boxes.from_xywh(box, size)
    else:
        x, y = relative_scale(box, size) if box_format == "relative" else (1, 1)
        boxes = Boxes([value * scale for value, scale in zip(box, (x, y, x, y), strict=True)], size)
    if boxes.area[0] <= 0:
        x1, y1, x2, y2 = boxes.xyxy[0]
        raise UserError(
            f"degenerate box {box} ({box_format}): it has no width or height",
            "empty_box" if x2 >= x1 and y2 >= y1 else "invalid_box",
        )
    clipped = boxes.clip()
    if clipped.area[0] <= 0:
        where = f"the image of {size[1]}x{size[0]} pixels"
        raise UserError(f"box {box} ({box_format}) lies outside {where}", "invalid_box")
    return [float(c) for c in clipped.xyxy[0]]


def fractions_note(boxes: Iterable[Any], remedy: str) -> list[str]:
    """A note with what to do, if all boxes of a set lie in one pixel, as fractions of the image's sides do that are
    taken for pixels; else empty."""
    found = [box for box in map(numbers, boxes) if box is not None and len(box) == 4]
    whole_numbers = all(value == int(value) for box in found for value in box)
    if whole_numbers or any(not 0 <= value <= 1 for box in found for value in box):
        return []
    read = f"all boxes ({len(found)}) lie within the first pixel of their images"
    return [f"{read}, as fractions of its sides would; {remedy}"]


def relative_scale(values: Sequence[float], size: Size) -> tuple[int, int]:
    """The factors (x, y) from relative coordinates to pixels. Raises `UserError` if `values` look like pixels."""
    if max(values) > 1.01:
        raise UserError(f"relative coordinates must lie in 0..1, got {short(values)}", "invalid_box")
    return size[1], size[0]


def plain_json(value: Any, depth: int = 4) -> Any:
    """`value` with everything that is not json, or nested deeper, replaced by None: pickles can hold anything."""
    if isinstance(value, bytes):
        return value.decode("ascii", "replace")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if depth and isinstance(value, list | tuple):
        return [plain_json(item, depth - 1) for item in value]
    if depth and isinstance(value, dict):
        return {key: plain_json(item, depth - 1) for key, item in value.items() if isinstance(key, str)}
    return None
