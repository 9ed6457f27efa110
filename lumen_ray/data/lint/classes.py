"""Class names that differ by spelling alone, and how often each class is annotated as present and as absent."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from statistics import median

from lumen_ray.data.lint.check import Check, SetFacts
from lumen_ray.data.lint.findings import Rule
from lumen_ray.data.lint.rows import LintRow

#: with fewer images that ask for a class, it can be always or never present by chance
MIN_IMAGES = 10
#: if the median class is in fewer images, the set may well lack some class by chance: a note, no warning
TYPICAL_IMAGES = 10
#: classes in fewer images are listed as rare
FEW_IMAGES = 5


def plain_name(name: str) -> str:
    """The name without case, blanks, hyphens and underscores."""
    return re.sub(r"[\s_\-]+", "", unicodedata.normalize("NFKC", name).casefold())


def singular(name: str) -> str:
    """The plain name without the "s" of a plural."""
    plain = plain_name(name)
    return plain[:-1] if len(plain) > 3 and plain.endswith("s") and not plain.endswith("ss") else plain


def _images(number: int) -> str:
    return f"{number:,} image{'s' * (number != 1)}"


class Classes(Check):
    """Counts the images that ask for each class and those that contain it."""

    spelling = Rule(
        "class-spelling", "problem", "classes",
        "class names differ only by case, blanks, hyphens or underscores, so each is trained as absent where the other "
        "stands; rename them to one name",
    )  # fmt: skip
    plural = Rule(
        "class-plural", "warning", "classes",
        "class names are singular and plural of one word; if they mean the same objects, rename them to one name",
    )  # fmt: skip
    never = Rule(
        "class-never", "warning", "classes",
        "classes have no object, unlike the others that the images ask for, so they are trained as absent only; check "
        "their spelling, or leave them out",
    )  # fmt: skip
    empty = Rule(
        "class-empty", "note", "classes",
        "classes have no object in this set and cannot be learned from it; leave them out, or add images with them",
    )  # fmt: skip
    always = Rule(
        "class-always", "warning", "classes",
        "classes are in every image that asks for them, so a model never learns that they can be absent; add images "
        "without them",
    )  # fmt: skip
    rare = Rule(
        "class-rare", "note", "classes",
        f"classes are in fewer than {FEW_IMAGES} images, too few to learn; add images with them",
    )  # fmt: skip
    rules = (spelling, plural, never, always, empty, rare)

    def begin(self) -> None:
        self._asked: Counter[str] = Counter()  # images that are annotated exhaustively for the class
        self._asked_with: Counter[str] = Counter()  # those of them that contain it
        self._images: Counter[str] = Counter()  # images that contain it

    def row(self, row: LintRow) -> None:
        present, asked = set(row.names), set(row.row["classes"])
        self._asked.update(asked)
        self._asked_with.update(asked & present)
        self._images.update(present)

    def finish(self, facts: SetFacts) -> None:
        listed = dict.fromkeys([*(c["name"] for c in facts.categories), *self._asked])
        self._compare_names([*listed, *(name for name in self._images if name not in listed)])
        present = [self._images[name] for name in listed if self._images[name]]
        conspicuous = not present or median(present) >= TYPICAL_IMAGES
        for name in sorted(listed, key=lambda n: (-self._asked[n], n)):
            asked, images = self._asked[name], self._images[name]
            if not images:
                rule = self.never if asked >= MIN_IMAGES and conspicuous else self.empty
                self.add(rule, None, f"'{name}', asked for in {_images(asked)}")
            elif images < FEW_IMAGES:
                self.add(self.rare, None, f"'{name}', in {_images(images)}")
            if asked >= MIN_IMAGES and self._asked_with[name] == asked:
                self.add(self.always, None, f"'{name}', in all {asked:,} images that ask for it")

    def _compare_names(self, names: list[str]) -> None:
        by_plain: dict[str, list[str]] = {}
        for name in names:
            by_plain.setdefault(plain_name(name), []).append(name)
        by_singular: dict[str, list[str]] = {}
        for first, *others in by_plain.values():
            by_singular.setdefault(singular(first), []).append(first)
            if others:
                self.add(self.spelling, None, self._list([first, *others]), number=len(others) + 1)
        for group in by_singular.values():
            if len(group) > 1:
                self.add(self.plural, None, self._list(group), number=len(group))

    def _list(self, names: list[str]) -> str:
        return ", ".join(f"'{name}' in {_images(self._images[name])}" for name in names)
