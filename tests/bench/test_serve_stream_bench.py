"""The bench of streamed chat: its client against small servers, and what it compares."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lumen_ray.bench import serve_stream
from lumen_ray.bench.chat_sides import Question
from lumen_ray.bench.command import KINDS, build_parser, check
from lumen_ray.bench.serve_stream import THEIRS, Streaming, pieces_of
from lumen_ray.bench.timing import SidesDiffer
from lumen_ray.errors import UserError


def event(text: str | None) -> bytes:
    delta = {"role": "assistant"} if text is None else {"content": text}
    return b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n\n"


def test_pieces_are_the_texts_of_events_and_nothing_else():
    usage = b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\n'
    stream = b": ping\n\n" + event(None) + event("a") + event("") + event(" b") + usage + b"data: [DONE]\n\n"
    assert list(pieces_of(iter(stream.splitlines(keepends=True)))) == ["a", " b"]


@contextmanager
def answering(answer: str, status: int = 200) -> Iterator[tuple[int, list[dict]]]:
    """A server that streams `answer` word by word to everyone: its port, and the bodies it gets."""
    bodies: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()
            for word in answer.split():
                self.wfile.write(event(f"{word} "))

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1], bodies
    finally:
        server.shutdown()
        server.server_close()


def test_users_ask_one_question_after_the_other():
    with answering("all is well") as (port, bodies):
        answers, seconds = Streaming(port, "m").ask([Question(f"q{n}", 0, 5) for n in range(6)], 3)
    assert [answer.text for answer in answers] == ["all is well"] * 6
    assert all(0 < answer.first_s <= seconds for answer in answers)
    assert sorted(body["messages"][0]["content"] for body in bodies) == [f"q{n}" for n in range(6)]
    assert all(body["stream"] and body["model"] == "m" and body["max_tokens"] == 5 for body in bodies)


def test_an_error_of_a_server_ends_the_bench():
    with answering("", 503) as (port, _), pytest.raises(UserError, match="answered 503"):
        Streaming(port, "m").ask([Question("q", 0, 5)], 1)


def words(text: str, add_special_tokens: bool) -> dict[str, list[str]]:
    return {"input_ids": text.split()}


def test_both_ratios_are_above_one_when_ours_is_ahead():
    with answering("a b c") as (one, _), answering("a b c") as (two, _):
        sides = {"one_process": Streaming(one, "m"), THEIRS: Streaming(two, "m")}
        tokens, first = serve_stream._compared(sides, words, users=2, turns=2, threads=1)
    assert list(tokens.rates) == ["one_process", THEIRS] and list(first.rates) == [THEIRS, "one_process"]
    assert tokens.equal == "4 of 4 answers" and tokens.aim == first.aim == 1
    assert len(tokens.ratios) == len(first.ratios) == 2


def test_other_answers_are_not_compared():
    with answering("a b c") as (one, _), answering("d") as (two, _):
        sides = {"one_process": Streaming(one, "m"), THEIRS: Streaming(two, "m")}
        with pytest.raises(SidesDiffer, match="only 0 of 2"):
            list(serve_stream._compared(sides, words, users=1, turns=1, threads=1))


def test_it_needs_a_published_llm(tmp_path):
    args = build_parser().parse_args(["serve", "--only", "stream", "--output", str(tmp_path / "o.json")])
    (left_out,) = KINDS["serve"]["stream"].run(args, tmp_path)
    assert "give --llm" in left_out.skipped
    args.llm = str(tmp_path)
    with pytest.raises(UserError, match="is no folder with a config.json"):
        check(args, {"stream": KINDS["serve"]["stream"]})
