"""The error envelope: ``{"error": {"reason": "unknown_task", "message": "one sentence", "request_id": "..."}}``, with
the fields of OpenAI's errors (`type`, `param`, `code`) beside them."""

from __future__ import annotations

import re
from typing import Any

#: a run of base64 characters longer than any word of an error, with the lines that base64 may be wrapped into
_BASE64 = re.compile(r"[\w+/=-]{40,}(?:(?:\s|\\[rn])+[\w+/=-]{20,})*", re.ASCII)
_LONGEST_MESSAGE = 1000

#: reason -> HTTP status; 400 for all other reasons
STATUS = {
    "missing_api_key": 401,
    "invalid_api_key": 401,
    "unknown_task": 404,
    "unknown_model": 404,
    "unknown_file": 404,
    "unknown_batch": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "image_gone": 410,
    "body_too_large": 413,
    "image_too_large": 413,
    "file_too_large": 413,
    "unsupported_media_type": 415,
    "rate_limit_exceeded": 429,
    "too_many_concurrent_requests": 429,
    "too_many_batches": 429,
    "internal_error": 500,
    "overloaded": 503,
    "shutting_down": 503,
    "unavailable": 503,
    "timeout": 504,
    "storage_full": 507,
}


class Unavailable(Exception):
    """A deployment of the model did not answer, retries included."""


def error_body(reason: str, message: str, request_id: str, field: str | None = None) -> tuple[int, dict[str, Any]]:
    """The HTTP status of `reason` and the envelope. `field`: the one of the request that is wrong."""
    status = STATUS.get(reason, 400)
    error = {
        "message": _printable(message),
        "type": "invalid_request_error" if status < 500 else "server_error",
        "param": None if field is None else _printable(field),
        "code": reason,
        "reason": reason,
        "request_id": request_id,
    }
    return status, {"error": error}


def _printable(text: str) -> str:
    """A text that may quote half a surrogate pair of the request, as UTF-8 can hold it."""
    return text.encode("utf-8", "backslashreplace").decode()


def without_data(message: str) -> str:
    """A message without the images and other long values that a caller sent in place of a name, wherever it arose."""
    message = _BASE64.sub(lambda found: f"({len(found[0])} characters)", message)
    return message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + "..."
