"""How precisely people place keypoints: the sigmas of object keypoint similarity (OKS)."""

from __future__ import annotations

from collections.abc import Sequence

#: COCO's own, of a person's keypoints, relative to the square root of the object's area
COCO_SIGMAS = {
    "nose": 0.026, "left eye": 0.025, "right eye": 0.025, "left ear": 0.035, "right ear": 0.035,
    "left shoulder": 0.079, "right shoulder": 0.079, "left elbow": 0.072, "right elbow": 0.072,
    "left wrist": 0.062, "right wrist": 0.062, "left hip": 0.107, "right hip": 0.107,
    "left knee": 0.087, "right knee": 0.087, "left ankle": 0.089, "right ankle": 0.089,
}  # fmt: skip
DEFAULT_SIGMA = 0.05  # of keypoints that nobody has measured


def keypoint_sigmas(names: Sequence[str]) -> tuple[float, ...]:
    """One for each keypoint of a skeleton: COCO's where all of its names are those of a person, else the default.

    An animal's eye is not placed like a person's, though it has the same name."""
    known = [COCO_SIGMAS.get(name.replace("_", " ").lower()) for name in names]
    return tuple((DEFAULT_SIGMA,) * len(known) if None in known else known)
