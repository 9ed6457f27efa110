"""`/v1/images/generations` and `/v1/images/edits` in OpenAI's format, over the tasks `generate` and `edit`.

Parameters that cannot be honoured are taken at their neutral value and refused at any other. Pictures are PNG in
base64; none is stored, so there are no URLs.
"""

from __future__ import annotations

import re
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.datastructures import FormData, UploadFile

from lumen_ray.config import Settings
from lumen_ray.errors import UserError
from lumen_ray.serve import forms
from lumen_ray.serve.asking import Backend, answer
from lumen_ray.serve.http import content_type, json_schema_ref
from lumen_ray.serve.openai_api import check_model
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.wire import schemas
from lumen_ray.wire.neutral import Neutral, refuse_others

_SIZE = re.compile(r"^([1-9]\d{0,4})x([1-9]\d{0,4})$")

#: names that clients give the file to edit
_FILES = ("image", "image[]")


class ImageRequest(Settings):
    """A picture to generate from a text."""

    prompt: str = Field(description="description of the picture")
    model: str | None = Field(None, description="the preset from GET /v1/models; null for the model that is loaded")
    n: int | None = Field(None, ge=1, le=10, description="pictures to make; null is 1")
    size: str | None = Field(None, description="'WIDTHxHEIGHT' in pixels; null or 'auto' for the model's own size")
    response_format: Literal["b64_json"] | None = Field(None, description="b64_json or null: PNG in base64")
    output_format: Literal["png"] | None = Field(None, description="png or null")
    background: Annotated[Any, Neutral("pictures are opaque", "auto")] = None
    moderation: Annotated[Any, Neutral("pictures are not moderated", "auto", "low")] = None
    quality: Annotated[Any, Neutral("pictures have one quality", "auto", "standard")] = None
    style: Annotated[Any, Neutral("the prompt alone says the style")] = None
    complexity: Annotated[Any, Neutral("pictures are not planned before they are made")] = None
    output_compression: Annotated[int | None, Neutral("PNG is lossless", 100)] = None
    partial_images: Annotated[int | None, Neutral("pictures come in one piece", 0)] = None
    stream: Annotated[bool | None, Neutral("pictures come in one piece", False, reason="streaming_unsupported")] = None
    frame_count: Annotated[Any, Neutral("pictures are still")] = None
    frame_duration_ms: Annotated[Any, Neutral("pictures are still")] = None
    svg: Annotated[Any, Neutral("pictures are PNG")] = None
    input_fidelity: Annotated[Any, Neutral("the prompt alone says what to keep of a picture", "low")] = None
    user: str | None = Field(None, description="accepted and without effect")
    safety_identifier: str | None = Field(None, description="accepted and without effect")
    seed: int | None = Field(None, ge=0, description="not in OpenAI's API: each seed gives another picture; null is 0")


class ImageEditForm(ImageRequest):
    """The change to make in the picture in the form's file `image`."""

    prompt: str = Field(description="the change to make")
    mask: Annotated[Any, Neutral("edits take no mask, the prompt says what to change", reason="mask_unsupported")] = (
        None
    )
    markup: Annotated[Any, Neutral("edits take no markup, the prompt says what to change")] = None


def make_router(backend: Backend, settings: ServeSettings) -> APIRouter:
    router = APIRouter(prefix="/v1/images", tags=["openai"])
    body = {"required": True, "content": {"application/json": {"schema": json_schema_ref(ImageRequest)}}}

    @router.post("/generations", summary="Pictures of a text, in OpenAI's format", openapi_extra={"requestBody": body})
    async def generations(request: Request) -> dict[str, Any]:
        wanted = schemas.parse(ImageRequest, schemas.parse_json(await request.body()))
        return await _draw("generate", wanted, None)

    @router.post("/edits", summary="An edited picture, in OpenAI's format", openapi_extra=_form_body())
    async def edits(request: Request) -> dict[str, Any]:
        if (kind := content_type(request)) != "multipart/form-data":
            raise UserError(
                f"content type '{kind}' is not supported; send multipart/form-data with the file 'image'",
                "unsupported_media_type",
            )
        async with request.form(max_files=3, max_fields=32) as form:
            wanted, image = await _read_edit(form)
        return await _draw("edit", wanted, image)

    async def _draw(task: str, wanted: ImageRequest, image: bytes | None) -> dict[str, Any]:
        refuse_others(wanted)
        await check_model(backend, wanted.model)
        height, width = _size(wanted.size)
        drawn = {"num_images": wanted.n, "seed": wanted.seed, "height": height, "width": width}
        fields = schemas.parse(schemas.TaskFields, {"text": wanted.prompt, **drawn})
        answers, extra = await answer(backend, settings, [] if image is None else [image], [(task, fields)])
        pictures = answers[0].to_dict()["images"]
        return {"created": int(time.time()), "data": [{"b64_json": picture} for picture in pictures], "lumen": extra}

    return router


def _size(text: str | None) -> tuple[int | None, int | None]:
    """(height, width), or Nones for the model's size."""
    if text is None or text == "auto":
        return None, None
    if not (found := _SIZE.match(text)):
        raise UserError(f"size '{text}' is not of the form 'WIDTHxHEIGHT', such as '512x512'", "invalid_size")
    return int(found[2]), int(found[1])


async def _read_edit(form: FormData) -> tuple[ImageRequest, bytes]:
    items = forms.given(form)
    files = [value for name, value in items if name in _FILES]
    if len(files) != 1 or not isinstance(files[0], UploadFile):
        raise UserError(f"the form needs exactly one file 'image', got {len(files)} of that name", "missing_image")
    fields = forms.read_fields((name, value) for name, value in items if name not in _FILES)
    return schemas.parse(ImageEditForm, fields), await files[0].read()


def _form_body() -> dict[str, Any]:
    schema = ImageEditForm.model_json_schema()
    schema["properties"]["image"] = {"type": "string", "format": "binary", "description": "the picture to change"}
    schema["required"] = ["image", "prompt"]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
