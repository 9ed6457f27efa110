"""Answers in pieces: the replica that writes them, the ingress that passes them on, and OpenAI's events."""

import asyncio
import base64
import dataclasses
import json
import threading
import time

import numpy as np
import pytest
from fastapi.testclient import TestClient
from ray.exceptions import ActorDiedError, RayTaskError
from support.serve_fakes import FakeBackend, base64_png

from lumen_ray.answer import Answer, TokenUsage
from lumen_ray.errors import UserError
from lumen_ray.inference.request import make_request
from lumen_ray.inference.sampling import Sampling
from lumen_ray.serve.api import create_api
from lumen_ray.serve.http import Unavailable
from lumen_ray.serve.image_cache import ImageGone, KeyedImage, gone, image_id
from lumen_ray.serve.ingress import ServeBackend
from lumen_ray.serve.job import TrunkJob, TrunkReply
from lumen_ray.serve.metrics import REGISTRY
from lumen_ray.serve.settings import ServeSettings, TrunkDeployment
from lumen_ray.serve.trunk import TrunkReplica

CHAT = "/v1/chat/completions"
QUESTION = dataclasses.replace(make_request("chat", text="what is it ?"), score_threshold=0.3, max_per_phrase=9)


def drawn(seed):
    """A question whose answer is drawn, so that it has many tokens, and goes to no decoder."""
    question = make_request("vqa", text="what is it ?", sampling=Sampling(temperature=2.0, seed=seed))
    return dataclasses.replace(question, score_threshold=0.3, max_per_phrase=9)


@pytest.fixture(scope="module")
def trunk(model_folder):
    replica = TrunkReplica(str(model_folder), "cpu", {})
    replica.reconfigure(TrunkDeployment().user_config)
    return replica


def job(seed, request, tokens=24):
    return TrunkJob(np.random.default_rng(seed).integers(0, 255, (96, 128, 3), np.uint8), (request,), tokens)


async def collect(replica, one):
    """The pieces of a job's text, and the reply."""
    *pieces, reply = [piece async for piece in replica.link_streaming(one)]
    return pieces, reply


def test_the_pieces_are_the_text_of_the_answer(trunk, monkeypatch):
    """Several at once, of which one is not streamed; each piece comes while its answer is being written."""
    links = trunk.stage.links

    def slow(images, requests, *, on_text, **options):
        def later(*text):
            on_text(*text)
            time.sleep(0.005)  # so that the event loop comes between

        return links(images, requests, on_text=on_text and later, **options)

    monkeypatch.setattr(trunk.stage, "links", slow)

    async def run():
        streamed = [collect(trunk, job(n, drawn(n))) for n in range(3)]
        return await asyncio.gather(*streamed, trunk.link(job(3, drawn(3))))

    *streamed, whole = asyncio.run(run())
    alone = [asyncio.run(trunk.link(job(n, drawn(n)))) for n in range(4)]
    assert whole.answers[0].text == alone[3].answers[0].text
    for (pieces, reply), expected in zip(streamed, alone[:3], strict=True):
        text = expected.answers[0].text
        assert reply.answers[0].text == text and len(text) > 10
        assert "".join(pieces) == text and len(pieces) > 1
    assert not trunk._listeners


def test_a_job_whose_pass_failed_does_not_repeat_its_text(trunk, monkeypatch):
    links, calls = trunk.stage.links, []

    def fails_once(images, requests, **options):
        output = links(images, requests, **options)
        calls.append(len(requests))
        if len(requests) > 1:
            raise RuntimeError("another one of the pass failed")
        return output

    monkeypatch.setattr(trunk.stage, "links", fails_once)

    async def run():
        with trunk.stage.loop.turn():  # so that they share a pass
            tasks = [asyncio.create_task(collect(trunk, job(n, drawn(n)))) for n in range(2)]
            await asyncio.sleep(0.1)
        return await asyncio.gather(*tasks)

    for pieces, reply in asyncio.run(run()):
        assert "".join(pieces) == reply.answers[0].text
    assert calls == [2, 1, 1]


def test_a_stream_that_is_closed_is_given_up(trunk, monkeypatch):
    """The model stops writing."""
    tokens = []
    links = trunk.stage.links

    def counted(images, requests, *, on_text, **options):
        def count(*text):
            tokens.append(text)
            on_text(*text)

        return links(images, requests, on_text=count, **options)

    monkeypatch.setattr(trunk.stage, "links", counted)

    async def run():
        pieces = trunk.link_streaming(job(1, drawn(1), tokens=1024))
        await anext(pieces)
        await pieces.aclose()
        assert not trunk._listeners

    asyncio.run(run())
    idle = threading.Event()
    for _ in range(200):
        before = len(tokens)
        if idle.wait(0.05) or len(tokens) == before:
            break
    assert len(tokens) < 1000


