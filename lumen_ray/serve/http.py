"""The error envelope, the body limit and the request id of all HTTP responses.

An error is always ``{"error": {"reason": "unknown_task", "message": "one sentence", "request_id": "..."}}``: `reason`
is for programs, `message` for people; beside them are the fields of OpenAI's errors (`type`, `param`, `code`).
Tracebacks go to the log, with the request id.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumen_ray.errors import UserError
from lumen_ray.serve.metrics import ERRORS, REFUSALS
from lumen_ray.serve.tracing import name_request
from lumen_ray.wire.errors import Unavailable, error_body, without_data

logger = logging.getLogger("ray.serve.lumen")  # a child of the logger that Serve writes to the replica's log file
_REQUEST_ID = re.compile(r"^[\w-]{8,64}$")


class Overloaded(Exception):
    """Too many requests are waiting; `retry_after_s` goes into the Retry-After header."""

    def __init__(self, message: str, retry_after_s: int = 1):
        super().__init__(message)
        self.retry_after_s = retry_after_s


def error_response(
    reason: str, message: str, request_id: str, headers: dict[str, str] | None = None, field: str | None = None
) -> JSONResponse:
    """The error envelope, with the status of `reason`. `field`: the one of the request that is wrong."""
    ERRORS.record(reason=reason)
    status, body = error_body(reason, message, request_id, field)
    return JSONResponse(body, status, headers)


def content_type(request: Request) -> str:
    """The content type in lower case, without parameters; JSON if the request has none."""
    return request.headers.get("content-type", "application/json").split(";")[0].strip().lower()


def request_id(request: Request) -> str:
    return request.scope.get("lumen_request_id", "-")


async def _user_error(request: Request, error: UserError) -> JSONResponse:
    field = None if error.field is None else without_data(error.field)
    return error_response(error.reason, without_data(str(error)), request_id(request), field=field)


async def _http_exception(request: Request, error: HTTPException) -> JSONResponse:
    path = without_data(request.url.path)
    if error.status_code == 404:
        return error_response("not_found", f"there is nothing at '{path}'; see /docs for the API", request_id(request))
    if error.status_code == 405:
        allowed = Headers(error.headers or {}).get("allow", "another method")
        message = f"'{path}' does not take {request.method}; use {allowed}"
        return error_response("method_not_allowed", message, request_id(request), dict(error.headers or {}))
    response = error_response("invalid_request", f"{error.detail}", request_id(request), dict(error.headers or {}))
    response.status_code = error.status_code
    return response


async def _overloaded(request: Request, error: Overloaded) -> JSONResponse:
    REFUSALS.record(by="model")
    return error_response("overloaded", str(error), request_id(request), {"Retry-After": str(error.retry_after_s)})


async def _unavailable(request: Request, error: Unavailable) -> JSONResponse:
    logger.warning("request %s: %s", request_id(request), error)
    return error_response("unavailable", str(error), request_id(request), {"Retry-After": "5"})


async def _timeout(request: Request, error: TimeoutError) -> JSONResponse:
    logger.warning("request %s timed out", request_id(request))
    return error_response("timeout", "the model did not answer in time; ask for less or try again", request_id(request))


_HANDLERS: dict[type[Exception], Any] = {  # Starlette's types want handlers of any exception
    UserError: _user_error,
    HTTPException: _http_exception,
    Overloaded: _overloaded,
    Unavailable: _unavailable,
    TimeoutError: _timeout,
}


def install_error_handlers(api: FastAPI) -> None:
    """Puts all errors of `api` into the envelope."""
    for error, handler in _HANDLERS.items():
        api.add_exception_handler(error, handler)


async def error_of(request: Request, error: Exception) -> dict[str, Any]:
    """The envelope of an error that arose after the status of the response was sent."""
    handler = next((handler for kind, handler in _HANDLERS.items() if isinstance(error, kind)), None)
    if handler is not None:
        return json.loads((await handler(request, error)).body)
    identity = request_id(request)
    logger.exception("request %s to %s failed", identity, request.url.path)
    ERRORS.record(reason="internal_error")
    return error_body("internal_error", failed_message(identity), identity)[1]


def failed_message(identity: str) -> str:
    return f"the server failed on this request; its log has the cause under {identity}"


def body_too_large(limit: int) -> UserError:
    return UserError(f"the request body is larger than {limit} bytes; send a smaller one", "body_too_large")


class Guard:
    """Middleware: numbers requests, stops oversized bodies as they arrive, and turns uncaught exceptions into
    a 500 without a traceback. Plain ASGI, because Starlette's handler for `Exception` re-raises."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, others: Mapping[str, int] = MappingProxyType({})):
        """`others`: paths whose bodies have another limit."""
        self.app = app
        self.max_body_bytes, self.others = max_body_bytes, others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = header(scope, b"x-request-id")  # set by Serve's proxy, which also adds it to the response
        identity = given if given and _REQUEST_ID.match(given) else uuid.uuid4().hex
        scope["lumen_request_id"] = identity
        name_request(identity)
        started = False

        async def numbered_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if given != identity:
                    message["headers"] = [*message.get("headers", []), (b"x-request-id", identity.encode())]
            await send(message)

        try:
            length, most = header(scope, b"content-length"), self.others.get(local_path(scope), self.max_body_bytes)
            if length and length.isdigit() and int(length) > most:
                raise body_too_large(most)
            await self.app(scope, self._counting(receive, most), numbered_send)
        except ClientDisconnect:  # before its body was here: nobody reads an answer
            return
        except UserError as error:
            if started:
                raise
            await error_response(error.reason, str(error), identity)(scope, receive, numbered_send)
        except Exception:
            logger.exception("request %s to %s failed", identity, scope.get("path"))
            if started:
                raise
            await error_response("internal_error", failed_message(identity), identity)(scope, receive, numbered_send)

    def _counting(self, receive: Receive, most: int) -> Receive:
        """A `receive` that raises once the body has more than `most` bytes, whatever its headers say."""
        size = 0

        async def counting_receive() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > most:
                raise body_too_large(most)
            return message

        return counting_receive


def header(scope: Scope, name: bytes) -> str | None:
    """A header of a request by its name in lower case; the first of several."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def without_range(scope: Scope) -> Scope:
    """A request for a whole file: Starlette's errors of its header Range are not in the envelope."""
    return {**scope, "headers": [(key, value) for key, value in scope["headers"] if key != b"range"]}


def local_path(scope: Scope) -> str:
    """The path of a request below the application's own prefix."""
    path, root = scope["path"], scope.get("root_path", "")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def json_schema_ref(model: Any) -> dict[str, str]:
    """The reference to a pydantic model's schema in `openapi.json`."""
    return {"$ref": f"#/components/schemas/{model.__name__}"}
