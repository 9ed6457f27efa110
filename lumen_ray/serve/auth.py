"""Middleware that asks for an API key and holds each key to its limits."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumen_ray.serve.http import error_response, header, local_path
from lumen_ray.serve.keys import Key, Keyring
from lumen_ray.serve.metrics import REFUSALS
from lumen_ray.serve.quota import Quota
from lumen_ray.serve.settings import Auth

#: answered without a key: health, and the pages with their description of the API, which hold nothing of anyone
OPEN = frozenset({"/healthz", "/readyz", "/", "/docs", "/openapi.json", "/v2/health/live", "/v2/health/ready"})
#: so are the files of the pages
_OPEN_FOLDER = "/page/"

_CHALLENGE = 'Bearer realm="lumen_ray"'


class KeyCheck:
    """Answers 401 without a valid key, and 429 above the limits of a key; POST requests count, as they do for
    `admission.Admission`. The name of the key goes into the scope as `lumen_key`.

    It stands before the admission of requests, so that those it refuses take no place in the queue.
    """

    def __init__(self, app: ASGIApp, settings: Auth):
        self.app = app
        self.settings = settings
        self.keyring = Keyring(settings.keys_file)
        self.quotas: dict[str, Quota] = {}
        self.open = OPEN | ({"/metrics"} if settings.open_metrics else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and self._is_open(local_path(scope))):
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket; no route takes one
            await send({"type": "websocket.close", "code": 1008})
            return
        given = _given(scope)
        found = None if given is None else self.keyring.find(given)
        if found is None:
            await _unauthorized(given, scope, receive, send)
            return
        name, key = found
        scope["lumen_key"] = name
        if scope["method"] == "POST":
            await self._limited(self._quota(name, key), scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in self.open or path.startswith(_OPEN_FOLDER)

    async def _limited(self, quota: Quota, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                told = [(key.encode(), value.encode()) for key, value in quota.headers().items()]
                message["headers"] = [*message.get("headers", []), *told]
            await send(message)

        if quota.is_full:
            reason = "too_many_concurrent_requests"
            message = f"this key may have {quota.at_a_time} requests at a time; wait for an answer before the next one"
            retry_after_s = 1
        elif not quota.take():
            reason = "rate_limit_exceeded"
            message = f"this key may send {quota.per_minute} requests a minute; send them more slowly"
            retry_after_s = quota.retry_after_s
        else:
            quota.ongoing += 1
            try:
                await self.app(scope, receive, counted_send)
            finally:
                quota.ongoing -= 1
            return
        REFUSALS.record(by="key")
        response = error_response(reason, message, scope["lumen_request_id"], {"Retry-After": str(retry_after_s)})
        await response(scope, receive, counted_send)

    def _quota(self, name: str, key: Key) -> Quota:
        per_minute = key.requests_per_minute or self.settings.requests_per_minute
        at_a_time = key.max_concurrent_requests or self.settings.max_concurrent_requests
        if name not in self.quotas:
            self.quotas[name] = Quota(per_minute, at_a_time)
        self.quotas[name].configure(per_minute, at_a_time)
        return self.quotas[name]


async def _unauthorized(given: str | None, scope: Scope, receive: Receive, send: Send) -> None:
    if given is None:
        reason, challenge = "missing_api_key", _CHALLENGE
        message = "this server needs an API key; send it in the header 'Authorization: Bearer KEY'"
    else:
        reason, challenge = "invalid_api_key", f'{_CHALLENGE}, error="invalid_token"'
        message = "the API key is not valid; check it, or ask the server's operator for another"
    response = error_response(reason, message, scope["lumen_request_id"], {"WWW-Authenticate": challenge})
    await response(scope, receive, send)


def _given(scope: Scope) -> str | None:
    """The key of a request; None without one. Clients of some other APIs send it as `X-API-Key`."""
    scheme, _, key = (header(scope, b"authorization") or "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return header(scope, b"x-api-key")
