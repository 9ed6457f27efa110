"""The routes of files and batches: OpenAI's client, mistakes, limits, and whose files are whose."""

from __future__ import annotations

import io
import itertools
import json
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi.testclient import TestClient
from support.batch_fakes import BatchServer, line
from support.live_server import live_server

from lumen_ray.errors import UserError
from lumen_ray.serve.api import create_api
from lumen_ray.serve.batches.batch_store import BatchStore
from lumen_ray.serve.batches.file_store import FileStore
from lumen_ray.serve.keys import new_key
from lumen_ray.serve.settings import Auth, ServeSettings

CHAT = "/v1/chat/completions"


def api(server, wake=lambda: None):
    return create_api(server.backend, server.settings, wake_batches=wake)


@pytest.fixture
def web(batch_server):
    return TestClient(api(batch_server))


def upload(web, content="x\n", name="requests.jsonl", headers=None, **fields):
    return web.post(
        "/v1/files", files={"file": (name, content)}, data={"purpose": "batch", **fields}, headers=headers or {}
    )


def body(file_id, **fields):
    return {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h", **fields}


def create(web, file_id, headers=None, **fields):
    return web.post("/v1/batches", json=body(file_id, **fields), headers=headers or {})


def reason(response, status=400):
    assert response.status_code == status, response.text
    return response.json()["error"]["code"]


def test_the_openai_client_has_a_file_answered(batch_server, tmp_path):
    openai = pytest.importorskip("openai")
    path = tmp_path / "my requests ü.jsonl"
    path.write_text("\n".join([line("a", "one"), line("b", "refuse")]))
    woken = []
    with live_server(api(batch_server, lambda: woken.append(1))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        kept = {"anchor": "created_at", "seconds": 7200}
        with path.open("rb") as file:
            sent = client.files.create(file=file, purpose="batch", expires_after=kept)
        assert (sent.filename, sent.bytes, sent.purpose) == (path.name, path.stat().st_size, "batch")
        assert sent.expires_at == sent.created_at + 7200 and client.files.retrieve(sent.id) == sent
        assert client.files.content(sent.id).read() == path.read_bytes()
        assert [file.id for file in client.files.list(purpose="batch", order="asc", limit=5)] == [sent.id]

        made = client.batches.create(
            input_file_id=sent.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"job": "night"},
            output_expires_after=kept,
        )
        assert (made.status, made.metadata, made.output_file_id) == ("validating", {"job": "night"}, None)
        assert made.expires_at == made.created_at + 86_400 and woken == [1]
        with pytest.raises(openai.BadRequestError, match="is read by batch"):
            client.files.delete(sent.id)
        batch_server.finish(made.id)
        batch = client.batches.retrieve(made.id)
        assert batch.status == "completed" and batch.request_counts.model_dump() == {
            "total": 2,
            "completed": 1,
            "failed": 1,
        }
        assert batch.usage.total_tokens == 0 and batch.model == "nano@abc123"
        (row,) = client.files.content(batch.output_file_id).text.splitlines()
        completion = json.loads(row)["response"]["body"]
        openai.types.chat.ChatCompletion.model_validate(completion, strict=True)
        assert completion["choices"][0]["message"]["content"] == "chat says one"
        output = client.files.retrieve(batch.output_file_id)
        assert output.purpose == "batch_output" and output.expires_at == output.created_at + 7200
        with pytest.raises(openai.BadRequestError, match="cannot be cancelled"):
            client.batches.cancel(made.id)
        assert client.files.delete(sent.id).deleted
        with pytest.raises(openai.NotFoundError, match="there is no file"):
            client.files.retrieve(sent.id)
        assert {file.purpose for file in client.files.list()} == {"batch_output"}

        again = client.files.create(file=("b.jsonl", line("a")), purpose="batch")
        others = [
            client.batches.create(input_file_id=again.id, endpoint="/v1/chat/completions", completion_window="1h")
            for _ in range(3)
        ]
        stopped = client.batches.cancel(others[1].id)
        assert stopped.status == "cancelling" and stopped.cancelling_at
        listed = [found.id for found in client.batches.list(limit=2)]  # two pages
        assert listed == [*reversed([found.id for found in others]), made.id]


def test_objects_are_whole(web, batch_server):
    """Every field that OpenAI's objects have, null where there is nothing."""
    batch = create(web, upload(web, line("a")).json()["id"]).json()
    names = {"in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"}
    assert {f"{name}_at" for name in names} <= batch.keys() and batch["created_at"]
    assert batch["errors"] is None and batch["metadata"] is None and batch["object"] == "batch"
    assert batch["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    page = web.get("/v1/batches").json()
    assert page == {
        "object": "list", "data": [batch], "first_id": batch["id"], "last_id": batch["id"], "has_more": False
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"endpoint": "/v1/responses"}, "unsupported_endpoint", "endpoint"),
        ({"endpoint": "/v1/embeddings"}, "unsupported_endpoint", "endpoint"),
        ({"completion_window": "1d"}, "invalid_completion_window", "completion_window"),
        ({"completion_window": "721h"}, "invalid_completion_window", "completion_window"),
        ({"metadata": {"a": 1}}, "invalid_request", "metadata.a"),
        ({"metadata": {f"{n}": "x" for n in range(17)}}, "invalid_request", "metadata"),
        ({"metadata": {"a": "x" * 513}}, "invalid_request", "metadata.a"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "invalid_request", None),
        ({"modle": "nano"}, "invalid_request", "modle"),
        ({"input_file_id": None}, "invalid_request", "input_file_id"),
    ],
)
def test_mistakes_in_a_batch_are_refused(web, fields, code, param):
    response = create(web, upload(web, line("a")).json()["id"], **fields)
    assert reason(response) == code
    assert param is None or response.json()["error"]["param"] == param
    assert web.get("/v1/batches").json()["data"] == []


