"""Streamed chat over HTTP with a published LLM, beside `transformers serve` on the same weights.

Users ask in text alone over `/v1/chat/completions` with `stream: true`, greedily, the next question when the answer to
the last one has ended. All servers run at once and are measured in turns.
"""

from __future__ import annotations

import http.client
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lumen_ray.bench.chat import EQUAL, WARM_UP, make_folder, questions
from lumen_ray.bench.chat_sides import Question, serving
from lumen_ray.bench.serve import DEPLOYMENTS, ONE, settings_of
from lumen_ray.bench.serve_sides import ServerSide
from lumen_ray.bench.timing import Result, SidesDiffer
from lumen_ray.errors import UserError

THEIRS = "transformers serve"
USERS = (1, 4, 16)
#: questions of a user in a turn
ROUNDS = 2
#: least ratios of tokens per second, and of their time to the first token over ours
AIM = 1.0


@dataclass(frozen=True)
class Streamed:
    """The text of an answer, and seconds from the request to its first piece."""

    text: str
    first_s: float


class Streaming:
    """A server whose `/v1/chat/completions` knows a model by a name."""

    def __init__(self, port: int, model: str):
        self.port, self.model = port, model

    def ask(self, asked: Sequence[Question], users: int) -> tuple[list[Streamed], float]:
        """The answers to questions, each of which the next free user asks, and the seconds of all together."""
        began = time.perf_counter()
        with ThreadPoolExecutor(users) as threads:
            answers = list(threads.map(self._answer, asked))
        return answers, time.perf_counter() - began

    def _answer(self, question: Question) -> Streamed:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question.text}],
            "max_tokens": question.limit,
            "temperature": 0,
            "stream": True,
        }
        began = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise UserError(f"a server answered {response.status}: {response.read()[:300]!r}", "bench_failed")
        first_s: float | None = None
        pieces: list[str] = []
        for piece in pieces_of(response):
            if first_s is None:
                first_s = time.perf_counter() - began
            pieces.append(piece)
        connection.close()
        return Streamed("".join(pieces).strip(), first_s if first_s is not None else time.perf_counter() - began)


def pieces_of(lines: Iterator[bytes] | http.client.HTTPResponse) -> Iterator[str]:
    """The texts in the server-sent events of a chat, without empty ones."""
    for line in lines:
        data = line.strip().removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            continue
        for choice in json.loads(data).get("choices", ()):
            if text := (choice.get("delta") or {}).get("content"):
                yield text


def bench(
    folder: Path, llm: str, *, threads: int = 1, turns: int = 1, users: Sequence[int] = USERS
) -> Iterator[Result]:
    """Tokens per second and times to the first token with each number of `users`. `llm`: folder of a published causal
    LLM with a chat template."""
    source = Path(llm).resolve()
    model = str(make_folder(source, folder))
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    with ExitStack() as stack:
        servers: dict[str, ServerSide] = {}
        for name in (ONE, DEPLOYMENTS):
            settings = settings_of(model, name)
            servers[name] = ServerSide(name, Path(__file__).parents[2], settings, folder / name, threads, {})
            stack.callback(servers[name].close)
        served = stack.enter_context(serving(source, threads, folder / "serve.log"))
        for server in servers.values():
            server.await_ready()
        sides = {name: Streaming(server.port, "nano") for name, server in servers.items()}
        sides[THEIRS] = Streaming(served.port, str(source))
        for each in users:
            yield from _compared(sides, tokenizer, each, turns, threads)


def _compared(sides: dict[str, Streaming], tokenizer: Any, users: int, turns: int, threads: int) -> Iterator[Result]:
    asked = questions(users * ROUNDS)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    firsts: dict[str, list[float]] = {name: [] for name in sides}
    texts: dict[str, list[str]] = {}
    for side in sides.values():
        side.ask(questions(users, WARM_UP), users)
    for _ in range(turns):
        for name, side in sides.items():
            answers, seconds = side.ask(asked, users)
            texts[name] = [answer.text for answer in answers]
            tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts[name])
            rates[name].append(tokens / seconds)
            firsts[name].append(1000 * statistics.median(answer.first_s for answer in answers))
    for name in sides:
        if name == THEIRS:
            continue
        same = sum(ours == theirs for ours, theirs in zip(texts[name], texts[THEIRS], strict=True))
        if same < EQUAL * len(asked):
            raise SidesDiffer(f"only {same} of {len(asked)} answers of {name} are equal to those of {THEIRS}")
        said: dict[str, Any] = {"equal": f"{same} of {len(asked)} answers", "budget": f"{threads} threads"}
        title = f"{users} users, {name}" if users > 1 else f"1 user, {name}"
        yield Result(f"tokens, {title}", "tokens/s", {name: rates[name], THEIRS: rates[THEIRS]}, AIM, **said)
        yield Result(f"first token p50, {title}", "ms", {THEIRS: firsts[THEIRS], name: firsts[name]}, AIM, **said)
