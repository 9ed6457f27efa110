"""The FastAPI application: task routes, OpenAI's routes, health, documentation and the page. Independent of Ray."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from fastapi.routing import iter_route_contexts

from lumen_ray.serve import hf_api, kserve_api, openai_api, openai_images, roboflow_api, task_api
from lumen_ray.serve.access import Access
from lumen_ray.serve.admission import Admission, Gate
from lumen_ray.serve.asking import Backend
from lumen_ray.serve.auth import KeyCheck
from lumen_ray.serve.batches.absent import make_absent_router
from lumen_ray.serve.batches.bodies import FORM_BYTES, BatchBody
from lumen_ray.serve.envelopes import Envelopes
from lumen_ray.serve.headers import SecurityHeaders
from lumen_ray.serve.http import Guard, install_error_handlers
from lumen_ray.serve.measured import MeasuredBackend
from lumen_ray.serve.metrics import exposition
from lumen_ray.serve.pages import add_pages
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.serve.sleeping import HEADER, Woken
from lumen_ray.version import __version__
from lumen_ray.wire import schemas

_REQUESTS = (
    *(schemas.TaskRequest, schemas.InferRequest, *openai_api.BODIES, openai_images.ImageRequest, BatchBody),
    *(*hf_api.BODIES, *roboflow_api.BODIES, *kserve_api.BODIES),
)
#: headers of answers that pages of other origins may read
_EXPOSED = (
    "Retry-After",
    "X-Request-ID",
    HEADER,
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
)
_SUMMARY = "Answers, finds, segments, poses and counts what is in an image. One schema for all tasks."


def create_api(
    backend: Backend,
    settings: ServeSettings,
    gate: Gate | None = None,
    notes: Callable[[], dict[str, Any]] = dict,
    wake_batches: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The HTTP API over `backend`.

    `gate`: of the requests that come in, by default one of its own; `notes`: further fields of /readyz; `wake_batches`:
    tells whoever answers batches to look at them. FastAPI's documentation pages are replaced: they load scripts from a
    remote host.
    """
    codes = [400, 404, 410, 413, 415, 500, 503, 504, *([] if settings.auth is None else [401, 429])]
    errors: dict[int | str, dict[str, Any]] = {code: {"model": schemas.ErrorResponse} for code in sorted(codes)}
    backend = MeasuredBackend(backend)
    api = FastAPI(title="lumen_ray", version=__version__, summary=_SUMMARY, docs_url=None, redoc_url=None)
    install_error_handlers(api)
    api.include_router(task_api.make_router(backend, settings), responses=errors)
    api.include_router(openai_api.make_router(backend, settings), responses=errors)
    api.include_router(openai_images.make_router(backend, settings), responses=errors)
    api.include_router(hf_api.make_router(backend, settings))
    api.include_router(roboflow_api.make_router(backend, settings))
    gate = gate or Gate(settings)

    async def is_ready() -> bool:
        return all((await backend.ready()).values()) and not gate.is_closed

    api.include_router(kserve_api.make_router(backend, settings, is_ready))
    _add_batches(api, settings, wake_batches, errors)
    api.include_router(task_api.make_fallback())
    _add_health(api, backend, gate, notes)
    add_pages(api)
    _add_to_openapi(api, asks_for_key=settings.auth is not None)
    _add_middleware(api, settings, gate)
    return api


def _add_batches(
    api: FastAPI, settings: ServeSettings, wake: Callable[[], None], errors: dict[int | str, dict[str, Any]]
) -> None:
    if settings.batches is None:
        api.include_router(make_absent_router())
        return
    from lumen_ray.serve.batches.api import make_batches_router, make_files_router
    from lumen_ray.serve.batches.batch_store import BatchStore
    from lumen_ray.serve.batches.file_store import FileStore

    files, batches = FileStore(settings.batches), BatchStore(settings.batches)
    api.include_router(make_files_router(files, batches), responses=errors)
    api.include_router(make_batches_router(files, batches, wake), responses=errors)


def _add_middleware(api: FastAPI, settings: ServeSettings, gate: Gate) -> None:
    """Innermost first."""
    api.add_middleware(Woken)
    api.add_middleware(Admission, gate=gate)
    if settings.auth is not None:
        api.add_middleware(KeyCheck, settings=settings.auth)
    uploads = {} if settings.batches is None else {"/v1/files": settings.batches.max_file_bytes + FORM_BYTES}
    api.add_middleware(Guard, max_body_bytes=settings.limits.max_body_bytes, others=uploads)
    api.add_middleware(Envelopes)
    if settings.http.cors_origins:  # around the key check: a browser's preflight has no key, and reads errors too
        api.add_middleware(
            CORSMiddleware,
            allow_origins=settings.http.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-ID"],
            expose_headers=_EXPOSED,
        )
    api.add_middleware(SecurityHeaders)
    routes = [context.route for context in iter_route_contexts(api.routes)]
    api.add_middleware(Access, routes=routes, log=settings.http.access_log)


def _add_health(api: FastAPI, backend: Backend, gate: Gate, notes: Callable[[], dict[str, Any]]) -> None:
    @api.get("/healthz", tags=["about"], summary="200 while the HTTP server runs")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @api.get(
        "/readyz",
        tags=["about"],
        summary="200 when every deployment of the model takes requests, else 503",
    )
    async def readyz() -> JSONResponse:
        deployments = await backend.ready()
        ready = all(deployments.values()) and not gate.is_closed
        return JSONResponse({"ready": ready, "deployments": deployments, **notes()}, 200 if ready else 503)

    @api.get("/metrics", tags=["about"], summary="Counts and times of this ingress replica, for Prometheus")
    async def metrics() -> Response:
        text, media_type = exposition()
        return Response(text, media_type=media_type)


def _add_to_openapi(api: FastAPI, asks_for_key: bool) -> None:
    """Adds what FastAPI does not see: the schemas of bodies, which are parsed by hand (JSON or form, our error
    envelope), and the key, which middleware asks for."""

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            document = get_openapi(title=api.title, version=api.version, summary=api.summary, routes=api.routes)
            components = document.setdefault("components", {})
            if asks_for_key:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                document["security"] = [{"key": []}]
            known = components.setdefault("schemas", {})
            for model in _REQUESTS:
                schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
                known.update(schema.pop("$defs", {}))
                known[model.__name__] = schema
            api.openapi_schema = document
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend OpenAPI