@pytest.mark.parametrize(
    "file_id", ["", "file-1", "file-" + "0" * 32, "../../etc/passwd", "batch_" + "0" * 32, "x" * 400]
)
def test_a_file_that_is_not_there(web, file_id):
    response = create(web, file_id)
    assert reason(response, 404) == "unknown_file" and len(response.text) < 1500


@pytest.mark.parametrize("path", ["files/{}", "files/{}/content", "batches/{}"])
@pytest.mark.parametrize("name", ["file-1", "batch_" + "f" * 32, "file-" + "f" * 32, "..%2f..%2fetc", "%00", "ü"])
def test_unknown_ids_are_404(web, path, name):
    response = web.get("/v1/" + path.format(name))
    assert reason(response, 404) in ("unknown_file", "unknown_batch", "not_found")
    if not path.endswith("content"):
        assert web.delete("/v1/" + path.format(name)).status_code in (404, 405)
    assert web.post(f"/v1/batches/{name}/cancel").status_code == 404


@pytest.mark.parametrize("given", ["bytes=abc", "bytes=100-200", "bytes=0-0,1-1", "bytes=0-0"])
def test_a_file_is_sent_whole(web, given):
    path = f"/v1/files/{upload(web, 'abc').json()['id']}/content"
    response = web.get(path, headers={"Range": given})
    assert (response.status_code, response.text, response.headers["accept-ranges"]) == (200, "abc", "none")


def test_a_file_that_goes_while_it_is_asked_for_is_unknown(web, batch_server):
    file_id = upload(web, "abc").json()["id"]
    batch_server.files.content(file_id).unlink()
    assert reason(web.get(f"/v1/files/{file_id}/content"), 404) == "unknown_file"


@pytest.mark.parametrize(
    ("query", "code", "status"),
    [
        ("files?limit=0", "invalid_request", 400),
        ("files?limit=x", "invalid_request", 400),
        ("files?order=up", "invalid_request", 400),
        ("files?page=2", "invalid_request", 400),
        ("files?after=file-1", "unknown_file", 404),
        ("batches?limit=101", "invalid_request", 400),
        ("batches?after=x", "unknown_batch", 404),
    ],
)
def test_mistakes_in_a_query_are_refused(web, query, code, status):
    assert reason(web.get(f"/v1/{query}"), status) == code


def test_mistakes_in_an_upload_are_refused(web, tmp_path):
    assert reason(upload(web, purpose="fine-tune")) == "unknown_purpose"
    assert reason(upload(web, content="")) == "empty_file"
    assert reason(upload(web, name="x" * 256)) == "invalid_name"
    assert reason(upload(web, **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "1"})) == (
        "invalid_request"
    )
    assert reason(upload(web, colour="red")) == "invalid_request"
    assert reason(web.post("/v1/files", data={"purpose": "batch"}), 415) == "unsupported_media_type"
    assert reason(web.post("/v1/files", files={"purpose": (None, "batch")})) == "missing_file"
    assert reason(web.post("/v1/files", files={"file": ("a", "x")})) == "invalid_request"
    assert reason(web.post("/v1/files", files={"file": ("a", "x"), "other": ("b", "y")})) == "invalid_request"
    broken = {"Content-Type": "multipart/form-data"}
    assert reason(web.post("/v1/files", content=b"x", headers=broken)) == "invalid_request"
    assert web.get("/v1/files").json()["data"] == []


