"""Base of the decoders on Grounding DINO's transformer (arXiv 2303.05499): queries for the objects of a group, and
their losses.

Legend: P' object prompts, G groups, T prompts of the largest group, Q queries, D denoising queries, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lumen_ray.attention import mask_to_bias
from lumen_ray.decoders.base import Decoder, LossTerm, sum_terms
from lumen_ray.decoders.common.ragged import Seats
from lumen_ray.decoders.dino.denoising import Denoising
from lumen_ray.decoders.dino.memory import Levels, Memory
from lumen_ray.decoders.dino.set_loss import Matches, Objects, box_loss, class_loss, find_objects, match
from lumen_ray.decoders.dino.settings import DinoLossSettings
from lumen_ray.decoders.dino.transformer import DinoTrunk, box_head, class_logits, gather_rows
from lumen_ray.decoders.spec import Reads, TrunkShape
from lumen_ray.input_size import padded_pixels
from lumen_ray.structures import Size
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import MASK_STRIDE, PerceptionTargets, Pixels
from lumen_ray.trunk.comm import IMAGENET_MEAN, IMAGENET_STD

FEW_OBJECTS = -4.6  # logit of one query in a hundred


class LayerOutput:
    """Queries after one layer. For most layers only losses need more than `hidden`, so logits and boxes are computed on
    first access, with gradients if they were enabled when the layer ran."""

    def __init__(self, hidden: Tensor, logits: Callable[[], Tensor], boxes: Callable[[], Tensor]):
        self.hidden = hidden  # [G, Q, C]
        self._logits, self._boxes, self._with_grad = logits, boxes, torch.is_grad_enabled()

    @cached_property
    def logits(self) -> Tensor:
        """float32 [G, Q, T], -inf at padded links."""
        with torch.set_grad_enabled(self._with_grad):
            return self._logits()

    @cached_property
    def boxes(self) -> Tensor:
        """float32 [G, Q, 4] cxcywh in 0..1 of the image without padding."""
        with torch.set_grad_enabled(self._with_grad):
            return self._boxes()

    def split(self, count: int) -> tuple[LayerOutput, LayerOutput]:
        """The first `count` queries, and the others."""
        return self._slice(slice(count)), self._slice(slice(count, None))

    def _slice(self, queries: slice) -> LayerOutput:
        return LayerOutput(self.hidden[:, queries], lambda: self.logits[:, queries], lambda: self.boxes[:, queries])


@dataclass
class Groups:
    """The groups of prompts that are processed jointly."""

    objects: Tensor  # int64 [P']: the links that are object prompts; the others are keypoint prompts of a parent
    seats: Seats  # row (group) and column of each in [G, T]
    shown: Tensor  # int64, ascending: the images of the batch that prompts are about
    image: Tensor  # int64 [G]: index into `shown` of each group's image
    sizes: list[Size]  # (height, width) of each group's image in input pixels, without padding

    @classmethod
    def of(cls, link: SuperLink, view: Pixels | Tensor) -> Groups:
        objects = torch.nonzero(link.parent < 0).flatten()
        groups, row = link.group[objects].unique(return_inverse=True)
        shown, place = link.image_index[objects].unique(return_inverse=True)
        image = place.new_zeros(len(groups)).scatter(0, row, place)
        sizes = [extent_of(view, index) for index in shown[image].tolist()]
        return cls(objects, Seats.of(row, len(groups)), shown, image, sizes)

    def among(self, whole: Groups) -> Groups:
        """The same groups, with `image` as indices into `whole.shown`."""
        return replace(self, shown=whole.shown, image=torch.searchsorted(whole.shown, self.shown)[self.image])

    def per_link(self, values: Tensor, links: int) -> Tensor:
        """values [G, T] -> [links], 0 at keypoint prompts."""
        return values.new_zeros(links).scatter(0, self.objects, self.seats.take(values))


def extent_of(view: Pixels | Tensor, image: int) -> Size:
    """(height, width) of an image in input pixels: without padding, or of the whole input of dense features."""
    if isinstance(view, Tensor):
        return view.shape[-2] * MASK_STRIDE, view.shape[-1] * MASK_STRIDE
    height, width = view.extents[image].tolist()
    return height, width


@dataclass
class Start:
    """Queries before the first layer: denoising ones, then the encoder's selection."""

    encoder: LayerOutput  # the encoder's selection
    valid: Tensor  # bool [G, Q], of the selection; False where an image has fewer places than queries
    content: Tensor  # [G, D + Q, C]
    boxes: Tensor  # float32 [G, D + Q, 4], without gradient
    self_mask: Tensor  # a bias, to be broadcast to [G, heads, D + Q, D + Q]

    @property
    def denoising(self) -> int:
        """D, the number of denoising queries."""
        return self.boxes.shape[1] - self.valid.shape[1]


