"""Classes given by example: boxes around objects of the class, and around others that are not meant.

The region encoder's embedding of each box enters the prompt where words would name the class, with or without its name
beside it: "detect bolt like <region> <region> unlike <region>". T-Rex2 (arXiv 2403.14610) and SAM 3 (arXiv 2511.16719)
prompt detectors this way; here the LLM reads names and boxes in one sentence.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lumen_ray.errors import UserError
from lumen_ray.structures import Region, Size, check_pixels
from lumen_ray.tasks import REGION_TOKEN

#: what stands for the class where its name is not read
UNNAMED = "objects"
#: most boxes of one class: positive and negative ones together
MOST_EXAMPLES = 8


def exemplar_phrase(name: str, positive: int, negative: int) -> str:
    """What takes the place of a class name in a prompt; `name` may be empty. Positive boxes come first."""
    phrase = f"{name or UNNAMED} like {' '.join([REGION_TOKEN] * positive)}"
    return f"{phrase} unlike {' '.join([REGION_TOKEN] * negative)}" if negative else phrase


@dataclass(frozen=True, eq=False)
class Example:
    """A box around an object of a class, or, if not `positive`, around one that is not meant.

    `box`: x1, y1, x2, y2 in pixels of `image`, uint8 [height, width, 3] RGB, EXIF-rotated, whose pixels must not change
    afterwards; None: the image that is asked about. Raises `UserError` for what is no image, and for a box without area
    or outside its image.
    """

    box: Sequence[float]
    image: np.ndarray | None = None
    positive: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.positive, bool):
            raise UserError(f"'positive' of an example is True or False, got {self.positive!r}", "invalid_example")
        self._corners()
        if self.image is None:
            return
        check_pixels(self.image, "the image of an example", "invalid_example")
        self.region((self.image.shape[0], self.image.shape[1]))

    def region(self, size: Size) -> Region:
        """The box on an image of (height, width) `size`. Raises `UserError` if it does not lie on it."""
        x1, y1, x2, y2 = self._corners()
        if x2 > size[1] or y2 > size[0]:
            raise UserError(
                f"the box {[x1, y1, x2, y2]} of an example is outside its image of {size[1]}x{size[0]} pixels; give "
                "[x1, y1, x2, y2] within it",
                "invalid_example",
            )
        return Region("box", size, np.array([[x1, y1], [x2, y2]], np.float32))

    def _corners(self) -> tuple[float, float, float, float]:
        """The box as numbers. Raises `UserError` if it is none, whatever its image."""
        try:
            if isinstance(self.box, str):
                raise TypeError
            x1, y1, x2, y2 = (float(value) for value in self.box)
        except (TypeError, ValueError):
            raise UserError(
                f"the box of an example is [x1, y1, x2, y2] in pixels, got {self.box!r}", "invalid_example"
            ) from None
        if not (0 <= x1 < x2 < math.inf and 0 <= y1 < y2 < math.inf):  # nor where a number is none
            raise UserError(
                f"the box {[x1, y1, x2, y2]} of an example has no area; give [x1, y1, x2, y2] in pixels of its image "
                "with 0 <= x1 < x2 and 0 <= y1 < y2",
                "invalid_example",
            )
        return x1, y1, x2, y2

    @cached_property
    def key(self) -> str:
        """Identifies box and image, of an example on an image of its own."""
        assert self.image is not None
        return hashlib.blake2b(f"{_digest(self.image)} {self._corners()}".encode(), digest_size=16).hexdigest()


#: (the array, its digest) by the array's id, while it lives: many boxes share an image
_digests: dict[int, tuple[weakref.ref[np.ndarray], str]] = {}


def _digest(image: np.ndarray) -> str:
    """Identifies the pixels of an image; computed once for an array."""
    known = _digests.get(id(image))
    if known is not None and known[0]() is image:
        return known[1]
    made = hashlib.blake2b(repr(image.shape).encode() + image.tobytes(), digest_size=16).hexdigest()
    number = id(image)
    _digests[number] = weakref.ref(image, lambda _: _digests.pop(number, None)), made
    return made


@dataclass(frozen=True, eq=False)
class ClassByExample:
    """A class given by 1 to 8 boxes, at least one of them positive.

    `name`: what its objects are called in answers; the model reads it beside the boxes unless `named` is False, e.g.
    for a number or a code. Raises `UserError` for a name without text, or for too few or too many boxes.
    """

    name: str
    examples: Sequence[Example]  # or a single one
    named: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise UserError(f"a class by example needs a name for its answers, got {self.name!r}", "invalid_classes")
        if isinstance(self.examples, Example):
            object.__setattr__(self, "examples", (self.examples,))
        wrong = next((example for example in self.examples if not isinstance(example, Example)), None)
        if wrong is not None:
            raise UserError(f"the examples of '{self.name}' are lumen_ray.Example, got {wrong!r}", "invalid_example")
        if not any(example.positive for example in self.examples):
            raise UserError(
                f"class '{self.name}' has no positive example; give 1 to {MOST_EXAMPLES} examples, at least one of "
                "them positive",
                "invalid_example",
            )
        if len(self.examples) > MOST_EXAMPLES:
            raise UserError(
                f"class '{self.name}' has {len(self.examples)} examples; give at most {MOST_EXAMPLES}",
                "invalid_example",
            )
        object.__setattr__(self, "name", self.name.strip())
        object.__setattr__(self, "examples", tuple(sorted(self.examples, key=lambda example: not example.positive)))

    @property
    def phrase(self) -> str:
        """What takes the place of its name in a prompt; `examples` fill its regions in order."""
        positive = sum(example.positive for example in self.examples)
        return exemplar_phrase(self.name if self.named else "", positive, len(self.examples) - positive)

    @property
    def is_own(self) -> bool:
        """Whether one of its boxes is on the image that is asked about."""
        return any(example.image is None for example in self.examples)


def no_exemplars(name: str, prompt_layout: str = "branches") -> UserError:
    """The error for a class by example, if the model does not take them."""
    if prompt_layout == "sequential":
        return UserError(
            f"class '{name}' is given by example, which models with prompt_layout 'sequential' cannot take; give its "
            "name alone",
            "no_exemplars",
        )
    return UserError(
        f"class '{name}' is given by example, which this model was not trained with; give its name alone, or "
        "train with 'exemplars' in the recipe's branches",
        "no_exemplars",
    )


def split_classes(classes: Sequence[Any]) -> tuple[list[Any], dict[str, ClassByExample]]:
    """(names of all classes in order, those by example by their name). Raises `UserError` for one given twice with
    examples."""
    names, shown = [], {}
    for given in classes:
        if not isinstance(given, ClassByExample):
            names.append(given)
            continue
        if given.name in shown:
            raise UserError(
                f"class '{given.name}' is given twice by example; give all its examples in one", "duplicate_class"
            )
        names.append(given.name)
        shown[given.name] = given
    return names, shown
