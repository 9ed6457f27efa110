"""What the decoders that look at images themselves get of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from lumen_ray.data.batches.decoder_inputs import as_tensor
from lumen_ray.data.batches.transforms import warp
from lumen_ray.decoders.base import PromptSpec
from lumen_ray.input_size import PictureSize, SizeRule
from lumen_ray.structures import SampleSettings


def rule_for(rule: SizeRule | None, sample: SampleSettings | None) -> SizeRule | None:
    """A decoder's rule for a prompt: pictures may be asked for in a size of their own, which is checked."""
    if isinstance(rule, PictureSize) and sample is not None and sample.size is not None:
        rule.check(sample.size)
        return replace(rule, asked=sample.size)
    return rule


def in_size(image: np.ndarray, rule: SizeRule) -> Tensor:
    """uint8 [h, w, 3] -> [3, *size], in the size that the rule gives it."""
    size, scale = rule.fit(image.shape[:2])
    return as_tensor(warp(image, np.diag((*scale, 1.0))[:2], size))


def looked_at(
    about: Sequence[int],
    prompts: Sequence[PromptSpec | None],
    rule: SizeRule | None,
    images: Sequence[np.ndarray],
    inputs: Tensor,
) -> list[Tensor]:
    """For each prompt the image that its decoder looks at, uint8 [3, h, w]; one tensor for all that see the same.

    `about`: index of each prompt's image, `images`: as they are stored, `inputs` [B, 3, H, W]: as the trunk sees them,
    which is what a decoder without a rule gets.
    """
    asked = [(i, rule_for(rule, spec and spec.sample)) for i, spec in zip(about, prompts, strict=True)]
    # a copy of an input, so that not the whole batch travels with a part of it
    made = {(i, own): inputs[i].clone() if own is None else in_size(images[i], own) for i, own in dict.fromkeys(asked)}
    return [made[image] for image in asked]
