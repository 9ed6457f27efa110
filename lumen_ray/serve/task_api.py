"""`/v1/<task>` for every task of the registry, `/v1/infer` for several tasks about one image, and their listings."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.datastructures import FormData, UploadFile

from lumen_ray.answer import Answer
from lumen_ray.errors import UserError
from lumen_ray.exemplars import ClassByExample, Example
from lumen_ray.inference.request import Request, Shown, check_image, check_requests, make_request
from lumen_ray.inference.sampling import GREEDY, Sampling
from lumen_ray.serve import forms, schemas
from lumen_ray.serve.http import content_type, json_schema_ref
from lumen_ray.serve.images import check_sizes, checked_rle, decode_images, image_bytes
from lumen_ray.serve.limits import check_amount, check_lengths
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.structures import Region, SampleSettings, Size
from lumen_ray.tasks import TASKS, Task, get_task


class Backend(Protocol):
    """The model behind the API. `ingress.ServeBackend` implements it over Serve; tests use a fake."""

    async def infer(self, image: Shown, requests: Sequence[Request], max_new_tokens: int) -> list[Answer]:
        """Answers about an image, those of a conversation, or text alone, one per request, in order."""

    async def info(self) -> dict[str, Any]:
        """preset, version, image_size, classes, skeletons of the loaded model."""

    async def ready(self) -> dict[str, bool]:
        """Deployment name -> whether it answers now."""


#: `Task.needs` -> the request fields that the task reads; any other field is refused
_FIELDS = {
    "classes": ("classes",),
    "question": ("text",),
    "sentence": ("text",),
    "expression": ("text",),
    "description": ("text",),
    "instruction": ("text",),
    "region": ("region",),
    "nothing": (),
}


#: settings of the pictures
_SAMPLE_FIELDS = ("seed", "steps", "guidance", "image_guidance", "height", "width", "num_images")
#: how the tokens of a text are chosen
_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "repetition_penalty", "stop", "seed")
_CHAT_FIELDS = ("history", "system")
_OPTIONAL = ("classes", "text", "region", "keypoints", *_CHAT_FIELDS, *_SAMPLING_FIELDS, *_SAMPLE_FIELDS)
_FORM_LISTS, _FORM_OBJECTS = ("classes", "keypoints", "stop"), ("region", "history")


def fields_of(task: Task) -> tuple[str, ...]:
    """Names of the request fields that `task` takes, without the limits of the answer."""
    fields = _FIELDS[task.needs] + (("keypoints",) if task.keypoint_template else ())
    if task.is_conversation:
        fields += _CHAT_FIELDS
    if task.is_text:
        fields += _SAMPLING_FIELDS
    if task.result == "image":
        fields += tuple(name for name in _SAMPLE_FIELDS if name != "image_guidance" or task.sees_image)
    return fields


def parse_request(
    task: str,
    fields: schemas.TaskFields,
    size: Size,
    settings: ServeSettings,
    example_images: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> Request:
    """The validated request about an image of `size` (height, width), with its limits. Raises `UserError`.

    `example_images`: those of `decode_all`.
    """
    taken = fields_of(get_task(task))
    for name in _OPTIONAL:
        if getattr(fields, name) is not None and name not in taken:
            raise UserError(
                f"task '{task}' does not take '{name}'; it takes {_in_words(taken)}", "unexpected_field", name
            )
    check_lengths(fields, settings.limits)
    region = None if fields.region is None else _region(fields.region, size)
    request = make_request(
        task,
        classes=None if fields.classes is None else [_class(given, example_images) for given in fields.classes],
        text=fields.text,
        region=region,
        keypoints=fields.keypoints,
        sample=_sample(fields) if get_task(task).result == "image" else None,
        history=fields.history or (),
        system=fields.system,
        sampling=_sampling(fields) if get_task(task).is_text else GREEDY,
    )
    if request.examples:
        check_requests(size, [request])  # here, where it costs the model nothing
    defaults = settings.defaults
    return replace(
        request,
        score_threshold=defaults.score_threshold if fields.score_threshold is None else fields.score_threshold,
        max_per_phrase=fields.max_per_phrase or defaults.max_per_phrase,
    )


def _class(given: str | schemas.ClassExamples, images: Mapping[str, np.ndarray]) -> str | ClassByExample:
    """A class as of `make_request`. Raises `UserError`, which names it, for examples that do not fit."""
    if isinstance(given, str):
        return given
    try:
        examples = [
            Example(item.box, None if item.image is None else images[item.image], item.positive)
            for item in given.examples
        ]
    except UserError as error:
        raise UserError(f"class '{given.name}': {error}", error.reason) from None
    return ClassByExample(given.name, examples, given.named)


def example_texts(tasks: Sequence[tuple[str, schemas.TaskFields]]) -> dict[str, str]:
    """The images of examples as they are in the request, each once, and where it is there first."""
    found: dict[str, str] = {}
    for number, (_, fields) in enumerate(tasks):
        where = f"requests.{number}." if len(tasks) > 1 else ""
        for n, given in enumerate(fields.classes or ()):
            for m, item in enumerate(() if isinstance(given, str) else given.examples):
                if item.image is not None:
                    found.setdefault(item.image, f"{where}classes.{n}.examples.{m}.image")
    return found


def decode_all(
    encoded: Sequence[bytes], places: Sequence[str], examples: Mapping[str, str], max_pixels: int
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """The images of a request and, by their texts, those of its examples (as of `example_texts`): `max_pixels` bounds
    them together. `places`: as of `decode_images`."""
    if not examples:
        return decode_images(encoded, max_pixels, places), {}
    encoded = [*encoded, *(image_bytes(text, place) for text, place in examples.items())]
    places = [*(places or ["image"] * (len(encoded) - len(examples))), *examples.values()]
    images = decode_images(encoded, max_pixels, places)
    number = len(images) - len(examples)
    return images[:number], dict(zip(examples, images[number:], strict=True))


def _in_words(taken: Sequence[str]) -> str:
    """The fields of a task for an error; those of sampling, which every text has, under one name."""
    if not set(_SAMPLING_FIELDS) <= set(taken):
        return " and ".join(taken)
    others = [name for name in taken if name not in _SAMPLING_FIELDS]
    return f"{' and '.join(others) or 'the image alone'}, and settings of sampling"


def _sampling(fields: schemas.TaskFields) -> Sampling:
    """How the tokens of a text are chosen. Drawn without a seed, every answer is another one."""
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    given = {name: value for name in names if (value := getattr(fields, name)) is not None}
    seed = secrets.randbits(63) if fields.seed is None else fields.seed
    return Sampling(**given, seed=seed if fields.temperature else 0, stop=tuple(fields.stop or ()))


def _sample(fields: schemas.TaskFields) -> SampleSettings:
    """The settings of a picture; those left out are the decoder's defaults."""
    height, width = fields.height, fields.width
    if (height is None) != (width is None):
        raise UserError("give 'height' and 'width' together, or neither", "invalid_size")
    names = ("seed", "steps", "guidance", "image_guidance", "num_images")
    given = {name: value for name in names if (value := getattr(fields, name)) is not None}
    return SampleSettings(**given, size=None if height is None or width is None else (height, width))


