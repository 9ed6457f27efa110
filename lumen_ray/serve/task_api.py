"""`/v1/<task>` for every task of the registry, `/v1/infer` for several tasks about one image, and their listings."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.datastructures import FormData, UploadFile

from lumen_ray.answer import Answer
from lumen_ray.errors import UserError
from lumen_ray.serve import forms
from lumen_ray.serve.asking import Backend, answer, answer_each
from lumen_ray.serve.http import content_type, json_schema_ref
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.tasks import TASKS, Task, get_task
from lumen_ray.wire import schemas
from lumen_ray.wire.images import GivenImage, given_image
from lumen_ray.wire.requests import fields_of

_FORM_LISTS, _FORM_OBJECTS = ("classes", "keypoints", "stop"), ("region", "history")


def _image_of(image: str | None, held_id: str | None) -> tuple[list[GivenImage], str | None]:
    """The image in a body, if any, or the id of one that is held."""
    if image is not None and held_id is not None:
        raise UserError("give 'image' or 'image_id', not both", "unexpected_field", "image_id")
    return [] if image is None else [given_image(image)], held_id


def as_response(answer: Answer) -> dict[str, Any]:
    """The fields of `schemas.TaskAnswer`."""
    return {**answer.to_dict(), "size": answer.size, "frame": "exif_rotated"}


async def _read_task(
    request: HttpRequest, settings: ServeSettings
) -> tuple[list[GivenImage], str | None, schemas.TaskFields]:
    """The image (none without one) or the id of a held one, and fields of a JSON body or of a multipart form."""
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


async def _read_form(form: FormData) -> tuple[list[GivenImage], str | None, schemas.TaskFields]:
    fields = forms.read_fields(forms.given(form), _FORM_LISTS, _FORM_OBJECTS)
    upload = fields.pop("image", None)
    body = schemas.parse(schemas.TaskRequest, fields)
    if upload is None:
        return [], body.image_id, body
    if not isinstance(upload, UploadFile):
        raise UserError("'image' is no file; attach one, or give 'image_id'", "missing_image", "image")
    if body.image_id is not None:
        raise UserError("give 'image' or 'image_id', not both", "unexpected_field", "image_id")
    return [await upload.read()], None, body


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
        limits = settings.limits.model_dump()
        return {"object": "list", "data": [{**card, "lumen": {**info, "limits": limits}}]}

    @router.post(
        "/infer",
        tags=["tasks"],
        summary="Several tasks about one image, or about each of several",
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
        if body.images is None:
            image, held_id = _image_of(body.image, body.image_id)
            if not image and held_id is None:
                raise UserError("give 'image', 'images' or 'image_id'", "missing_image")
            answers, extra = await answer(backend, settings, image, tasks, held_id)
            return {"answers": [as_response(a) for a in answers], **extra}
        if body.image is not None or body.image_id is not None:
            raise UserError("give one of 'image', 'images' and 'image_id'", "two_images")
        places = [f"images.{n}" for n in range(len(body.images))]
        images = [given_image(text, place) for text, place in zip(body.images, places, strict=True)]
        each, extra = await answer_each(backend, settings, images, tasks, places)
        return {"answers": [{**as_response(a), "image": n} for n, found in enumerate(each) for a in found], **extra}

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
        answers, extra = await answer(backend, settings, image, [(name, fields)], held_id)
        return {**as_response(answers[0]), **extra}

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
    names = [name for name in schemas.TaskRequest.model_fields if name != "image"]
    form = {
        "type": "object",
        "properties": {"image": {"type": "string", "format": "binary"}, **dict.fromkeys(names, text)},
        "description": "the file itself, or image_id; classes, keypoints and stop comma-separated (in double quotes "
        "where an item has a comma) or JSON, as classes by example are, repeated fields add up; region and history as "
        "JSON; an empty field is as if left out",
    }
    body["content"]["multipart/form-data"] = {"schema": form}
    return body
