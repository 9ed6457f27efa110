#!/usr/bin/env bash
# fastapi 0.165.0 with starlette 1.10.0
#
# Guess:  a route has the same path for a middleware whether it is declared on the app
#         or in a router: request.scope["route"].path is the path with the prefix of
#         include_router(), and app.routes lists it.
# Seen:   include_router() keeps the router as one object in app.routes, which has no
#         path (since 0.137, as its release notes say). And scope["route"] is the route
#         as declared in that router, so its path lacks the prefix that was given to
#         include_router(); one given to APIRouter() is kept. app.openapi() and
#         iter_route_contexts(app.routes) have the full paths.
#         (Reported: fastapi/fastapi#16176.)
# Output: /v1/items/7 and /v2/items/7 called once each. Declared on the app or with
#         APIRouter(prefix=): two paths. With include_router(prefix=): "/items/{id}"
#         twice.
# Why it matters: metrics and access logs take scope["route"].path as their label, as
#         it has few values. Requests to two versions of an interface are then counted
#         as one, and alerts on "/v1/..." never fire. Give the prefix to APIRouter(),
#         and list paths with fastapi.routing.iter_route_contexts.
source "$(dirname "$0")/lib.sh"

install "fastapi==0.165.0" "starlette==1.10.0"

probe <<'PY'
import asyncio
from fastapi import APIRouter, FastAPI
from fastapi.routing import iter_route_contexts

VERSIONS = ("/v1", "/v2")


def item(id: int):
    return id


def on_app(app):
    for version in VERSIONS:
        app.get(f"{version}/items/{{id}}")(item)


def router_prefix(app):
    for version in VERSIONS:
        router = APIRouter(prefix=version)
        router.get("/items/{id}")(item)
        app.include_router(router)


def include_prefix(app):
    for version in VERSIONS:
        router = APIRouter()
        router.get("/items/{id}")(item)
        app.include_router(router, prefix=version)


async def get(app, path):
    """The status, and the path of the route that a middleware finds in the scope afterwards."""
    statuses = []
    scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b""}

    async def receive():
        return {"type": "http.request"}

    async def send(message):
        statuses.append(message.get("status"))

    await app(scope, receive, send)
    return statuses[0], scope["route"].path


for declare in (on_app, router_prefix, include_prefix):
    app = FastAPI(openapi_url=None)
    declare(app)
    answers = [asyncio.run(get(app, f"{version}/items/7")) for version in VERSIONS]
    print(f"{declare.__name__}:")
    print("  status and scope['route'].path:", answers)
    print("  app.routes:", [getattr(route, "path", None) for route in app.routes])
    print("  iter_route_contexts:", [context.path for context in iter_route_contexts(app.routes)])
    print("  app.openapi():", list(app.openapi()["paths"]))
PY

expect <<'TXT'
on_app:
  status and scope['route'].path: [(200, '/v1/items/{id}'), (200, '/v2/items/{id}')]
  app.routes: ['/v1/items/{id}', '/v2/items/{id}']
  iter_route_contexts: ['/v1/items/{id}', '/v2/items/{id}']
  app.openapi(): ['/v1/items/{id}', '/v2/items/{id}']
router_prefix:
  status and scope['route'].path: [(200, '/v1/items/{id}'), (200, '/v2/items/{id}')]
  app.routes: [None, None]
  iter_route_contexts: ['/v1/items/{id}', '/v2/items/{id}']
  app.openapi(): ['/v1/items/{id}', '/v2/items/{id}']
include_prefix:
  status and scope['route'].path: [(200, '/items/{id}'), (200, '/items/{id}')]
  app.routes: [None, None]
  iter_route_contexts: ['/v1/items/{id}', '/v2/items/{id}']
  app.openapi(): ['/v1/items/{id}', '/v2/items/{id}']
TXT