def _region(prompt: schemas.RegionPrompt, size: Size) -> Region:
    if prompt.kind == "mask":
        if prompt.points is not None:
            raise UserError("a mask region takes 'mask', not 'points'", "invalid_region")
        return Region("mask", size, rle=checked_rle(prompt.mask, size))
    if prompt.mask is not None:
        raise UserError(f"a {prompt.kind} region takes 'points', not 'mask'", "invalid_region")
    return Region(prompt.kind, size, points=np.asarray(prompt.points or [], np.float32))


async def answer(
    backend: Backend,
    settings: ServeSettings,
    encoded: Sequence[bytes],
    tasks: Sequence[tuple[str, schemas.TaskFields]],
    image_turns: Sequence[int] = (),
    places: Sequence[str] = (),
    copies: int = 1,
) -> tuple[list[Answer], dict[str, Any]]:
    """Answers to `tasks` about an encoded image, a conversation about several, or text alone, and the response's fields
    `model` and `timing_ms`. `image_turns`: as of `Request`; `places`: as of `decode_images`; `copies`: how often the
    request body has all this answered, for its limits."""
    start = time.perf_counter()
    for task, _ in tasks:
        check_image(task, bool(encoded))  # refused before the image is decoded
    examples = example_texts(tasks)
    if len(examples) > settings.limits.max_images:
        raise UserError(
            f"{len(examples)} images of examples in one request; give at most {settings.limits.max_images}",
            "too_many_images",
        )
    limit = settings.limits.max_pixels
    images, example_images = await asyncio.to_thread(decode_all, encoded, places, examples, limit)
    decoded = time.perf_counter()
    size = (images[0].shape[0], images[0].shape[1]) if images else (1, 1)
    requests = [
        replace(parse_request(task, fields, size, settings, example_images), image_turns=tuple(image_turns))
        for task, fields in tasks
    ]
    tokens = [fields.max_new_tokens for _, fields in tasks if fields.max_new_tokens is not None]
    max_new_tokens = max(tokens, default=settings.defaults.max_new_tokens)
    check_amount(requests * copies, max_new_tokens, settings.limits)
    shown: Shown = images if len(images) > 1 else images[0] if images else None
    answers = await backend.infer(shown, requests, max_new_tokens)
    info = await backend.info()
    end = time.perf_counter()
    timing = {"decode": decoded - start, "model": end - decoded, "total": end - start}
    timing_ms = {name: round(1000 * seconds, 1) for name, seconds in timing.items()}
    return answers, {"model": f"{info['preset']}@{info['version']}", "timing_ms": timing_ms}


