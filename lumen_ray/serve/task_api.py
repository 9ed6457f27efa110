"""`/v1/<task>` for every task of the registry, `/v1/infer` for several tasks about one image, and their listings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.datastructures import FormData, UploadFile

from lumen_ray.answer import Answer
from lumen_ray.data.images import Picture
from lumen_ray.errors import UserError
from lumen_ray.inference.request import Request, Shown
from lumen_ray.serve import forms
from lumen_ray.serve.http import content_type, json_schema_ref
from lumen_ray.serve.image_cache import ImageGone, KeyedImage, gone, image_id
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.structures import Size
from lumen_ray.tasks import TASKS, Task, get_task
from lumen_ray.wire import schemas
from lumen_ray.wire.images import image_bytes
from lumen_ray.wire.requests import Asked, fields_of, prepare

_FORM_LISTS, _FORM_OBJECTS = ("classes", "keypoints", "stop"), ("region", "history")


class Backend(Protocol):
    """The model behind the API. `ingress.ServeBackend` implements it over Serve; tests use a fake."""

    async def infer(self, image: Shown | KeyedImage, requests: Sequence[Request], max_new_tokens: int) -> list[Answer]:
        """Answers about an image, those of a conversation, or text alone, one per request, in order. Raises `ImageGone`
        for a `KeyedImage` without its picture that is not held."""

    async def held_size(self, image_id: str, ask: bool) -> Size | None:
        """(height, width) of an image that a trunk holds, as far as this process remembers, or, with `ask`, as the
        trunk says; None if it holds none."""

    async def info(self) -> dict[str, Any]:
        """preset, version, image_size, classes, skeletons of the loaded model."""

    async def ready(self) -> dict[str, bool]:
        """Deployment name -> whether it answers now."""


async def answer(
    backend: Backend,
    settings: ServeSettings,
    encoded: Sequence[bytes],
    tasks: Sequence[tuple[str, schemas.TaskFields]],
    held_id: str | None = None,
) -> tuple[list[Answer], dict[str, Any]]:
    """Answers to `tasks` about an encoded image or none, or about the image of id `held_id`, which the server was shown
    before; and the response's fields as of `ask`."""
    return await ask(backend, settings, lambda: Asked(encoded, tasks), held_id)


async def ask(
    backend: Backend, settings: ServeSettings, read: Callable[[], Asked], held_id: str | None = None
) -> tuple[list[Answer], dict[str, Any]]:
    """Answers to what `read` finds in a body, in a thread, and the response's fields `model`, `timing_ms` and, for a
    single image, `image_id`. An image that a trunk holds is neither decoded nor encoded again."""
    start = time.perf_counter()
    info, asked = await backend.info(), await asyncio.to_thread(read)
    key = held_id
    if key is None and len(asked.encoded) == 1 and settings.trunk.image_cache_mb:
        key = image_id(asked.encoded[0])
    held = None if key is None else await backend.held_size(key, ask=held_id is not None)
    if held_id is not None and held is None:
        raise gone(held_id)
    decoding = 0.0

    async def infer(held: Size | None) -> list[Answer]:
        nonlocal decoding
        began = time.perf_counter()
        side = info.get("largest_side")
        prepared = await asyncio.to_thread(prepare, asked, settings.limits, settings.defaults, side, held)
        decoding += time.perf_counter() - began
        shown: Shown | KeyedImage = prepared.shown
        if key is not None:
            assert shown is None or isinstance(shown, Picture)
            shown = KeyedImage(key, prepared.size, shown)
        return await backend.infer(shown, prepared.requests, prepared.max_new_tokens)

    try:
        answers = await infer(held)
    except ImageGone:
        if not asked.encoded:
            raise
        answers = await infer(None)
    end = time.perf_counter()
    timing = {"decode": decoding, "model": end - start - decoding, "total": end - start}
    timing_ms = {name: round(1000 * seconds, 1) for name, seconds in timing.items()}
    extra: dict[str, Any] = {"model": f"{info['preset']}@{info['version']}", "timing_ms": timing_ms}
    if key is not None:
        extra["image_id"] = key
    return answers, extra


def _image_of(image: str | None, held_id: str | None) -> tuple[list[bytes], str | None]:
    """The bytes of the image in a body, if any, or the id of one that is held."""
    if image is not None and held_id is not None:
        raise UserError("give 'image' or 'image_id', not both", "unexpected_field", "image_id")
    return [] if image is None else [image_bytes(image)], held_id


async def _read_task(
    request: HttpRequest, settings: ServeSettings
) -> tuple[list[bytes], str | None, schemas.TaskFields]:
    """Image bytes (none without an image) or the id of a held one, and fields of a JSON body or of a multipart form."""
    kind = content_type(request)
    if kind == "application/json":
        body = schemas.parse(schemas.TaskRequest, schemas.parse_json(await request.body()))
        return *_image_of(body.image, body.image_id), body
    if kind == "multipart/form-data":
        # the body is bounded; a field may hold images of examples
        most = settings.limits.max_body_bytes
        async with request.form(max_files=1, max_fields=32, max_part_size=most) as form:
            return await _read_form(form)
    raise UserError(
        f"content type '{kind}' is not supported; send application/json or multipart/form-data",
        "unsupported_media_type",
    )


