"""The pose expert: UniPose driven by link embeddings (arXiv 2310.08530, sec. 3.3; VisionLLM v2, arXiv 2406.08394, sec.
3.3).

Queries first detect objects, as in Grounding DINO. The best pairs of a query and an object prompt then become slots: a
slot is the object's query plus one query for each keypoint prompt of that object prompt. They attend to each other, the
pixels and the object prompts. Skeletons are defined by the links alone, so prompts with different skeletons, of any
length, may share a group and a batch.

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
from lumen_ray.decoders.dino.transformer import box_head, gather_rows, last_layer
from lumen_ray.decoders.unipose import SPEC
from lumen_ray.decoders.unipose.pose_loss import find_poses, match_poses, pose_losses
from lumen_ray.decoders.unipose.settings import UniPoseSettings
from lumen_ray.decoders.unipose.slots import KeypointStart, Skeletons, Slots
from lumen_ray.structures import Boxes, Keypoints, Prediction
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import Frame, PerceptionTargets

LIKELY_VISIBLE = 1.0  # initial visibility logit; the constant of the released code


@dataclass
class PoseOutput:
    """Predictions of one layer for the slots."""

    logits: Tensor  # float32 [G, N], of the slot's prompt
    boxes: Tensor  # float32 [G, N, 4] cxcywh
    xy: Tensor  # float32 [G, N, K, 2]
    visible: Tensor  # float32 [G, N, K], logits


@dataclass
class UniPoseRaw(DinoRaw):
    """Output of the forward pass."""

    skeletons: Skeletons
    slots: Slots
    poses: list[PoseOutput]  # of the layers that predict keypoints; the last is the result


class UniPoseDecoder(DinoDecoder):
    """See the module's docstring."""

    spec = SPEC
    settings: UniPoseSettings

    def __init__(self, settings: UniPoseSettings, link_channels: int, dense_channels: int = 0):
        super().__init__(settings, link_channels, dense_channels)
        c = settings.hidden_size
        self.keypoint_proj = self._link_proj(link_channels)
        self.keypoint_start = KeypointStart(c, settings.size_tables)
        self.pose_embed = box_head(c, 2)
        self.pose_hw_embed = box_head(c, 2)
        self.visible_embed = box_head(c, 1)
        nn.init.constant_(last_layer(self.visible_embed).bias, LIKELY_VISIBLE)
        if settings.features == "backbone":
            # of the stride-4 map, which only masks use
            self.trunk.backbone.hidden_states_norms["stage1"] = nn.Identity()

    def _decode(self, link: SuperLink, levels: Levels, groups: Groups, wanted: Objects | None = None) -> UniPoseRaw:
        box_layers, layers = self.settings.box_layers, self.settings.decoder_layers
        memory, links = self._encode(levels, groups, self.link_proj(link.embeddings[groups.objects]))
        denoising = None if wanted is None else make_denoising(wanted, links, memory.link_valid, self.settings)
        start = self.begin(memory, denoising)
        first, mask = start.denoising, start.self_mask
        outputs, hidden, boxes = self.layers(memory, start.content, start.boxes, mask, range(box_layers))
        boxes = self.passed_on(boxes, hidden)
        denoised, detected = (list(half) for half in zip(*(output.split(first) for output in outputs), strict=True))
        if denoising is not None:  # run separately from the slots, which are many
            noisy = (hidden[:, :first], boxes[:, :first], mask[..., :first, :first])
            denoised += self.layers(memory, *noisy, range(box_layers, layers))[0]
        hidden, boxes = hidden[:, first:], boxes[:, first:]
        skeletons, slots = Skeletons.of(link, groups.objects), self._choose(hidden, memory, start.valid, groups)
        keypoints = skeletons.fill(self.keypoint_proj(link.embeddings))[slots.prompt]
        mask = self._slot_mask(skeletons.valid[slots.prompt], hidden.dtype)
        hidden, boxes = gather_rows(hidden, slots.query), gather_rows(boxes, slots.query)
        poses = self._pose(memory, hidden, boxes, slots, keypoints, mask)
        detection = (link, groups, start.encoder, detected, start.valid, denoising, denoised)
        return UniPoseRaw(*detection, skeletons, slots, poses)

    def _choose(self, hidden: Tensor, memory: Memory, query_valid: Tensor, groups: Groups) -> Slots:
        """The pairs of query and prompt with the highest scores."""
        scores = self._classify(hidden, memory).detach().masked_fill(~query_valid[..., None], float("-inf"))
        return Slots.best(scores, groups, self.settings.num_instances)

    @staticmethod
    def _slot_mask(keypoint_valid: Tensor, dtype: torch.dtype) -> Tensor:
        """A bias, [G * N, 1, 1, 1 + K]: a slot's queries attend to its object and its existing keypoints."""
        allowed = nn.functional.pad(keypoint_valid.flatten(0, 1), (1, 0), value=True)
        return mask_to_bias(allowed, dtype)[:, None, None]

    def _pose(
        self, memory: Memory, hidden: Tensor, boxes: Tensor, slots: Slots, keypoints: Tensor, self_mask: Tensor
    ) -> list[PoseOutput]:
        """Runs the layers after the box layers. hidden [G, N, C] and boxes [G, N, 4] of the slots' objects; `keypoints`
        [G, N, K, C]: their keypoint prompts; `self_mask` as in `DinoTrunk.layer`.

        Positions are detached between layers, as boxes in `layers`. Sizes, which set how far a keypoint's attention
        reaches, keep their gradient: no loss trains them directly."""
        outputs: list[PoseOutput] = []
        content = self.keypoint_start.content(keypoints, hidden)
        xy = self.trunk.moved(boxes[:, :, None, :2], self.pose_embed, content)
        size = self.keypoint_start.sizes(content) * boxes[:, :, None, 2:].detach()
        hidden = torch.cat([hidden[:, :, None], content], dim=2)
        for index in range(self.settings.box_layers, self.settings.decoder_layers):
            if outputs:
                boxes, xy, size = self._advance(boxes, xy, size, hidden)
            if not self.settings.look_forward_twice:
                boxes, xy = boxes.detach(), xy.detach()
            at = torch.cat([boxes.detach()[:, :, None], torch.cat([xy.detach(), size], dim=-1)], dim=2)
            shape = hidden.shape[1:3]
            hidden = self.trunk.layer(index, hidden.flatten(1, 2), at.flatten(1, 2), memory, self_mask)
            hidden = hidden.unflatten(1, shape)
            normed = self.trunk.decoder.layer_norm(hidden)
            outputs.append(self._output(normed[:, :, 0], normed[:, :, 1:], memory, slots, boxes, xy))
        return outputs

    def _output(
        self, objects: Tensor, keypoints: Tensor, memory: Memory, slots: Slots, boxes: Tensor, xy: Tensor
    ) -> PoseOutput:
        logits = self._classify(objects, memory).gather(2, slots.seat[..., None])[..., 0]
        return PoseOutput(
            logits,
            self.trunk.moved(boxes, self.bbox_embed, objects),
            self.trunk.moved(xy, self.pose_embed, keypoints),
            self.visible_embed(keypoints)[..., 0].float(),
        )

    def _advance(self, boxes: Tensor, xy: Tensor, size: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, keypoints and sizes for the next layer, given `hidden` [G, N, 1 + K, C] of a layer."""
        moved, keypoints = self.trunk.moved, hidden[:, :, 1:]
        return (
            moved(boxes.detach(), self.bbox_embed, hidden[:, :, 0]),
            moved(xy.detach(), self.pose_embed, keypoints),
            moved(size, self.pose_hw_embed, keypoints),
        )

    def _losses(self, raw: UniPoseRaw, wanted: Objects, targets: PerceptionTargets) -> dict[str, LossTerm]:
        """Sums over all layers, normalised by the number of objects; an object counts once per prompt."""
        poses = find_poses(targets, raw.groups, raw.skeletons)
        per_class, box = self._class_and_box(self._matched(raw, wanted), wanted)
        totals = dict.fromkeys(self.loss_names[1:], torch.zeros_like(box)) | {"unipose_box": box}
        for output in raw.poses:
            matches = match_poses(output, raw.slots, poses, self.settings)
            of_class, others = pose_losses(output, raw.slots, matches, poses, wanted.counted, self.settings)
            per_class = per_class + of_class
            totals = {name: total + others[name] for name, total in totals.items()}
        count = box.new_tensor(float(len(poses)))
        each = raw.groups.per_link(per_class.detach(), len(raw.link))
        terms = {name: LossTerm(total, count) for name, total in totals.items()}
        return {"unipose_class": LossTerm(per_class.sum(), count, each), **terms}

    @torch.inference_mode()
    def predict(
        self,
        raw: UniPoseRaw,
        frames: list[Frame],
        prompts: list[PromptSpec | None],
        settings: PredictSettings,
    ) -> list[Prediction | None]:
        """See `Decoder.predict`."""
        out: list[Prediction | None] = [None] * len(raw.link)
        groups, slots, last = raw.groups, raw.slots, raw.poses[-1]
        image, rows, lengths = raw.link.image_index.tolist(), groups.seats.row.tolist(), raw.skeletons.valid.sum(1)
        scores = last.logits.sigmoid().masked_fill(~slots.valid, -1.0).cpu()
        xyv = torch.cat([last.xy, last.visible.sigmoid()[..., None]], dim=-1).cpu().numpy()
        boxes, owner = to_xyxy(last.boxes).cpu().numpy(), slots.prompt.cpu()
        for p, link in enumerate(groups.objects.tolist()):
            frame, prompt, row = frames[image[link]], prompts[link], rows[p]
            assert prompt is not None, "only keypoint prompts have none"
            members = torch.nonzero((owner[row] == p) & (scores[row] >= settings.score_threshold)).flatten()
            order = scores[row, members].argsort(descending=True, stable=True)
            best = members[order][: settings.max_per_phrase].numpy()
            height, width = (side / frame.scale for side in groups.sizes[row])
            keypoints = None
            if prompt.keypoints:
                points = xyv[row, best, : int(lengths[p])]
                keypoints = _keypoints(points, prompt.keypoints, (width, height), frame)
            scale = np.array((width, height, width, height), np.float32)
            placed = Boxes(boxes[row, best] * scale, frame.size).clip()
            out[link] = Prediction(prompt.phrase, placed, scores[row, best].numpy(), keypoints=keypoints)
        return out


def _keypoints(xyv: np.ndarray, names: tuple[str, ...], scale: tuple[float, float], frame: Frame) -> Keypoints:
    """xyv [I, K, 3]: x, y in units of `scale` (pixels of the stored image), visibility. Clipped to the image."""
    height, width = frame.size
    xy = np.clip(xyv[..., :2] * np.array(scale, np.float32), 0, np.array((width, height), np.float32))
    return Keypoints(np.concatenate([xy, xyv[..., 2:]], axis=-1), names, frame.size)
