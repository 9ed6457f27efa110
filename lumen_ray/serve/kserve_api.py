"""`/v2`: the Open Inference Protocol of KServe and Triton over HTTP, with its binary extension.

Every tensor in is BYTES; an encoded image is one element. Which outputs have elements depends on the task; all are
always there, so that the response fits the metadata.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from lumen_ray.answer import Answer
from lumen_ray.errors import UserError
from lumen_ray.serve.asking import Backend, answer
from lumen_ray.serve.http import content_type, json_schema_ref
from lumen_ray.serve.job import pinned
from lumen_ray.serve.kserve_tensors import (
    LENGTH_HEADER,
    KserveRequest,
    OutputTensor,
    Texts,
    read_request,
    write_response,
)
from lumen_ray.serve.openai_api import check_model
from lumen_ray.serve.own_classes import classes_or_own
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.tasks import get_task
from lumen_ray.version import __version__
from lumen_ray.wire import schemas
from lumen_ray.wire.images import GivenImage, given_image

#: inputs -> their shapes
INPUTS = {"IMAGE": [1], "TASK": [1], "PROMPT": [1], "CLASSES": [-1], "KEYPOINTS": [-1], "REGION": [1]}
#: outputs -> their datatypes and shapes
OUTPUTS = {
    "BOXES": ("FP32", [-1, 4]),
    "SCORES": ("FP32", [-1]),
    "LABELS": ("BYTES", [-1]),
    "MASKS": ("BYTES", [-1]),
    "KEYPOINTS": ("BYTES", [-1]),
    "TEXT": ("BYTES", [-1]),
    "PICTURES": ("BYTES", [-1]),
    "SIZE": ("INT32", [2]),
}
_SINGLE = tuple(name for name, shape in INPUTS.items() if shape == [1])
_PLATFORM = "lumen_ray"

#: the body, for OpenAPI
BODIES = (KserveRequest,)


class KserveError(BaseModel):
    error: str = Field(description="one sentence that says what to change")


def make_router(backend: Backend, settings: ServeSettings, is_ready: Callable[[], Awaitable[bool]]) -> APIRouter:
    """The routes. `is_ready`: as of /readyz."""
    router = APIRouter(prefix="/v2", tags=["kserve"], responses=dict.fromkeys(("4XX", "5XX"), {"model": KserveError}))

    @router.get("", summary="The server")
    async def server() -> dict[str, Any]:
        return {"name": _PLATFORM, "version": __version__, "extensions": ["binary_tensor_data"]}

    @router.get("/health/live", summary="200 while the HTTP server runs")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @router.get("/health/ready", summary="200 when every deployment of the model answers, else 503")
    async def ready() -> JSONResponse:
        answers = await is_ready()
        return JSONResponse({"ready": answers}, 200 if answers else 503)

    async def model_ready(name: str, version: str | None = None) -> JSONResponse:
        await _check(backend, name, version)
        answers = await is_ready()
        return JSONResponse({"name": name, "ready": answers}, 200 if answers else 503)

    async def metadata(name: str, version: str | None = None) -> dict[str, Any]:
        await _check(backend, name, version)
        return {
            "name": name,
            "versions": [(await backend.info())["version"]],
            "platform": _PLATFORM,
            "inputs": [{"name": name, "datatype": "BYTES", "shape": shape} for name, shape in INPUTS.items()],
            "outputs": [{"name": name, "datatype": kind, "shape": shape} for name, (kind, shape) in OUTPUTS.items()],
        }

    async def infer(request: Request, name: str, version: str | None = None) -> Response:
        await _check(backend, name, version)
        if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
            raise UserError(f"bodies in '{encoding[:20]}' are not read; send it uncompressed", "unsupported_media_type")
        if content_type(request).startswith("multipart/"):
            raise UserError("a form is not taken; send JSON, with or without binary data", "unsupported_media_type")
        asked, tensors = read_request(await request.body(), request.headers.get(LENGTH_HEADER))
        image, task, fields = await _read_task(backend, asked, tensors)
        answers, extra = await answer(backend, settings, [] if image is None else [image], [(task, fields)])
        head = {"model_name": name, "model_version": extra["model"].rpartition("@")[2]}
        head |= {} if asked.id is None else {"id": asked.id}
        body, length = write_response(asked, head, _outputs(answers[0]))
        if length is None:
            return Response(body, media_type="application/json")
        return Response(body, media_type="application/octet-stream", headers={LENGTH_HEADER: str(length)})

    for path, endpoint, method, summary in (
        ("/ready", model_ready, "GET", "200 when the model answers, else 503"),
        ("", metadata, "GET", "The model's tensors"),
        ("/infer", infer, "POST", "One task, in tensors"),
    ):
        for place in ("/models/{name}", "/models/{name}/versions/{version}"):
            router.add_api_route(
                place + path,
                endpoint,
                methods=[method],
                summary=summary,
                include_in_schema="version" not in place,
                openapi_extra=_body() if method == "POST" else None,
            )
    return router


async def _check(backend: Backend, name: str, version: str | None) -> None:
    """Raises `UserError` for another model, or another version of it."""
    await check_model(backend, name)
    known = (await backend.info())["version"]
    if version not in (None, known):
        raise UserError(f"unknown version '{version}' of model '{name}'; versions: {known}", "unknown_model", "version")
    if version is not None:
        pinned.set(version)


async def _read_task(
    backend: Backend, request: KserveRequest, tensors: dict[str, Texts]
) -> tuple[GivenImage | None, str, schemas.TaskFields]:
    """The image, the task and its fields. Raises `UserError`."""
    for name, texts in tensors.items():
        if name not in INPUTS:
            raise UserError(f"unknown input '{name}'; inputs: {', '.join(INPUTS)}", "unknown_input", "inputs")
        if name in _SINGLE and len(texts.values) != 1:
            raise UserError(f"input '{name}' takes one element, got {len(texts.values)}", "invalid_tensor", name)
    given = {name: texts.decoded(name) for name, texts in tensors.items() if name != "IMAGE"}
    task = get_task(_one(given, "TASK") or ("vqa" if "PROMPT" in given else "detect"))
    parameters = request.parameters.model_dump(exclude_none=True) if request.parameters else {}
    for name in ("binary_data_output", "priority", "timeout"):
        parameters.pop(name, None)
    fields: dict[str, Any] = {**parameters, "text": _one(given, "PROMPT"), "keypoints": given.get("KEYPOINTS")}
    fields["classes"] = given.get("CLASSES")
    if task.needs == "classes":
        fields["classes"] = await classes_or_own(backend, fields["classes"], "CLASSES", task.result == "keypoints")
    if (region := _one(given, "REGION")) is not None:
        fields["region"] = schemas.parse_json(region.encode())
    image = tensors.get("IMAGE")
    shown: GivenImage | None = None
    if image is not None:
        shown = given_image(image.decoded("IMAGE")[0], "IMAGE") if image.in_json else image.values[0]
    return shown, task.name, schemas.parse(schemas.TaskFields, fields)


def _one(given: dict[str, list[str]], name: str) -> str | None:
    return given[name][0] if name in given else None


def _outputs(answer: Answer) -> dict[str, OutputTensor]:
    """Every output of the metadata, in its order; those that the task does not have are empty."""
    data = answer.to_dict()
    found = data.get("instances", [])
    values: dict[str, Any] = {
        "BOXES": np.array([i["box"] for i in found], np.float32).reshape(-1, 4),
        "SCORES": np.array([i["score"] for i in found], np.float32),
        "LABELS": [i["phrase"].encode() for i in found],
        "MASKS": [json.dumps(i["mask"]).encode() for i in found if "mask" in i],
        "KEYPOINTS": [json.dumps(i["keypoints"]).encode() for i in found if "keypoints" in i],
        "TEXT": [] if answer.text is None else [answer.text.encode()],
        "PICTURES": [base64.b64decode(picture) for picture in data.get("images", [])],
        "SIZE": np.array(answer.size, np.int32),
    }
    return {name: OutputTensor(kind, values[name], name == "PICTURES") for name, (kind, _) in OUTPUTS.items()}


def _body() -> dict[str, Any]:
    binary = {"schema": {"type": "string", "format": "binary", "description": "the JSON, then the tensors' bytes"}}
    content = {"application/json": {"schema": json_schema_ref(KserveRequest)}, "application/octet-stream": binary}
    return {"requestBody": {"required": True, "content": content}}
