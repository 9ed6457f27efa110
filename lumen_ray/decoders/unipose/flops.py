"""Floating-point operations of the UniPose decoder."""

from __future__ import annotations

from lumen_ray.decoders.common.flops import DecoderWork, products
from lumen_ray.decoders.dino.flops import Step
from lumen_ray.decoders.unipose.decoder import UniPoseDecoder
from lumen_ray.decoders.unipose.slots import Skeletons


def count(decoder: UniPoseDecoder, work: DecoderWork) -> float:
    """FLOPs of a training step, forward and backward."""
    step, s = Step.of(decoder, work), decoder.settings
    noisy, queries = step.denoising, step.queries + step.denoising
    points = Skeletons.of(work.link, step.groups.objects).valid.shape[1]
    slots = min(s.num_instances, step.queries * step.prompts)
    one = step.encoder() + sum(step.layer(i, queries, queries) for i in range(s.box_layers))
    heads = (decoder.pose_embed, decoder.pose_embed, decoder.pose_hw_embed, decoder.visible_embed)
    for i in range(s.box_layers, s.decoder_layers):
        one += step.layer(i, slots * (1 + points), 1 + points) + (step.layer(i, noisy, noisy) if noisy else 0.0)
        one += sum(products(head, lambda _: slots * points) for head in heads)
    return step.total(one)