def test_a_name_is_never_a_path(web, batch_server, tmp_path):
    for name in ("../../../evil", "/etc/passwd", "a\\b", "..", "x.jsonl\r\nSet-Cookie: a=b"):
        sent = upload(web, name=name).json()
        response = web.get(f"/v1/files/{sent['id']}/content")
        assert response.text == "x\n" and "set-cookie" not in response.headers
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"file.json", "content.jsonl"}


def test_limits_of_files(tmp_path):
    server = BatchServer(tmp_path, max_file_bytes=100_000, max_total_bytes=250_000)
    web = TestClient(api(server))
    assert upload(web, "x" * 99_999).status_code == 200
    assert reason(upload(web, "x" * 100_001), 413) == "file_too_large"
    assert reason(upload(web, "x" * 200_000), 413) == "body_too_large"
    last = upload(web, "x" * 99_999).json()["id"]
    assert reason(upload(web, "x" * 99_999), 507) == "storage_full"
    web.delete(f"/v1/files/{last}")
    assert upload(web, "x" * 99_999).status_code == 200
    assert web.post(CHAT, content=b"x" * (21 << 20)).status_code == 413  # of other routes the limit is their own


def test_a_client_has_so_many_batches(tmp_path):
    server = BatchServer(tmp_path, max_unfinished=2)
    web = TestClient(api(server))
    file_id = upload(web, line("a")).json()["id"]
    ids = [create(web, file_id).json()["id"] for _ in range(2)]
    assert reason(create(web, file_id), 429) == "too_many_batches"
    server.finish(ids[0])
    assert create(web, file_id).status_code == 200


def test_an_output_is_no_input(web, batch_server):
    batch_id = create(web, upload(web, line("a")).json()["id"]).json()["id"]
    (batch,) = batch_server.finish(batch_id)
    assert reason(create(web, batch["output_file_id"])) == "wrong_purpose"


def test_an_expired_file_is_gone_at_once(web, batch_server):
    batch_server.now -= 31 * 86_400
    file_id = batch_server.upload(line("a"))
    assert reason(web.get(f"/v1/files/{file_id}"), 404) == "unknown_file"
    assert web.get("/v1/files").json()["data"] == []


def test_a_large_upload_is_not_held_in_memory(batch_server):
    """Nor by the client of this process, which sends it piece by piece."""
    piece, pieces = b"x" * 65_535 + b"\n", 500
    head = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    content = itertools.chain([head], itertools.repeat(piece, pieces), [b"\r\n--b--\r\n"])
    with live_server(api(batch_server)) as url:
        httpx.get(f"{url}/v1/files")
        tracemalloc.start()
        try:
            headers = {"Content-Type": "multipart/form-data; boundary=b"}
            sent = httpx.post(f"{url}/v1/files", content=content, headers=headers, timeout=60).json()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert sent["bytes"] == len(piece) * pieces and peak < 8 << 20


def at_a_time(call, count=4):
    """What calls that begin together return or raise."""
    barrier = threading.Barrier(count)

    def one(n):
        barrier.wait(20)
        try:
            return call(n)
        except UserError as error:
            return error.reason

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_uploads_at_the_same_time_do_not_take_the_same_room(tmp_path):
    server = BatchServer(tmp_path, max_total_bytes=200_000)
    ingresses = [FileStore(server.settings.batches) for _ in range(2)]
    for _ in range(4):
        server.files.check_room(90_000)  # at this time there is room for each
    found = at_a_time(lambda n: ingresses[n % 2].add(io.BytesIO(b"x" * 90_000), None, "a"))
    kept = server.files.of(None)
    assert len(kept) <= 2 and found.count("storage_full") == 4 - len(kept)
    assert len(list((tmp_path / "files").iterdir())) == len(kept)
    server.files.add(io.BytesIO(b"x" * 10_000), None, "a")
    alone = BatchServer(tmp_path / "alone", max_total_bytes=200_000).files
    found = at_a_time(lambda _: alone.add(io.BytesIO(b"x" * 150_000), None, "a"), 2)
    assert len(alone.of(None)) <= 1 and "storage_full" in found


def test_an_upload_that_is_not_done_takes_room(tmp_path):
    server = BatchServer(tmp_path, max_total_bytes=200_000)
    other = server.files.content("file-" + "0" * 32)
    other.parent.mkdir()
    other.write_bytes(b"x" * 150_000)
    with pytest.raises(UserError, match="delete files"):
        server.files.check_room(60_000)


