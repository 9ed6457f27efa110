"""Bodies that Roboflow's client sends, and its predictions."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from lumen_ray.answer import Answer
from lumen_ray.config import Settings
from lumen_ray.errors import UserError
from lumen_ray.outline import one_outline
from lumen_ray.structures import Masks
from lumen_ray.wire import schemas
from lumen_ray.wire.images import GivenImage, image_bytes, web_address
from lumen_ray.wire.neutral import Neutral
from lumen_ray.wire.settings import MAX_NEW_TOKENS

MaskFormat = Literal["polygon", "rle"]


class RoboflowImage(Settings):
    """An image in a body."""

    type: Literal["base64", "url", "numpy"] = Field(description="base64 or url; the other is refused")
    value: str = Field(
        description="the encoded image in base64, or a web address of a host that the server's settings allow"
    )

    def read(self, place: str) -> GivenImage:
        """The image, which is at `place` in the body. Raises `UserError`."""
        if self.type == "numpy":
            raise UserError(
                f"'{place}.type' must be 'base64' or 'url': pickled arrays are not read", "invalid_request", place
            )
        if self.type == "base64":
            return image_bytes(self.value, f"{place}.value")
        if (address := web_address(self.value)) is None:
            raise UserError(
                f"'{place}.value' is no address of http or https; give one, or the image with type 'base64'",
                "remote_image_refused",
                place,
            )
        return address


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _as_confidence(value: Any) -> Any:
    if value == "best":
        raise UserError("'confidence' is a number from 0 to 1, or 'default'; the model has no thresholds by class")
    return None if value == "default" else value


class RoboflowBody(Settings):
    """What all bodies have. Other keys, such as `api_key` and `source`, are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    image: Annotated[
        list[RoboflowImage], BeforeValidator(_as_list, json_schema_input_type=RoboflowImage | list[RoboflowImage])
    ] = Field(min_length=1, description="an image, or several, which are answered by a list")
    model_id: str | None = Field(None, description="as in GET /model/registry")

    def given(self) -> tuple[list[GivenImage], list[str]]:
        """The images, and where each is in the body. Raises `UserError`."""
        places = [f"image.{n}" if len(self.image) > 1 else "image" for n in range(len(self.image))]
        return [given.read(place) for given, place in zip(self.image, places, strict=True)], places


Confidence = Annotated[
    schemas.Fraction | None, BeforeValidator(_as_confidence, json_schema_input_type=float | str | None)
]


class RoboflowDetectionBody(RoboflowBody):
    """object_detection."""

    class_filter: list[str] | None = Field(
        None, description="classes to find, of which the model need not know the names; null for its own"
    )
    confidence: Confidence = Field(None, description="lowest score; null or 'default' for the server's default")
    max_detections: int | None = Field(None, ge=1, le=1000, description="most objects of an image, best first")
    visualize_predictions: Annotated[bool | None, Neutral("predictions are not drawn", False)] = None
    disable_preproc_auto_orient: Annotated[bool | None, Neutral("images are turned as their EXIF tag says", False)] = (
        None
    )


class RoboflowSegmentationBody(RoboflowDetectionBody):
    """instance_segmentation."""

    response_mask_format: MaskFormat | None = Field(None, description="null is polygon")
    allow_reduced_mask_resolution: Annotated[bool | None, Neutral("masks are of the image's size", False)] = None


class RoboflowKeypointsBody(RoboflowDetectionBody):
    """keypoints_detection."""

    keypoint_confidence: schemas.Fraction | None = Field(None, description="lowest score of a keypoint")


class RoboflowWorldBody(RoboflowBody):
    """yolo_world: classes by name."""

    text: list[str] = Field(description="classes to find")
    confidence: Confidence = Field(None, description="lowest score; null for the server's default")


class RoboflowTextBody(RoboflowBody):
    """lmm: a question, or none for a caption."""

    prompt: str | None = Field(None, description="the question; null for a caption")
    max_new_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS, description="longest answer, in tokens")


class RoboflowPrompt(Settings):
    """A concept of sam3."""

    type: Literal["text"] | None = Field(None, description="text; give classes by example to /v1/segment")
    text: str = Field(description="the class to segment")
    output_prob_thresh: schemas.Fraction | None = Field(None, description="lowest score, else that of the body")
    boxes: Annotated[Any, Neutral("concepts are given by text; /v1/segment takes classes by example", [])] = None
    box_labels: Annotated[Any, Neutral("concepts are given by text", [])] = None


class RoboflowConceptBody(RoboflowBody):
    """sam3/concept_segment."""

    prompts: list[RoboflowPrompt] = Field(min_length=1)
    output_prob_thresh: schemas.Fraction | None = Field(None, description="lowest score; null for the server's default")
    format: MaskFormat = Field("polygon")
    nms_iou_threshold: Annotated[float | None, Neutral("objects of several prompts may overlap")] = None


class RoboflowModelBody(Settings):
    """The model of `/model/add` and `/model/remove`."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    model_id: str = Field(description="as in GET /model/registry")


class RoboflowError(BaseModel):
    message: str = Field(description="one sentence that says what to change")
    reason: str = Field(description="machine-readable, e.g. broken_image")
    request_id: str = Field(description="also in the X-Request-ID header")


def predictions(
    answer: Answer, ids: dict[str, int], masks: MaskFormat = "polygon", keypoint_score: float = 0
) -> list[dict[str, Any]]:
    """The instances, best first. `ids`: number of each class; `keypoint_score`: lowest of a keypoint."""
    found: list[dict[str, Any]] = []
    for instance in sorted(answer.to_dict()["instances"], key=lambda instance: -instance["score"]):
        x1, y1, x2, y2 = instance["box"]
        item: dict[str, Any] = {
            "x": round((x1 + x2) / 2, 3),
            "y": round((y1 + y2) / 2, 3),
            "width": round(x2 - x1, 2),
            "height": round(y2 - y1, 2),
            "confidence": instance["score"],
            "class": instance["phrase"],
            "class_id": ids[instance["phrase"]],
            "detection_id": str(uuid.uuid4()),
        }
        if "mask" in instance:
            item["mask_format"] = masks
            if masks == "rle":
                item["rle"] = instance["mask"]
            else:
                item["points"] = [{"x": x, "y": y} for x, y in polygon(instance["mask"], answer).tolist()]
        if "keypoints" in instance:
            named = enumerate(instance["keypoints"].items())
            item["keypoints"] = [
                {"x": x, "y": y, "confidence": score, "class": name, "class_id": number}
                for number, (name, (x, y, score)) in named
                if score >= keypoint_score
            ]
        found.append(item)
    return found


def polygon(mask: dict[str, Any], answer: Answer) -> np.ndarray:
    """A mask's outline as OpenCV's contours have it: int64 [n, 2], x and y of the pixels at its edge. Readers fill it
    together with its edges, and some round where others cut off."""
    return np.floor(one_outline(Masks([mask], answer.size).to_arrays()[0])).astype(np.int64)
