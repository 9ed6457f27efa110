"""The expert detector and segmenter: Grounding DINO (arXiv 2303.05499, sec. 3) driven by link embeddings (VisionLLM v2,
arXiv 2406.08394, sec. 3.3).

All object prompts of a group are processed jointly: links and pixels are fused in the encoder, the best places become
queries, and the dot product of a query with a prompt's link is its score. The number of prompts of a group is not
limited, and results do not depend on the other groups or image sizes in the batch.

Legend: P' object prompts, G groups, T prompts of the largest group, Q queries, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoMLPPredictionHead

from lumen_ray.decoders.base import LossTerm, PredictSettings, PromptSpec
from lumen_ray.decoders.common.boxes import to_xyxy
from lumen_ray.decoders.common.upsample import masks_at_stored_size
from lumen_ray.decoders.dino.decoder import DinoDecoder, DinoRaw, Groups, LayerOutput, Matched
from lumen_ray.decoders.dino.denoising import Denoising, make_denoising
from lumen_ray.decoders.dino.memory import Levels, Memory
from lumen_ray.decoders.dino.set_loss import Objects
from lumen_ray.decoders.dino.transformer import cells
from lumen_ray.decoders.grounding_dino import SPEC
from lumen_ray.decoders.grounding_dino.mask_head import MaskHead
from lumen_ray.decoders.grounding_dino.point_masks import mask_losses
from lumen_ray.decoders.grounding_dino.settings import GroundingDinoSettings
from lumen_ray.structures import Boxes, Masks, Prediction
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import MASK_STRIDE, Frame, PerceptionTargets


@dataclass
class GroundingDinoRaw(DinoRaw):
    """Output of the forward pass, with the inputs of the mask head."""

    memory: Memory
    levels: Levels

    def scores(self) -> Tensor:
        """float32 [G, Q, T] in 0..1, -1 at unused queries."""
        return self.layers[-1].logits.sigmoid().masked_fill(~self.query_valid[..., None], -1.0)


class GroundingDinoDecoder(DinoDecoder):
    """See the module's docstring."""

    spec = SPEC
    settings: GroundingDinoSettings

    def __init__(self, settings: GroundingDinoSettings, link_channels: int, dense_channels: int = 0):
        super().__init__(settings, link_channels, dense_channels)
        c = settings.hidden_size
        self.mask_head = MaskHead(c, self.trunk.stride4_channels, settings.mask_channels)
        self.mask_embed = GroundingDinoMLPPredictionHead(c, c, settings.mask_channels, 3)

    def _decode(
        self, link: SuperLink, levels: Levels, groups: Groups, wanted: Objects | None = None
    ) -> GroundingDinoRaw:
        memory, links = self._encode(levels, groups, self.link_proj(link.embeddings[groups.objects]))
        denoising = None if wanted is None else make_denoising(wanted, links, memory.link_valid, self.settings)
        encoder, outputs, query_valid = self.decode(memory, denoising)
        first = outputs[0].boxes.shape[1] - query_valid.shape[1]
        denoised, layers = (list(half) for half in zip(*(output.split(first) for output in outputs), strict=True))
        return GroundingDinoRaw(link, groups, encoder, layers, query_valid, denoising, denoised, memory, levels)

    def decode(
        self, memory: Memory, denoising: Denoising | None = None
    ) -> tuple[LayerOutput, list[LayerOutput], Tensor]:
        """Runs selection and decoder. Returns the encoder's selection, the output of every decoder layer (denoising
        queries first), and the validity of the selected queries, bool [G, Q]."""
        start, every = self.begin(memory, denoising), range(self.settings.decoder_layers)
        outputs, _, _ = self.layers(memory, start.content, start.boxes, start.self_mask, every)
        return start.encoder, outputs, start.valid

    def _losses(self, raw: GroundingDinoRaw, wanted: Objects, targets: PerceptionTargets) -> dict[str, LossTerm]:
        """Sums over the encoder's selection, all decoder layers and denoising, normalised by the number of objects."""
        matched = self._matched(raw, wanted)
        per_class, box = self._class_and_box(matched, wanted)
        count = box.new_tensor(float(len(wanted)))
        each = raw.groups.per_link(per_class.detach(), len(raw.link))
        return {
            "gdino_class": LossTerm(per_class.sum(), count, each),
            "gdino_box": LossTerm(box, count),
            "gdino_mask": self._mask_loss(raw, matched[1:], wanted, targets),
        }

    def _mask_loss(
        self,
        raw: GroundingDinoRaw,
        matched: list[Matched],
        wanted: Objects,
        targets: PerceptionTargets,
    ) -> LossTerm:
        """BCE and dice of matched queries whose object has a mask, over all decoder layers."""
        s, total = self.settings, wanted.boxes.new_zeros(())
        masked = wanted.mask >= 0
        count = masked.sum().float()
        if count == 0:
            return LossTerm(total, count)
        features = self.mask_features(raw)
        points = min(s.mask_points, features.shape[-2:].numel())  # at most the number of cells
        for m in matched:
            keep = masked[m.matches.object]
            group, query, index = (v[keep] for v in m.matches)
            if not len(group):
                continue
            logits = self._mask_logits(features, m.layer.hidden, group, query)
            truth = targets.coverage(wanted.mask[index])
            bce, dice = mask_losses(logits, truth, wanted.scale[group, :2], points, MASK_STRIDE)
            total = total + ((s.mask_weight * bce + s.dice_weight * dice) * m.weight[group, query]).sum()
        return LossTerm(total, count)

    def mask_features(self, raw: GroundingDinoRaw) -> Tensor:
        """[G, mask channels, h, w] at stride 4."""
        return self.mask_head(raw.memory, raw.levels, raw.groups.image)

    def _mask_logits(self, features: Tensor, hidden: Tensor, group: Tensor, query: Tensor) -> Tensor:
        """[K, h, w] at stride 4 of the queries (group, query), int64 [K] each, groups ascending."""
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
        """See `Decoder.predict`. A query may be an instance of several prompts."""
        groups, last = raw.groups, raw.layers[-1]
        out: list[Prediction | None] = [None] * len(raw.link)
        features: Tensor | None = None
        places = [v.tolist() for v in (groups.objects, groups.seats.row, groups.seats.seat)]
        image = raw.link.image_index.tolist()
        scale = [(width, height, width, height) for height, width in groups.sizes]
        boxes = (to_xyxy(last.boxes) * last.boxes.new_tensor(scale)[:, None]).cpu().numpy()
        ranked = raw.scores().transpose(1, 2).sort(dim=2, descending=True, stable=True)
        scores, queries = (v[..., : settings.max_per_phrase].cpu().numpy() for v in ranked)
        counts = (scores >= settings.score_threshold).sum(-1)
        for link, row, seat in zip(*places, strict=True):
            frame, prompt, count = frames[image[link]], prompts[link], counts[row, seat]
            assert prompt is not None, "only keypoint prompts have none"
            best = queries[row, seat, :count]
            masks = None
            if prompt.masks:
                features = self.mask_features(raw) if features is None else features
                masks = self._masks(raw, features, row, torch.from_numpy(best), frame)
            placed = Boxes(boxes[row, best] / frame.scale, frame.size).clip()
            out[link] = Prediction(prompt.phrase, placed, scores[row, seat, :count], masks)
        return out

    def _probabilities(self, raw: GroundingDinoRaw, features: Tensor, row: int, queries: Tensor) -> Tensor:
        """Mask probabilities [K, h, w] of a group's queries, without padding."""
        hidden = raw.layers[-1].hidden
        queries = queries.to(hidden.device)
        logits = self._mask_logits(features, hidden, torch.full_like(queries, row), queries)
        rows, columns = cells(raw.groups.sizes[row], MASK_STRIDE)
        return logits[:, :rows, :columns].float().sigmoid()

    def _masks(self, raw: GroundingDinoRaw, features: Tensor, row: int, queries: Tensor, frame: Frame) -> Masks:
        return masks_at_stored_size(self._probabilities(raw, features, row, queries), MASK_STRIDE, frame)
