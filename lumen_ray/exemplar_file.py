"""Files of classes given by example: YAML or JSON, with boxes on images beside the file.

classes:
  - name: bolt
    named: true  # optional; false: the name is for answers only, and the model reads the boxes alone
    examples:
      - {image: photos/a.jpg, box: [10, 20, 60, 80]}
      - {image: photos/b.jpg, box: [5, 5, 30, 40], positive: false}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from lumen_ray import config
from lumen_ray.config import Settings
from lumen_ray.data.images import decode
from lumen_ray.errors import UserError
from lumen_ray.exemplars import ClassByExample, Example, split_classes


class ExampleEntry(Settings):
    """One box."""

    image: str = Field(description="path of the image, relative to the file")
    box: list[float] = Field(description="x1, y1, x2, y2 in pixels of the image after EXIF rotation")
    positive: bool = Field(True, description="false: an object that is not meant")


class ClassEntry(Settings):
    """One class."""

    name: str = Field(description="what its objects are called in answers")
    named: bool = Field(True, description="false: the model does not read the name, only the boxes")
    examples: list[ExampleEntry]


class ExemplarFile(Settings):
    """The whole file. Its classes are validated as `ClassEntry` one by one, so that errors name them."""

    classes: list[Any]


def read_exemplars(path: str | PathLike[str]) -> list[ClassByExample]:
    """The classes of a file. An image that several examples name is decoded once, and they share its array.

    Raises `UserError`, which names the file and the class, for a file, an image or a box that does not fit.
    """
    path = Path(path)
    entries = config.validate(ExemplarFile, _load(path), str(path)).classes
    if not entries:
        raise UserError(f"{path}: it has no classes; list some under 'classes'", "empty_classes")
    images: dict[Path, np.ndarray] = {}
    classes = [_read_class(entry, path, number, images) for number, entry in enumerate(entries, start=1)]
    try:
        split_classes(classes)
    except UserError as error:
        raise UserError(f"{path}: {error}", error.reason) from None
    return classes


def load_exemplars(given: str | PathLike[str] | Sequence[ClassByExample] | None) -> list[ClassByExample]:
    """The classes of a file or those given, none for None; all their boxes are on images of their own.

    Raises `UserError` as `read_exemplars`, for a class given twice and for an example without an image.
    """
    if given is None:
        return []
    if isinstance(given, str | PathLike):
        return read_exemplars(fspath(given))
    if isinstance(given, ClassByExample):
        given = [given]
    for shown in given:
        if not isinstance(shown, ClassByExample):
            raise UserError(
                f"'exemplars' takes the path of a file or a list of lumen_ray.ClassByExample, got {shown!r}",
                "invalid_classes",
            )
        if shown.is_own:
            raise UserError(
                f"class '{shown.name}' has an example without an image, which means the image that is asked about; "
                "give each example its image",
                "invalid_example",
            )
    split_classes(given)
    return list(given)


def _load(path: Path) -> dict[str, Any]:
    """The content of the file; JSON, which YAML does not read where it is indented by tabs, by its suffix."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return config.load_yaml(path, "exemplar file")
    try:
        return json.loads(path.read_bytes())  # `validate` refuses what is no mapping
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"exemplar file '{path}' is not valid JSON: {error}", "invalid_config") from None


def _read_class(entry: Any, path: Path, number: int, images: dict[Path, np.ndarray]) -> ClassByExample:
    """`number`: its place in the file, from 1; `images`: those decoded so far, which it adds to."""
    name = entry.get("name") if isinstance(entry, dict) else None
    where = f"{path}: class '{name}'" if isinstance(name, str) and name.strip() else f"{path}: class number {number}"
    found = config.validate(ClassEntry, entry, where)
    try:
        examples = [
            Example(item.box, _read_image(path.parent / item.image, images), item.positive) for item in found.examples
        ]
    except UserError as error:
        raise UserError(f"{where}: {error}", error.reason) from None
    try:
        return ClassByExample(found.name, examples, found.named)
    except UserError as error:  # names the class
        raise UserError(f"{path}: {error}", error.reason) from None


def _read_image(path: Path, images: dict[Path, np.ndarray]) -> np.ndarray:
    """uint8 [height, width, 3] RGB, EXIF-rotated."""
    key = path.resolve()
    if key not in images:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise UserError(f"its image '{path}' {what}; give the path relative to the file", "missing_image")
        try:
            images[key] = decode(path.read_bytes())
        except OSError as error:
            raise UserError(f"its image '{path}' cannot be read: {error.strerror}", "broken_image") from None
        except UserError as error:
            raise UserError(f"its image '{path}': {error}", error.reason) from None
    return images[key]
