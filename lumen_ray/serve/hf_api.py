"""`/hf/<task>`: the shapes of Hugging Face's inference endpoints, for `huggingface_hub.InferenceClient`.

A body is an image's bytes, or JSON with the image in base64 under `inputs` and `parameters`. Which of them a client
sends depends on whether it has parameters, and not all clients name the type, so that the body itself decides. The
client posts every task to the address that it is given, so that each task here has its own. Boxes are whole pixels.
"""

from __future__ import annotations

import base64
import io
import math
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from fastapi import APIRouter, Request
from PIL import Image
from pydantic import BaseModel, BeforeValidator, Field

from lumen_ray.answer import Answer
from lumen_ray.config import Settings
from lumen_ray.errors import UserError
from lumen_ray.serve import forms
from lumen_ray.serve.asking import Backend, answer
from lumen_ray.serve.http import content_type, json_schema_ref
from lumen_ray.serve.own_classes import classes_or_own
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.structures import Masks
from lumen_ray.wire import schemas
from lumen_ray.wire.images import IMAGE_URL, GivenImage, given_image
from lumen_ray.wire.neutral import Neutral, refuse_others
from lumen_ray.wire.settings import MAX_NEW_TOKENS

T = TypeVar("T", bound="HfBody")
_LABELS = "classes to find; null for those the model was trained with. Also in the URL: ?candidate_labels=a,b"
_THRESHOLD = "lowest score; null for the server's default"


class HfInputs(Settings):
    """The image, and what is asked about it, as huggingface.js and pipelines have them."""

    image: str = Field(description=f"the image: {IMAGE_URL}")
    question: str | None = Field(None, description="visual-question-answering only")
    candidate_labels: list[str] | None = Field(None, description=_LABELS)


def _as_inputs(value: Any) -> Any:
    return {"image": value} if isinstance(value, str) else value


class HfBody(Settings):
    """The JSON form of a body."""

    inputs: Annotated[HfInputs, BeforeValidator(_as_inputs, json_schema_input_type=str | HfInputs)] = Field(
        description="the image in base64, or an object with it"
    )
    options: dict[str, Any] | None = Field(None, description="accepted and without effect")


class HfDetectionParameters(Settings):
    threshold: schemas.Fraction | None = Field(None, description=_THRESHOLD)
    candidate_labels: list[str] | None = Field(None, description=_LABELS)


class HfDetectionBody(HfBody):
    """object-detection, zero-shot-object-detection."""

    parameters: HfDetectionParameters | None = None
    candidate_labels: list[str] | None = Field(None, description=_LABELS)


class HfSegmentationParameters(HfDetectionParameters):
    subtask: Literal["instance", "semantic"] | None = Field(
        None, description="instance (also null): a mask per object; semantic: one per class"
    )
    mask_threshold: Annotated[float | None, Neutral("masks end where the model is at one half", 0.5)] = None
    overlap_mask_area_threshold: Annotated[float | None, Neutral("masks may overlap, and none is dropped for it")] = (
        None
    )


class HfSegmentationBody(HfBody):
    """image-segmentation."""

    parameters: HfSegmentationParameters | None = None
    candidate_labels: list[str] | None = Field(None, description=_LABELS)


class HfGenerationParameters(Settings):
    """How tokens are chosen."""

    max_new_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS, description="longest text, in tokens")
    do_sample: bool | None = Field(None, description="whether tokens are drawn")
    temperature: schemas.Temperature | None = Field(None, description="with do_sample; null is 1")
    top_k: int | None = Field(None, ge=0, le=2**31, description="with do_sample: draw from so many tokens")
    top_p: schemas.Fraction | None = Field(None, description="with do_sample: draw from tokens of this probability")
    num_beams: Annotated[int | None, Neutral("there is no beam search", 1)] = None
    use_cache: bool | None = Field(None, description="accepted and without effect")


class HfTextParameters(Settings):
    max_new_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS, description="longest text, in tokens")
    generation_parameters: HfGenerationParameters | None = None


