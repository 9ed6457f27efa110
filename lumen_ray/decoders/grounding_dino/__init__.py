"""The expert detector and segmenter: Grounding DINO (arXiv 2303.05499) with links in place of its text branch."""

from lumen_ray.decoders.grounding_dino.settings import GroundingDinoSettings
from lumen_ray.decoders.spec import DecoderSpec

SPEC = DecoderSpec(
    name="grounding_dino",
    family="perception",
    tasks=("detect", "ground", "refer", "segment", "region_segment", "semantic", "count"),
    reads="pixels",
    losses={"gdino_class": "objects", "gdino_box": "objects", "gdino_mask": "masks"},
    settings=GroundingDinoSettings,
    decoder="lumen_ray.decoders.grounding_dino.decoder:GroundingDinoDecoder",
    link_head="lumen_ray.trunk.queries:perception_head",
    flops="lumen_ray.decoders.grounding_dino.flops:count",
    published="lumen_ray.decoders.grounding_dino.published:LOADER",
    released="lumen_ray.decoders.grounding_dino.released:MODULE",
    description="detects, grounds and segments",
)
