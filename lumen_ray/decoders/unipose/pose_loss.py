"""What slots should find, and the losses of their keypoints (ED-Pose, arXiv 2302.01593, sec. 3.4, as UniPose uses it).

Distances of OKS are in pixels of the model input, so that it means the same for images of any shape.

Legend: G groups, N slots, M objects of the richest group, E objects of all groups; one that several prompts name
appears once for each. K keypoints of the largest skeleton. Boxes are cxcywh, and points xy, in 0..1 of the image
without padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lumen_ray.decoders.common.boxes import to_cxcywh
from lumen_ray.decoders.common.ragged import Seats
from lumen_ray.decoders.dino.decoder import Groups
from lumen_ray.decoders.dino.set_loss import Matches, assign, box_cost, box_loss, class_cost, focal_loss
from lumen_ray.decoders.unipose.settings import UniPoseSettings
from lumen_ray.decoders.unipose.slots import Skeletons, Slots
from lumen_ray.targets import PerceptionTargets


class Poses(Protocol):
    """What a stage says of the slots: logits float32 [G, N] of their prompt, boxes [G, N, 4], xy [G, N, K, 2], logits
    of visibility [G, N, K]."""

    logits: Tensor
    boxes: Tensor
    xy: Tensor
    visible: Tensor


@dataclass
class PoseObjects:
    group: Tensor  # int64 [E], rising
    seat: Tensor  # int64 [E]: column of the prompt among those of the group
    boxes: Tensor  # float32 [E, 4]
    xy: Tensor  # float32 [E, K, 2]
    labelled: Tensor  # bool [E, K]
    visible: Tensor  # bool [E, K]
    exists: Tensor  # bool [E, K]: the skeleton has such a keypoint
    sigma: Tensor  # float32 [E, K]
    scale: Tensor  # float32 [G, 4]: width, height, width, height of the groups' images in pixels

    def __len__(self) -> int:
        return len(self.group)

    @property
    def counts(self) -> Tensor:
        """int64 [G]"""
        return self.group.bincount(minlength=len(self.scale))

    @property
    def area(self) -> Tensor:
        """float32 [E]: of the boxes, in square pixels, at least 1."""
        return (self.boxes[:, 2:] * self.scale[self.group, 2:]).prod(-1).clamp_min(1)

    def by_group(self, values: Tensor) -> Tensor:
        """values [E, ...] -> [G, M, ...], 0 where a group has fewer."""
        seats = Seats.of(self.group, len(self.scale))
        return values.new_zeros(*seats.shape, *values.shape[1:]).index_put((seats.row, seats.seat), values)


def find_poses(targets: PerceptionTargets, groups: Groups, skeletons: Skeletons) -> PoseObjects:
    """Crowds are not among the objects; without keypoints, others are."""
    wanted = (targets.valid & ~targets.crowd & targets.counted[:, None])[groups.objects]
    prompt, column = torch.nonzero(wanted, as_tuple=True)
    order = groups.seats.row[prompt].argsort(stable=True)
    prompt, column = prompt[order], column[order]
    group = groups.seats.row[prompt]
    scale = targets.boxes.new_tensor([(width, height, width, height) for height, width in groups.sizes])
    keypoints = skeletons.fill(targets.keypoints)[prompt, :, column]
    return PoseObjects(
        group,
        groups.seats.seat[prompt],
        to_cxcywh(targets.boxes[groups.objects[prompt], column] / scale[group]),
        keypoints[..., :2] / scale[group, None, :2],
        keypoints[..., 2] > 0,
        keypoints[..., 2] > 1,
        skeletons.valid[prompt],
        skeletons.fill(targets.sigma)[prompt],
        scale,
    )


def object_similarity(distance: Tensor, labelled: Tensor, sigma: Tensor, area: Tensor) -> Tensor:
    """Object keypoint similarity [...], COCO's: squared pixel distances [..., K] of labelled keypoints against `sigma`
    [..., K], relative to the object's `area` [...] in square pixels."""
    spread = 2 * area[..., None] * (2 * sigma.clamp_min(1e-6)).square()
    near = torch.exp(-distance / spread) * labelled
    return near.sum(-1) / labelled.sum(-1).clamp_min(1)


@torch.no_grad()
def match_poses(stage: Poses, slots: Slots, objects: PoseObjects, s: UniPoseSettings) -> Matches:
    """The cheapest assignment of objects to slots of their prompt."""
    if not len(objects):
        none = objects.group
        return Matches(none, none, none)
    seat, boxes, xy, labelled, sigma, area = map(
        objects.by_group,
        (objects.seat, objects.boxes, objects.xy, objects.labelled, objects.sigma, objects.area),
    )
    difference = stage.xy[:, :, None] - xy[:, None]  # G N M K 2
    labelled = labelled[:, None]
    place = (difference.abs().sum(-1) * labelled).sum(-1)
    distance = (difference * objects.scale[:, None, None, None, :2]).square().sum(-1)
    oks = object_similarity(distance, labelled, sigma[:, None], area[:, None])
    unlike = (1 - oks) * labelled.any(-1)
    cost = (
        s.class_cost * class_cost(stage.logits)[..., None]
        + box_cost(stage.boxes, boxes, objects.scale, s)
        + s.keypoint_cost * place
        + s.oks_cost * unlike
    )
    allowed = slots.valid[..., None] & (slots.seat[..., None] == seat[:, None])
    return assign(cost, allowed, objects.counts)


def pose_losses(
    stage: Poses, slots: Slots, matches: Matches, objects: PoseObjects, counted: Tensor, s: UniPoseSettings
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sums of a stage: of the class, [G, T], and of boxes and keypoints.

    `counted` bool [G, T]: prompts that have detection targets. Visibility is asked of all keypoints of an instance that
    has labelled ones: an annotator who placed some saw no sign of the others."""
    group, slot, index = matches
    wanted = torch.zeros_like(stage.logits)
    wanted[group, slot] = 1.0
    used = slots.valid & counted.gather(1, slots.seat)
    kinds = torch.zeros_like(counted, dtype=torch.float32)
    kinds = kinds.scatter_add(1, slots.seat, focal_loss(stage.logits.masked_fill(~used, 0.0), wanted) * used)
    labelled = objects.labelled[index]
    difference = stage.xy[group, slot] - objects.xy[index]
    place = (difference.abs().sum(-1) * labelled).sum()
    distance = (difference * objects.scale[group, None, :2]).square().sum(-1)
    oks = object_similarity(distance, labelled, objects.sigma[index], objects.area[index])
    asked = objects.exists[index] & labelled.any(-1, keepdim=True)
    visible = objects.visible[index].float()
    seen = F.binary_cross_entropy_with_logits(stage.visible[group, slot], visible, reduction="none") * asked
    return s.class_weight * kinds, {
        "unipose_box": box_loss(stage, matches, objects, s).sum(),
        "unipose_keypoint": s.keypoint_weight * place,
        "unipose_oks": s.oks_weight * ((1 - oks) * labelled.any(-1)).sum(),
        "unipose_visible": s.visible_weight * (seen.sum(-1) / asked.sum(-1).clamp_min(1)).sum(),
    }
