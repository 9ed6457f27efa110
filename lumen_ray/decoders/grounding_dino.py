"""The expert detector and segmenter: Grounding DINO driven by link embeddings (VisionLLM v2, arXiv 2406.08394).

All object prompts of a group are looked at together: their links meet the pixels in the encoder, the best places become
queries, and a query belongs to a prompt by the product with its link. There is no limit to the prompts of a group, and
groups of different sizes, like images of different sizes, give in one batch what each gives alone.

Legend: P' object prompts, G groups, T prompts of the largest group, Q queries, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoMLPPredictionHead

from lumen_ray.decoders.base import (
    Decoder,
    Frame,
    LossTerm,
    PerceptionTargets,
    Pixels,
    PredictSettings,
    PromptSpec,
)
from lumen_ray.decoders.denoising import Denoising, make_denoising
from lumen_ray.decoders.dino import (
    MASK_STRIDE,
    DinoTrunk,
    Levels,
    Memory,
    additive,
    box_head,
    cells,
    class_logits,
    gather_rows,
    to_xyxy,
)
from lumen_ray.decoders.mask_head import MaskHead
from lumen_ray.decoders.point_masks import mask_losses
from lumen_ray.decoders.set_loss import Matches, Objects, box_loss, class_loss, find_objects, match
from lumen_ray.decoders.settings import GroundingDinoSettings
from lumen_ray.decoders.stored_size import at_stored_size
from lumen_ray.model.aligner import Seats
from lumen_ray.model.superlink import SuperLink
from lumen_ray.structures import Boxes, Masks, Prediction, Size

if TYPE_CHECKING:
    from lumen_ray.model.settings import ModelSettings

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in 0..1, as the published weights use
FEW_OBJECTS = -4.6  # logit of one query in a hundred


@dataclass
class Stage:
    """What one layer makes of the queries."""

    hidden: Tensor  # [G, Q, C]
    logits: Tensor  # float32 [G, Q, T], -inf at padded links
    boxes: Tensor  # float32 [G, Q, 4] cxcywh in 0..1 of the image without padding

    def split(self, count: int) -> tuple[Stage, Stage]:
        """The first `count` queries, and the others."""
        parts = zip(*(v.split([count, v.shape[1] - count], dim=1) for v in vars(self).values()), strict=True)
        first, rest = (Stage(*values) for values in parts)
        return first, rest


@dataclass
class Groups:
    """Which prompts are looked at together."""

    objects: Tensor  # int64 [P']: the links that are object prompts; the others ask for a keypoint of their parent
    seats: Seats  # row (group) and column of each in [G, T]
    shown: Tensor  # int64, rising: the images that prompts are about
    image: Tensor  # int64 [G]: of each group, among `shown`
    sizes: list[Size]  # (height, width) of each group's image in input pixels, without padding

    @classmethod
    def of(cls, link: SuperLink, pixels: Pixels) -> Groups:
        objects = torch.nonzero(link.parent < 0).flatten()
        groups, row = link.group[objects].unique(return_inverse=True)
        shown, place = link.image_index[objects].unique(return_inverse=True)
        image = place.new_zeros(len(groups)).scatter(0, row, place)
        sizes = [(height, width) for height, width in pixels.extents[shown[image]].tolist()]
        return cls(objects, Seats.of(row, len(groups)), shown, image, sizes)

    def per_link(self, values: Tensor, links: int) -> Tensor:
        """values [G, T] -> [links], 0 at keypoint prompts."""
        return values.new_zeros(links).scatter(0, self.objects, self.seats.take(values))


@dataclass
class GroundingDinoRaw:
    link: SuperLink
    groups: Groups
    encoder: Stage  # the selected places as the encoder sees them
    stages: list[Stage]  # of the decoder; the last is the result
    query_valid: Tensor  # bool [G, Q]; an image with fewer places than queries leaves some unused
    memory: Memory
    levels: Levels
    denoising: Denoising | None = None
    denoised: list[Stage] = field(default_factory=list)  # of the decoder, for the denoising queries

    def scores(self) -> Tensor:
        """float32 [G, Q, T] in 0..1, -1 at queries that are none."""
        return self.stages[-1].logits.sigmoid().masked_fill(~self.query_valid[..., None], -1.0)


class GroundingDinoDecoder(Decoder):
    name = "grounding_dino"
    family = "perception"
    loss_names = ("gdino_class", "gdino_box", "gdino_mask")
    reads = "pixels"
    independent = False

    @classmethod
    def build(cls, settings: ModelSettings) -> GroundingDinoDecoder:
        return cls(settings.grounding_dino, settings.link_width(cls.name))

    def __init__(self, settings: GroundingDinoSettings, link_channels: int):
        super().__init__()
        self.settings = settings
        c = settings.hidden_size
        self.link_proj = nn.Identity() if link_channels == c else nn.Linear(link_channels, c)
        self.trunk = DinoTrunk(settings)
        self.bbox_embed = box_head(c)
        self.mask_head = MaskHead(c, self.trunk.stride4_channels, settings.mask_channels)
        self.mask_embed = GroundingDinoMLPPredictionHead(c, c, settings.mask_channels, 3)
        if settings.learned_class_scale:
            self.class_scale = nn.Parameter(torch.tensor(c**-0.5))
            self.class_bias = nn.Parameter(torch.tensor(FEW_OBJECTS))

    def forward(self, link: SuperLink, pixels: Pixels) -> GroundingDinoRaw:
        """link of P prompts, at least one of them an object prompt -> queries of every group."""
        return self._look(link, pixels, Groups.of(link, pixels))

    def _look(self, link: SuperLink, pixels: Pixels, groups: Groups, wanted: Objects | None = None) -> GroundingDinoRaw:
        """`wanted`: what denoising queries are made of."""
        levels = self._see(pixels, groups)
        seats = groups.seats
        links = seats.fill(self.link_proj(link.embeddings[groups.objects]))
        link_valid = seats.fill(torch.ones_like(seats.row, dtype=torch.bool)[:, None])[..., 0]
        memory = self.trunk.encode(levels, groups.image, links, link_valid)
        denoising = None if wanted is None else make_denoising(wanted, links, link_valid, self.settings)
        encoder, stages, query_valid = self.decode(memory, denoising)
        first = stages[0].boxes.shape[1] - query_valid.shape[1]
        denoised, stages = zip(*(stage.split(first) for stage in stages), strict=True)
        return GroundingDinoRaw(
            link, groups, encoder, list(stages), query_valid, memory, levels, denoising, list(denoised)
        )

    def decode(self, memory: Memory, denoising: Denoising | None = None) -> tuple[Stage, list[Stage], Tensor]:
        """The encoder's selection, what every decoder layer makes of it (denoising queries first), and which queries
        of the selection there are at all (bool [G, Q])."""
        encoder, query_valid = self._propose(memory)
        content = self.trunk.query_position_embeddings.weight[: query_valid.shape[1]]
        content = content.expand(len(query_valid), -1, -1)
        boxes, blocked = encoder.boxes.detach(), ~query_valid[:, None]
        if denoising is not None:
            content = torch.cat([denoising.content, content], dim=1)
            boxes = torch.cat([denoising.boxes, boxes], dim=1)
            blocked = denoising.blocked(query_valid)
        stages = self._layers(memory, content, boxes, additive(blocked, content.dtype)[:, None])
        return encoder, stages, query_valid

    def _see(self, pixels: Pixels, groups: Groups) -> Levels:
        images = pixels.images[groups.shown].float() / 255
        mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        extents = [(height, width) for height, width in pixels.extents[groups.shown].tolist()]
        return self.trunk.see((images - mean) / std, extents)

    def _classify(self, hidden: Tensor, memory: Memory) -> Tensor:
        if self.settings.learned_class_scale:
            return class_logits(hidden, memory, self.class_scale, self.class_bias)
        return class_logits(hidden, memory)

    def _propose(self, memory: Memory) -> tuple[Stage, Tensor]:
        """The places that become queries, best first, and which of them are proposals at all."""
        proposals = self.trunk.propose(memory)
        logits = self._classify(proposals.features, memory)
        chosen = self.trunk.select(proposals, logits.detach().amax(-1))
        features, logits, boxes = (gather_rows(v, chosen) for v in (proposals.features, logits, proposals.logits))
        return Stage(features, logits, boxes.float().sigmoid()), proposals.valid.gather(1, chosen)

    def _layers(self, memory: Memory, hidden: Tensor, reference: Tensor, self_mask: Tensor) -> list[Stage]:
        """A stage for every decoder layer. Layers pass their boxes on without gradient; with `look_forward_twice` the
        next layer's loss reaches them."""
        trunk, stages = self.trunk, []
        for index in range(len(trunk.decoder.layers)):
            hidden = trunk.layer(index, hidden, reference.detach(), memory, self_mask)
            normed = trunk.decoder.layer_norm(hidden)
            boxes = trunk.moved(reference, self.bbox_embed, normed)
            stages.append(Stage(normed, self._classify(normed, memory), boxes))
            reference = trunk.moved(reference.detach(), self.bbox_embed, hidden)
            if not self.settings.look_forward_twice:
                reference = reference.detach()
        return stages

    def losses(self, link: SuperLink, pixels: Pixels, targets: PerceptionTargets) -> dict[str, LossTerm]:
        """With denoising. `targets` has one entry per link, keypoint prompts included."""
        groups = Groups.of(link, pixels)
        wanted = find_objects(targets, groups.objects, groups.seats, groups.sizes)
        return self._losses(self._look(link, pixels, groups, wanted), wanted, targets)

    def loss(self, raw: GroundingDinoRaw, targets: PerceptionTargets) -> dict[str, LossTerm]:
        groups = raw.groups
        wanted = find_objects(targets, groups.objects, groups.seats, groups.sizes)
        return self._losses(raw, wanted, targets)

    def _losses(self, raw: GroundingDinoRaw, wanted: Objects, targets: PerceptionTargets) -> dict[str, LossTerm]:
        """Sums over the encoder's selection, all decoder layers and their denoising, over the number of objects."""
        s = self.settings
        found, weight = [raw.encoder, *raw.stages], raw.query_valid.float()
        matches = match(found, raw.query_valid, wanted, s)
        pairs = [(stage, own, weight) for stage, own in zip(found, matches, strict=True)]
        if raw.denoising is not None:
            pairs += [(stage, raw.denoising.matches, raw.denoising.weight) for stage in raw.denoised]
        kinds, box = torch.zeros_like(wanted.counted, dtype=torch.float32), wanted.boxes.new_zeros(())
        for stage, own, weight in pairs:
            kinds = kinds + s.class_weight * class_loss(stage, own, wanted, weight)
            box = box + (box_loss(stage, own, wanted, s) * weight[own.group, own.query]).sum()
        count = box.new_tensor(float(len(wanted)))
        each = raw.groups.per_link(kinds.detach(), len(raw.link))
        return {
            "gdino_class": LossTerm(kinds.sum(), count, each),
            "gdino_box": LossTerm(box, count),
            "gdino_mask": self._mask_loss(raw, pairs[1:], wanted, targets),
        }

    def _mask_loss(
        self,
        raw: GroundingDinoRaw,
        pairs: list[tuple[Stage, Matches, Tensor]],
        wanted: Objects,
        targets: PerceptionTargets,
    ) -> LossTerm:
        """Of matched queries whose object has a mask, in all decoder stages; one group at a time."""
        s, total = self.settings, wanted.boxes.new_zeros(())
        masked = wanted.mask >= 0
        count = masked.sum().float()
        if count == 0:
            return LossTerm(total, count)
        features = self.mask_features(raw)
        points = min(s.mask_points, features.shape[-2:].numel())  # of small maps, not more than there are cells
        for stage, matches, weight in pairs:
            keep = masked[matches.object]
            group, query, index = (v[keep] for v in matches)
            if not len(group):
                continue
            logits = self._mask_logits(features, stage.hidden, group, query)
            bce, dice = mask_losses(
                logits, targets.masks[wanted.mask[index]], wanted.scale[group, :2], points, MASK_STRIDE
            )
            total = total + ((s.mask_weight * bce + s.dice_weight * dice) * weight[group, query]).sum()
        return LossTerm(total, count)

    def mask_features(self, raw: GroundingDinoRaw) -> Tensor:
        """[G, mask channels, h, w] at stride 4."""
        return self.mask_head(raw.memory, raw.levels, raw.groups.image)

    def _mask_logits(self, features: Tensor, hidden: Tensor, group: Tensor, query: Tensor) -> Tensor:
        """[K, h, w] at stride 4 of the queries (group, query), int64 [K] each, groups rising."""
        kernels = self.mask_embed(hidden[group, query]).split(group.bincount(minlength=len(features)).tolist())
        return torch.cat([torch.einsum("kc,chw->khw", k, f) for k, f in zip(kernels, features, strict=True)])

    @torch.inference_mode()
    def predict(
        self,
        raw: GroundingDinoRaw,
        frames: list[Frame],
        prompts: list[PromptSpec | None],
        settings: PredictSettings,
    ) -> list[Prediction | None]:
        """One Prediction per link, in the frame of the stored image; None for keypoint prompts.

        A query may be an instance of several prompts. `frames`: one per image; `prompts`: one per link."""
        groups, out, features = raw.groups, [None] * len(raw.link), None
        places = [v.tolist() for v in (groups.objects, groups.seats.row, groups.seats.seat)]
        image = raw.link.image_index.tolist()
        scale = [(width, height, width, height) for height, width in groups.sizes]
        boxes = to_xyxy(raw.stages[-1].boxes) * raw.stages[-1].boxes.new_tensor(scale)[:, None]
        boxes, scores = boxes.cpu().numpy(), raw.scores().cpu()
        for link, row, seat in zip(*places, strict=True):
            frame, spec = frames[image[link]], prompts[link]
            own = scores[row, :, seat]
            best = own.argsort(descending=True, stable=True)[: settings.max_per_phrase]
            best = best[own[best] >= settings.score_threshold]
            masks = None
            if spec.masks:
                features = self.mask_features(raw) if features is None else features
                masks = self._masks(raw, features, row, best, frame)
            found = Boxes(boxes[row, best.numpy()] / frame.scale, frame.size).clip()
            out[link] = Prediction(spec.phrase, found, own[best].numpy(), masks)
        return out

    def _probabilities(self, raw: GroundingDinoRaw, features: Tensor, row: int, queries: Tensor) -> Tensor:
        """Masks [K, h, w] in 0..1 of a group's queries, without the padding."""
        hidden = raw.stages[-1].hidden
        queries = queries.to(hidden.device)
        logits = self._mask_logits(features, hidden, torch.full_like(queries, row), queries)
        rows, columns = cells(raw.groups.sizes[row], MASK_STRIDE)
        return logits[:, :rows, :columns].float().sigmoid()

    def _masks(self, raw: GroundingDinoRaw, features: Tensor, row: int, queries: Tensor, frame: Frame) -> Masks:
        rles = []
        for one in self._probabilities(raw, features, row, queries):  # one at a time, to bound memory
            full = at_stored_size(one, MASK_STRIDE, frame) > 0.5
            rles += Masks.from_arrays(full.cpu().numpy()[None]).rles
        return Masks(rles, frame.size)

    @torch.inference_mode()
    def class_maps(self, raw: GroundingDinoRaw, frames: list[Frame], settings: PredictSettings) -> list[np.ndarray]:
        """Semantic segmentation: for every group an int64 map [height, width] of the stored image, which of the
        group's object prompts (in their order) each pixel belongs to, -1 where none reaches the score threshold.

        A pixel's evidence for a class is the sum over queries of class score times mask (MaskFormer, arXiv 2107.06278,
        sec. 3.4), with the sigmoid scores of this model in place of a softmax. `frames`: one per image."""
        scores, features, out = raw.scores(), self.mask_features(raw), []
        shown = raw.groups.shown.tolist()
        prompts = raw.groups.seats.row.bincount().tolist()
        for row, image in enumerate(raw.groups.image.tolist()):
            frame = frames[shown[image]]
            own = scores[row, :, : prompts[row]]
            used = torch.nonzero(own.amax(1) >= settings.score_threshold).flatten()
            masks = self._probabilities(raw, features, row, used)
            evidence = torch.einsum("qt,qhw->thw", own[used], masks)
            best = torch.full(frame.size, settings.score_threshold, device=evidence.device)
            classes = torch.full(frame.size, -1, dtype=torch.int64, device=evidence.device)
            for index, one in enumerate(evidence):  # one at a time: many classes of a large photo would not fit
                full = at_stored_size(one, MASK_STRIDE, frame)
                classes = torch.where(full >= best, index, classes)
                best = torch.maximum(best, full)
            out.append(classes.cpu().numpy())
        return out
