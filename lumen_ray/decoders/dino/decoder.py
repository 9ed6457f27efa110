"""What the decoders on Grounding DINO's transformer do alike: queries for the objects of a group, and their losses.

Legend: P' object prompts, G groups, T prompts of the largest group, Q queries, D denoising queries, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lumen_ray.attention import mask_to_bias
from lumen_ray.decoders.base import Decoder, LossTerm
from lumen_ray.decoders.common.ragged import Seats
from lumen_ray.decoders.dino.denoising import Denoising
from lumen_ray.decoders.dino.memory import Levels, Memory
from lumen_ray.decoders.dino.set_loss import Matches, Objects, box_loss, class_loss, find_objects, match
from lumen_ray.decoders.dino.settings import DinoLossSettings
from lumen_ray.decoders.dino.transformer import DinoTrunk, box_head, class_logits, gather_rows
from lumen_ray.decoders.spec import TrunkShape
from lumen_ray.input_size import padded_pixels
from lumen_ray.structures import Size
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import PerceptionTargets, Pixels
from lumen_ray.trunk.comm import IMAGENET_MEAN, IMAGENET_STD

FEW_OBJECTS = -4.6  # logit of one query in a hundred


class Stage:
    """What one layer makes of the queries. Of most layers only losses ask for more than `hidden`, so that logits and
    boxes are computed when they are first read, with gradients where the stage was made with gradients."""

    def __init__(self, hidden: Tensor, logits: Callable[[], Tensor], boxes: Callable[[], Tensor]):
        self.hidden = hidden  # [G, Q, C]
        self._logits, self._boxes, self._learns = logits, boxes, torch.is_grad_enabled()

    @cached_property
    def logits(self) -> Tensor:
        """float32 [G, Q, T], -inf at padded links."""
        with torch.set_grad_enabled(self._learns):
            return self._logits()

    @cached_property
    def boxes(self) -> Tensor:
        """float32 [G, Q, 4] cxcywh in 0..1 of the image without padding."""
        with torch.set_grad_enabled(self._learns):
            return self._boxes()

    def split(self, count: int) -> tuple[Stage, Stage]:
        """The first `count` queries, and the others."""
        first, rest = (
            Stage(self.hidden[:, part], lambda part=part: self.logits[:, part], lambda part=part: self.boxes[:, part])
            for part in (slice(count), slice(count, None))
        )
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

    def among(self, whole: Groups) -> Groups:
        """The same, its images counted among those that `whole` shows."""
        return replace(self, shown=whole.shown, image=torch.searchsorted(whole.shown, self.shown)[self.image])

    def per_link(self, values: Tensor, links: int) -> Tensor:
        """values [G, T] -> [links], 0 at keypoint prompts."""
        return values.new_zeros(links).scatter(0, self.objects, self.seats.take(values))


@dataclass
class Start:
    """Queries before the first layer: denoising ones, then the encoder's selection."""

    encoder: Stage  # the selection as the encoder sees it
    valid: Tensor  # bool [G, Q], of the selection; an image with fewer places than queries leaves some unused
    content: Tensor  # [G, D + Q, C]
    boxes: Tensor  # float32 [G, D + Q, 4], without gradient
    self_mask: Tensor  # a bias, to be broadcast to [G, heads, D + Q, D + Q]

    @property
    def denoising(self) -> int:
        """D"""
        return self.boxes.shape[1] - self.valid.shape[1]


@dataclass
class DinoRaw:
    link: SuperLink
    groups: Groups
    encoder: Stage  # the selected places as the encoder sees them
    stages: list[Stage]  # of the decoder's layers that look for objects
    query_valid: Tensor  # bool [G, Q]; an image with fewer places than queries leaves some unused
    denoising: Denoising | None
    denoised: list[Stage]  # of all layers of the decoder, for the denoising queries


def _joined(terms: list[LossTerm], parts: list[Tensor]) -> LossTerm:
    """One term of those of the prompts in each part."""
    each = terms[0].each
    if each is not None:
        each = each.new_zeros(sum(map(len, parts)))
        for term, members in zip(terms, parts, strict=True):
            each[members] = term.each
    return LossTerm(sum(term.total for term in terms), sum(term.count for term in terms), each)