async def _read_form(form: FormData) -> tuple[list[bytes], str | None, schemas.TaskFields]:
    fields = forms.read_fields(forms.given(form), _FORM_LISTS, _FORM_OBJECTS)
    upload, held_id = fields.pop("image", None), fields.pop("image_id", None)
    if held_id and upload is None:
        return [], held_id, schemas.parse(schemas.TaskFields, fields)
    if not isinstance(upload, UploadFile):
        raise UserError("the form has no file 'image'; attach one", "missing_image")
    if held_id:
        raise UserError("give 'image' or 'image_id', not both", "unexpected_field", "image_id")
    return [await upload.read()], None, schemas.parse(schemas.TaskFields, fields)


def make_router(backend: Backend, settings: ServeSettings) -> APIRouter:
    """The task routes."""
    router = APIRouter(prefix="/v1")

    @router.get("/tasks", tags=["about"], summary="The tasks that the model serves, and what each takes")
    async def tasks() -> dict[str, Any]:
        served = (await backend.info())["tasks"]
        return {"tasks": [describe(task) for task in TASKS.values() if task.name in served]}

    @router.get("/models", tags=["about"], summary="The model that is loaded")
    async def models() -> dict[str, Any]:
        info = await backend.info()
        card = {"id": info["preset"], "object": "model", "created": 0, "owned_by": "lumen_ray"}
        return {"object": "list", "data": [{**card, "lumen": info}]}

    @router.post(
        "/infer",
        tags=["tasks"],
        summary="Several tasks about one image in one pass",
        response_model=schemas.InferResponse,
        response_model_exclude_none=True,
        openapi_extra={"requestBody": _json_body(schemas.InferRequest)},
    )
    async def infer(request: HttpRequest) -> Any:
        body = schemas.parse(schemas.InferRequest, schemas.parse_json(await request.body()))
        tasks = [(entry.task, entry) for entry in body.requests]
        for name, _ in tasks:
            if not get_task(name).sees_image:
                raise UserError(f"task '{name}' takes no image; use /v1/{name}", "unexpected_image")
        image, held_id = _image_of(body.image, body.image_id)
        answers, extra = await answer(backend, settings, image, tasks, held_id=held_id)
        return {"answers": [a.to_dict() for a in answers], **extra}

    for task in TASKS.values():
        router.add_api_route(
            f"/{task.name}",
            _task_endpoint(task.name, backend, settings),
            methods=["POST"],
            tags=["tasks"],
            name=task.name,
            summary=f"{task.name}: takes {', '.join(takes(task))}; gives {task.result}",
            response_model=schemas.TaskResponse,
            response_model_exclude_none=True,
            openapi_extra={"requestBody": _task_body()},
        )
    return router


def make_fallback() -> APIRouter:
    """The last route of `/v1`: the error for an unknown task lists the valid ones."""
    router = APIRouter()

    @router.post("/v1/{task}", include_in_schema=False)
    async def unknown_task(task: str) -> None:
        get_task(task)

    return router


def _task_endpoint(name: str, backend: Backend, settings: ServeSettings) -> Any:
    async def endpoint(request: HttpRequest) -> Any:
        image, held_id, fields = await _read_task(request, settings)
        answers, extra = await answer(backend, settings, image, [(name, fields)], held_id=held_id)
        return {**answers[0].to_dict(), **extra}

    return endpoint


def takes(task: Task) -> tuple[str, ...]:
    """The image, where the task takes one, and the names of its fields."""
    return ("image",) * task.sees_image + fields_of(task)


def describe(task: Task) -> dict[str, Any]:
    """The entry of a task in `/v1/tasks`."""
    return {
        "name": task.name,
        "endpoint": f"/v1/{task.name}",
        "needs": task.needs,
        "sees_image": task.sees_image,
        "fields": list(fields_of(task)),
        "result": task.result,
        "routing_token": task.routing_token,
    }


def _json_body(model: type) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": json_schema_ref(model)}}}


def _task_body() -> dict[str, Any]:
    """JSON, or a form with the image as a file and the other fields as text."""
    body = _json_body(schemas.TaskRequest)
    text = {"type": "string"}
    names = [name for name in schemas.TaskFields.model_fields if name != "image"]
    form = {
        "type": "object",
        "required": ["image"],
        "properties": {"image": {"type": "string", "format": "binary"}, **dict.fromkeys(names, text)},
        "description": "the file itself; classes, keypoints and stop comma-separated (in double quotes where an item "
        "has a comma) or JSON, as classes by example are, repeated fields add up; region and history as JSON; an empty "
        "field is as if left out",
    }
    body["content"]["multipart/form-data"] = {"schema": form}
    return body
