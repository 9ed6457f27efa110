"""Stable Diffusion and InstructPix2Pix in the released checkpoint: `sd.*` and `ip2p.*`, which look alike.

Each holds the mapper, here the link head of the decoder's family, and the published UNet, VAE and CLIP text encoder.
"""

from __future__ import annotations

from lumen_ray.checkpoints.rules import Part, ReleasedModule, Rule

#: of `model.diffusion_head.DiffusionHead`
HEAD_RULES: list[Rule] = [
    Rule(r"emb_proj\.(.+)", r"proj.\1"),
    Rule(r"llm2sd_mapper\.(.+)", r"mapper.\1"),
    Rule(r"llm2sd_mapper_queries", "queries", change=lambda queries: queries.squeeze(0)),
]

#: of `decoders.diffusion.DiffusionDecoder`; transformers' CLIPTextModel has lost the level `text_model`
DECODER_RULES: list[Rule] = [
    Rule(r"sd_unet\.(.+)", r"unet.\1"),
    Rule(r"sd_vae\.(.+)", r"vae.\1"),
    Rule(r"sd_text_encoder\.text_model\.(.+)", r"text_encoder.\1"),
]


def released_parts(decoder: str, link_head: str, source: str) -> list[Part]:
    """Where the tensors of the module `source` go: `decoder` and `link_head` are our prefixes. All end with a dot."""
    return [Part(source, link_head, HEAD_RULES), Part(source, decoder, DECODER_RULES)]


STABLE_DIFFUSION = ReleasedModule("sd", released_parts)
INSTRUCT_PIX2PIX = ReleasedModule("ip2p", released_parts)
