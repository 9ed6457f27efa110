"""The images that decoders read, each at the decoder's input size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from lumen_ray.data.batches.decoder_inputs import as_tensor
from lumen_ray.data.batches.transforms import warp
from lumen_ray.data.images import Picture
from lumen_ray.decoders.base import PromptSpec
from lumen_ray.input_size import PictureSize, SizeRule
from lumen_ray.structures import SampleSettings


def rule_for(rule: SizeRule | None, sample: SampleSettings | None) -> SizeRule | None:
    """A decoder's size rule for one prompt: a request for pictures may name their size, which is checked."""
    if isinstance(rule, PictureSize) and sample is not None and sample.size is not None:
        rule.check(sample.size)
        return replace(rule, asked=sample.size)
    return rule


def resize(image: Picture, rule: SizeRule) -> Tensor:
    """Resamples an image to the size that the rule gives it: uint8 [3, *size]."""
    size, scale = rule.fit(image.size)
    return as_tensor(warp(image.pixels, np.diag((*scale, 1.0))[:2], size, reduction=image.reduction))


def decoder_pixels(
    about: Sequence[int],
    prompts: Sequence[PromptSpec | None],
    rule: SizeRule | None,
    images: Sequence[Picture],
    inputs: Tensor,
) -> list[Tensor]:
    """For each prompt the image that its decoder reads, uint8 [3, h, w]; prompts with the same image share a tensor.

    `about`: index of each prompt's image; `images`: as given; `inputs` uint8 [B, 3, H, W]: the trunk's inputs, which
    a decoder without a size rule reads.
    """
    wanted = [
        (i, rule_for(rule, None if prompt is None else prompt.sample)) for i, prompt in zip(about, prompts, strict=True)
    ]
    # a copy of an input, so that not the whole batch travels with one image of it
    made = {
        (i, input_rule): inputs[i].clone() if input_rule is None else resize(images[i], input_rule)
        for i, input_rule in dict.fromkeys(wanted)
    }
    return [made[key] for key in wanted]
