"""Multipart forms. Their fields are text: a list is comma-separated or JSON, and an empty field is as if left out."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Container, Iterable
from typing import Any

from starlette.datastructures import FormData, UploadFile

from lumen_ray.errors import UserError

Item = tuple[str, str | UploadFile]


def given(form: FormData) -> list[Item]:
    """(name, value) of every field of a form, without those that a browser sends for inputs left empty."""
    return [(name, value) for name, value in form.multi_items() if not _is_left_out(value)]


def _is_left_out(value: str | UploadFile) -> bool:
    if isinstance(value, UploadFile):
        return not value.filename and not value.size
    return not value


def read_fields(items: Iterable[Item], lists: Container[str] = (), objects: Container[str] = ()) -> dict[str, Any]:
    """The values by name. `lists`: names of lists, which repeated fields add to; `objects`: names of JSON objects."""
    fields: dict[str, Any] = {}
    for name, value in items:
        if isinstance(value, UploadFile):  # validation says what the field takes instead
            fields[name] = value
        elif name in lists:
            fields[name] = [*fields.get(name, ()), *_read_list(name, value)]
        elif name in objects:
            fields[name] = _read_json(name, value)
        else:
            fields[name] = value
    return fields


def _read_list(name: str, text: str) -> list[Any]:
    """The items of a JSON list, a JSON object as one item, or those of comma-separated text with or without double
    quotes."""
    if text.lstrip().startswith("["):
        return _read_json(name, text)
    if text.lstrip().startswith("{"):
        return [_read_json(name, text)]
    lines = io.StringIO(text + ",", newline=None)  # an item behind this comma is one that an open quote made of it
    try:
        items = [item.strip() for row in csv.reader(lines, skipinitialspace=True) for item in row]
    except csv.Error as error:
        raise UserError(f"the form field '{name}' is not a comma-separated list: {error}", "invalid_list") from None
    if items[-1]:
        raise UserError(
            f"a double quote in the form field '{name}' is not closed; close it, double it inside quotes, or give JSON",
            "invalid_list",
        )
    return [item for item in items if item]


def _read_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"the form field '{name}' is not valid JSON", "invalid_json") from None