class HfTextBody(HfBody):
    """image-to-text."""

    parameters: HfTextParameters | None = None


class HfQuestionParameters(Settings):
    top_k: int | None = Field(None, ge=1, description="any; there is one answer")


class HfQuestionBody(HfBody):
    """visual-question-answering."""

    parameters: HfQuestionParameters | None = None
    question: str | None = Field(None, description="the question, as huggingface_hub sends it")
    image: str | None = Field(None, description="the image once more, as huggingface_hub sends it; `inputs` is read")


class HfBox(BaseModel):
    """In whole pixels of the image after EXIF rotation."""

    xmin: int
    ymin: int
    xmax: int
    ymax: int


class HfDetection(BaseModel):
    score: float
    label: str
    box: HfBox


class HfSegment(BaseModel):
    score: float
    label: str
    mask: str = Field(description="PNG of the image's size in base64, one channel: 255 where the object is, else 0")


class HfText(BaseModel):
    generated_text: str


class HfAnswer(BaseModel):
    score: float = Field(description="probability of the answer's tokens by the language model")
    answer: str


class HfError(BaseModel):
    error: str = Field(description="one sentence that says what to change")
    error_type: str = Field(description="machine-readable, e.g. broken_image")


#: bodies of the JSON form, for OpenAPI
BODIES = (HfDetectionBody, HfSegmentationBody, HfTextBody, HfQuestionBody)


def make_router(backend: Backend, settings: ServeSettings) -> APIRouter:
    router = APIRouter(prefix="/hf", tags=["hugging face"], responses=dict.fromkeys(("4XX", "5XX"), {"model": HfError}))

    async def find(request: Request, task: str, image: GivenImage, body: Any, labels: list[str] | None) -> Answer:
        """The objects of the labels of the URL, the body, or the model."""
        labels = _labels_of_url(request) or labels
        found = await classes_or_own(backend, labels, "candidate_labels")
        threshold = body.parameters.threshold if body and body.parameters else None
        fields = schemas.parse(schemas.TaskFields, {"classes": found, "score_threshold": threshold})
        return (await answer(backend, settings, [image], [(task, fields)]))[0][0]

    @router.post("/object-detection", summary="Boxes of the model's classes", openapi_extra=_body(HfDetectionBody))
    async def object_detection(request: Request) -> list[HfDetection]:
        image, body = await _read(request, HfDetectionBody)
        return _detections(await find(request, "detect", image, body, _labels(body)))

    @router.post("/zero-shot-object-detection", summary="Boxes of given classes", openapi_extra=_body(HfDetectionBody))
    async def zero_shot_object_detection(request: Request) -> list[HfDetection]:
        image, body = await _read(request, HfDetectionBody)
        labels = _labels_of_url(request) or _labels(body)
        if not labels:
            raise UserError("give the classes to find in 'candidate_labels'", "empty_classes", "candidate_labels")
        return _detections(await find(request, "detect", image, body, labels))

    @router.post("/image-segmentation", summary="Masks of the model's classes", openapi_extra=_body(HfSegmentationBody))
    async def image_segmentation(request: Request) -> list[HfSegment]:
        image, body = await _read(request, HfSegmentationBody)
        parameters = body.parameters if body else None
        if parameters is not None:
            refuse_others(parameters, "parameters.")
        task = "semantic" if parameters and parameters.subtask == "semantic" else "segment"
        return _segments(await find(request, task, image, body, _labels(body)))

    @router.post("/image-to-text", summary="A caption", openapi_extra=_body(HfTextBody))
    async def image_to_text(request: Request) -> list[HfText]:
        image, body = await _read(request, HfTextBody)
        fields = _sampling(body.parameters if body else None)
        answers, _ = await answer(backend, settings, [image], [("caption", fields)])
        return [HfText(generated_text=answers[0].text or "")]

    @router.post("/visual-question-answering", summary="The answer to a question", openapi_extra=_body(HfQuestionBody))
    async def visual_question_answering(request: Request) -> list[HfAnswer]:
        image, body = await _read(request, HfQuestionBody)
        question = None if body is None else body.question or body.inputs.question
        if not question:
            raise UserError("give the question in 'question', and the image in 'inputs'", "empty_text", "question")
        fields = schemas.parse(schemas.TaskFields, {"text": question})
        answers, _ = await answer(backend, settings, [image], [("vqa", fields)])
        return [HfAnswer(score=_probability(answers[0]), answer=answers[0].text or "")]

    return router


