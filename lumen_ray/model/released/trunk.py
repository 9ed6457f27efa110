"""Rules for the trunk of a released VisionLLM v2 checkpoint: CLIP, LLM, region encoder, bridge and [EMB] queries."""

from __future__ import annotations

from lumen_ray.model.released.encoders import CLIP, LLM
from lumen_ray.model.released.rules import Part, Rule
from lumen_ray.tasks import LINK_FAMILIES

#: whose queries stand behind which routing tokens: {the checkpoint's name: our family}
QUERIES = {"det": "perception", "pose": "pose", "gen": "generation", "edit": "editing"}

REGIONS = (
    Rule(r"mask_embedding\.(\d+\.(?:weight|bias))", r"convs.\1"),
    Rule(r"up_dim\.(weight|bias)", r"projector.\1"),
)


def _queries() -> tuple[Rule, ...]:
    return tuple(
        Rule(rf"{theirs}\.weight", ours)
        if ours in LINK_FAMILIES
        else Rule(rf"{theirs}\.weight", drop="no decoder reads these queries")
        for theirs, ours in QUERIES.items()
    )


PARTS = (
    Part("vis_encoder.", "trunk.vision.clip.model.", CLIP),
    Part("llm.", "trunk.llm.", LLM),
    Part("region_encoder.", "trunk.regions.", REGIONS),
    Part("vl_bridge.", "trunk.vision.projector.", [Rule(r"[02]\.(?:weight|bias)", r"\g<0>")]),
    Part("emb_embeddings_", "trunk.queries.queries.", _queries()),
)