class Trunk:
    """A handle whose calls yield what `scripts` say, one after the other; an exception in one is raised."""

    def __init__(self, *scripts):
        self.scripts, self.cancelled, self.options_given, self.jobs = list(scripts), 0, [], []

    def options(self, **options):
        self.options_given.append(options)
        return self

    @property
    def link_streaming(self):
        return self

    def remote(self, job):
        self.jobs.append(job)
        return Response(self, self.scripts.pop(0))


class Response:
    def __init__(self, handle, script):
        self.handle, self.script = handle, iter(script)

    def __aiter__(self):
        return self

    async def __anext__(self):
        await asyncio.sleep(0)
        piece = next(self.script, None)
        if piece is None:
            raise StopAsyncIteration
        if isinstance(piece, Exception):
            raise piece
        if piece == "(stalls)":
            await asyncio.sleep(60)
        return piece

    def cancel(self):
        self.handle.cancelled += 1


ANSWER = Answer("chat", (8, 8), text="a red circle")
REPLY = TrunkReply((ANSWER,))
LOST = ActorDiedError()


def streamed(trunk, image=None, **http):
    backend = ServeBackend(trunk, {}, ServeSettings(model="m", http=http))

    async def run():
        return [piece async for piece in backend.stream(image, [QUESTION], 8)]

    return asyncio.run(run())


@pytest.mark.parametrize(
    "scripts",
    [
        [["a", " red", " circle", REPLY]],
        [[LOST], ["a red", " circle", REPLY]],
        [["a", " re", LOST], ["a red", " circle", REPLY]],
        [["a red circle", LOST], ["a", " red", " circle", REPLY]],
    ],
)
def test_a_lost_replica_does_not_repeat_or_lose_text(scripts):
    trunk = Trunk(*scripts)
    *texts, answer = streamed(trunk)
    assert "".join(texts) == "a red circle" and all(texts) and answer is ANSWER
    assert all({"stream": True} in trunk.options_given for _ in scripts)


def test_another_text_of_another_replica_ends_the_stream():
    with pytest.raises(Unavailable, match="ask again"):
        streamed(Trunk(["a red", LOST], ["a blue circle", REPLY]))
    with pytest.raises(Unavailable):
        streamed(Trunk([LOST], ["a", LOST]))


def test_a_stream_that_takes_too_long_is_cancelled():
    trunk = Trunk(["a", "(stalls)"])
    with pytest.raises(TimeoutError):
        streamed(trunk, request_timeout_s=0.1)
    assert trunk.cancelled == 1


def test_errors_of_the_request_are_raised_as_they_are():
    with pytest.raises(UserError, match="too long"):
        streamed(Trunk([RayTaskError("f", "", UserError("too long", "context_too_long"))]))
    with pytest.raises(ImageGone):
        streamed(Trunk([RayTaskError("f", "", gone("a" * 32))]), KeyedImage("a" * 32, (8, 8)))


def events(response):
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def body(**fields):
    url = {"url": f"data:image/png;base64,{base64_png()}"}
    parts = [{"type": "text", "text": "what is it ?"}, {"type": "image_url", "image_url": url}]
    return {"messages": [{"role": "user", "content": parts}], "stream": True, **fields}


def test_events_are_those_of_openai(client):
    *chunks, end = events(client.post(CHAT, json=body()))
    chunks = [json.loads(chunk) for chunk in chunks]
    assert end == "[DONE]" and {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1 and {chunk["model"] for chunk in chunks} == {"nano@abc123"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == "chat says what is it ?"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1]["lumen"]["text"] == "chat says what is it ?" and chunks[-1]["lumen"]["timing_ms"]["total"] >= 0
    assert "usage" not in chunks[0]


@pytest.mark.parametrize("path_body", [(CHAT, body()), ("/v1/responses", {"input": "x", "stream": True})])
def test_an_answer_that_is_not_what_was_sent_ends_the_stream(client, backend, path_body):
    async def stream(image, requests, max_new_tokens):
        yield "a red"
        yield Answer("chat", (8, 8), text="a blue circle")

    backend.stream = stream
    path, asked = path_body
    *_, last = client.post(path, json=asked).text.strip().split("\n\n")
    assert json.loads(last.split("data: ")[1])["error"]["code"] == "unavailable" and "blue" not in last


def test_usage_is_the_last_event(client, backend):
    async def stream(image, requests, max_new_tokens):
        yield Answer("chat", (8, 8), text="a b", usage=TokenUsage(70, 2))

    backend.stream = stream
    *chunks, end = events(client.post(CHAT, json=body(stream_options={"include_usage": True})))
    *others, last = [json.loads(chunk) for chunk in chunks]
    assert last["choices"] == [] and last["usage"] == {"prompt_tokens": 70, "completion_tokens": 2, "total_tokens": 72}
    assert all(chunk["usage"] is None for chunk in others)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in others) == "a b"


