"""Rules for Stable Diffusion and InstructPix2Pix in the released VisionLLM v2 checkpoint: `sd.*` and `ip2p.*`, which
have the same layout.

Each holds the mapper, here the decoder's link head, and the published UNet, VAE and CLIP text encoder.
"""

from __future__ import annotations

from lumen_ray.checkpoints.rules import ModuleRules, ReleasedModule, Rule

#: of `link_head.DiffusionHead`
HEAD_RULES: list[Rule] = [
    Rule(r"emb_proj\.(.+)", r"proj.\1"),
    Rule(r"llm2sd_mapper\.(.+)", r"mapper.\1"),
    Rule(r"llm2sd_mapper_queries", "queries", change=lambda queries: queries.squeeze(0)),
]

#: of `DiffusionDecoder`; the CLIPTextModel of current transformers has no level `text_model`
DECODER_RULES: list[Rule] = [
    Rule(r"sd_unet\.(.+)", r"unet.\1"),
    Rule(r"sd_vae\.(.+)", r"vae.\1"),
    Rule(r"sd_text_encoder\.text_model\.(.+)", r"text_encoder.\1"),
]


def released_parts(decoder: str, link_head: str, source: str) -> list[ModuleRules]:
    """The rules for the module `source`; `decoder` and `link_head`: our prefixes. All end with a dot."""
    return [ModuleRules(source, link_head, HEAD_RULES), ModuleRules(source, decoder, DECODER_RULES)]


STABLE_DIFFUSION = ReleasedModule("sd", released_parts)
INSTRUCT_PIX2PIX = ReleasedModule("ip2p", released_parts)