class DinoDecoder(Decoder):
    """A subclass looks (`_decode`) and sums its losses (`_losses`)."""

    independent = False
    #: Swin cuts maps into windows by Python arithmetic on their sizes, so that every size of image is a graph of its
    #: own (on CPUs, one that is not done in five minutes); a projection is a convolution
    eager = ("trunk.backbone.", "trunk.input_proj_vision.")

    @classmethod
    def build(cls, settings: DinoLossSettings, shape: TrunkShape) -> Self:
        return cls(settings, settings.link_width(shape.link_channels))

    def __init__(self, settings: DinoLossSettings, link_channels: int):
        super().__init__()
        self.settings = settings
        c = settings.hidden_size
        self.link_proj = self._link_proj(link_channels)
        self.trunk = DinoTrunk(settings)
        self.bbox_embed = box_head(c)
        if settings.learned_class_scale:
            self.class_scale = nn.Parameter(torch.tensor([c**-0.5]))  # of one dimension: FSDP shards no scalars
            self.class_bias = nn.Parameter(torch.tensor([FEW_OBJECTS]))

    def _link_proj(self, link_channels: int) -> nn.Module:
        c = self.settings.hidden_size
        return nn.Identity() if link_channels == c else nn.Linear(link_channels, c)

    def forward(self, link: SuperLink, pixels: Pixels) -> DinoRaw:
        """link of P prompts, at least one of them an object prompt -> what every group finds."""
        groups = Groups.of(link, pixels)
        return self._decode(link, self._extract_features(pixels, groups), groups)

    def _decode(self, link: SuperLink, levels: Levels, groups: Groups, wanted: Objects | None = None) -> DinoRaw:
        """`wanted`: what denoising queries are made of."""
        raise NotImplementedError

    def _extract_features(self, pixels: Pixels, groups: Groups) -> Levels:
        images = pixels.images[groups.shown].float() / 255
        mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        extents = [(height, width) for height, width in pixels.extents[groups.shown].tolist()]
        return self.trunk.extract_features((images - mean) / std, extents)

    def _encode(self, levels: Levels, groups: Groups, links: Tensor) -> tuple[Memory, Tensor]:
        """Pixels and object prompts, links [P', C], read each other; and those links by group, [G, T, C]."""
        seats = groups.seats
        table = seats.fill(links)
        valid = seats.fill(torch.ones_like(seats.row, dtype=torch.bool)[:, None])[..., 0]
        return self.trunk.encode(levels, groups.image, table, valid), table

    def _classify(self, hidden: Tensor, memory: Memory) -> Tensor:
        if self.settings.learned_class_scale:
            return class_logits(hidden, memory, self.class_scale, self.class_bias)
        return class_logits(hidden, memory)

    def begin(self, memory: Memory, denoising: Denoising | None = None) -> Start:
        """The places that become queries, best first, behind the denoising queries."""
        proposals = self.trunk.propose(memory)
        logits = self._classify(proposals.features, memory)
        chosen = self.trunk.select(proposals, logits.detach().amax(-1))
        features, logits, boxes = (gather_rows(v, chosen) for v in (proposals.features, logits, proposals.start))
        boxes = (self.trunk.encoder_output_bbox_embed(features).float() + boxes).sigmoid()
        valid, encoder = proposals.valid.gather(1, chosen), Stage(features, lambda: logits, lambda: boxes)
        content = self.trunk.query_position_embeddings.weight[: valid.shape[1]].expand(len(valid), -1, -1)
        reference, blocked = boxes.detach(), ~valid[:, None]
        if denoising is not None:
            content = torch.cat([denoising.content, content], dim=1)
            reference = torch.cat([denoising.boxes, reference], dim=1)
            blocked = denoising.blocked(valid)
        return Start(encoder, valid, content, reference, mask_to_bias(~blocked, content.dtype)[:, None])

    def layers(
        self, memory: Memory, hidden: Tensor, reference: Tensor, self_mask: Tensor, which: Iterable[int]
    ) -> tuple[list[Stage], Tensor, Tensor]:
        """A stage for each of the decoder's layers `which`; and the queries that the last one leaves, with the boxes
        [G, Q, 4] it started from."""
        trunk, stages = self.trunk, []
        for index in which:
            if stages:
                reference = self.passed_on(reference, hidden)
            hidden = trunk.layer(index, hidden, reference.detach(), memory, self_mask)
            normed = trunk.decoder.layer_norm(hidden)
            logits = partial(self._classify, normed, memory)
            stages.append(Stage(normed, logits, partial(trunk.moved, reference, self.bbox_embed, normed)))
        return stages, hidden, reference

    def passed_on(self, reference: Tensor, hidden: Tensor) -> Tensor:
        """The boxes [G, Q, 4] that the layer behind the one that made `hidden` of `reference` starts from.

        Layers pass boxes on without gradient; with `look_forward_twice` the next layer's loss reaches them."""
        moved = self.trunk.moved(reference.detach(), self.bbox_embed, hidden)
        return moved if self.settings.look_forward_twice else moved.detach()

    def losses(self, link: SuperLink, pixels: Pixels, targets: PerceptionTargets) -> dict[str, LossTerm]:
        """With denoising. `targets` has one entry per link, keypoint prompts included.

        Every image is seen once. Groups of more pixels than `pixels_at_once` are looked at part by part.
        """
        groups = Groups.of(link, pixels)
        most = max(1, self.settings.pixels_at_once // padded_pixels(groups.sizes))
        levels, parts = self._extract_features(pixels, groups), link.group_chunks(most)
        if len(parts) == 1:
            return self._losses_of(link, levels, groups, targets)
        found = []
        for members in parts:
            own = link.select(members)
            part = own, levels, Groups.of(own, pixels).among(groups), targets.select(members)
            # torch keeps the random numbers of the devices of tensors among the arguments, and looks into no dataclass
            again = checkpoint(lambda _, *of: self._losses_of(*of), own.embeddings, *part, use_reentrant=False)
            found.append(again)
        return {name: _joined([terms[name] for terms in found], parts) for name in found[0]}

    def _losses_of(
        self, link: SuperLink, levels: Levels, groups: Groups, targets: PerceptionTargets
    ) -> dict[str, LossTerm]:
        wanted = find_objects(targets, groups.objects, groups.seats, groups.sizes)
        return self._losses(self._decode(link, levels, groups, wanted), wanted, targets)

    def loss(self, raw: DinoRaw, targets: PerceptionTargets) -> dict[str, LossTerm]:
        groups = raw.groups
        wanted = find_objects(targets, groups.objects, groups.seats, groups.sizes)
        return self._losses(raw, wanted, targets)

    def _losses(self, raw: DinoRaw, wanted: Objects, targets: PerceptionTargets) -> dict[str, LossTerm]:
        raise NotImplementedError

    def _matched(self, raw: DinoRaw, wanted: Objects) -> list[tuple[Stage, Matches, Tensor]]:
        """The encoder's selection, the stages and what was denoised: with the objects that queries should be, and the
        weights of queries, float [G, queries]."""
        found, weight = [raw.encoder, *raw.stages], raw.query_valid.float()
        matches = match(found, raw.query_valid, wanted, self.settings)
        matched = [(stage, own, weight) for stage, own in zip(found, matches, strict=True)]
        if raw.denoising is not None:
            matched += [(stage, raw.denoising.matches, raw.denoising.weight) for stage in raw.denoised]
        return matched

    def _class_and_box(self, matched: list[tuple[Stage, Matches, Tensor]], wanted: Objects) -> tuple[Tensor, Tensor]:
        """Weighted sums of the class, [G, T], and of boxes."""
        s = self.settings
        kinds, box = torch.zeros_like(wanted.counted, dtype=torch.float32), wanted.boxes.new_zeros(())
        for stage, own, weight in matched:
            kinds = kinds + s.class_weight * class_loss(stage, own, wanted, weight)
            box = box + (box_loss(stage, own, wanted, s) * weight[own.group, own.query]).sum()
        return kinds, box