async def _read(request: Request, model: type[T]) -> tuple[GivenImage, T | None]:
    """The image, and the JSON body that it was in, if it was in one. Raises `UserError`."""
    data = await request.body()
    if content_type(request).startswith("multipart/"):
        raise UserError("send the image's bytes, or JSON with 'inputs'; a form is not taken", "unsupported_media_type")
    says_json = content_type(request) == "application/json" and "content-type" in request.headers
    if not says_json and data.lstrip()[:1] != b"{":
        if not data:
            raise UserError("the body is empty; send the image's bytes, or JSON with 'inputs'", "missing_image")
        return data, None
    body = schemas.parse(model, schemas.parse_json(data))
    return given_image(body.inputs.image, "inputs"), body


def _labels(body: HfDetectionBody | HfSegmentationBody | None) -> list[str] | None:
    if body is None:
        return None
    return (
        (body.parameters and body.parameters.candidate_labels) or body.candidate_labels or body.inputs.candidate_labels
    )


def _labels_of_url(request: Request) -> list[str] | None:
    given = [("candidate_labels", text) for text in request.query_params.getlist("candidate_labels")]
    return forms.read_fields(given, lists=("candidate_labels",)).get("candidate_labels")


def _sampling(parameters: HfTextParameters | None) -> schemas.TaskFields:
    """The settings of a caption as fields of the task API. Raises `UserError`."""
    how = (parameters and parameters.generation_parameters) or HfGenerationParameters()
    refuse_others(how, "parameters.generation_parameters.")
    longest = (parameters and parameters.max_new_tokens) or how.max_new_tokens
    if not how.do_sample:
        return schemas.TaskFields(max_new_tokens=longest)
    heat = 1.0 if how.temperature is None else how.temperature
    return schemas.TaskFields(max_new_tokens=longest, temperature=heat, top_k=how.top_k, top_p=how.top_p)


def _detections(answer: Answer) -> list[HfDetection]:
    """The instances, best first."""
    found = [
        HfDetection(
            score=instance["score"],
            label=instance["phrase"],
            box=HfBox(**dict(zip(("xmin", "ymin", "xmax", "ymax"), map(round, instance["box"]), strict=True))),
        )
        for instance in answer.to_dict()["instances"]
    ]
    return sorted(found, key=lambda item: -item.score)


def _segments(answer: Answer) -> list[HfSegment]:
    """The instances with their masks, best first."""
    found = [
        HfSegment(score=instance["score"], label=instance["phrase"], mask=_png(Masks([instance["mask"]], answer.size)))
        for instance in answer.to_dict()["instances"]
    ]
    return sorted(found, key=lambda item: -item.score)


def _png(mask: Masks) -> str:
    """One mask as PNG of one channel in base64."""
    buffer = io.BytesIO()
    Image.fromarray(mask.to_arrays()[0].astype(np.uint8) * 255).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _probability(answer: Answer) -> float:
    """Of the tokens of a text; 1 for an empty one."""
    return math.exp(sum(answer.log_probs or ()))


def _body(model: type[HfBody]) -> dict[str, Any]:
    binary = {"schema": {"type": "string", "format": "binary", "description": "the image's bytes"}}
    content = {"application/json": {"schema": json_schema_ref(model)}, "image/*": binary}
    operation: dict[str, Any] = {"requestBody": {"required": True, "content": content}}
    if "candidate_labels" in model.model_fields:
        schema = {"type": "array", "items": {"type": "string"}}
        labels = {"name": "candidate_labels", "in": "query", "explode": False, "schema": schema, "description": _LABELS}
        operation["parameters"] = [labels]
    return operation
