"""The page at `/`, the reference at `/docs`, and the files that they load: plain ES modules, without a build step."""

from __future__ import annotations

import asyncio
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from lumen_ray.serve.headers import PAGE_POLICY
from lumen_ray.serve.http import without_range
from lumen_ray.serve.samples import samples

_FOLDER = Path(__file__).parent / "page"
_HEADERS = {"Content-Security-Policy": PAGE_POLICY}
#: of samples, which change with the version of the package at most
_CACHED = {"Cache-Control": "max-age=3600"}


class _Files(StaticFiles):
    """Scripts and styles that browsers ask for again each time, by their ETag: those of one version go together. Pages
    have routes of their own, with their headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        if path.endswith(".html"):
            raise HTTPException(404)
        return await super().get_response(path, scope)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(without_range(scope), receive, send)

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Accept-Ranges"] = "none"
        response.headers["Cache-Control"] = "no-cache"
        return response


@cache
def _html(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def add_pages(api: FastAPI) -> None:
    """Adds the pages, the files below `/page/` and the sample images."""

    @api.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(_html("index.html"), headers=_HEADERS)

    @api.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(_html("docs.html"), headers=_HEADERS)

    @api.get("/page/samples", include_in_schema=False)
    async def list_samples() -> dict[str, Any]:
        found = await asyncio.to_thread(samples)
        return {"samples": [{"number": n + 1, "description": s.description} for n, s in enumerate(found)]}

    @api.get("/page/samples/{number}.jpg", include_in_schema=False)
    async def sample(number: str) -> Response:
        found = {f"{n + 1}": sample for n, sample in enumerate(await asyncio.to_thread(samples))}
        if number not in found:
            raise HTTPException(404)
        return Response(found[number].jpeg, media_type="image/jpeg", headers=_CACHED)

    api.mount("/page", _Files(directory=_FOLDER))  # behind the routes above, which are below it
