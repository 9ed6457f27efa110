"""The expert of poses: UniPose (arXiv 2310.08530), any skeleton, driven by links of objects and of keypoints."""

from lumen_ray.decoders.spec import DecoderSpec
from lumen_ray.decoders.unipose.settings import UniPoseSettings

SPEC = DecoderSpec(
    name="unipose",
    family="perception",
    tasks=("pose",),
    reads="pixels",
    losses={
        "unipose_class": "objects",
        "unipose_box": "objects",
        "unipose_keypoint": "objects",
        "unipose_oks": "objects",
        "unipose_visible": "objects",
    },
    settings=UniPoseSettings,
    decoder="lumen_ray.decoders.unipose.decoder:UniPoseDecoder",
    link_head="lumen_ray.decoders.unipose.link_head:link_head",
    flops="lumen_ray.decoders.unipose.flops:count",
    released="lumen_ray.decoders.unipose.released:MODULE",
    description="finds poses",
)
