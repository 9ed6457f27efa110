"""The files of the page at `/`: they fit each other, the routes and the tasks, and need nothing of other servers."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from support.serve_fakes import FakeBackend

from lumen_ray.serve import pages
from lumen_ray.serve.api import create_api
from lumen_ray.serve.keys import new_key
from lumen_ray.serve.samples import SCENES
from lumen_ray.serve.settings import Auth, ServeSettings
from lumen_ray.tasks import TASKS
from lumen_ray.wire.requests import fields_of

FOLDER = Path(pages.__file__).parent / "page"
FILES = sorted(FOLDER.iterdir())
SCRIPTS = {path.name: path.read_text() for path in FILES if path.suffix == ".js"}
INDEX = (FOLDER / "index.html").read_text()
IDS = re.findall(r'\sid="([^"]+)"', INDEX)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_small_and_load_nothing_from_elsewhere(path):
    text = path.read_text()
    assert len(text.splitlines()) < 400 and max(map(len, text.splitlines())) < 200
    assert set(re.findall(r"https?://[^\s'\"`]+", text)) <= {"http://www.w3.org/2000/svg"}


def test_scripts_name_elements_that_exist():
    assert len(IDS) == len(set(IDS))
    named = {name for text in SCRIPTS.values() for name in re.findall(r'\bfind\("([^"]+)"\)', text)}
    assert named and named - set(IDS) == set()
    referred = re.findall(r'\s(?:for|aria-controls|aria-labelledby)="([^"]+)"', INDEX)
    assert set(referred) - set(IDS) == set()


def test_modules_import_what_others_export():
    for name, text in SCRIPTS.items():
        for names, source in re.findall(r'import \{([^}]+)\} from "\./([^"]+)"', text):
            exported = set(re.findall(r"export (?:async )?(?:function\*?|const|class) (\w+)", SCRIPTS[source]))
            assert {n.strip() for n in names.split(",")} - exported == set(), f"{name} imports from {source}"


def test_the_page_calls_routes_that_exist():
    api = create_api(FakeBackend(), ServeSettings(model="m"))
    paths = {getattr(route, "path", "") for route in api.routes} | set(api.openapi()["paths"])
    called = {p for text in SCRIPTS.values() for p in re.findall(r'"((?:v1|page)/[\w/]+)"', text)}
    assert {"v1/tasks", "v1/models", "v1/chat/completions", "page/samples"} <= called
    assert {f"/{path}" for path in called} <= paths


def test_every_task_and_field_has_its_words():
    form, options = SCRIPTS["form.js"], SCRIPTS["options.js"]
    for task in TASKS.values():
        if task.is_conversation:  # the chat has a panel of its own
            continue
        assert re.search(rf"\b{task.name}:", form), task.name
        known = set(re.findall(r"^  (\w+):", options, re.MULTILINE)) | {"classes", "text", "keypoints", "region"}
        assert set(fields_of(task)) <= known


@pytest.fixture(scope="module")
def client():
    return TestClient(create_api(FakeBackend(), ServeSettings(model="m")))


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix != ".html"], ids=lambda path: path.name)
def test_files_are_served_and_asked_for_again(client, path):
    response = client.get(f"/page/{path.name}")
    assert response.status_code == 200 and response.headers["cache-control"] == "no-cache"
    kind = {".js": "javascript", ".css": "text/css", ".html": "text/html"}[path.suffix]
    assert kind in response.headers["content-type"]
    assert client.get(f"/page/{path.name}", headers={"If-None-Match": response.headers["etag"]}).status_code == 304


@pytest.mark.parametrize("path", ["nothing.js", "%2e%2e/api.py", "samples/0.jpg", "samples/99.jpg", "samples/a.jpg"])
def test_nothing_else_is_served(client, path):
    response = client.get(f"/page/{path}")
    assert (response.status_code, response.json()["error"]["reason"]) == (404, "not_found")


@pytest.mark.parametrize("given", ["bytes=abc", "bytes=99999999-"])
def test_files_are_sent_whole(client, given):
    assert client.get("/page/main.js", headers={"Range": given}).status_code == 200


def test_samples_are_images_with_words_for_who_cannot_see_them(client):
    listed = client.get("/page/samples").json()["samples"]
    assert [sample["number"] for sample in listed] == list(range(1, len(SCENES) + 1))
    for sample in listed:
        assert re.fullmatch(r"[A-Z][a-z, ]+\.", sample["description"])
        response = client.get(f"/page/samples/{sample['number']}.jpg")
        assert response.headers["content-type"] == "image/jpeg" and len(response.content) < 40_000
        assert Image.open(io.BytesIO(response.content)).size == (256, 256)


def test_the_page_needs_no_key_but_what_it_asks_does(tmp_path):
    (tmp_path / "keys.yaml").write_text(new_key("alice")[1])
    client = TestClient(
        create_api(FakeBackend(), ServeSettings(model="m", auth=Auth(keys_file=str(tmp_path / "keys.yaml"))))
    )
    for path in ("/", "/page/main.js", "/page/samples", "/page/samples/1.jpg"):
        assert client.get(path).status_code == 200
    assert client.get("/v1/tasks").status_code == 401 and client.get("/pages").status_code == 401


def test_the_model_names_the_limits_that_the_page_scales_images_to(client):
    limits = client.get("/v1/models").json()["data"][0]["lumen"]["limits"]
    assert limits["max_pixels"] == 40_000_000 and limits["max_body_bytes"] == 20 * 1024 * 1024


@pytest.mark.parametrize("name", ["index.html", "docs.html"])
def test_pages_have_one_address(client, name):
    assert client.get(f"/page/{name}").status_code == 404