async def answer_each(
    backend: Backend,
    settings: ServeSettings,
    encoded: Sequence[bytes],
    tasks: Sequence[tuple[str, schemas.TaskFields]],
    places: Sequence[str] = (),
) -> tuple[list[list[Answer]], dict[str, Any]]:
    """`answer` about each of several images: a list for each, and the response's fields; the times are the longest."""
    if len(encoded) > settings.limits.max_images:
        raise UserError(
            f"{len(encoded)} images in one request; give at most {settings.limits.max_images}", "too_many_images"
        )
    await asyncio.to_thread(check_sizes, encoded, settings.limits.max_pixels, places)
    try:
        async with asyncio.TaskGroup() as group:
            running = [
                group.create_task(answer(backend, settings, [image], tasks, (), places[n : n + 1], len(encoded)))
                for n, image in enumerate(encoded)
            ]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    answers, extras = zip(*(task.result() for task in running), strict=True)
    timing = {name: max(extra["timing_ms"][name] for extra in extras) for name in extras[0]["timing_ms"]}
    return list(answers), {**extras[0], "timing_ms": timing}


def as_response(answer: Answer) -> dict[str, Any]:
    """The fields of `schemas.TaskAnswer`."""
    return {**answer.to_dict(), "size": answer.size, "frame": "exif_rotated"}


async def _read_task(request: HttpRequest, settings: ServeSettings) -> tuple[bytes | None, schemas.TaskFields]:
    """Image bytes (None without an image) and fields of a JSON body or of a multipart form."""
    kind = content_type(request)
    if kind == "application/json":
        body = schemas.parse(schemas.TaskRequest, schemas.parse_json(await request.body()))
        return None if body.image is None else image_bytes(body.image), body
    if kind == "multipart/form-data":
        # the body is bounded; a field may hold images of examples
        most = settings.limits.max_body_bytes
        async with request.form(max_files=1, max_fields=32, max_part_size=most) as form:
            return await _read_form(form)
    raise UserError(
        f"content type '{kind}' is not supported; send application/json or multipart/form-data",
        "unsupported_media_type",
    )


async def _read_form(form: FormData) -> tuple[bytes, schemas.TaskFields]:
    fields = forms.read_fields(forms.given(form), _FORM_LISTS, _FORM_OBJECTS)
    upload = fields.pop("image", None)
    if not isinstance(upload, UploadFile):
        raise UserError("the form has no file 'image'; attach one", "missing_image")
    return await upload.read(), schemas.parse(schemas.TaskFields, fields)


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
        if body.images is None and body.image is not None:
            answers, extra = await answer(backend, settings, [image_bytes(body.image)], tasks)
            return {"answers": [as_response(a) for a in answers], **extra}
        if body.images is None or body.image is not None:
            raise UserError("give either 'image' or 'images'", "missing_image" if body.image is None else "two_images")
        places = [f"images.{n}" for n in range(len(body.images))]
        encoded = [image_bytes(text, place) for text, place in zip(body.images, places, strict=True)]
        each, extra = await answer_each(backend, settings, encoded, tasks, places)
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
        image, fields = await _read_task(request, settings)
        answers, extra = await answer(backend, settings, [] if image is None else [image], [(name, fields)])
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
