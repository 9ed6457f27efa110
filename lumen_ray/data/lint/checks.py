"""The table of the checks of `data lint`. See `check` for how to add one."""

from __future__ import annotations

from lumen_ray.data.lint.boxes import BoxGeometry, RepeatedObjects, WholeImageBoxes
from lumen_ray.data.lint.check import Check
from lumen_ray.data.lint.classes import Classes
from lumen_ray.data.lint.copies import Copies, Leaks
from lumen_ray.data.lint.images import Images
from lumen_ray.data.lint.keypoints import KeypointPlaces
from lumen_ray.data.lint.masks import Crowds, MaskGeometry, MixedMasks
from lumen_ray.data.lint.records import Notes, Records, RejectedRecords
from lumen_ray.data.lint.texts import RepeatedCaptions, Texts

#: in the order of the report
CHECKS: tuple[type[Check], ...] = (
    Records,
    RejectedRecords,
    Images,
    Leaks,
    Copies,
    Classes,
    RepeatedObjects,
    BoxGeometry,
    WholeImageBoxes,
    MaskGeometry,
    MixedMasks,
    Crowds,
    KeypointPlaces,
    Texts,
    RepeatedCaptions,
    Notes,
)
