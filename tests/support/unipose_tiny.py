"""UniPose small enough for tests, links with skeletons, and scenes of stick figures."""

from __future__ import annotations

from typing import Any

import torch

from lumen_ray.data.scenes import render as scenes
from lumen_ray.decoders.unipose.decoder import UniPoseDecoder
from lumen_ray.decoders.unipose.settings import UniPoseSettings
from lumen_ray.keypoints import FIGURE_KEYPOINTS
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import PerceptionTargets, Pixels
from support.gdino_tiny import LINK_CHANNELS, TINY

TINY_POSE = {key: value for key, value in TINY.items() if key != "mask_channels"} | {
    "decoder_layers": 4, "num_instances": 6, "denoising_queries": 16,
}  # fmt: skip


def tiny_decoder(seed: int = 0, **changes: Any) -> UniPoseDecoder:
    torch.manual_seed(seed)
    return UniPoseDecoder(UniPoseSettings.model_validate(TINY_POSE | changes), LINK_CHANNELS)


def pose_link(groups: list[list[int]], images: list[int] | None = None, seed: int = 0) -> SuperLink:
    """`groups`: the number of keypoints of every object prompt; `images`: the image of each group, by default its own.

    An object prompt stands before its keypoint prompts."""
    parent, group = [], []
    for number, skeletons in enumerate(groups):
        for keypoints in skeletons:
            parent += [-1] + [len(parent)] * keypoints
            group += [number] * (1 + keypoints)
    group = torch.tensor(group)
    image = group if images is None else torch.tensor(images)[group]
    embeddings = torch.randn(len(group), LINK_CHANNELS, generator=torch.Generator().manual_seed(seed))
    return SuperLink("unipose", embeddings, image, torch.tensor(parent), group)


def figures(indices: list[int], side: int) -> tuple[SuperLink, Pixels, PerceptionTargets]:
    """Some scenes, each asked for the figures in it by their colours and keypoints; words mean the same in all."""
    generator = torch.Generator().manual_seed(3)
    words = {
        name: torch.randn(LINK_CHANNELS, generator=generator)
        for colour in ("red", "green", "blue")
        for name in (colour, *(f"{colour} {keypoint}" for keypoint in FIGURE_KEYPOINTS))
    }
    images, links, boxes, points = [], [], [], []
    for number, index in enumerate(indices):
        scene = scenes.render(0, index, side)
        images.append(torch.from_numpy(scene.image).permute(2, 0, 1))
        found: dict[str, list[scenes.SceneObject]] = {}
        for one in scene.objects:
            if one.keypoints is not None:
                found.setdefault(one.colour, []).append(one)
        for colour, own in found.items():
            parent = len(links)
            links.append((words[colour], number, -1))
            boxes.append([one.box for one in own])
            points.append([[0.0, 0.0, 0.0]] * len(own))
            for k, keypoint in enumerate(FIGURE_KEYPOINTS):
                links.append((words[f"{colour} {keypoint}"], number, parent))
                boxes.append([one.box for one in own])
                points.append([one.keypoints[k].tolist() for one in own])
    embeddings, image, parent = zip(*links, strict=True)
    link = SuperLink("unipose", torch.stack(embeddings), torch.tensor(image), torch.tensor(parent))
    pixels = Pixels(torch.stack(images), torch.tensor([[side, side]] * len(images)))
    return link, pixels, pose_targets(link, boxes, points)


def pose_targets(link: SuperLink, boxes: list[list[Any]], points: list[list[Any]]) -> PerceptionTargets:
    """`boxes` xyxy and `points` (x, y, v) of every prompt's instances."""
    most = max([1, *map(len, boxes)])
    table, keypoints = torch.zeros(len(boxes), most, 4), torch.zeros(len(boxes), most, 3)
    valid = torch.zeros(len(boxes), most, dtype=torch.bool)
    for p, (own, placed) in enumerate(zip(boxes, points, strict=True)):
        if own:
            table[p, : len(own)], keypoints[p, : len(own)] = torch.tensor(own), torch.tensor(placed)
            valid[p, : len(own)] = True
    none = torch.zeros(0, 1, 1, dtype=torch.uint8)
    index = torch.full_like(valid, -1, dtype=torch.int64)
    return PerceptionTargets(table, valid, torch.zeros_like(valid), index, none, keypoints, link.parent < 0)