class Failing(FakeBackend):
    """`pieces` are written, then `failure` is raised."""

    def __init__(self, failure, *pieces):
        super().__init__()
        self.failure, self.pieces = failure, pieces

    async def stream(self, image, requests, max_new_tokens):
        for piece in self.pieces:
            yield piece
        raise self.failure


@pytest.mark.parametrize(
    ("failure", "status", "reason"),
    [
        (UserError("too long", "context_too_long"), 400, "context_too_long"),
        (Unavailable("a replica died"), 503, "unavailable"),
        (TimeoutError(), 504, "timeout"),
        (RuntimeError("a bug"), 500, "internal_error"),
    ],
)
def test_an_error_has_its_status_before_the_first_text_and_an_event_after_it(settings, failure, status, reason):
    before = TestClient(create_api(Failing(failure), settings)).post(CHAT, json=body())
    assert (before.status_code, before.json()["error"]["reason"]) == (status, reason)
    *chunks, last = events(TestClient(create_api(Failing(failure, "a", " b"), settings)).post(CHAT, json=body()))
    assert [json.loads(chunk)["choices"][0]["delta"].get("content") for chunk in chunks] == ["", "a", " b"]
    error = json.loads(last)["error"]
    assert (error["reason"], error["code"]) == (reason, reason) and "a bug" not in error["message"]


def test_log_probabilities_are_not_streamed(client):
    answer = client.post(CHAT, json=body(logprobs=True))
    assert answer.status_code == 400 and "'logprobs'" in answer.json()["error"]["message"]


def test_openais_client_reads_the_stream(client):
    openai = pytest.importorskip("openai", reason="needs openai")
    asked = openai.OpenAI(api_key="none", base_url="http://testserver/v1", http_client=client)
    stream = asked.chat.completions.create(**body(model="nano", stream_options={"include_usage": True}))
    chunks = list(stream)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == "chat says what is it ?" and chunks[-1].choices == []


def test_a_stream_about_a_held_image_goes_on_when_its_replica_dies(settings):
    """The next replica does not hold the image, and gets it; the requests are those of the first time."""
    trunk = Trunk(["a", " red", LOST], [RayTaskError("f", "", gone("x"))], ["a", " red", " circle", REPLY])
    settings = settings.model_copy(update={"openai_sampling": True})
    backend = ServeBackend(trunk, {}, settings)
    encoded = base64.b64decode(base64_png())
    backend._held[image_id(encoded)] = (16, 20)
    backend._info = {"preset": "nano", "version": "1", "classes": [], "tasks": ["chat"]}
    client = TestClient(create_api(backend, settings))
    *chunks, end = events(client.post(CHAT, json=body(temperature=0.7)))
    texts = [json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(texts) == "a red circle" and end == "[DONE]"
    first, second, third = trunk.jobs
    assert first.image.picture is None and third.image.picture is not None
    assert first.requests == third.requests  # with the seed that was drawn


def test_a_client_that_leaves_is_counted_and_no_error_of_the_server(settings):
    app = create_api(FakeBackend(), settings)
    name, labels = "lumen_ray_requests_total", {"method": "POST", "route": "/v1/detect", "status": "499"}

    def counted():
        errors = REGISTRY.get_sample_value("lumen_ray_errors_total", {"reason": "internal_error"}) or 0
        return REGISTRY.get_sample_value(name, labels) or 0, errors

    async def left():
        messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
        sent = []

        async def receive():
            return messages.pop(0) if len(messages) > 1 else messages[0]

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/detect", "headers": [], "query_string": b""}
        await app(scope, receive, send)
        return sent

    before = counted()
    assert asyncio.run(left()) == []
    assert counted() == (before[0] + 1, before[1])
