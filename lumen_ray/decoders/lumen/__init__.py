"""The light decoder (Lumen, arXiv 2403.07304): heatmaps, boxes, masks and keypoints from the shared dense features."""

from lumen_ray.decoders.lumen.settings import LumenSettings
from lumen_ray.decoders.spec import DecoderSpec

SPEC = DecoderSpec(
    name="lumen",
    family="perception",
    tasks=("detect", "ground", "refer", "segment", "pose", "region_segment", "semantic", "count"),
    reads="dense",
    losses={
        "heatmap": "objects",
        "match": "objects",
        "box": "objects",
        "mask": "masks",
        "keypoint": "keypoints",
        "presence": "prompts",
    },
    settings=LumenSettings,
    default=LumenSettings(),
    decoder="lumen_ray.decoders.lumen.decoder:LumenDecoder",
    link_head="lumen_ray.trunk.queries:perception_head",
    flops="lumen_ray.decoders.lumen.flops:count",
    description="the light decoder; null: the model has none",
)
