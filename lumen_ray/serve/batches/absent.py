"""The routes of files and batches on a server that keeps none."""

from __future__ import annotations

from fastapi import APIRouter

from lumen_ray.errors import UserError


def make_absent_router() -> APIRouter:
    """Says how they are turned on."""
    router = APIRouter(prefix="/v1", include_in_schema=False)

    async def absent() -> None:
        raise UserError(
            "this server keeps no files and batches; its operator can turn them on with the setting 'batches'",
            "not_found",
        )

    for path in ("/files", "/files/{rest:path}", "/batches", "/batches/{rest:path}"):
        router.add_api_route(path, absent, methods=["GET", "POST", "DELETE"])
    return router
