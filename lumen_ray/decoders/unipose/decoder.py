"""The expert of poses: UniPose driven by link embeddings (arXiv 2310.08530; VisionLLM v2, arXiv 2406.08394).

Queries look for objects first, as in Grounding DINO. The best pairs of a query and an object prompt then become slots:
a slot is the object's query and one query for each keypoint prompt of that object prompt. They read each other, the
pixels and the object prompts. Skeletons come from the links alone, so prompts with different ones, of any length, may
be in one group and one batch.

Legend: P' object prompts, G groups, T prompts of the largest group, Q queries, D denoising queries, N slots, K
keypoints of the largest skeleton, C channels. Coordinates inside are in 0..1 of the image without padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lumen_ray.attention import mask_to_bias
from lumen_ray.decoders.base import LossTerm, PredictSettings, PromptSpec
from lumen_ray.decoders.common.boxes import to_xyxy
from lumen_ray.decoders.dino.decoder import DinoDecoder, DinoRaw, Groups
from lumen_ray.decoders.dino.denoising import make_denoising
from lumen_ray.decoders.dino.memory import Levels, Memory
from lumen_ray.decoders.dino.set_loss import Objects
from lumen_ray.decoders.dino.transformer import box_head, gather_rows
from lumen_ray.decoders.unipose import SPEC
from lumen_ray.decoders.unipose.pose_loss import find_poses, match_poses, pose_losses
from lumen_ray.decoders.unipose.settings import UniPoseSettings
from lumen_ray.decoders.unipose.slots import KeypointStart, Skeletons, Slots
from lumen_ray.structures import Boxes, Keypoints, Prediction
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import Frame, PerceptionTargets

LIKELY_VISIBLE = 1.0  # logit of a fresh visibility; the released code's constant


@dataclass
class PoseStage:
    """What one layer makes of the slots."""

    logits: Tensor  # float32 [G, N], of the slot's own prompt
    boxes: Tensor  # float32 [G, N, 4] cxcywh
    xy: Tensor  # float32 [G, N, K, 2]
    visible: Tensor  # float32 [G, N, K], logits


@dataclass
class UniPoseRaw(DinoRaw):
    skeletons: Skeletons
    slots: Slots
    poses: list[PoseStage]  # of the layers that look for keypoints; the last is the result


class UniPoseDecoder(DinoDecoder):
    spec = SPEC

    def __init__(self, settings: UniPoseSettings, link_channels: int):
        super().__init__(settings, link_channels)
        c = settings.hidden_size
        self.keypoint_proj = self._link_proj(link_channels)
        self.keypoint_start = KeypointStart(c, settings.size_tables)
        self.pose_embed = box_head(c, 2)
        self.pose_hw_embed = box_head(c, 2)
        self.visible_embed = box_head(c, 1)
        nn.init.constant_(self.visible_embed.layers[-1].bias, LIKELY_VISIBLE)
        self.trunk.backbone.hidden_states_norms["stage1"] = nn.Identity()  # of a map that only masks read

    def _decode(self, link: SuperLink, levels: Levels, groups: Groups, wanted: Objects | None = None) -> UniPoseRaw:
        box_layers, layers = self.settings.box_layers, self.settings.decoder_layers
        memory, links = self._encode(levels, groups, self.link_proj(link.embeddings[groups.objects]))
        denoising = None if wanted is None else make_denoising(wanted, links, memory.link_valid, self.settings)
        start = self.begin(memory, denoising)
        first, mask = start.denoising, start.self_mask
        stages, hidden, boxes = self.layers(memory, start.content, start.boxes, mask, range(box_layers))
        boxes = self.passed_on(boxes, hidden)
        denoised, stages = (list(part) for part in zip(*(stage.split(first) for stage in stages), strict=True))
        if denoising is not None:  # apart from the slots, which are many
            own = (hidden[:, :first], boxes[:, :first], mask[..., :first, :first])
            denoised += self.layers(memory, *own, range(box_layers, layers))[0]
        hidden, boxes = hidden[:, first:], boxes[:, first:]
        skeletons, slots = Skeletons.of(link, groups.objects), self._choose(hidden, memory, start.valid, groups)
        keypoints = skeletons.fill(self.keypoint_proj(link.embeddings))[slots.prompt]
        mask = self._own(skeletons.valid[slots.prompt], hidden.dtype)
        hidden, boxes = gather_rows(hidden, slots.query), gather_rows(boxes, slots.query)
        poses = self._pose(memory, hidden, boxes, slots, keypoints, mask)
        found = (link, groups, start.encoder, stages, start.valid, denoising, denoised)
        return UniPoseRaw(*found, skeletons, slots, poses)

    def _choose(self, hidden: Tensor, memory: Memory, query_valid: Tensor, groups: Groups) -> Slots:
        """The pairs of query and prompt that are likeliest to be an object."""
        scores = self._classify(hidden, memory).detach().masked_fill(~query_valid[..., None], float("-inf"))
        return Slots.best(scores, groups, self.settings.num_instances)

    @staticmethod
    def _own(keypoint_valid: Tensor, dtype: torch.dtype) -> Tensor:
        """A bias, [G * N, 1, 1, 1 + K]: a slot's queries read the object and those of its keypoints that exist."""
        allowed = nn.functional.pad(keypoint_valid.flatten(0, 1), (1, 0), value=True)
        return mask_to_bias(allowed, dtype)[:, None, None]

    def _pose(
        self, memory: Memory, hidden: Tensor, boxes: Tensor, slots: Slots, keypoints: Tensor, self_mask: Tensor
    ) -> list[PoseStage]:
        """A stage for every layer after the box layers. hidden [G, N, C] and boxes [G, N, 4] of the slots' objects,
        `keypoints` [G, N, K, C]: their keypoint prompts; `self_mask` as in `DinoTrunk.layer`.

        Layers pass places on without gradient, as boxes in `layers`; but sizes with it, as nothing else trains them:
        they say how far a keypoint looks around."""
        stages = []
        content = self.keypoint_start.content(keypoints, hidden)
        xy = self.trunk.moved(boxes[:, :, None, :2], self.pose_embed, content)
        size = self.keypoint_start.sizes(content) * boxes[:, :, None, 2:].detach()
        hidden = torch.cat([hidden[:, :, None], content], dim=2)
        for index in range(self.settings.box_layers, self.settings.decoder_layers):
            if stages:
                boxes, xy, size = self._advance(boxes, xy, size, hidden)
            if not self.settings.look_forward_twice:
                boxes, xy = boxes.detach(), xy.detach()
            at = torch.cat([boxes.detach()[:, :, None], torch.cat([xy.detach(), size], dim=-1)], dim=2)
            shape = hidden.shape[1:3]
            hidden = self.trunk.layer(index, hidden.flatten(1, 2), at.flatten(1, 2), memory, self_mask)
            hidden = hidden.unflatten(1, shape)
            normed = self.trunk.decoder.layer_norm(hidden)
            stages.append(self._stage(normed[:, :, 0], normed[:, :, 1:], memory, slots, boxes, xy))
        return stages

    def _stage(
        self, objects: Tensor, keypoints: Tensor, memory: Memory, slots: Slots, boxes: Tensor, xy: Tensor
    ) -> PoseStage:
        logits = self._classify(objects, memory).gather(2, slots.seat[..., None])[..., 0]
        return PoseStage(
            logits,
            self.trunk.moved(boxes, self.bbox_embed, objects),
            self.trunk.moved(xy, self.pose_embed, keypoints),
            self.visible_embed(keypoints)[..., 0].float(),
        )

    def _advance(self, boxes: Tensor, xy: Tensor, size: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a layer that leaves `hidden` [G, N, 1 + K, C] passes on to the next."""
        moved, keypoints = self.trunk.moved, hidden[:, :, 1:]
        return (
            moved(boxes.detach(), self.bbox_embed, hidden[:, :, 0]),
            moved(xy.detach(), self.pose_embed, keypoints),
            moved(size, self.pose_hw_embed, keypoints),
        )

    def _losses(self, raw: UniPoseRaw, wanted: Objects, targets: PerceptionTargets) -> dict[str, LossTerm]:
        """Sums over all stages, over the number of objects; one that several prompts name counts for each."""
        poses = find_poses(targets, raw.groups, raw.skeletons)
        kinds, box = self._class_and_box(self._matched(raw, wanted), wanted)
        totals = dict.fromkeys(self.loss_names[1:], torch.zeros_like(box)) | {"unipose_box": box}
        for stage in raw.poses:
            matches = match_poses(stage, raw.slots, poses, self.settings)
            of_class, others = pose_losses(stage, raw.slots, matches, poses, wanted.counted, self.settings)
            kinds = kinds + of_class
            totals = {name: total + others[name] for name, total in totals.items()}
        count = box.new_tensor(float(len(poses)))
        each = raw.groups.per_link(kinds.detach(), len(raw.link))
        terms = {name: LossTerm(total, count) for name, total in totals.items()}
        return {"unipose_class": LossTerm(kinds.sum(), count, each), **terms}

    @torch.inference_mode()
    def predict(
        self,
        raw: UniPoseRaw,
        frames: list[Frame],
        prompts: list[PromptSpec | None],
        settings: PredictSettings,
    ) -> list[Prediction | None]:
        """One Prediction per link, in the frame of the stored image; None for keypoint prompts (see their parent).

        `frames`: one per image; `prompts`: one per link."""
        out: list[Prediction | None] = [None] * len(raw.link)
        groups, slots, last = raw.groups, raw.slots, raw.poses[-1]
        image, rows, lengths = raw.link.image_index.tolist(), groups.seats.row.tolist(), raw.skeletons.valid.sum(1)
        scores = last.logits.sigmoid().masked_fill(~slots.valid, -1.0).cpu()
        found = torch.cat([last.xy, last.visible.sigmoid()[..., None]], dim=-1).cpu().numpy()
        boxes, owner = to_xyxy(last.boxes).cpu().numpy(), slots.prompt.cpu()
        for p, link in enumerate(groups.objects.tolist()):
            frame, spec, row = frames[image[link]], prompts[link], rows[p]
            own = torch.nonzero((owner[row] == p) & (scores[row] >= settings.score_threshold)).flatten()
            best = own[scores[row, own].argsort(descending=True, stable=True)][: settings.max_per_phrase].numpy()
            height, width = (side / frame.scale for side in groups.sizes[row])
            keypoints = None
            if spec.keypoints:
                points = found[row, best, : int(lengths[p])]
                keypoints = _keypoints(points, spec.keypoints, (width, height), frame)
            placed = Boxes(boxes[row, best] * np.float32((width, height, width, height)), frame.size).clip()
            out[link] = Prediction(spec.phrase, placed, scores[row, best].numpy(), keypoints=keypoints)
        return out


def _keypoints(found: np.ndarray, names: tuple[str, ...], scale: tuple[float, float], frame: Frame) -> Keypoints:
    """found [I, K, 3]: x, y in units of `scale` (pixels of the stored image), visibility. Clipped to the image."""
    height, width = frame.size
    xy = np.clip(found[..., :2] * np.float32(scale), 0, np.float32((width, height)))
    return Keypoints(np.concatenate([xy, found[..., 2:]], axis=-1), names, frame.size)
