"""Sample images for the page: scenes of the synthetic data set, drawn when they are first asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

SEED = 2026
#: scenes of this seed, with few and many objects, equal ones, and figures
SCENES = (3, 10, 15, 38)
_SIDE = 256


@dataclass(frozen=True)
class Sample:
    """`jpeg`: the encoded image; `description`: what it shows, as an alternative text."""

    jpeg: bytes
    description: str


@cache
def samples() -> tuple[Sample, ...]:
    """The samples, in the order of the page."""
    # here, since most ingress replicas draw none
    from lumen_ray.data.scenes.render import encode_jpeg, render
    from lumen_ray.data.scenes.text import caption

    scenes = [render(SEED, index, _SIDE) for index in SCENES]
    return tuple(Sample(encode_jpeg(scene.image), _sentence(caption(scene.objects))) for scene in scenes)


def _sentence(text: str) -> str:
    """A caption of the data set, which has blanks around punctuation, as a sentence."""
    text = text.replace(" ,", ",").replace(" .", ".")
    return text[:1].upper() + text[1:]
