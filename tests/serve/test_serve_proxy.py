"""What Serve's proxy answers by itself is in the envelope of all errors; what applications answer is left."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from fastapi.testclient import TestClient

from lumen_ray.serve.proxy import Envelope, middlewares


async def lost(scope, receive, send):
    """As the proxy's application, when an ingress replica dies."""


def plain(status, text, headers=None):
    return PlainTextResponse(text, status, headers)


@pytest.mark.parametrize(
    ("inner", "status", "reason", "retry"),
    [
        (lost, 503, "unavailable", "1"),
        (plain(503, "Deployment 'Ingress' is unavailable", {"retry-after": "7"}), 503, "unavailable", "7"),
        (plain(408, "Request 1 timed out after 70s."), 504, "timeout", None),
        (plain(404, "Path '/x' not found. Ping http://.../-/routes"), 404, "not_found", None),
    ],
)
def test_the_proxys_own_errors_get_the_envelope(inner, status, reason, retry):
    response = TestClient(Envelope(inner)).post("/v1/detect", headers={"X-Request-ID": "0123456789"})
    error = response.json()["error"]
    assert (response.status_code, error["code"], response.headers.get("retry-after")) == (status, reason, retry)
    assert error["request_id"] == response.headers["x-request-id"] == "0123456789"
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("/hf/image-to-text", {"error", "error_type"}),
        ("/infer/lmm", {"message", "reason", "request_id"}),
        ("/v2/models/nano/infer", {"error"}),
    ],
)
def test_other_apis_get_theirs(path, keys):
    app = lost
    for one in middlewares():  # as Serve puts them around its proxy
        app = one.cls(app, *one.args, **one.kwargs)
    response = TestClient(app).post(path)
    assert response.status_code == 503 and set(response.json()) == keys
    assert response.headers["retry-after"] == "1" and response.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/-/healthz", "/text", "/json"])
def test_other_answers_are_left(path):
    api = FastAPI()
    api.add_api_route("/-/healthz", lambda: plain(503, "draining"))
    api.add_api_route("/text", lambda: plain(200, "text"))
    api.add_api_route("/json", lambda: {"a": 1})
    assert TestClient(Envelope(api)).get(path).text in ("draining", "text", '{"a":1}')


def test_serve_takes_the_path_of_the_module():
    from ray.serve._private.http_util import validate_http_proxy_callback_return
    from ray.serve._private.utils import call_function_from_import_path

    from lumen_ray.serve.environment import _DEFAULTS

    given = call_function_from_import_path(_DEFAULTS["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"])
    assert [m.cls for m in validate_http_proxy_callback_return(given)] == [m.cls for m in middlewares()]
