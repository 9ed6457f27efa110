"""The light decoder: heatmap, boxes, masks and keypoints of all prompts in one forward (Lumen, sec. 3.3).

Per prompt the aligner yields a heatmap over the shared dense features. Each place says a box, the distances from it to
its four sides; places of high score are instances, after suppression of overlapping boxes. (Lumen takes peaks above
their 8 neighbours, which loses one of two small objects in neighbouring cells.) A mask comes from a dynamic kernel
taken at the place that reads mask features and coordinates relative to it (CondInst, arXiv 2003.05664); keypoints come
from cross-attention of each instance and keypoint name over the instance's box. Several places per object are positives
(see `assigner`), their score learns the IoU (quality focal loss, arXiv 2006.04388).

Legend: P prompts, L = h * w places at `stride`, I instances, K keypoints, C channels. Coordinates: input pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumen_ray.decoders.base import Decoder, LossTerm, PredictSettings, PromptSpec
from lumen_ray.decoders.common.boxes import giou_loss
from lumen_ray.decoders.common.ragged import place_in_group
from lumen_ray.decoders.common.upsample import at_stored_size
from lumen_ray.decoders.lumen import SPEC
from lumen_ray.decoders.lumen.aligner import Aligner, sine_position
from lumen_ray.decoders.lumen.assigner import Assignment, assign, pairwise_iou
from lumen_ray.decoders.lumen.pose_head import PoseHead
from lumen_ray.decoders.lumen.settings import LumenSettings
from lumen_ray.decoders.spec import TrunkShape
from lumen_ray.structures import Boxes, Keypoints, Masks, Prediction
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import MASK_STRIDE, Frame, PerceptionTargets
from lumen_ray.trunk.dense import DownBlock, ResidualBlock, conv_block

KERNEL_WIDTH = 8
#: places that are looked at before overlaps are suppressed: about those that one instance makes likely, and a bound on
#: the matrix of overlaps
PLACES_PER_INSTANCE, MOST_PLACES = 10, 3000


@dataclass
class LumenRaw:
    """`objects` int64 [P]: the links that are object prompts (the others ask for a keypoint of their parent)."""

    link: SuperLink
    objects: Tensor
    logits: Tensor  # [P, L] heatmap
    boxes: Tensor  # [P, L, 4] xyxy
    places: Tensor  # [P, L, C]
    centers: Tensor  # [L, 2] xy
    shape: tuple[int, int]  # (h, w)
    mask_features: Tensor  # [B, mask_channels, H/4, W/4]
    dense: Tensor  # [B, D, H/4, W/4]


def greedy_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of boxes [N, 4] kept, best score first; one prompt's instances only, so prompts stay independent."""
    order = scores.argsort(descending=True, stable=True)
    overlaps = pairwise_iou(boxes[order], boxes[order]).cpu().numpy() > iou_threshold
    dropped = np.zeros(len(order), bool)
    for i in range(len(order)):
        if not dropped[i]:
            dropped[i + 1 :] |= overlaps[i, i + 1 :]
    return order[torch.from_numpy(~dropped).to(order.device)]


def best_of_each(groups: Tensor, values: Tensor, most: int) -> Tensor:
    """Indices of the `most` highest `values` [N] of each group (int64 [N]), by group, best first; ties by index.

    A group keeps the same ones whatever groups are beside it, so a loss over them does not depend on the rank split.
    """
    order = values.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    return order[place_in_group(groups[order]) < most]


def scattered(boxes: Tensor) -> Tensor:
    """A number in [0, 1) for each box [N, 4] that looks random but depends on the box alone."""
    x1, y1, x2, y2 = boxes.double().unbind(-1)  # not a product of matrices, whose rounding may depend on N
    return ((x1 * 12.9898 + y1 * 78.233 + x2 * 37.719 + y2 * 4.581).sin() * 43758.5453).frac().abs()


