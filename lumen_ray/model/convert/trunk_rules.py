"""Rules for the trunk of a released VisionLLM v2 checkpoint: CLIP, LLM, region encoder, bridge and [EMB] queries."""

from __future__ import annotations

from collections.abc import Collection

from lumen_ray.checkpoints.rules import ModuleRules, Rule
from lumen_ray.model.convert.encoder_rules import CLIP, LLM

#: query sets: {name in the checkpoint: our family}
QUERIES = {"det": "perception", "pose": "pose", "gen": "generation", "edit": "editing"}

BRIDGE = (Rule(r"[02]\.(?:weight|bias)", r"\g<0>"),)
REGIONS = (
    Rule(r"mask_embedding\.(\d+\.(?:weight|bias))", r"convs.\1"),
    Rule(r"up_dim\.(weight|bias)", r"projector.\1"),
)


def module_rules(families: Collection[str]) -> tuple[ModuleRules, ...]:
    """The rules for the trunk of a model with the queries of these link families; other queries are dropped."""
    queries = [
        Rule(rf"{theirs}\.weight", ours)
        if ours in families
        else Rule(rf"{theirs}\.weight", drop=f"no decoder of the preset reads queries of the family '{ours}'")
        for theirs, ours in QUERIES.items()
    ]
    return (
        ModuleRules("vis_encoder.", "trunk.vision.clip.model.", CLIP),
        ModuleRules("llm.", "trunk.llm.", LLM),
        ModuleRules("region_encoder.", "trunk.regions.", REGIONS),
        ModuleRules("vl_bridge.", "trunk.vision.projector.", BRIDGE),
        ModuleRules("emb_embeddings_", "trunk.queries.queries.", queries),
    )
