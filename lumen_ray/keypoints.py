"""Keypoints: the sigmas of object keypoint similarity (OKS), which say how precisely annotators place each, and the
skeletons of the synthetic scenes and of COCO."""

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


#: keypoints of a figure in the synthetic scenes, left and right from the viewer's side, and the pairs to join
FIGURE_KEYPOINTS = ("head", "left hand", "right hand", "left foot", "right foot")
FIGURE_EDGES = ((0, 1), (0, 2), (0, 3), (0, 4))
_COCO_EDGES = (
    (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8),
    (7, 9), (8, 10), (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6),
)  # fmt: skip


def known_edges(names: Sequence[str]) -> Sequence[tuple[int, int]]:
    """Pairs of keypoint indices to join, for the keypoint names of the scenes and of COCO; empty for others."""
    if tuple(names) == FIGURE_KEYPOINTS:
        return FIGURE_EDGES
    if len(names) == 17 and names[0] == "nose" and names[16] in ("right_ankle", "right ankle"):
        return _COCO_EDGES
    return ()
