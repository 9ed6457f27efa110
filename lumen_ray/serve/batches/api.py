"""The routes of `/v1/files` and `/v1/batches`.

An ingress only writes down what is asked for; another replica answers the batches. Of a server with API keys, each key
sees its own files and batches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send

from lumen_ray.errors import UserError
from lumen_ray.serve import forms
from lumen_ray.serve.batches.batch_store import BatchStore
from lumen_ray.serve.batches.bodies import BatchBody, BatchQuery, FileForm, FileQuery, read_upload
from lumen_ray.serve.batches.file_store import FileStore
from lumen_ray.serve.batches.records import Batch, StoredFile, is_id
from lumen_ray.serve.http import content_type, json_schema_ref, without_range
from lumen_ray.wire import schemas


class _Content(FileResponse):
    """A whole file. Raises `UserError` if it is deleted before it is sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not await asyncio.to_thread(Path(self.path).is_file):
            raise UserError("the file was deleted; GET /v1/files lists those there are", "unknown_file")
        await super().__call__(without_range(scope), receive, send)


def make_files_router(files: FileStore, batches: BatchStore) -> APIRouter:
    router = APIRouter(prefix="/v1/files", tags=["batches"])

    @router.post("", summary="Upload a file of requests, in OpenAI's format", openapi_extra=_form_body())
    async def create(request: Request) -> dict[str, Any]:
        if (kind := content_type(request)) != "multipart/form-data":
            raise UserError(
                f"content type '{kind}' is not supported; send multipart/form-data with 'file' and 'purpose'",
                "unsupported_media_type",
            )
        async with request.form(max_files=1, max_fields=8) as form:  # a large file is on disk, not in memory
            upload, name, fields = read_upload(forms.given(form))

            def keep() -> StoredFile:
                files.check_room(upload.size or 0)
                return files.add(upload.file, _owner(request), name, fields.lifetime_s)

            return (await asyncio.to_thread(keep)).shown()

    @router.get("", summary="Your files")
    async def listed(request: Request) -> dict[str, Any]:
        query = schemas.parse(FileQuery, dict(request.query_params))
        found = await asyncio.to_thread(files.of, _owner(request))
        if query.order == "desc":
            found.reverse()
        if query.after is not None:
            ids = [file.id for file in found]
            if query.after not in ids:
                raise UserError(f"'after' names no file of yours: '{query.after}'", "unknown_file", "after")
            found = found[ids.index(query.after) + 1 :]
        found = [file for file in found if query.purpose in (None, file.purpose)]
        return _page([file.shown() for file in found[: query.limit]], len(found) > query.limit)

    @router.get("/{file_id}", summary="A file's name, size and purpose")
    async def one(request: Request, file_id: str) -> dict[str, Any]:
        return (await asyncio.to_thread(files.get, file_id, _owner(request))).shown()

    @router.get("/{file_id}/content", summary="A file itself", response_class=FileResponse)
    async def content(request: Request, file_id: str) -> FileResponse:
        file = await asyncio.to_thread(files.get, file_id, _owner(request))
        return _Content(
            files.content(file.id),
            headers={"Accept-Ranges": "none"},
            media_type="application/octet-stream",
            filename=file.filename,
        )

    @router.delete("/{file_id}", summary="Delete a file")
    async def delete(request: Request, file_id: str) -> dict[str, Any]:
        def remove() -> None:
            file = files.get(file_id, _owner(request))
            for batch in batches.unfinished():
                if batch.input_file_id == file.id:
                    raise UserError(
                        f"file '{file.id}' is read by batch '{batch.id}'; cancel it or wait until it is done",
                        "file_in_use",
                    )
            files.delete(file.id)

        await asyncio.to_thread(remove)
        return {"id": file_id, "object": "file", "deleted": True}

    return router


def make_batches_router(files: FileStore, batches: BatchStore, wake: Callable[[], None]) -> APIRouter:
    """`wake`: tells the replica that answers batches to look at them."""
    router = APIRouter(prefix="/v1/batches", tags=["batches"])
    body = {"required": True, "content": {"application/json": {"schema": json_schema_ref(BatchBody)}}}

    @router.post("", summary="Have a file of requests answered", openapi_extra={"requestBody": body})
    async def create(request: Request) -> dict[str, Any]:
        asked = schemas.parse(BatchBody, schemas.parse_json(await request.body()))
        asked.check_endpoint()
        fields = asked.model_dump(include={"input_file_id", "endpoint", "completion_window", "metadata"})
        fields["output_lifetime_s"] = asked.output_lifetime_s

        def add() -> dict[str, Any]:
            file = files.get(asked.input_file_id, _owner(request))
            if file.purpose != "batch":
                raise UserError(
                    f"file '{file.id}' is the output of a batch; upload one with purpose 'batch'", "wrong_purpose"
                )
            return batches.shown(batches.add(_owner(request), asked.window_s, **fields))

        created = await asyncio.to_thread(add)
        wake()
        return created

    @router.get("", summary="Your batches, newest first")
    async def listed(request: Request) -> dict[str, Any]:
        query = schemas.parse(BatchQuery, dict(request.query_params))
        if query.after is not None and not is_id(query.after, "batch_"):
            raise UserError(f"'after' names no batch: '{query.after}'", "unknown_batch", "after")

        def page() -> dict[str, Any]:
            found: list[Batch] = list(islice(batches.newest(_owner(request), query.after), query.limit + 1))
            return _page([batches.shown(batch) for batch in found[: query.limit]], len(found) > query.limit)

        return await asyncio.to_thread(page)

    @router.get("/{batch_id}", summary="How far a batch is")
    async def one(request: Request, batch_id: str) -> dict[str, Any]:
        return await asyncio.to_thread(lambda: batches.shown(batches.get(batch_id, _owner(request))))

    @router.post("/{batch_id}/cancel", summary="Cancel a batch; what is answered is kept")
    async def cancel(request: Request, batch_id: str) -> dict[str, Any]:
        def stop() -> dict[str, Any]:
            batch = batches.get(batch_id, _owner(request))
            batches.cancel(batch.id)
            return batches.shown(batch)

        cancelled = await asyncio.to_thread(stop)
        wake()
        return cancelled

    return router


def _owner(request: Request) -> str | None:
    """The name of the request's API key."""
    return request.scope.get("lumen_key")


def _page(data: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, **ends, "has_more": has_more}


def _form_body() -> dict[str, Any]:
    schema = FileForm.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    schema["properties"]["file"] = {"type": "string", "format": "binary", "description": "a request per line, as JSON"}
    schema["required"] = ["file", "purpose"]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
