"""Masks and keypoints of all instances that a pass found, together: a call for each prompt would cost more than its
work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lumen_ray.decoders.base import PromptSpec
from lumen_ray.decoders.common.upsample import masks_at_stored_size
from lumen_ray.decoders.lumen.pose_head import PoseHead
from lumen_ray.decoders.lumen.raw import LumenRaw
from lumen_ray.structures import Keypoints, Masks
from lumen_ray.targets import MASK_STRIDE, Frame

#: instances whose masks, and keypoints which, are computed in one pass: bounds memory, whatever the number of prompts
MASKS_AT_ONCE, KEYPOINTS_AT_ONCE = 256, 4096


@dataclass
class Found:
    """The instances of object prompt `prompt`: `places` [I], `boxes` [I, 4] in input pixels; `children`: the links of
    its keypoint prompts."""

    prompt: int
    places: Tensor
    boxes: Tensor
    frame: Frame
    spec: PromptSpec
    children: list[int]


def masks_of(
    masks_at: Callable[[LumenRaw, Tensor, Tensor, Tensor], Tensor],
    near: Callable[[Tensor, torch.Size, LumenRaw], Tensor],
    raw: LumenRaw,
    found: Sequence[Found],
) -> dict[int, Masks]:
    """Prompt -> masks at the stored image's resolution, for the prompts that ask for masks.

    masks_at: `LumenDecoder.masks_at`; near: `LumenDecoder.near`, the enlarged box that clips each mask.
    """
    asked = [one for one in found if one.spec.masks]
    if not asked:
        return {}
    prompts = torch.cat([torch.full_like(one.places, one.prompt) for one in asked])
    places, boxes = torch.cat([one.places for one in asked]), torch.cat([one.boxes for one in asked])
    owners = [one for one in asked for _ in range(len(one.places))]
    rles: dict[int, list[dict[str, Any]]] = {one.prompt: [] for one in asked}
    for start in range(0, len(owners), MASKS_AT_ONCE):
        part = slice(start, start + MASKS_AT_ONCE)
        sides = boxes[part, 2:] - boxes[part, :2]
        logits = masks_at(raw, prompts[part], places[part], sides.amax(-1))
        logits = torch.where(near(boxes[part], logits.shape[-2:], raw) > 0, logits, torch.full_like(logits, -10.0))
        for one, values in zip(owners[part], logits.sigmoid(), strict=True):
            rles[one.prompt] += masks_at_stored_size([values], MASK_STRIDE, one.frame).rles
    return {one.prompt: Masks(rles[one.prompt], one.frame.size) for one in asked}


def keypoints_of(pose: PoseHead, raw: LumenRaw, found: Sequence[Found]) -> dict[int, Keypoints]:
    """Prompt -> keypoints, for the prompts that have keypoint prompts."""
    keypoints: dict[int, Keypoints] = {}
    group: list[Found] = []
    rows = 0
    for one in (one for one in found if one.children):
        if group and rows + len(one.places) * len(one.children) > KEYPOINTS_AT_ONCE:
            keypoints |= _together(pose, raw, group)
            group, rows = [], 0
        group.append(one)
        rows += len(one.places) * len(one.children)
    return keypoints | (_together(pose, raw, group) if group else {})


def _together(pose: PoseHead, raw: LumenRaw, asked: Sequence[Found]) -> dict[int, Keypoints]:
    """`keypoints_of` prompts that all have keypoint prompts, in one pass."""
    images, boxes, links = [], [], []
    for one in asked:
        number = len(one.places)
        images.append(raw.link.image_index[one.children[0]].expand(number * len(one.children)))
        boxes.append(one.boxes.repeat_interleave(len(one.children), dim=0))
        links.append(raw.link.embeddings[one.children].repeat(number, 1))
    xy, visible = pose(raw.dense, torch.cat(boxes), torch.cat(images), torch.cat(links))
    xyv = torch.cat([xy, visible.sigmoid()[:, None]], dim=1).float().cpu()
    keypoints = {}
    for one, values in zip(asked, xyv.split([len(part) for part in boxes]), strict=True):
        height, width = one.frame.size
        points = values.numpy().reshape(len(one.places), len(one.children), 3)
        points[..., :2] /= one.frame.scale
        points[..., 0], points[..., 1] = points[..., 0].clip(0, width), points[..., 1].clip(0, height)
        keypoints[one.prompt] = Keypoints(points, one.spec.keypoints, one.frame.size)
    return keypoints