@dataclass
class DinoRaw:
    """Output of the forward pass."""

    link: SuperLink
    groups: Groups
    encoder: LayerOutput  # the encoder's selection
    layers: list[LayerOutput]  # of the decoder's layers that detect objects
    query_valid: Tensor  # bool [G, Q]; False where an image has fewer places than queries
    denoising: Denoising | None
    denoised: list[LayerOutput]  # of all layers of the decoder, for the denoising queries


@dataclass
class Matched:
    """A layer's output with the objects assigned to its queries, and the weights of the queries, float [G, queries]."""

    layer: LayerOutput
    matches: Matches
    weight: Tensor


def _joined(terms: list[LossTerm], chunks: list[Tensor]) -> LossTerm:
    """Adds up the terms of chunks of prompts (int64 indices each)."""
    each = None
    if terms[0].each is not None:
        each = terms[0].each.new_zeros(sum(map(len, chunks)))
        for term, members in zip(terms, chunks, strict=True):
            assert term.each is not None, "all chunks have the same losses"
            each[members] = term.each
    return sum_terms(terms, each)


class DinoDecoder(Decoder):
    """Subclasses implement the forward pass (`_decode`) and the losses (`_losses`)."""

    settings: DinoLossSettings
    independent = False
    #: Swin partitions maps into windows by Python arithmetic on their sizes, so torch.compile builds a graph for every
    #: image size (on CPUs, for more than five minutes each); the projections are single convolutions
    eager = ("trunk.backbone.", "trunk.input_proj_vision.")

    @classmethod
    def build(cls, settings: DinoLossSettings, shape: TrunkShape) -> Self:
        return cls(settings, settings.link_width(shape.link_channels), shape.dense_channels)

    def __init__(self, settings: DinoLossSettings, link_channels: int, dense_channels: int = 0):
        """`dense_channels`: of the trunk's dense features, for settings that read them."""
        super().__init__()
        self.settings = settings
        c = settings.hidden_size
        self.link_proj = self._link_proj(link_channels)
        self.trunk = DinoTrunk(settings, dense_channels)
        self.bbox_embed = box_head(c)
        if settings.learned_class_scale:
            self.class_scale = nn.Parameter(torch.tensor([c**-0.5]))  # 1-D, since FSDP does not shard scalars
            self.class_bias = nn.Parameter(torch.tensor([FEW_OBJECTS]))

    @property
    def reads(self) -> Reads:
        return self.settings.source(self.spec.reads)

    def _link_proj(self, link_channels: int) -> nn.Module:
        c = self.settings.hidden_size
        return nn.Identity() if link_channels == c else nn.Linear(link_channels, c)

    def forward(self, link: SuperLink, view: Pixels | Tensor) -> DinoRaw:
        """link of P prompts, at least one of them an object prompt -> predictions of every group."""
        groups = Groups.of(link, view)
        return self._decode(link, self._extract_features(view, groups), groups)

    def _decode(self, link: SuperLink, levels: Levels, groups: Groups, wanted: Objects | None = None) -> DinoRaw:
        """Runs the transformer. `wanted`: the ground truth for denoising queries, in training."""
        raise NotImplementedError

    def _extract_features(self, view: Pixels | Tensor, groups: Groups) -> Levels:
        extents = [extent_of(view, index) for index in groups.shown.tolist()]
        if isinstance(view, Tensor):
            return self.trunk.extract_features(view[groups.shown], extents)
        images = view.images[groups.shown].float() / 255
        mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        return self.trunk.extract_features((images - mean) / std, extents)

    def _encode(self, levels: Levels, groups: Groups, links: Tensor) -> tuple[Memory, Tensor]:
        """Encodes pixels and object prompts, links [P', C], jointly. Returns the memory, and the input links by group,
        [G, T, C]."""
        seats = groups.seats
        table = seats.fill(links)
        valid = seats.fill(torch.ones_like(seats.row, dtype=torch.bool)[:, None])[..., 0]
        return self.trunk.encode(levels, groups.image, table, valid), table

    def _classify(self, hidden: Tensor, memory: Memory) -> Tensor:
        if self.settings.learned_class_scale:
            return class_logits(hidden, memory, self.class_scale, self.class_bias)
        return class_logits(hidden, memory)

    def begin(self, memory: Memory, denoising: Denoising | None = None) -> Start:
        """Selects the places that become queries, best first, and puts the denoising queries before them."""
        proposals = self.trunk.propose(memory)
        logits = self._classify(proposals.features, memory)
        chosen = self.trunk.select(proposals, logits.detach().amax(-1))
        features, logits, boxes = (gather_rows(v, chosen) for v in (proposals.features, logits, proposals.start))
        boxes = (self.trunk.encoder_output_bbox_embed(features).float() + boxes).sigmoid()
        valid, encoder = proposals.valid.gather(1, chosen), LayerOutput(features, lambda: logits, lambda: boxes)
        content = self.trunk.query_position_embeddings.weight[: valid.shape[1]].expand(len(valid), -1, -1)
        reference, blocked = boxes.detach(), ~valid[:, None]
        if denoising is not None:
            content = torch.cat([denoising.content, content], dim=1)
            reference = torch.cat([denoising.boxes, reference], dim=1)
            blocked = denoising.blocked(valid)
        return Start(encoder, valid, content, reference, mask_to_bias(~blocked, content.dtype)[:, None])

    def layers(
        self, memory: Memory, hidden: Tensor, reference: Tensor, self_mask: Tensor, which: Iterable[int]
    ) -> tuple[list[LayerOutput], Tensor, Tensor]:
        """Runs the decoder's layers `which`. Returns their outputs, the last layer's hidden states, and the boxes
        [G, Q, 4] that layer started from."""
        trunk = self.trunk
        outputs: list[LayerOutput] = []
        for index in which:
            if outputs:
                reference = self.passed_on(reference, hidden)
            hidden = trunk.layer(index, hidden, reference.detach(), memory, self_mask)
            normed = trunk.decoder.layer_norm(hidden)
            logits = partial(self._classify, normed, memory)
            boxes = partial(trunk.moved, reference, self.bbox_embed, normed)
            outputs.append(LayerOutput(normed, logits, boxes))
        return outputs, hidden, reference

    def passed_on(self, reference: Tensor, hidden: Tensor) -> Tensor:
        """The boxes [G, Q, 4] for the next layer, given `hidden` of a layer that started from `reference`.

        Boxes are detached between layers; with `look_forward_twice` the next layer's loss also reaches them (DINO,
        arXiv 2203.03605, sec. 3.5)."""
        moved = self.trunk.moved(reference.detach(), self.bbox_embed, hidden)
        return moved if self.settings.look_forward_twice else moved.detach()

    def losses(self, link: SuperLink, view: Pixels | Tensor, targets: PerceptionTargets) -> dict[str, LossTerm]:
        """Losses including denoising. `targets` has one entry per link, keypoint prompts included.

        The backbone runs once per image. Groups of more pixels than `pixels_at_once` are processed in chunks.
        """
        groups = Groups.of(link, view)
        most = max(1, self.settings.pixels_at_once // padded_pixels(groups.sizes))
        levels, chunks = self._extract_features(view, groups), link.group_chunks(most)
        if len(chunks) == 1:
            return self._losses_of(link, levels, groups, targets)
        losses = []
        for members in chunks:
            part = link.select(members)
            inputs = part, levels, Groups.of(part, view).among(groups), targets.select(members)
            # `checkpoint` preserves RNG state only for the devices of positional tensors, so pass one
            again = checkpoint(lambda _, *rest: self._losses_of(*rest), part.embeddings, *inputs, use_reentrant=False)
            losses.append(again)
        return {name: _joined([terms[name] for terms in losses], chunks) for name in losses[0]}

    def _losses_of(
        self, link: SuperLink, levels: Levels, groups: Groups, targets: PerceptionTargets
    ) -> dict[str, LossTerm]:
        wanted = find_objects(targets, groups.objects, groups.seats, groups.sizes)
        return self._losses(self._decode(link, levels, groups, wanted), wanted, targets)

    def loss(self, raw: DinoRaw, targets: PerceptionTargets) -> dict[str, LossTerm]:
        groups = raw.groups
        wanted = find_objects(targets, groups.objects, groups.seats, groups.sizes)
        return self._losses(raw, wanted, targets)

    def _losses(self, raw: Any, wanted: Objects, targets: PerceptionTargets) -> dict[str, LossTerm]:
        """Losses by name. `raw`: the output of `_decode`; `wanted`: the objects of `targets`."""
        raise NotImplementedError

    def _matched(self, raw: DinoRaw, wanted: Objects) -> list[Matched]:
        """The encoder's selection, the decoder layers and the denoising queries, matched with the objects."""
        layers, weight = [raw.encoder, *raw.layers], raw.query_valid.float()
        shared = [*[weight / self.settings.auxiliary_matches] * len(raw.layers), weight]
        matches = match(layers, raw.query_valid, wanted, self.settings)
        matched = [Matched(*each) for each in zip(layers, matches, shared, strict=True)]
        if raw.denoising is not None:
            matched += [Matched(layer, raw.denoising.matches, raw.denoising.weight) for layer in raw.denoised]
        return matched

    def _class_and_box(self, matched: list[Matched], wanted: Objects) -> tuple[Tensor, Tensor]:
        """Weighted sums of the class losses, [G, T], and of the box losses."""
        s = self.settings
        per_class, box = torch.zeros_like(wanted.counted, dtype=torch.float32), wanted.boxes.new_zeros(())
        for m in matched:
            per_class = per_class + s.class_weight * class_loss(m.layer, m.matches, wanted, m.weight)
            box = box + (box_loss(m.layer, m.matches, wanted, s) * m.weight[m.matches.group, m.matches.query]).sum()
        return per_class, box
