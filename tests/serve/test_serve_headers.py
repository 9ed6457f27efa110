"""Headers for browsers: other origins are shut out unless named, and pages load nothing but themselves."""

from __future__ import annotations

import re

import pytest
from fastapi.testclient import TestClient
from support.serve_fakes import FakeBackend, base64_png

from lumen_ray import config
from lumen_ray.errors import UserError
from lumen_ray.serve.api import create_api
from lumen_ray.serve.keys import new_key
from lumen_ray.serve.settings import Auth, Http, ServeSettings

ORIGIN = "https://app.example.com"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def served(**fields):
    return TestClient(create_api(FakeBackend(), ServeSettings(model="m", **fields)))


@pytest.mark.parametrize("path", ["/", "/docs", "/v1/tasks", "/nothing", "/metrics"])
def test_every_answer_has_them(path):
    response = served().get(path)
    policy = response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert policy.startswith("default-src 'none'") and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert ("script-src" in policy) == (path in ("/", "/docs"))


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_runs_and_loads_files_of_this_server_alone(path):
    response = served().get(path)
    policy = response.headers["content-security-policy"]
    assert "script-src 'self';" in policy and "style-src 'self';" in policy and "connect-src 'self';" in policy
    # its policy would not let these run
    assert not re.search(r"<style|<script(?![^>]*\ssrc=)|\son\w+=|\sstyle=", response.text)


def test_other_origins_are_shut_out_unless_named(tmp_path):
    assert not [h for h in served().get("/v1/tasks", headers={"Origin": ORIGIN}).headers if "access-control" in h]
    key, line = new_key("alice")
    (tmp_path / "keys.yaml").write_text(line)
    client = served(http=Http(cors_origins=[ORIGIN]), auth=Auth(keys_file=str(tmp_path / "keys.yaml")))
    asked = client.options("/v1/caption", headers=PREFLIGHT)  # has no key
    assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == ORIGIN
    refused = client.post("/v1/caption", json={}, headers={"Origin": ORIGIN})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)
    headers = {"Origin": ORIGIN, "Authorization": f"Bearer {key}"}
    given = client.post("/v1/caption", json={"image": base64_png()}, headers=headers)
    assert given.status_code == 200 and "X-Request-ID" in given.headers["access-control-expose-headers"]
    stranger = client.options("/v1/caption", headers=PREFLIGHT | {"Origin": "https://evil.example"})
    assert stranger.status_code == 400 and "access-control-allow-origin" not in stranger.headers


@pytest.mark.parametrize("origin", ["app.example.com", "https://a.com/", "https://*.a.com", "ftp://a.com", ""])
def test_what_is_no_origin_is_refused(origin):
    with pytest.raises(UserError, match="is no origin"):
        config.validate(ServeSettings, {"model": "m", "http": {"cors_origins": [origin]}}, "settings")
