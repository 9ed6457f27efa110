"""Targets, matching and losses of slots and their keypoints (ED-Pose, arXiv 2302.01593, sec. 3.4, as used by UniPose).

OKS uses distances in pixels of the model input, so that it does not depend on the image's aspect ratio.

Legend: G groups, N slots, M objects of the largest group, E objects of all groups; an object shared by several prompts
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
    """Predictions of a layer for the slots: logits float32 [G, N] of their prompt, boxes [G, N, 4], xy [G, N, K, 2],
    visibility logits [G, N, K]."""

    logits: Tensor
    boxes: Tensor
    xy: Tensor
    visible: Tensor


@dataclass
class PoseObjects:
    """The ground truth, group by group."""

    group: Tensor  # int64 [E], ascending
    seat: Tensor  # int64 [E]: column of the object's prompt in [G, T]
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
        """Objects per group, int64 [G]."""
        return self.group.bincount(minlength=len(self.scale))

    @property
    def area(self) -> Tensor:
        """float32 [E]: area of the boxes in square pixels, at least 1."""
        return (self.boxes[:, 2:] * self.scale[self.group, 2:]).prod(-1).clamp_min(1)

    def by_group(self, values: Tensor) -> Tensor:
        """Pads values [E, ...] -> [G, M, ...] with 0."""
        seats = Seats.of(self.group, len(self.scale))
        return values.new_zeros(*seats.shape, *values.shape[1:]).index_put((seats.row, seats.seat), values)


def find_poses(targets: PerceptionTargets, groups: Groups, skeletons: Skeletons) -> PoseObjects:
    """Collects the objects of all groups, without crowds; objects without keypoints are included."""
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
    """COCO's object keypoint similarity [...], from squared pixel distances [..., K] of labelled keypoints, their
    `sigma` [..., K], and the object's `area` [...] in square pixels."""
    spread = 2 * area[..., None] * (2 * sigma.clamp_min(1e-6)).square()
    near = torch.exp(-distance / spread) * labelled
    return near.sum(-1) / labelled.sum(-1).clamp_min(1)


@torch.no_grad()
def match_poses(output: Poses, slots: Slots, objects: PoseObjects, s: UniPoseSettings) -> Matches:
    """Minimum-cost assignment of objects to slots of their prompt."""
    if not len(objects):
        none = objects.group
        return Matches(none, none, none)
    seat, boxes, xy, labelled, sigma, area = map(
        objects.by_group,
        (objects.seat, objects.boxes, objects.xy, objects.labelled, objects.sigma, objects.area),
    )
    difference = output.xy[:, :, None] - xy[:, None]  # G N M K 2
    labelled = labelled[:, None]
    place = (difference.abs().sum(-1) * labelled).sum(-1)
    distance = (difference * objects.scale[:, None, None, None, :2]).square().sum(-1)
    oks = object_similarity(distance, labelled, sigma[:, None], area[:, None])
    unlike = (1 - oks) * labelled.any(-1)
    cost = (
        s.class_cost * class_cost(output.logits)[..., None]
        + box_cost(output.boxes, boxes, objects.scale, s)
        + s.keypoint_cost * place
        + s.oks_cost * unlike
    )
    allowed = slots.valid[..., None] & (slots.seat[..., None] == seat[:, None])
    return assign(cost, allowed, objects.counts)


def pose_losses(
    output: Poses, slots: Slots, matches: Matches, objects: PoseObjects, counted: Tensor, s: UniPoseSettings
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted loss sums of a layer: of the class, [G, T], and of boxes and keypoints by name.

    `counted` bool [G, T]: prompts that have detection targets. Visibility is supervised for all keypoints of an
    instance that has labelled ones: an annotator who labelled some saw none of the others."""
    group, slot, index = matches
    labels = torch.zeros_like(output.logits)
    labels[group, slot] = 1.0
    used = slots.valid & counted.gather(1, slots.seat)
    per_class = torch.zeros_like(counted, dtype=torch.float32)
    focal = focal_loss(output.logits.masked_fill(~used, 0.0), labels) * used
    per_class = per_class.scatter_add(1, slots.seat, focal)
    labelled = objects.labelled[index]
    difference = output.xy[group, slot] - objects.xy[index]
    place = (difference.abs().sum(-1) * labelled).sum()
    distance = (difference * objects.scale[group, None, :2]).square().sum(-1)
    oks = object_similarity(distance, labelled, objects.sigma[index], objects.area[index])
    supervised = objects.exists[index] & labelled.any(-1, keepdim=True)
    visible = objects.visible[index].float()
    bce = F.binary_cross_entropy_with_logits(output.visible[group, slot], visible, reduction="none") * supervised
    return s.class_weight * per_class, {
        "unipose_box": box_loss(output, matches, objects, s).sum(),
        "unipose_keypoint": s.keypoint_weight * place,
        "unipose_oks": s.oks_weight * ((1 - oks) * labelled.any(-1)).sum(),
        "unipose_visible": s.visible_weight * (bce.sum(-1) / supervised.sum(-1).clamp_min(1)).sum(),
    }
