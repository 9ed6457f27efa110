"""The sigmas of object keypoint similarity (OKS): how precisely annotators place each keypoint."""

from __future__ import annotations

from collections.abc import Sequence

#: COCO's, for the keypoints of a person, relative to the square root of the object's area
COCO_SIGMAS = {
    "nose": 0.026, "left eye": 0.025, "right eye": 0.025, "left ear": 0.035, "right ear": 0.035,
    "left shoulder": 0.079, "right shoulder": 0.079, "left elbow": 0.072, "right elbow": 0.072,
    "left wrist": 0.062, "right wrist": 0.062, "left hip": 0.107, "right hip": 0.107,
    "left knee": 0.087, "right knee": 0.087, "left ankle": 0.089, "right ankle": 0.089,
}  # fmt: skip
DEFAULT_SIGMA = 0.05  # of keypoints without a measured one


def keypoint_sigmas(names: Sequence[str]) -> tuple[float, ...]:
    """The sigma of each keypoint of a skeleton: COCO's if all names are those of a person, else `DEFAULT_SIGMA`.

    An animal's eye is not placed like a person's, although it has the same name."""
    keys = [name.replace("_", " ").lower() for name in names]
    if not all(key in COCO_SIGMAS for key in keys):
        return (DEFAULT_SIGMA,) * len(keys)
    return tuple(COCO_SIGMAS[key] for key in keys)
