"""What every HTTP answer has in common: the error envelope, the body limit and the request id.

An error is always ``{"error": {"reason": "unknown_task", "message": "one sentence", "request_id": "..."}}``: `reason`
is for programs, `message` for people. Tracebacks go to the log, beside the request id.
"""

from __future__ import annotations

import logging
import re
import uuid
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumen_ray.errors import UserError

logger = logging.getLogger("ray.serve.lumen")  # below the logger that Serve writes to the replica's log file
_REQUEST_ID = re.compile(r"^[\w-]{8,64}$")

#: HTTP status of a reason; whatever else a user did wrong is a 400
STATUS = {
    "unknown_task": 404,
    "unknown_model": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "body_too_large": 413,
    "image_too_large": 413,
    "unsupported_media_type": 415,
    "internal_error": 500,
    "overloaded": 503,
    "unavailable": 503,
    "timeout": 504,
}


class Overloaded(Exception):
    """Too many requests wait already; `retry_after_s` goes into the Retry-After header."""

    def __init__(self, message: str, retry_after_s: int = 1):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(Exception):
    """A part of the model did not answer, retries included."""


def error_response(reason: str, message: str, request_id: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The error envelope with the status that belongs to `reason`."""
    content = {"error": {"reason": reason, "message": message, "request_id": request_id}}
    return JSONResponse(content, STATUS.get(reason, 400), headers)


def content_type(request: Request) -> str:
    """Without parameters, in lower case; JSON where the request names none."""
    return request.headers.get("content-type", "application/json").split(";")[0].strip().lower()


def request_id(request: Request) -> str:
    return request.scope.get("lumen_request_id", "-")


async def _user_error(request: Request, error: UserError) -> JSONResponse:
    return error_response(error.reason, str(error), request_id(request))


async def _http_exception(request: Request, error: HTTPException) -> JSONResponse:
    path = request.url.path
    if error.status_code == 404:
        return error_response("not_found", f"there is nothing at '{path}'; see /docs for the API", request_id(request))
    if error.status_code == 405:
        allowed = (error.headers or {}).get("allow", "another method")
        message = f"'{path}' does not take {request.method}; use {allowed}"
        return error_response("method_not_allowed", message, request_id(request), dict(error.headers or {}))
    response = error_response("invalid_request", f"{error.detail}", request_id(request), dict(error.headers or {}))
    response.status_code = error.status_code
    return response


async def _overloaded(request: Request, error: Overloaded) -> JSONResponse:
    return error_response("overloaded", str(error), request_id(request), {"Retry-After": str(error.retry_after_s)})


async def _unavailable(request: Request, error: Unavailable) -> JSONResponse:
    logger.warning("request %s: %s", request_id(request), error)
    return error_response("unavailable", str(error), request_id(request), {"Retry-After": "5"})


async def _timeout(request: Request, error: TimeoutError) -> JSONResponse:
    logger.warning("request %s timed out", request_id(request))
    return error_response("timeout", "the model did not answer in time; ask for less or try again", request_id(request))


def install_error_handlers(api: FastAPI) -> None:
    """All errors of `api` leave in the envelope."""
    api.add_exception_handler(UserError, _user_error)
    api.add_exception_handler(HTTPException, _http_exception)
    api.add_exception_handler(Overloaded, _overloaded)
    api.add_exception_handler(Unavailable, _unavailable)
    api.add_exception_handler(TimeoutError, _timeout)


def body_too_large(limit: int) -> UserError:
    return UserError(f"the request body is larger than {limit} bytes; send a smaller image", "body_too_large")


class Guard:
    """Outermost middleware: numbers the request, stops oversized bodies while they arrive, and turns what nobody caught
    into a 500 without a traceback. Plain ASGI, because Starlette's own handler for `Exception` re-raises."""

    def __init__(self, app: ASGIApp, max_body_bytes: int):
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = _header(scope, b"x-request-id")  # Serve's proxy numbers requests itself, and answers with its number
        identity = given if given and _REQUEST_ID.match(given) else uuid.uuid4().hex
        scope["lumen_request_id"] = identity
        started = False

        async def numbered_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if given != identity:
                    message["headers"] = [*message.get("headers", []), (b"x-request-id", identity.encode())]
            await send(message)

        try:
            length = _header(scope, b"content-length")
            if length and length.isdigit() and int(length) > self.max_body_bytes:
                raise body_too_large(self.max_body_bytes)
            await self.app(scope, self._counting(receive), numbered_send)
        except UserError as error:
            if started:
                raise
            await error_response(error.reason, str(error), identity)(scope, receive, numbered_send)
        except Exception:
            logger.exception("request %s to %s failed", identity, scope.get("path"))
            if started:
                raise
            message = f"the server failed on this request; its log has the cause under {identity}"
            await error_response("internal_error", message, identity)(scope, receive, numbered_send)

    def _counting(self, receive: Receive) -> Receive:
        """`receive` that stops a body which grows beyond the limit, whatever its headers said."""
        seen = 0

        async def counting_receive() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_body_bytes:
                raise body_too_large(self.max_body_bytes)
            return message

        return counting_receive


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def json_schema_ref(model: Any) -> dict[str, str]:
    """Where `openapi.json` keeps the schema of a pydantic model."""
    return {"$ref": f"#/components/schemas/{model.__name__}"}
