"""Floating-point operations of the light decoder."""

from __future__ import annotations

from lumen_ray.decoders.common.flops import DecoderWork, convolutions, is_trainable, products
from lumen_ray.decoders.lumen.decoder import KERNEL_WIDTH, LumenDecoder
from lumen_ray.targets import MASK_STRIDE


def count(decoder: LumenDecoder, work: DecoderWork) -> float:
    """FLOPs of a training step, forward and backward."""
    trained = is_trainable(decoder)
    return forward(decoder, work) * (1 + (work.needs_input_grad or trained) + trained)


def forward(module: LumenDecoder, work: DecoderWork) -> float:
    """FLOPs of a forward pass: per image the neck and mask features, per prompt the aligner and the heads.

    Masks are counted as if every object had the maximum number of positives.
    """
    targets = work.targets
    s, c = module.settings, module.settings.hidden_size
    images, (height, width) = work.num_images, (side // MASK_STRIDE for side in work.input_size)
    neck, h, w = convolutions(module.neck, height, width)
    masks = convolutions(module.mask_features, height, width)[0]
    parents = work.link.parent
    poses = int((parents >= 0).any()) * convolutions(module.pose.key_value, height, width)[0]
    prompts, places = int((parents < 0).sum()), h * w
    link = products(module.link_proj, lambda _: 1.0)
    maps = images + (s.num_layers - 1) * prompts  # the aligner's first layer has one map per image
    read = maps * places * 2 * 3 * c * c
    aligner = s.num_layers * (places * (2 * 3 * c + 2 * s.num_heads * c) + 2 * 9 * c * c)
    presence = 0.0
    if module.presence is not None:
        once = products(module.presence.place, lambda _: 1.0) * places * images
        each = products(module.presence.token, lambda _: 1.0) + products(module.presence.read, lambda _: 1.0)
        presence = once + prompts * (each + places * 2 * 3 * c)
    heads = places * (2 * c + 2 * (c * c + 4 * c)) + 2 * 2 * c * c
    objects = int(((targets.mask_index >= 0) & targets.valid & ~targets.crowd & targets.counted[:, None]).sum())
    k, m = KERNEL_WIDTH, s.mask_channels
    kernel = 2.0 * c * (c + sum(module.kernel_sizes)) + 2.0 * height * width * ((m + 2) * k + k * k + k)
    trained = min(objects * min(s.max_masks_per_object, s.topk_assign), images * s.max_masks_per_image)
    return images * (neck + masks + poses) + presence + read + prompts * (link + aligner + heads) + trained * kernel