def test_batches_created_at_the_same_time_are_counted(tmp_path):
    server = BatchServer(tmp_path, max_unfinished=2)
    asked = {"input_file_id": server.upload(line("a")), "endpoint": CHAT, "completion_window": "24h"}
    found = at_a_time(lambda _: server.batches.add("alice", 60, **asked), 6)
    assert found.count("too_many_batches") == 4
    others = [BatchStore(server.settings.batches) for _ in range(4)]
    at_a_time(lambda n: others[n].add("bob", 60, **asked))
    kept = list(server.batches.newest("bob"))
    assert len(kept) <= 2 and len(list((tmp_path / "batches").iterdir())) == 2 + len(kept)


def test_batches_that_are_gone_are_forgotten(batch_server):
    batch_id = batch_server.create(line("a"))
    batch_server.finish(batch_id)
    assert not list(batch_server.batches.unfinished()) and batch_server.batches._ended == {batch_id}
    batch_server.now += 40 * 86_400
    batch_server.batches.sweep()
    assert not list(batch_server.batches.unfinished()) and not batch_server.batches._ended


def test_damaged_records_are_no_errors_of_others(web, batch_server):
    kept, lost = (upload(web, line("a")).json()["id"] for _ in range(2))
    good, bad = (create(web, kept).json()["id"] for _ in range(2))
    (batch_server.batches.folder.parent / "files" / lost / "file.json").write_text("")
    (batch_server.batches.folder / bad / "state.json").write_text("{")
    assert [file["id"] for file in web.get("/v1/files").json()["data"]] == [kept]
    assert reason(web.get(f"/v1/files/{lost}"), 404) == "unknown_file"
    found = {batch["id"]: batch["status"] for batch in web.get("/v1/batches").json()["data"]}
    assert found == {good: "validating", bad: "failed"}
    assert create(web, kept).status_code == 200


@pytest.fixture
def keyed(batch_server, tmp_path):
    """A server with the keys of alice and bob, and their headers."""
    made = {name: new_key(name) for name in ("alice", "bob")}
    path = tmp_path / "keys.yaml"
    path.write_text("\n".join(entry for _, entry in made.values()))
    batch_server.settings = batch_server.settings.model_copy(update={"auth": Auth(keys_file=str(path))})
    headers = {name: {"Authorization": f"Bearer {key}"} for name, (key, _) in made.items()}
    return TestClient(api(batch_server)), headers


def test_a_key_sees_its_own_files_and_batches_only(keyed, batch_server):
    web, headers = keyed
    alice, bob = headers["alice"], headers["bob"]
    file_id = upload(web, line("a"), headers=alice).json()["id"]
    batch_id = create(web, file_id, alice).json()["id"]
    assert web.get(f"/v1/batches/{batch_id}", headers=alice).status_code == 200
    assert web.get("/v1/files", headers=alice).json()["data"] and web.get("/v1/batches", headers=alice).json()["data"]
    for path in ("/v1/files", "/v1/batches"):
        assert web.get(path).status_code == 401
        assert web.get(path, headers=bob).json()["data"] == []
    assert reason(create(web, file_id, bob), 404) == "unknown_file"
    for path in (f"files/{file_id}", f"files/{file_id}/content", f"batches/{batch_id}"):
        assert reason(web.get(f"/v1/{path}", headers=bob), 404).startswith("unknown_")
    assert web.delete(f"/v1/files/{file_id}", headers=bob).status_code == 404
    assert web.post(f"/v1/batches/{batch_id}/cancel", headers=bob).status_code == 404
    (done,) = batch_server.finish(batch_id, owner="alice")
    assert done["status"] == "completed" and done["input_file_id"] == file_id
    assert web.get(f"/v1/files/{done['output_file_id']}/content", headers=alice).status_code == 200
    assert web.get(f"/v1/files/{done['output_file_id']}/content", headers=bob).status_code == 404


def test_without_the_setting_there_are_no_files_and_batches(backend):
    web = TestClient(create_api(backend, ServeSettings(model="m")))
    for method, path in (("GET", "files"), ("POST", "files"), ("DELETE", "files/file-1"), ("POST", "batches/x/cancel")):
        response = web.request(method, f"/v1/{path}")
        assert reason(response, 404) == "not_found" and "setting 'batches'" in response.text
    assert not any("/v1/files" in path for path in web.get("/openapi.json").json()["paths"])


def test_the_routes_are_documented(web):
    document = web.get("/openapi.json").json()
    assert {"/v1/files", "/v1/files/{file_id}/content", "/v1/batches/{batch_id}/cancel"} <= document["paths"].keys()
    assert "BatchBody" in document["components"]["schemas"]
