"""Floating-point operations of a training step of the expert decoders, forward and backward.

What the classes of `transformers` and `diffusers` compute as a whole (backbone, UNet, VAE, text encoder) is counted by
torch's own counter on a copy without numbers; the layers of Grounding DINO's transformer, whose rows change from step
to step, from the sizes of their matrices. Counting is as in `train.flops`.

Legend: B images, G groups, T prompts of the largest group, S places of all levels, Q queries, D denoising queries, N
slots, K keypoints of the largest skeleton, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lumen_ray.decoders.diffusion.decoder import DiffusionDecoder
from lumen_ray.decoders.dino.decoder import DinoDecoder, Groups
from lumen_ray.decoders.dino.set_loss import find_objects
from lumen_ray.decoders.dino.transformer import STRIDES, cells
from lumen_ray.decoders.grounding_dino.decoder import GroundingDinoDecoder
from lumen_ray.decoders.unipose.decoder import UniPoseDecoder
from lumen_ray.decoders.unipose.slots import Skeletons
from lumen_ray.model.build import Generalist, given, served_links
from lumen_ray.structures import Size
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import MASK_STRIDE, Pixels
from lumen_ray.tasks import decoder_class
from lumen_ray.train.metrics.flops import learns
from lumen_ray.trunk.batch import TrainingBatch

_counted: WeakKeyDictionary[nn.Module, Counted] = WeakKeyDictionary()


class Counted:
    """Forward FLOPs of a decoder's library parts, each kind of input counted once."""

    def __init__(self, model: Generalist, name: str):
        with torch.device("meta"):
            self.decoder = decoder_class(name).build(model.settings)
        self._known: dict[Any, float] = {}

    @classmethod
    def of(cls, model: Generalist, name: str) -> Counted:
        decoder = model.decoders[name]
        if decoder not in _counted:
            _counted[decoder] = cls(model, name)
        return _counted[decoder]

    def _count(self, key: Any, run: Callable[[], Any]) -> float:
        if key not in self._known:
            counter = FlopCounterMode(display=False)
            with torch.no_grad(), torch.device("meta"), counter:
                run()
            self._known[key] = float(counter.get_total_flops())
        return self._known[key]

    def backbone(self, sizes: list[Size]) -> float:
        """Images of (height, width) `sizes` in pixels through the backbone and the projections of its maps: in
        proportion to their area, as windows are of one size."""
        sides = tuple(STRIDES[-1] * 4 for _ in range(2))
        one = self._count("backbone", lambda: self.decoder.trunk.see(torch.empty(1, 3, *sides), [sides]))
        return one * sum(height * width for height, width in sizes) / (sides[0] * sides[1])

    def _latents(self, size: Size, channels: int) -> Tensor:
        shrink = 2 ** (len(self.decoder.vae.config.block_out_channels) - 1)
        return torch.empty(1, channels, size[0] // shrink, size[1] // shrink)

    def unet(self, size: Size) -> float:
        """One picture of `size` through the UNet."""
        unet, tokens = self.decoder.unet, self.decoder.settings.num_tokens

        def run() -> None:
            condition = torch.empty(1, tokens, self.decoder.width)
            unet(self._latents(size, unet.config.in_channels), torch.zeros(1), encoder_hidden_states=condition)

        return self._count(("unet", size), run)

    def encode(self, size: Size) -> float:
        """One picture to latents."""
        return self._count(("encode", size), lambda: self.decoder.vae.encode(torch.empty(1, 3, *size)))

    def decode(self, size: Size) -> float:
        """Latents to one picture."""
        vae = self.decoder.vae
        return self._count(("decode", size), lambda: vae.decode(self._latents(size, vae.config.latent_channels)))

    def caption(self) -> float:
        """One text through the text encoder."""
        encoder = self.decoder.text_encoder
        ids = torch.zeros(1, encoder.config.max_position_embeddings, dtype=torch.int64, device="meta")
        return self._count("caption", lambda: encoder(ids))


def of_expert(model: Generalist, name: str, batch: TrainingBatch, flows: bool) -> float:
    """FLOPs of one expert on a batch; 0 where it is asked nothing. `flows`: whether gradients of its links are
    needed."""
    decoder, layout = model.decoders[name], batch.layout
    served = served_links(name, batch) if decoder.family in layout.link_branches else []
    if not served:
        return 0.0
    columns = (layout.link_images, layout.link_parents, layout.link_groups)
    images, parents, groups = (column[decoder.family].cpu() for column in columns)
    members = torch.tensor(served)
    link = SuperLink(name, torch.empty(len(images), 0), images, parents, groups).only(members)
    pixels, targets = given(decoder, batch)
    targets, counted = targets.only(members), Counted.of(model, name)
    if isinstance(decoder, DiffusionDecoder):
        return diffusion(decoder, counted, [(h, w) for h, w in targets.extents.tolist()], targets, flows)
    return dino(decoder, counted, link, pixels, targets, flows)


def diffusion(decoder: DiffusionDecoder, counted: Counted, sizes: list[Size], targets: Any, flows: bool) -> float:
    """`sizes`: (height, width) of the pictures it learns from."""
    s, encoded = decoder.settings, sum(counted.encode(size) for size in sizes)
    total = decoder.latents_read * encoded  # what is drawn, and what an edit starts from
    learnt = learns(decoder.unet)
    total += sum(counted.unet(size) for size in sizes) * (1 + (flows or learnt) + learnt)
    if learns(decoder.vae):
        share = min(1.0, s.vae_images / len(sizes))
        total += 3 * share * (encoded + sum(counted.decode(size) for size in sizes))
    if decoder.text_encoder is not None:
        total += counted.caption() * (1 + (0 if targets.caption_ids is None else len(targets.caption_ids)))
    return total


def _products(module: nn.Module, rows: Callable[[str], float]) -> float:
    """All linear layers of a module, `rows` by name."""
    found = ((name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear))
    return sum(2.0 * rows(name) * m.in_features * m.out_features for name, m in found)


def _encoder_layer(layer: nn.Module, places: float, prompts: float, width: int) -> float:
    """Fusion, links among each other, pixels among each other; one group."""
    inner = layer.fusion_layer.attn.embed_dim
    products = _products(layer, lambda name: prompts if "text" in name else places)
    return products + 6.0 * places * prompts * inner + 4.0 * prompts**2 * width


def _decoder_layer(layer: nn.Module, queries: float, block: float, prompts: float, places: float, width: int) -> float:
    """Queries in blocks of `block` that read each other, then links, then pixels; one group."""

    def rows(name: str) -> float:
        if name.startswith("encoder_attn_text") and name.endswith(("key", "value")):
            return prompts
        return places if name == "encoder_attn.value_proj" else queries

    return _products(layer, rows) + 4.0 * queries * (block + prompts) * width


def dino(decoder: DinoDecoder, counted: Counted, link: SuperLink, pixels: Pixels, targets: Any, flows: bool) -> float:
    """`link`, `targets`: of the prompts that the decoder serves; groups are padded to the largest, as computed."""
    groups, trunk, s = Groups.of(link, pixels), decoder.trunk, decoder.settings
    wanted = find_objects(targets, groups.objects, groups.seats, groups.sizes)
    count, prompts = groups.seats.shape
    most = int(wanted.counts.max()) if len(wanted) else 0
    noisy = max(s.denoising_queries, 2 * most) if most and s.denoising_queries else 0
    largest = tuple(max(sides) for sides in zip(*groups.sizes, strict=True))
    places = sum(rows * columns for rows, columns in (cells(largest, stride) for stride in STRIDES))
    queries, c = min(s.num_queries, places), s.hidden_size

    def layer(index: int, queries: float, block: float) -> float:
        heads = (trunk.decoder.reference_points_head, decoder.bbox_embed, decoder.bbox_embed)
        own = sum(_products(head, lambda _: queries) for head in heads) + 2.0 * queries * prompts * c
        return own + _decoder_layer(trunk.decoder.layers[index], queries, block, prompts, places, c)

    one = sum(_encoder_layer(each, places, prompts, c) for each in trunk.encoder.layers)
    one += sum(_products(m, lambda _: places) for m in (trunk.enc_output, trunk.encoder_output_bbox_embed))
    one += 2.0 * places * prompts * c
    if isinstance(decoder, UniPoseDecoder):
        boxes, points = s.box_layers, Skeletons.of(link, groups.objects).valid.shape[1]
        slots = min(s.num_instances, queries * prompts)
        one += sum(layer(i, queries + noisy, queries + noisy) for i in range(boxes))
        heads = (decoder.pose_embed, decoder.pose_embed, decoder.pose_hw_embed, decoder.visible_embed)
        for i in range(boxes, s.decoder_layers):
            one += layer(i, slots * (1 + points), 1 + points) + (layer(i, noisy, noisy) if noisy else 0.0)
            one += sum(_products(head, lambda _: slots * points) for head in heads)
    else:
        one += sum(layer(i, queries + noisy, queries + noisy) for i in range(s.decoder_layers))
    total = count * one
    if isinstance(decoder, GroundingDinoDecoder) and (shown := int((wanted.mask >= 0).sum())):
        total += _masks(decoder, groups.sizes, shown * (s.decoder_layers * (1 + noisy / (2 * most))))
    learnt = learns(trunk.encoder) or learns(trunk.decoder)
    passed = flows or learnt or learns(trunk.backbone)
    seen = counted.backbone([groups.sizes[groups.image.tolist().index(i)] for i in range(len(groups.shown))])
    return seen * (3 if learns(trunk.backbone) else 1) + total * (1 + passed + learnt)


def _masks(decoder: GroundingDinoDecoder, sizes: list[Size], masks: float) -> float:
    """Mask features of every group's image, and so many masks of all."""
    head, total = decoder.mask_head, 0.0
    for height, width in (cells(size, MASK_STRIDE) for size in sizes):
        convolutions = (m for m in head.modules() if isinstance(m, nn.Conv2d))
        total += sum(2.0 * height * width * conv.weight.numel() for conv in convolutions)
        total += masks / len(sizes) * 2.0 * height * width * decoder.settings.mask_channels
    return total + _products(decoder.mask_embed, lambda _: masks)
