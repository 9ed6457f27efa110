"""Images at web addresses: which are asked, and what is taken from them.

The hosts are names that only the tests know: `Web` resolves them, to addresses that are checked. Then all lead to one
server on this machine.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Iterator

import pytest
from aiohttp import web
from aiohttp.resolver import ThreadedResolver
from fastapi.testclient import TestClient
from support.serve_fakes import FakeBackend, base64_png, png

from lumen_ray.errors import UserError
from lumen_ray.serve import remote_images
from lumen_ray.serve.api import create_api
from lumen_ray.serve.remote_images import is_public
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.wire.settings import RemoteImages

HOST = "images.test"
PUBLIC, OTHER_PUBLIC = "8.8.8.8", "2606:4700::1111"


class Web:
    """A server on this machine, as `HOST` and others see it. `asked`: (Host header, path) of each request; `resolved`:
    the names that were looked up; `addresses`: what a name resolves to next, the last for ever."""

    def __init__(self):
        self.port = 0
        self.asked: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.resolved: list[str] = []
        self.addresses: dict[str, list[list[str]]] = {HOST: [[PUBLIC]]}

    def url(self, path: str, host: str = HOST) -> str:
        return f"http://{host}:{self.port}{path}"

    def resolve(self, host: str) -> list[str]:
        self.resolved.append(host)
        answers = self.addresses.get(host)
        if answers is None:
            raise OSError(None, "no such host")
        return answers.pop(0) if len(answers) > 1 else answers[0]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.host, request.path))
        self.headers.append(dict(request.headers))
        match request.path.strip("/").split("/"):
            case ["to", host, *path]:
                return web.Response(status=302, headers={"Location": self.url("/" + "/".join(path), host)})
            case ["file"]:
                return web.Response(status=302, headers={"Location": "file:///etc/hostname"})
            case ["loop"]:
                return web.Response(status=307, headers={"Location": "/loop"})
            case ["large"]:
                return web.Response(body=b"0" * (2 << 20))
            case ["endless"]:
                response = web.StreamResponse()
                await response.prepare(request)
                while True:
                    await response.write(b"0" * (1 << 18))
            case ["slow"]:
                await asyncio.sleep(60)
            case ["text"]:
                return web.Response(text="this is not an image")
            case ["gone"]:
                return web.Response(status=404, text="a secret of that server")
        return web.Response(body=png())


@pytest.fixture(scope="module")
def started() -> Iterator[Web]:
    found, ready, loop = Web(), threading.Event(), asyncio.new_event_loop()

    async def start() -> None:
        server = web.Server(found.answer)
        runner = web.ServerRunner(server, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        found.port = site._server.sockets[0].getsockname()[1]
        ready.set()

    thread = threading.Thread(target=lambda: (loop.run_until_complete(start()), loop.run_forever()), daemon=True)
    thread.start()
    assert ready.wait(10)
    yield found
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


@pytest.fixture
def site(started, monkeypatch) -> Web:
    """The server where the public addresses lead to it, at its port."""
    fresh = Web()
    started.asked, started.headers, started.resolved = fresh.asked, fresh.headers, fresh.resolved
    started.addresses = fresh.addresses

    async def resolve(self, host, port=0, family=0):
        fields = {"hostname": host, "port": port, "family": 2, "proto": 0, "flags": 0}
        return [{**fields, "host": address} for address in started.resolve(host)]

    checked = remote_images.PublicResolver.resolve

    async def led_here(self, host, port=0, family=0):
        return [{**result, "host": "127.0.0.1"} for result in await checked(self, host, port, family)]

    monkeypatch.setattr(ThreadedResolver, "resolve", resolve)
    monkeypatch.setattr(remote_images.PublicResolver, "resolve", led_here)
    monkeypatch.setattr(remote_images, "_PORTS", (started.port,))
    return started


ALLOWED = RemoteImages(hosts=[HOST, "*.images.test"], max_mb=1)


@pytest.fixture(scope="module")
def client() -> TestClient:
    """Of a server without the setting."""
    return TestClient(create_api(FakeBackend(), ServeSettings(model="unused")))


@pytest.fixture(scope="module")
def fetching() -> TestClient:
    return TestClient(create_api(FakeBackend(), ServeSettings(model="unused", remote_images=ALLOWED)))


@pytest.fixture
def web_client(fetching, site) -> TestClient:
    return fetching


def caption(client, url):
    return client.post("/v1/caption", json={"image": url})


def refused(response, reason, *words, status=400):
    error = response.json()["error"]
    assert (response.status_code, error["reason"]) == (status, reason), error
    for word in words:
        assert word in error["message"]
    return error


def test_an_image_is_fetched_from_an_allowed_host(web_client, site):
    response = caption(web_client, site.url("/a.png?size=2"))
    assert response.status_code == 200, response.text
    body = response.json()
    assert (body["height"], body["width"]) == (16, 20)
    assert set(body["timing_ms"]) == {"fetch", "decode", "model", "total"}
    assert site.asked == [(f"{HOST}:{site.port}", "/a.png")]
    assert not {"Cookie", "Authorization", "Proxy-Authorization"} & set(site.headers[0])
    assert site.headers[0]["Accept-Encoding"] == "identity"


def test_it_is_known_by_its_bytes(site):
    """As any other image, so that a trunk that holds it need not decode it."""
    backend, asked = FakeBackend(), []

    async def held_size(image_id, ask):
        asked.append(image_id)

    backend.held_size = held_size
    client = TestClient(create_api(backend, ServeSettings(model="unused", remote_images=ALLOWED)))
    caption(client, site.url("/a.png"))
    caption(client, base64_png())
    assert set(asked) == {hashlib.sha256(png()).hexdigest()[:32]}


URLS = {
    "chat": lambda url: (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "what ?"}, _part(url)]}]},
    ),
    "responses": lambda url: (
        "/v1/responses",
        {
            "input": [
                {
                    "role": "user",
                    "content": [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": url}],
                }
            ]
        },
    ),
    "infer": lambda url: ("/v1/infer", {"image": url, "requests": [{"task": "caption"}]}),
    "images": lambda url: ("/v1/infer", {"images": [url, base64_png(), url], "requests": [{"task": "caption"}]}),
    "example": lambda url: (
        "/v1/detect",
        {
            "image": base64_png(),
            "classes": [{"name": "bolt", "examples": [{"box": [1, 1, 8, 8], "image": f" {url}"}]}],
        },
    ),
    "hf": lambda url: ("/hf/image-to-text", {"inputs": url}),
    "roboflow": lambda url: ("/infer/lmm", {"image": {"type": "url", "value": url}}),
    "kserve": lambda url: (
        "/v2/models/nano/infer",
        {"inputs": [{"name": "IMAGE", "datatype": "BYTES", "shape": [1], "data": [url]}]},
    ),
}


def _part(url):
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize("name", URLS)
def test_every_route_takes_one(web_client, client, site, name):
    path, body = URLS[name](site.url("/a.png"))
    response = web_client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert len(site.asked) == 1, "once, however often it is named"
    response = client.post(path, json=body)  # a server without the setting
    assert response.status_code == 400 and "remote image URLs are not fetched" in response.text
    assert len(site.asked) == 1


def test_a_streamed_chat_takes_one(web_client, site):
    path, body = URLS["chat"](site.url("/a.png"))
    assert web_client.post(path, json=body | {"stream": True}).text.endswith("data: [DONE]\n\n")
    refused(web_client.post(path, json=body | {"stream": True} | URLS["chat"]("http://a.test/")[1]), NO)


NO = "remote_image_refused"


@pytest.mark.parametrize(
    ("url", "word"),
    {
        "another host": ("http://other.test:PORT/a.png", "images.test"),
        "a host that ends alike": ("http://badimages.test:PORT/a.png", "images.test"),
        "an address": ("http://127.0.0.1:PORT/a.png", "images.test"),
        "another port": ("http://images.test:22/a.png", "port"),
        "a user": ("http://me@images.test:PORT/a.png", "user name"),
        "a password": ("http://:secret@images.test:PORT/a.png", "password"),
        "another scheme": ("ftp://images.test:PORT/a.png", "not fetched"),
    }.values(),
    ids=lambda value: value[:20],
)
def test_other_addresses_are_refused_before_they_are_asked(web_client, site, url, word):
    error = refused(caption(web_client, url.replace("PORT", str(site.port))), NO, word)
    assert "secret" not in error["message"]
    assert not site.resolved and not site.asked


def test_subdomains_are_allowed_by_a_star(web_client, site):
    site.addresses["a.b.images.test"] = [[OTHER_PUBLIC]]
    assert caption(web_client, site.url("/a.png", "A.b.Images.test")).status_code == 200


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "10.0.0.1", "169.254.169.254", "::ffff:10.0.0.1"])
def test_a_host_without_a_public_address_is_not_asked(web_client, site, address):
    site.addresses[HOST] = [[PUBLIC, address]]
    error = refused(caption(web_client, site.url("/a.png")), NO, "no public address")
    assert address not in error["message"] and not site.asked


def test_a_name_is_resolved_once_for_a_connection(web_client, site):
    """A second answer of the name server, which would be a private address, has no effect on the first request."""
    site.addresses[HOST] = [[PUBLIC], ["127.0.0.1"]]
    assert caption(web_client, site.url("/a.png")).status_code == 200
    assert site.resolved == [HOST]
    refused(caption(web_client, site.url("/a.png")), NO, "no public address")
    assert len(site.asked) == 1


def test_redirects_are_followed_to_allowed_hosts_only(web_client, site):
    site.addresses["cdn.images.test"] = [[PUBLIC]]
    assert caption(web_client, site.url("/to/cdn.images.test/a.png")).status_code == 200
    assert [host for host, _ in site.asked] == [f"{HOST}:{site.port}", f"cdn.images.test:{site.port}"]
    refused(caption(web_client, site.url("/to/other.test/a.png")), NO, "images.test")
    refused(caption(web_client, site.url("/to/127.0.0.1/a.png")), NO, "images.test")
    refused(caption(web_client, site.url("/file")), NO, "http or https")


def test_a_redirect_to_a_private_address_is_refused(web_client, site):
    site.addresses["cdn.images.test"] = [["192.168.1.1"]]
    refused(caption(web_client, site.url("/to/cdn.images.test/a.png")), NO, "no public address")
    assert [host for host, _ in site.asked] == [f"{HOST}:{site.port}"]


def test_redirects_end(web_client, site):
    refused(caption(web_client, site.url("/loop")), "remote_image_failed", "3 times")
    assert len(site.asked) == 4


@pytest.mark.parametrize("path", ["/large", "/endless"])
def test_too_many_bytes_are_not_read(web_client, site, path):
    refused(caption(web_client, site.url(path)), "image_too_large", "1 MiB", status=413)


def test_the_images_of_a_request_share_the_limits(web_client, site):
    path, body = URLS["images"](site.url("/a.png"))
    many = [site.url(f"/{n}.png") for n in range(9)]
    refused(web_client.post(path, json=body | {"images": many}), "too_many_images")
    examples = [{"box": [1, 1, 8, 8], "image": url} for url in many]
    classes = [{"name": "bolt", "examples": examples}]
    refused(web_client.post("/v1/detect", json={"image": base64_png(), "classes": classes}), "too_many_images")
    assert not site.asked


def test_a_slow_host_is_given_up(site):
    hurried = ALLOWED.model_copy(update={"timeout_s": 0.2})
    with pytest.raises(UserError, match="within 0.2 s") as caught:
        asyncio.run(remote_images.fetch_images({site.url("/slow"): "image", site.url("/a.png"): ""}, hurried))
    assert caught.value.reason == "remote_image_failed"


def test_what_is_no_image_is_refused_as_ever(web_client, site):
    refused(caption(web_client, site.url("/text")), "broken_image")


def test_failures_say_nothing_of_that_server(web_client, site):
    error = refused(caption(web_client, site.url("/gone")), "remote_image_failed", "404")
    assert "secret" not in error["message"]
    refused(caption(web_client, site.url("/a.png", "none.images.test")), "remote_image_failed", "could not be fetched")


def test_the_proxies_of_the_environment_are_not_used(web_client, site, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert caption(web_client, site.url("/a.png")).status_code == 200


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        *((address, True) for address in (PUBLIC, OTHER_PUBLIC, "93.184.215.14", "2a00:1450:4001::1")),
        *((address, False) for address in ("0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.255.0.1")),
        *((address, False) for address in ("169.254.169.254", "172.16.0.1", "192.0.0.8", "192.0.2.1", "192.168.0.1")),
        *((address, False) for address in ("198.18.0.1", "203.0.113.1", "224.0.0.1", "240.0.0.1", "255.255.255.255")),
        *((address, False) for address in ("::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1")),
        *((address, False) for address in ("64:ff9b::7f00:1", "64:ff9b:1::1", "2001::1", "2002:7f00:1::", "3fff::1")),
        *((address, False) for address in ("2001:db8::1", "fc00::1", "fd00:ec2::254", "fe80::1%eth0", "fec0::1")),
        ("ff02::1", False),
    ],
)
def test_public_addresses(address, expected):
    assert is_public(address) == expected


@pytest.mark.parametrize("host", ["127.0.0.1", "8.8.8.8", "::1", "https://a.org", "a.org:80", "*", "A.org", "a b", ""])
def test_hosts_are_names(host):
    with pytest.raises((UserError, ValueError), match="no name of a host"):
        RemoteImages(hosts=[host])
