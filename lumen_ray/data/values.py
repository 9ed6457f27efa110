"""Ids, flags and numbers of annotation files, read by value: 1, 1.0 and "1" are the same id.

Tools disagree on the types of json, yaml and xml: pandas writes ids as floats, spreadsheets and form builders write
numbers and flags as texts.
"""

from __future__ import annotations

import math
import re
from typing import Any

from lumen_ray.errors import UserError

_MOST = 1e9  # float32 holds whole numbers up to about 1.7e7 exactly; no image coordinate is near it
_WHOLE = re.compile(r"[+-]?(0|[1-9][0-9]{0,17})(\.0{1,18})?")  # not "007": leading zeros make another name
_NUMBER = re.compile(r"[+-]?([0-9]{1,18}(\.[0-9]{0,40})?|\.[0-9]{1,40})([eE][+-]?[0-9]{1,3})?")
_FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}


def id_key(value: Any) -> str | None:
    """The id as a text that is equal for equal ids (1, 1.0, "1", " 1 "); None if it is not an id."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return str(value) if abs(value) < 10**40 else None
    if isinstance(value, float):
        return str(int(value)) if math.isfinite(value) and value == int(value) else None
    if isinstance(value, str):
        text = value.strip()
        return str(int(float(text)) if "." in text else int(text)) if _WHOLE.fullmatch(text) else text or None
    return None


def name_text(value: Any) -> str | None:
    """The name of a class: a text, or a number as one (0 as "0"); None for anything else, or if it is blank."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    text = " ".join(value.split()) if isinstance(value, str) else id_key(value)
    if not text or any(char == "\0" or "\ud800" <= char <= "\udfff" for char in text):
        return None
    return text


def is_file_name(value: Any) -> bool:
    """Whether a value can be the name of a file: a text that can be stored and opened."""
    return isinstance(value, str) and bool(value) and not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value)


def flag(value: Any, what: str) -> bool:
    """A flag by value: 0, 1, true or false, also as text; a missing or empty one is False.

    Raises `UserError` (`invalid_flag`) that names `what`, the key, for anything else.
    """
    if value is None or isinstance(value, bool):
        return bool(value)
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in _FLAGS:
        return _FLAGS[value.strip().lower()]
    shown = repr(value) if isinstance(value, int | float | str) else f"a {type(value).__name__}"
    raise UserError(f"{what} must be 0, 1, true or false, got {shown[:80]}", "invalid_flag")


def number(value: Any) -> float | None:
    """A finite number that float32 can hold, also from a text; None for anything else."""
    if isinstance(value, str):
        value = float(value) if _NUMBER.fullmatch(value := value.strip()) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < _MOST else None  # false for nan


def numbers(values: Any) -> list[float] | None:
    """A list of finite numbers, also from texts; None if `values` is not such a list."""
    if not isinstance(values, list | tuple):
        return None
    found = [number(value) for value in values]
    return [v for v in found if v is not None] if None not in found else None


def whole(value: Any) -> int | None:
    """A whole number by value (64, 64.0, "64"); None for anything else."""
    found = number(value)
    return int(found) if found is not None and found == int(found) else None


def declared_size(height: Any, width: Any) -> list[int]:
    """[height, width] in pixels as declared by an annotation file; zeros, which declare nothing, unless both are whole
    and positive."""
    sides = [whole(height) or 0, whole(width) or 0]
    return sides if min(sides) > 0 else [0, 0]
