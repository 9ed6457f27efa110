"""Headers that keep browsers from doing with an answer what it is not for."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # of answers that are no page: nothing in them is run or loaded, and no page shows them in a frame
    "content-security-policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
#: the Content-Security-Policy of pages: they load and call this server alone, and have no scripts or styles in them
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class SecurityHeaders:
    """Middleware that adds `X-Content-Type-Options`, `Referrer-Policy` and `Content-Security-Policy` to answers that do
    not have their own."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def safe_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                has = {key.lower() for key, _ in message.get("headers", [])}
                added = [(k.encode(), v.encode()) for k, v in _HEADERS.items() if k.encode() not in has]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        await self.app(scope, receive, safe_send)
