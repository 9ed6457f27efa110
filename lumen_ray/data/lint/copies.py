"""Rows that stand for one image: equal or confusable image ids, and equal image bytes, here and in other folders."""

from __future__ import annotations

import json
import re
import unicodedata
from array import array
from urllib.parse import unquote

from lumen_ray.data.lint.check import Check, SetFacts
from lumen_ray.data.lint.findings import Rule
from lumen_ray.data.lint.rows import LintRow, fingerprint


def plain_id(image_id: str) -> str:
    """The id without what tools and file systems change: case, Unicode form, backslashes, ``%20``, a leading ``./``."""
    text = unquote(image_id).replace("\\", "/")
    text = re.sub(r"^(\./+)+", "", text)
    return unicodedata.normalize("NFC", text).casefold()


class Copies(Check):
    """Compares every row with the first row of its image id, of its plain id and of its image bytes (of several images:
    of all of them).

    Keeps per row the id, three hashes of 8 bytes and one of 16. Several rows may share an image if they have different
    texts, as in sets of captions or of edits; with objects or classes, an image should be one row.
    """

    repeated_id = Rule(
        "repeated-id", "problem", "rows",
        "rows have the image_id of an earlier row, so their annotations compete and their scores cannot be told apart; "
        "rename the image, or merge the rows",
    )  # fmt: skip
    similar_ids = Rule(
        "similar-ids", "warning", "rows",
        "image ids differ only by case, Unicode form, backslash, %20 or a leading './' and may name one file; keep one "
        "spelling",
    )  # fmt: skip
    copies_differ = Rule(
        "copies-differ", "problem", "images",
        "copies of one image have different objects, so training contradicts itself; delete the copies, or correct "
        "their annotations",
    )  # fmt: skip
    copies = Rule(
        "copies", "warning", "images",
        "images equal an earlier one byte for byte, so they count twice and may end up in two splits; delete them",
    )  # fmt: skip
    shared = Rule(
        "shared-image", "note", "rows",
        "rows have the image of an earlier row with other texts; several texts can also share one row",
    )  # fmt: skip
    rules = (repeated_id, similar_ids, copies_differ, copies, shared)

    def begin(self) -> None:
        self.ids: list[str] = []
        self.by_image: dict[bytes, int] = {}  # digest of the bytes -> number of the first row
        self._by_id: dict[int, int] = {}
        self._by_plain_id: dict[int, int] = {}
        self._objects, self._texts = array("Q"), array("Q")  # hashes; 0: the row has none

    def row(self, row: LintRow) -> None:
        number = len(self.ids)
        self.ids.append(row.image_id)
        self._objects.append(_objects_hash(row))
        self._texts.append(_texts_hash(row))
        image = number if row.image_digest is None else self.by_image.setdefault(row.image_digest, number)
        same_id = self._by_id.setdefault(fingerprint(row.image_id.encode("utf-8", "replace")), number)
        if same_id != number:
            self._same_id(row, number, same_id, image)
            return
        plain = plain_id(row.image_id).encode("utf-8", "replace")
        similar = self._by_plain_id.setdefault(fingerprint(plain), number)
        if similar != number:
            self.add(self.similar_ids, row, f"there is also '{self.ids[similar]}'")
        if image != number:
            self._same_image(row, number, image)

    def _same_id(self, row: LintRow, number: int, first: int, image: int) -> None:
        same_image = image != number and self.ids[image] == row.image_id
        if same_image and not (self._objects[first] or self._objects[number]):
            if self._texts[first] == self._texts[number]:
                self.add(self.copies, row, "the row is there twice")
            else:
                self.add(self.shared, row, "the image_id is there twice, with other texts")
            return
        self.add(self.repeated_id, row, f"there twice, with {'the same' if same_image else 'another'} image")

    def _same_image(self, row: LintRow, number: int, first: int) -> None:
        objects, others = self._objects[number], self._objects[first]
        detail = f"the same image as '{self.ids[first]}'"
        if objects and others and objects != others:
            self.add(self.copies_differ, row, f"{detail}, with other objects")
        elif objects == others and (objects or self._texts[number] == self._texts[first]):
            self.add(self.copies, row, detail)
        else:
            self.add(self.shared, row, f"{detail}, with other annotations")


def _objects_hash(row: LintRow) -> int:
    """A hash of the row's objects in any order, box corners to 0.01 pixels; 0 if it is not annotated for objects."""
    if not row.instances and not row.row["classes"]:
        return 0
    corners = [[str(c) for c in box] for box in row.boxes.round(2).tolist()]
    objects = sorted(zip(row.names, corners, row.crowd.tolist(), strict=True))
    return fingerprint(json.dumps(objects).encode()) or 1


def _texts_hash(row: LintRow) -> int:
    texts = [row.row["messages"], row.row["phrases"]]
    return fingerprint(json.dumps(texts, sort_keys=True).encode()) or 1 if any(texts) else 0


class Leaks(Check):
    """Compares the images with those of other folders, which the command feeds in by `other` after all rows."""

    leak = Rule(
        "leak", "problem", "images",
        "images are also in a folder given by --against, byte for byte, so scores there are too good; delete them from "
        "one of the two",
    )  # fmt: skip
    rules = (leak,)

    def begin(self) -> None:
        self._images: dict[bytes, str] = {}  # digest -> id of its first row

    def row(self, row: LintRow) -> None:
        for digest in row.image_digests:
            self._images.setdefault(digest, row.image_id)

    def other(self, row: LintRow, folder: str) -> None:
        """Looks for the images of a row of another folder among those of the set."""
        for digest in row.image_digests:
            if digest in self._images:
                own = self._images.pop(digest)
                name = "" if own == row.image_id else f" as '{row.image_id}'"
                self.add(self.leak, LintRow({**row.row, "image_id": own}), f"also in '{folder}'{name}")

    def finish(self, facts: SetFacts) -> None:
        self._images.clear()