class LumenDecoder(Decoder):
    spec = SPEC
    exact = ("box_head",)  # of sides: in bf16 they are off by a hundredth

    @classmethod
    def build(cls, settings: LumenSettings, shape: TrunkShape) -> LumenDecoder:
        return cls(settings, shape.dense_channels, settings.link_width(shape.link_channels))

    def __init__(self, settings: LumenSettings, dense_channels: int, link_channels: int):
        super().__init__()
        self.settings = settings
        c = settings.hidden_size
        downs = {4: [], 8: [DownBlock(dense_channels, c)]}
        downs[16] = [*downs[8], DownBlock(c, c)]
        if settings.stride not in downs:
            raise ValueError(f"lumen.stride must be one of {sorted(downs)}, got {settings.stride}")
        self.neck = nn.Sequential(*(downs[settings.stride] or [conv_block(dense_channels, c)]), ResidualBlock(c))
        self.position_scale = nn.Parameter(torch.full((1,), 0.25))  # below the features, which say what is there
        self.link_proj = nn.Sequential(nn.LayerNorm(link_channels), nn.Linear(link_channels, c))
        self.aligner = Aligner(c, settings.num_heads, settings.num_layers)
        self.heat_place = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, c))
        self.heat_token = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, c))
        self.heat_scale = nn.Parameter(torch.full((1,), 4.0))  # a steep match: places must tell prompts apart early
        self.heat_bias = nn.Parameter(torch.full((1,), -4.0))  # few places are objects
        self.box_head = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, c), nn.SiLU(), nn.Linear(c, 4))
        m, k = settings.mask_channels, KERNEL_WIDTH
        self.kernel_sizes = [(m + 2) * k, k * k, k, k, k, 1]  # weights of three 1x1 layers, then their biases
        self.kernel_head = nn.Sequential(
            nn.LayerNorm(c), nn.Linear(c, c), nn.SiLU(), nn.Linear(c, sum(self.kernel_sizes))
        )
        self.mask_features = nn.Sequential(conv_block(dense_channels, c // 2), nn.Conv2d(c // 2, m, 1))
        self.pose = PoseHead(dense_channels, link_channels, c, settings.pose_grid)

    def forward(self, link: SuperLink, dense: Tensor) -> LumenRaw:
        """link of P prompts, dense [B, D, H/4, W/4] -> raw maps of all object prompts."""
        features = self.neck(dense)
        h, w = features.shape[-2:]
        position = sine_position(h, w, features.shape[1], dense.device)
        objects = torch.nonzero(link.parent < 0).flatten()
        tokens, places = self.aligner(
            self.link_proj(link.embeddings[objects]),
            features.flatten(2).transpose(1, 2) + self.position_scale * position,
            link.image_index[objects],
            position,
        )
        c = places.shape[-1]
        norm, linear = self.heat_place
        word = self.heat_token(tokens)  # P C; its product with heat_place(places), without C x C per place
        logits = torch.einsum("plc,pc->pl", norm(places), word @ linear.weight) + (word @ linear.bias)[:, None]
        logits = logits * (self.heat_scale / c**0.5) + self.heat_bias
        stride = self.settings.stride
        y, x = torch.meshgrid(torch.arange(h, device=dense.device), torch.arange(w, device=dense.device), indexing="ij")
        centers = (torch.stack([x.flatten(), y.flatten()], -1) + 0.5) * stride
        # exp keeps distances positive; 2 strides is a typical object's half size where training starts
        sides = torch.exp(self.box_head(places).clamp(-6, 6)) * (2 * stride)
        boxes = torch.cat([centers - sides[..., :2], centers + sides[..., 2:]], dim=-1)
        return LumenRaw(link, objects, logits, boxes, places, centers, (h, w), self.mask_features(dense), dense)

    def masks_at(self, raw: LumenRaw, prompts: Tensor, places: Tensor, sizes: Tensor) -> Tensor:
        """Mask logits [I, H/4, W/4] of instances found at `places` [I] of `prompts` [I].

        `sizes` [I]: the longer side of each instance's box in pixels, the unit of the relative coordinates.
        """
        kernels = self.kernel_head(raw.places[prompts, places])
        w1, w2, w3, b1, b2, b3 = kernels.split(self.kernel_sizes, dim=1)
        features = raw.mask_features[raw.link.image_index[raw.objects[prompts]]]  # I m h w
        h, w = features.shape[-2:]
        step = raw.shape[1] * self.settings.stride / w
        y = (torch.arange(h, device=features.device) + 0.5) * step
        x = (torch.arange(w, device=features.device) + 0.5) * step
        center, unit = raw.centers[places], sizes.clamp_min(self.settings.stride)[:, None]
        rel_x = ((x - center[:, :1]) / unit)[:, None, :].expand(-1, h, -1)
        rel_y = ((y - center[:, 1:]) / unit)[:, :, None].expand(-1, -1, w)
        z = torch.cat([features, rel_x[:, None], rel_y[:, None]], dim=1).flatten(2)  # I m+2 hw
        k = KERNEL_WIDTH
        z = torch.relu(torch.bmm(w1.view(len(z), k, -1), z) + b1.unsqueeze(-1))
        z = torch.relu(torch.bmm(w2.view(len(z), k, k), z) + b2.unsqueeze(-1))
        return (torch.bmm(w3.view(len(z), 1, k), z) + b3.unsqueeze(-1)).view(-1, h, w)

    def used(self, tasks: Collection[str] | None) -> Iterable[nn.Parameter]:
        posed = tasks is None or "pose" in tasks
        return (p for name, p in self.named_parameters() if posed or not name.startswith("pose."))

    def loss(self, raw: LumenRaw, targets: PerceptionTargets) -> dict[str, LossTerm]:
        """Heatmap, box, mask and keypoint losses; `targets` has one entry per link, keypoint prompts included."""
        s, rows = self.settings, raw.objects
        boxes, counted = targets.boxes[rows], targets.counted[rows]
        assignment = assign(
            raw.logits.sigmoid(), raw.boxes, raw.centers, boxes, targets.valid[rows], targets.crowd[rows],
            s.topk_assign, s.stride,
        )  # fmt: skip
        quality = assignment.quality
        weight = (counted[:, None] & ~assignment.ignored).float()
        heat = F.binary_cross_entropy_with_logits(raw.logits, quality, reduction="none")
        heat = heat * (raw.logits.sigmoid() - quality).abs().square() * weight
        count = (quality * weight).sum().detach()
        prompt, place = torch.nonzero((assignment.target >= 0) & counted[:, None], as_tuple=True)
        gt = assignment.target[prompt, place]
        predicted, wanted, q = raw.boxes[prompt, place], boxes[prompt, gt], quality[prompt, place]
        extent = (wanted[:, 2:] - wanted[:, :2]).clamp_min(s.stride).repeat(1, 2)
        l1 = ((predicted - wanted) / extent).abs().mean(-1)
        box = (q * (giou_loss(predicted, wanted) + 0.5 * l1)).sum()
        losses = {
            "heatmap": LossTerm(s.heatmap_weight * heat.sum(), count, self._per_link(heat.detach().sum(1), raw)),
            "match": self._match_loss(raw, assignment, counted, prompt, place),
            "box": LossTerm(s.box_weight * box, count),
            "mask": self._mask_loss(raw, targets, prompt, place, gt),
        }
        losses["keypoint"] = self._keypoint_loss(raw, targets)
        return losses

    @staticmethod
    def _per_link(values: Tensor, raw: LumenRaw) -> Tensor:
        """Values of the object prompts, spread over all links (0 for keypoint prompts)."""
        return values.new_zeros(len(raw.link)).scatter(0, raw.objects, values)

    def _match_loss(
        self, raw: LumenRaw, assignment: Assignment, counted: Tensor, prompt: Tensor, place: Tensor
    ) -> LossTerm:
        """Which of an image's prompts an object's place belongs to: cross entropy over them, per positive place.

        The focal loss of the heatmap is content with a middling score at any object of the image; this one is not.
        Prompts that have an object at that place themselves take no part, whether or not it is the same one.
        """
        image = raw.link.image_index[raw.objects]
        rivals = (image[:, None] == image[prompt]) & counted[:, None]  # P N: prompts against positive places
        rivals &= ~(assignment.inside | assignment.ignored)[:, place]
        logits = raw.logits[:, place]
        own = raw.logits[prompt, place]
        against = torch.logsumexp(logits.masked_fill(~rivals, -1e4), dim=0)
        total = F.softplus(against - own).sum()
        return LossTerm(self.settings.match_weight * total, own.new_tensor(float(len(own))))

    def _mask_loss(
        self,
        raw: LumenRaw,
        targets: PerceptionTargets,
        prompt: Tensor,
        place: Tensor,
        gt: Tensor,
    ) -> LossTerm:
        """BCE + Dice (sec. 3.3) on the positives nearest the centre, `max_masks_per_object` of each prompt's object.

        Nearness is exact; a choice by score would turn on rounding, and with it on how a batch is split over ranks.
        Of crowded images `max_masks_per_image`: the nearest of each object first, of objects that change with where
        augmentation puts them.
        """
        index = targets.mask_index[raw.objects][prompt, gt]
        keep = torch.nonzero(index >= 0).flatten()
        objects = prompt[keep] * targets.valid.shape[1] + gt[keep]
        gt_boxes = targets.boxes[raw.objects][prompt[keep], gt[keep]]
        distance = (raw.centers[place[keep]] - (gt_boxes[:, :2] + gt_boxes[:, 2:]) / 2).square().sum(-1)
        best = best_of_each(objects, -distance, self.settings.max_masks_per_object)
        keep, gt_boxes = keep[best], gt_boxes[best]
        wish = scattered(gt_boxes) - place_in_group(objects[best])
        images = raw.link.image_index[raw.objects[prompt[keep]]]
        best = best_of_each(images, wish, self.settings.max_masks_per_image)
        keep, gt_boxes = keep[best], gt_boxes[best]
        prompt, place, gt, index = prompt[keep], place[keep], gt[keep], index[keep]
        if len(keep) == 0:
            return LossTerm(raw.logits.new_zeros(()), raw.logits.new_zeros(()))
        boxes = raw.boxes.detach()[prompt, place]
        logits = self.masks_at(raw, prompt, place, (boxes[:, 2:] - boxes[:, :2]).amax(-1))
        wanted = targets.masks[index].float()
        bce = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        # the loss looks at the object and its surroundings, else the empty image outweighs a small object
        near = self._near(gt_boxes, logits.shape[-2:], raw)
        bce = (bce * near).sum((1, 2)) / near.sum((1, 2)).clamp_min(1)
        probability = logits.sigmoid()
        overlap = (probability * wanted).sum((1, 2))
        dice = 1 - (2 * overlap + 1) / (probability.square().sum((1, 2)) + wanted.square().sum((1, 2)) + 1)
        total = self.settings.mask_weight * (bce + dice).sum()
        return LossTerm(total, logits.new_tensor(float(len(keep))))

    def _near(self, boxes: Tensor, shape: torch.Size, raw: LumenRaw) -> Tensor:
        """float [I, h, w], 1 inside the boxes grown by half their size."""
        h, w = shape
        step = raw.shape[1] * self.settings.stride / w
        y = (torch.arange(h, device=boxes.device) + 0.5) * step
        x = (torch.arange(w, device=boxes.device) + 0.5) * step
        grow = (boxes[:, 2:] - boxes[:, :2]) / 2
        low, high = boxes[:, :2] - grow, boxes[:, 2:] + grow
        in_x = (x >= low[:, :1]) & (x <= high[:, :1])
        in_y = (y >= low[:, 1:]) & (y <= high[:, 1:])
        return (in_y[:, :, None] & in_x[:, None, :]).float()

    def _keypoint_loss(self, raw: LumenRaw, targets: PerceptionTargets) -> LossTerm:
        """L1 in units of the box, plus 1 - OKS, over labelled keypoints; visibility by BCE."""
        link = raw.link
        children = torch.nonzero(link.parent >= 0).flatten()
        if len(children) == 0:
            return LossTerm(raw.logits.new_zeros(()), raw.logits.new_zeros(()))
        parents = link.parent[children]
        child, instance = torch.nonzero(targets.valid[parents] & ~targets.crowd[parents], as_tuple=True)
        boxes = targets.boxes[parents[child], instance]
        truth = targets.keypoints[children[child], instance]
        labelled = truth[:, 2] > 0
        xy, visible = self.pose(raw.dense, boxes, link.image_index[children[child]], link.embeddings[children[child]])
        extent = (boxes[:, 2:] - boxes[:, :2]).clamp_min(1)
        difference = (xy - truth[:, :2]) / extent
        l1 = difference.abs().sum(-1)
        spread = 2 * targets.sigma[children[child]]  # COCO's OKS falls off with twice the sigma
        oks = torch.exp(-difference.square().sum(-1) / (2 * spread.square()))
        place = (l1 * 4 + 1 - oks)[labelled].sum()
        seen = F.binary_cross_entropy_with_logits(visible, (truth[:, 2] == 2).float(), reduction="none")[labelled].sum()
        return LossTerm(self.settings.keypoint_weight * (place + 0.5 * seen), labelled.float().sum())

    @torch.inference_mode()
    def predict(
        self, raw: LumenRaw, frames: list[Frame], prompts: list[PromptSpec | None], settings: PredictSettings
    ) -> list[Prediction | None]:
        """One Prediction per link, in the frame of the stored image; None for keypoint prompts (see their parent).

        `frames`: one per image; `prompts`: one per link.
        """
        children: dict[int, list[int]] = {}
        for child, parent in enumerate(raw.link.parent.tolist()):
            if parent >= 0:
                children.setdefault(parent, []).append(child)
        out: list[Prediction | None] = [None] * len(raw.link)
        scores = raw.logits.sigmoid()
        for p, link_index in enumerate(raw.objects.tolist()):
            frame = frames[int(raw.link.image_index[link_index])]
            found = self._instances(raw, p, scores[p], frame, settings)
            out[link_index] = self._prediction(
                raw, p, found, scores[p], frame, prompts[link_index], children.get(link_index, [])
            )
        return out

    def _instances(self, raw: LumenRaw, p: int, scores: Tensor, frame: Frame, settings: PredictSettings) -> Tensor:
        """Places of one prompt's instances, best first: inside the image, above the threshold, after NMS."""
        height, width = (side * frame.scale for side in frame.size)
        centers = raw.centers
        inside = (centers[:, 0] < width) & (centers[:, 1] < height)
        found = torch.nonzero(inside & (scores >= settings.score_threshold)).flatten()
        if len(found) == 0:
            return found
        most = min(PLACES_PER_INSTANCE * settings.max_per_phrase, MOST_PLACES)
        best = scores[found].argsort(descending=True, stable=True)[:most]
        found = found[best]
        return found[greedy_nms(raw.boxes[p, found], scores[found], self.settings.nms_iou)][: settings.max_per_phrase]

    def _prediction(
        self,
        raw: LumenRaw,
        p: int,
        found: Tensor,
        scores: Tensor,
        frame: Frame,
        spec: PromptSpec,
        children: list[int],
    ) -> Prediction:
        height, width = frame.size
        input_boxes = raw.boxes[p, found]
        boxes = Boxes((input_boxes / frame.scale).float().cpu().numpy(), frame.size).clip()
        masks = keypoints = None
        if spec.masks:
            masks = self._masks(raw, p, found, input_boxes, frame)
        if children:
            image = raw.link.image_index[children[0]].expand(len(found) * len(children))
            repeated = input_boxes.repeat_interleave(len(children), dim=0)
            links = raw.link.embeddings[children].repeat(len(found), 1)
            xy, visible = self.pose(raw.dense, repeated, image, links)
            xyv = torch.cat([xy / frame.scale, visible.sigmoid()[:, None]], dim=1).float().cpu().numpy()
            xyv = xyv.reshape(len(found), len(children), 3)
            xyv[..., 0], xyv[..., 1] = xyv[..., 0].clip(0, width), xyv[..., 1].clip(0, height)
            keypoints = Keypoints(xyv, spec.keypoints, frame.size)
        return Prediction(spec.phrase, boxes, scores[found].float().cpu().numpy(), masks, keypoints)

    def _masks(self, raw: LumenRaw, p: int, found: Tensor, boxes: Tensor, frame: Frame) -> Masks:
        """Masks at the stored image's resolution, each cut to its box grown by half."""
        if len(found) == 0:
            return Masks([], frame.size)
        prompts = torch.full_like(found, p)
        logits = self.masks_at(raw, prompts, found, (boxes[:, 2:] - boxes[:, :2]).amax(-1))
        logits = torch.where(self._near(boxes, logits.shape[-2:], raw) > 0, logits, torch.full_like(logits, -10.0))
        rles = []
        # Probabilities are enlarged, not logits: one very negative cell would move the border inwards.
        for one in logits:  # one at a time: hundreds of full-size masks of a large photo would not fit in memory
            full = at_stored_size(one.sigmoid(), MASK_STRIDE, frame)
            rles += Masks.from_arrays((full > 0.5).cpu().numpy()[None]).rles
        return Masks(rles, frame.size)
