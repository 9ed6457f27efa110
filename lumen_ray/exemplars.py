"""Classes given by example: boxes around objects of the class, and around others that are not meant.

The region encoder's embedding of each box enters the prompt where words would name the class, with or without its name
beside it: "detect bolt like <region> <region> unlike <region>". T-Rex2 (arXiv 2403.14610) and SAM 3 (arXiv 2511.16719)
prompt detectors this way; here the LLM reads names and boxes in one sentence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lumen_ray.errors import UserError
from lumen_ray.structures import Region, Size
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

    `box`: x1, y1, x2, y2 in pixels of `image`, uint8 [height, width, 3] RGB, EXIF-rotated; None: the image that is
    asked about. Raises `UserError` for what is no image, and for a box without area or outside its image.
    """

    box: Sequence[float]
    image: np.ndarray | None = None
    positive: bool = True

    def __post_init__(self) -> None:
        if self.image is None:
            self.region((1 << 24, 1 << 24))  # of unknown size; checked again beside its image
            return
        image = self.image
        if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3):
            kind = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
            raise UserError(
                f"the image of an example is a uint8 array [height, width, 3] (RGB), got {kind}", "invalid_example"
            )
        self.region((image.shape[0], image.shape[1]))

    def region(self, size: Size) -> Region:
        """The box on an image of (height, width) `size`. Raises `UserError` if it does not lie on it."""
        try:
            x1, y1, x2, y2 = (float(value) for value in self.box)
        except (TypeError, ValueError):
            raise UserError(
                f"the box of an example is [x1, y1, x2, y2] in pixels, got {self.box!r}", "invalid_example"
            ) from None
        if not (0 <= x1 < x2 and 0 <= y1 < y2):  # also where a number is not finite
            raise UserError(
                f"the box {[x1, y1, x2, y2]} of an example has no area; give [x1, y1, x2, y2] in pixels of its image "
                "with 0 <= x1 < x2 and 0 <= y1 < y2",
                "invalid_example",
            )
        if x2 > size[1] or y2 > size[0]:
            raise UserError(
                f"the box {[x1, y1, x2, y2]} of an example is outside its image of {size[1]}x{size[0]} pixels; give "
                "[x1, y1, x2, y2] within it",
                "invalid_example",
            )
        return Region("box", size, np.array([[x1, y1], [x2, y2]], np.float32))

    @cached_property
    def key(self) -> str:
        """Identifies box and image, of an example on an image of its own."""
        assert self.image is not None
        digest = hashlib.blake2b(self.image.tobytes(), digest_size=16)
        digest.update(repr((self.image.shape, [float(value) for value in self.box])).encode())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class ClassByExample:
    """A class given by 1 to 8 boxes, at least one of them positive.

    `name`: what its objects are called in answers; the model reads it beside the boxes unless `named` is False, e.g.
    for a number or a code. Raises `UserError` for a name without text, or for too few or too many boxes.
    """

    name: str
    examples: Sequence[Example]
    named: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise UserError(f"a class by example needs a name for its answers, got {self.name!r}", "invalid_classes")
        wrong = next((example for example in self.examples if not isinstance(example, Example)), None)
        if wrong is not None:
            raise UserError(f"the examples of '{self.name}' are lumen_ray.Example, got {wrong!r}", "invalid_example")
        positive = sum(example.positive for example in self.examples)
        if not positive or len(self.examples) > MOST_EXAMPLES:
            raise UserError(
                f"class '{self.name}' has {len(self.examples)} examples, {positive} of them positive; give 1 to "
                f"{MOST_EXAMPLES}, at least one positive",
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


def no_exemplars(name: str) -> UserError:
    """The error for a class by example, if the model does not take them."""
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
