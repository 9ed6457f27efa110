"""The light decoder: heatmap, boxes, masks and keypoints of all prompts in one forward pass (Lumen, arXiv 2403.07304,
sec. 3.3).

Per prompt, the aligner gives a heatmap over the shared dense features. Each place predicts a box by its distances to
the four sides (FCOS, arXiv 1904.01355, eq. 1); places of high score become instances after NMS. (Lumen takes peaks
among 8 neighbours, which loses one of two small objects in neighbouring cells.) Masks come from a dynamic kernel per
place that reads mask features and relative coordinates (CondInst, arXiv 2003.05664, sec. 3); keypoints from
cross-attention of each instance and keypoint name over the instance's box. With `presence` a prompt is first asked
whether its object is in the image at all, and only then for places (see `presence`). Several places per object are
positives (see `assigner`); the target of their score is the IoU (quality focal loss, arXiv 2006.04388, eq. 2).

Legend: P prompts, L = h * w places at `stride`, I instances, K keypoints, C channels. Coordinates: input pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumen_ray.decoders.base import Decoder, LossTerm, PredictSettings, PromptSpec
from lumen_ray.decoders.common.boxes import giou_loss, greedy_nms
from lumen_ray.decoders.common.ragged import place_in_group
from lumen_ray.decoders.lumen import SPEC
from lumen_ray.decoders.lumen.aligner import Aligner, sine_position
from lumen_ray.decoders.lumen.assigner import Assignment, assign
from lumen_ray.decoders.lumen.instances import Found, keypoints_of, masks_of
from lumen_ray.decoders.lumen.mask_positives import select_mask_positives
from lumen_ray.decoders.lumen.pose_head import PoseHead
from lumen_ray.decoders.lumen.presence import PresenceHead
from lumen_ray.decoders.lumen.raw import LumenRaw
from lumen_ray.decoders.lumen.settings import LumenSettings
from lumen_ray.decoders.spec import TrunkShape
from lumen_ray.structures import Boxes, Prediction
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import Frame, PerceptionTargets
from lumen_ray.trunk.dense import DownBlock, ResidualBlock, conv_block

KERNEL_WIDTH = 8
#: candidates before NMS: about as many as one instance gives high scores, and a bound on the IoU matrix
PLACES_PER_INSTANCE, MOST_PLACES = 10, 3000


class LumenDecoder(Decoder):
    """See the module's docstring."""

    spec = SPEC
    settings: LumenSettings
    exact = ("box_head",)  # in bf16 box sides are off by a hundredth

    @classmethod
    def build(cls, settings: LumenSettings, shape: TrunkShape) -> LumenDecoder:
        return cls(settings, shape.dense_channels, settings.link_width(shape.link_channels))

    def __init__(self, settings: LumenSettings, dense_channels: int, link_channels: int):
        super().__init__()
        self.settings = settings
        c = settings.hidden_size
        downs: dict[int, list[nn.Module]] = {4: [], 8: [DownBlock(dense_channels, c)]}
        downs[16] = [*downs[8], DownBlock(c, c)]
        if settings.stride not in downs:
            raise ValueError(f"lumen.stride must be one of {sorted(downs)}, got {settings.stride}")
        self.neck = nn.Sequential(*(downs[settings.stride] or [conv_block(dense_channels, c)]), ResidualBlock(c))
        self.position_scale = nn.Parameter(torch.full((1,), 0.25))  # small beside the features
        self.link_proj = nn.Sequential(nn.LayerNorm(link_channels), nn.Linear(link_channels, c))
        self.aligner = Aligner(c, settings.num_heads, settings.num_layers)
        self.heat_place = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, c))
        self.heat_token = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, c))
        self.heat_scale = nn.Parameter(torch.full((1,), 4.0))  # large: separates prompts early
        self.heat_bias = nn.Parameter(torch.full((1,), -4.0))  # prior: few places are objects
        self.box_head = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, c), nn.SiLU(), nn.Linear(c, 4))
        m, k = settings.mask_channels, KERNEL_WIDTH
        self.kernel_sizes = [(m + 2) * k, k * k, k, k, k, 1]  # weights of three 1x1 layers, then their biases
        self.kernel_head = nn.Sequential(
            nn.LayerNorm(c), nn.Linear(c, c), nn.SiLU(), nn.Linear(c, sum(self.kernel_sizes))
        )
        self.mask_features = nn.Sequential(conv_block(dense_channels, c // 2), nn.Conv2d(c // 2, m, 1))
        self.presence = PresenceHead(c) if settings.presence else None
        self.pose = PoseHead(dense_channels, link_channels, c, settings.pose_grid)

    def forward(self, link: SuperLink, dense: Tensor) -> LumenRaw:
        """link of P prompts, dense [B, D, H/4, W/4] -> maps of all object prompts; in eval mode and without gradients
        of those whose object may be in the image."""
        features = self.neck(dense)
        h, w = features.shape[-2:]
        position = sine_position(h, w, features.shape[1], dense.device)
        objects = torch.nonzero(link.parent < 0).flatten()
        tokens = self.link_proj(link.embeddings[objects])
        maps = features.flatten(2).transpose(1, 2) + self.position_scale * position
        presence, absent = None, objects[:0]
        if self.presence is not None:
            presence = self.presence(tokens, maps, link.image_index[objects])
            if not (self.training or torch.is_grad_enabled()) and self.settings.presence_threshold > 0:
                possible = presence.sigmoid() >= self.settings.presence_threshold
                objects, absent = objects[possible], objects[~possible]
                tokens, presence = tokens[possible], presence[possible]
        tokens, places = self.aligner(tokens, maps, link.image_index[objects], position)
        c = features.shape[1]
        norm, linear = self.heat_place
        word = self.heat_token(tokens)  # P C; folds heat_place's C x C product into the token
        stride = self.settings.stride
        y, x = torch.meshgrid(torch.arange(h, device=dense.device), torch.arange(w, device=dense.device), indexing="ij")
        centers = (torch.stack([x.flatten(), y.flatten()], -1) + 0.5) * stride
        boxes = None
        if torch.is_grad_enabled():  # the losses read the boxes of all places
            whole = places.whole()
            logits = torch.einsum("plc,pc->pl", norm(whole), word @ linear.weight)
            boxes = self._boxes(whole, centers)
        else:
            logits = places.matched(norm, word @ linear.weight)
        logits = (logits + (word @ linear.bias)[:, None]) * (self.heat_scale / c**0.5) + self.heat_bias
        return LumenRaw(
            link, objects, absent, presence, logits, boxes, places, centers, (h, w), self.mask_features(dense), dense
        )

    def _boxes(self, aligned: Tensor, centers: Tensor) -> Tensor:
        """Boxes xyxy [..., 4] of aligned places [..., C] at `centers` [..., 2]."""
        # exp keeps distances positive; at initialisation they are 2 strides, half a typical object
        sides = torch.exp(self.box_head(aligned).clamp(-6, 6)) * (2 * self.settings.stride)
        return torch.cat([centers - sides[..., :2], centers + sides[..., 2:]], dim=-1)

    def all_boxes(self, raw: LumenRaw) -> Tensor:
        """Boxes xyxy [P, L, 4] of all places."""
        return self._boxes(raw.places.whole(), raw.centers) if raw.boxes is None else raw.boxes

    def boxes_at(self, raw: LumenRaw, prompts: Tensor, places: Tensor) -> Tensor:
        """Boxes xyxy [N, 4] at `places` [N] of `prompts` [N]."""
        if raw.boxes is not None:
            return raw.boxes[prompts, places]
        return self._boxes(raw.places.at(prompts, places), raw.centers[places])

    def masks_at(self, raw: LumenRaw, prompts: Tensor, places: Tensor, sizes: Tensor) -> Tensor:
        """Mask logits [I, H/4, W/4] of the instances at `places` [I] of `prompts` [I].

        `sizes` [I]: the longer side of each instance's box in pixels, the unit of the relative coordinates.
        """
        kernels = self.kernel_head(raw.places.at(prompts, places))
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
        everywhere = self.all_boxes(raw)
        boxes, counted = targets.boxes[rows], targets.counted[rows]
        assignment = assign(
            raw.logits.sigmoid(), everywhere, raw.centers, boxes, targets.valid[rows], targets.crowd[rows],
            s.topk_assign, s.stride,
        )  # fmt: skip
        quality = assignment.quality
        weight = (counted[:, None] & ~assignment.ignored).float()
        heat = F.binary_cross_entropy_with_logits(raw.logits, quality, reduction="none")
        heat = heat * (raw.logits.sigmoid() - quality).abs().square() * weight
        count = (quality * weight).sum().detach()
        prompt, place = torch.nonzero((assignment.target >= 0) & counted[:, None], as_tuple=True)
        gt = assignment.target[prompt, place]
        predicted, truth, q = everywhere[prompt, place], boxes[prompt, gt], quality[prompt, place]
        extent = (truth[:, 2:] - truth[:, :2]).clamp_min(s.stride).repeat(1, 2)
        l1 = ((predicted - truth) / extent).abs().mean(-1)
        box = (q * (giou_loss(predicted, truth) + 0.5 * l1)).sum()
        losses = {
            "heatmap": LossTerm(s.heatmap_weight * heat.sum(), count, self._per_link(heat.detach().sum(1), raw)),
            "match": self._match_loss(raw, assignment, counted, prompt, place),
            "box": LossTerm(s.box_weight * box, count),
            "mask": self._mask_loss(raw, targets, prompt, place, gt),
        }
        losses["keypoint"] = self._keypoint_loss(raw, targets)
        if raw.presence is not None:
            losses["presence"] = self._presence_loss(raw, raw.presence, targets.valid[rows].any(1), counted)
        return losses

    def _presence_loss(self, raw: LumenRaw, presence: Tensor, present: Tensor, counted: Tensor) -> LossTerm:
        """Binary cross entropy of every prompt that is `counted`; `present` bool [P]: whether it has an object, crowds
        included."""
        loss = F.binary_cross_entropy_with_logits(presence, present.float(), reduction="none") * counted
        weighted = self.settings.presence_weight * loss.sum()
        return LossTerm(weighted, counted.float().sum(), self._per_link(loss.detach(), raw))

    @staticmethod
    def _per_link(values: Tensor, raw: LumenRaw) -> Tensor:
        """Values [P] of the object prompts -> [links], 0 for keypoint prompts."""
        return values.new_zeros(len(raw.link)).scatter(0, raw.objects, values)

    def _match_loss(
        self, raw: LumenRaw, assignment: Assignment, counted: Tensor, prompt: Tensor, place: Tensor
    ) -> LossTerm:
        """Cross entropy over an image's prompts at each positive place: which prompt's object is there.

        The focal loss of the heatmap tolerates medium scores at objects of other prompts; this loss does not. Prompts
        with an object of their own at that place are excluded.
        """
        image = raw.link.image_index[raw.objects]
        rivals = (image[:, None] == image[prompt]) & counted[:, None]  # P N: prompts against positive places
        rivals &= ~(assignment.inside | assignment.ignored)[:, place]
        logits = raw.logits[:, place]
        positive = raw.logits[prompt, place]
        against = torch.logsumexp(logits.masked_fill(~rivals, -1e4), dim=0)
        total = F.softplus(against - positive).sum()
        return LossTerm(self.settings.match_weight * total, positive.new_tensor(float(len(positive))))

    def _mask_loss(
        self,
        raw: LumenRaw,
        targets: PerceptionTargets,
        prompt: Tensor,
        place: Tensor,
        gt: Tensor,
    ) -> LossTerm:
        """BCE + Dice (sec. 3.3) on the positives of `select_mask_positives`."""
        index = targets.mask_index[raw.objects][prompt, gt]
        keep = torch.nonzero(index >= 0).flatten()
        gt_boxes = targets.boxes[raw.objects][prompt[keep], gt[keep]]
        chosen = select_mask_positives(
            prompt[keep] * targets.valid.shape[1] + gt[keep],
            gt_boxes,
            raw.centers[place[keep]],
            raw.link.image_index[raw.objects[prompt[keep]]],
            self.settings.max_masks_per_object,
            self.settings.max_masks_per_image,
        )
        keep, gt_boxes = keep[chosen], gt_boxes[chosen]
        prompt, place, gt, index = prompt[keep], place[keep], gt[keep], index[keep]
        if len(keep) == 0:
            return LossTerm(raw.logits.new_zeros(()), raw.logits.new_zeros(()))
        boxes = self.boxes_at(raw, prompt, place).detach()
        logits = self.masks_at(raw, prompt, place, (boxes[:, 2:] - boxes[:, :2]).amax(-1))
        truth = targets.coverage(index)
        bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        # only the object and its surroundings, else background would outweigh a small object
        near = self.near(gt_boxes, logits.shape[-2:], raw)
        bce = (bce * near).sum((1, 2)) / near.sum((1, 2)).clamp_min(1)
        probability = logits.sigmoid()
        overlap = (probability * truth).sum((1, 2))
        dice = 1 - (2 * overlap + 1) / (probability.square().sum((1, 2)) + truth.square().sum((1, 2)) + 1)
        total = self.settings.mask_weight * (bce + dice).sum()
        return LossTerm(total, logits.new_tensor(float(len(keep))))

    def near(self, boxes: Tensor, shape: torch.Size, raw: LumenRaw) -> Tensor:
        """float [I, h, w], 1 inside the boxes enlarged by half their size on each side."""
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
        """L1 relative to the box size, plus 1 - OKS, over labelled keypoints; BCE for visibility."""
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
        spread = 2 * targets.sigma[children[child]]  # COCO's OKS uses twice the sigma
        oks = torch.exp(-difference.square().sum(-1) / (2 * spread.square()))
        place = (l1 * 4 + 1 - oks)[labelled].sum()
        bce = F.binary_cross_entropy_with_logits(visible, (truth[:, 2] == 2).float(), reduction="none")[labelled].sum()
        return LossTerm(self.settings.keypoint_weight * (place + 0.5 * bce), labelled.float().sum())

    @torch.inference_mode()
    def predict(
        self, raw: LumenRaw, frames: list[Frame], prompts: list[PromptSpec | None], settings: PredictSettings
    ) -> list[Prediction | None]:
        """See `Decoder.predict`."""
        children: dict[int, list[int]] = {}
        for child, parent in enumerate(raw.link.parent.tolist()):
            if parent >= 0:
                children.setdefault(parent, []).append(child)
        out: list[Prediction | None] = [None] * len(raw.link)
        scores = raw.logits.sigmoid()
        presence: list[float] | None = None
        if raw.presence is not None:
            gate = raw.presence.sigmoid()
            scores, presence = scores * gate[:, None].to(scores.dtype), gate.tolist()
        for link_index in raw.absent.tolist():
            frame, prompt = frames[int(raw.link.image_index[link_index])], prompts[link_index]
            assert prompt is not None, "only keypoint prompts have none"
            out[link_index] = prompt.nothing(frame.size)
        objects = raw.objects.tolist()
        found = []
        for p, (places, boxes) in enumerate(self._candidates(raw, scores, frames, settings)):
            prompt = prompts[objects[p]]
            assert prompt is not None, "only keypoint prompts have none"
            if len(places):
                kept = greedy_nms(boxes, scores[p, places], self.settings.nms_iou)[: settings.max_per_phrase]
                places, boxes = places[kept], boxes[kept]
            frame = frames[int(raw.link.image_index[objects[p]])]
            found.append(Found(p, places, boxes, frame, prompt, children.get(objects[p], [])))
        masks, keypoints = masks_of(self.masks_at, self.near, raw, found), keypoints_of(self.pose, raw, found)
        for one in found:
            stored = Boxes((one.boxes / one.frame.scale).float().cpu().numpy(), one.frame.size).clip()
            best = scores[one.prompt, one.places].float().cpu().numpy()
            marks = {} if presence is None else {"presence": np.full(len(best), presence[one.prompt])}
            out[objects[one.prompt]] = Prediction(
                one.spec.phrase, stored, best, masks.get(one.prompt), keypoints.get(one.prompt), marks
            )
        return out

    def _candidates(
        self, raw: LumenRaw, scores: Tensor, frames: list[Frame], settings: PredictSettings
    ) -> list[tuple[Tensor, Tensor]]:
        """For each object prompt the places [I] that may be instances, best first, and their boxes [I, 4]: inside the
        image and above the threshold. `scores` [P, L]."""
        ends = raw.centers.new_tensor([[side * frame.scale for side in reversed(frame.size)] for frame in frames])
        inside = (raw.centers < ends[:, None]).all(-1)  # images L
        hits = (scores >= settings.score_threshold) & inside[raw.link.image_index[raw.objects]]
        prompts, places = torch.nonzero(hits, as_tuple=True)
        order = scores[prompts, places].argsort(descending=True, stable=True)
        order = order[prompts[order].argsort(stable=True)]  # by prompt, then best first
        most = min(PLACES_PER_INSTANCE * settings.max_per_phrase, MOST_PLACES)
        if len(order):
            order = order[place_in_group(prompts[order]) < most]
        prompts, places = prompts[order], places[order]
        boxes = self.boxes_at(raw, prompts, places)
        numbers = prompts.bincount(minlength=len(scores)).tolist()
        return list(zip(places.split(numbers), boxes.split(numbers), strict=True))
