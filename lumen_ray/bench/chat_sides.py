"""The sides of the chat bench: the engine, and its peers, which write the same answers to the same questions."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from lumen_ray.errors import UserError
from lumen_ray.inference.encoded_images import EncodedImages
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import branch_span


@dataclass(frozen=True)
class Question:
    """A question about image `image`, and the most tokens of its answer."""

    text: str
    image: int
    limit: int


@dataclass(frozen=True)
class Written:
    """The text of an answer and its number of tokens, without the end token."""

    text: str
    length: int


class Side(Protocol):
    """One side of a comparison."""

    def write(self, asked: list[Question], users: int) -> list[Written]:
        """The answers to questions of `users` users at once, in their order."""


class Ours:
    """The engine. Each user is a thread that asks one question after the other."""

    def __init__(self, engine: Engine, images: Sequence[np.ndarray] = ()):
        """`images`: those asked about are encoded once in each turn; without any, the questions are text alone, and
        answers end where the LLM ends them."""
        self.engine = engine
        if images:
            engine.trunk.tokenizer.end_ids = frozenset()
        self.images = images
        self.encoded: dict[int, EncodedImages] = {}

    def write(self, asked: list[Question], users: int) -> list[Written]:
        """The answers to questions, each of which the next free user asks."""
        asked_about = {question.image for question in asked}
        self.encoded = {n: self.engine.encode([image]) for n, image in enumerate(self.images) if n in asked_about}
        with ThreadPoolExecutor(users) as threads:
            return list(threads.map(self._answer, asked))

    def _answer(self, question: Question) -> Written:
        images = self.encoded[question.image] if self.encoded else [None]
        request = make_request("chat", text=question.text)
        ((answer,),) = self.engine.run(images, [[request]], max_new_tokens=question.limit, route_only=True)
        assert answer.tokens is not None, "free chat has tokens"
        return Written(answer.text or "", len(answer.tokens))


class _Lengths(StoppingCriteria):
    """Ends each row at its own length."""

    def __init__(self, limits: Sequence[int]):
        self.limits = torch.tensor(limits)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self.limits


class Library:
    """`generate` of `transformers` on a padded batch of all users' questions. The image tokens are the engine's, made
    once before the clock starts."""

    def __init__(self, llm: Path, engine: Engine, images: Sequence[np.ndarray] = ()):
        self.tokenizer: Any = AutoTokenizer.from_pretrained(llm)
        self.model: Any = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()
        self.prefixes: list[Tensor] = []
        with torch.inference_mode():
            for image in images:
                pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
                self.prefixes.append(engine.trunk.trunk.extract_features(pixels)[0][0])
        self.engine = engine

    def write(self, asked: list[Question], users: int) -> list[Written]:
        """As `Ours.write`, in batches of `users` questions."""
        batches = [asked[start : start + users] for start in range(0, len(asked), users)]
        return [answer for batch in batches for answer in self._batch(batch)]

    @torch.inference_mode()
    def _batch(self, asked: list[Question]) -> list[Written]:
        rows = [self._embed(question) for question in asked]
        longest = max(len(row) for row in rows)
        embeds = torch.stack([torch.cat([row.new_zeros(longest - len(row), row.shape[1]), row]) for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        limits = [question.limit for question in asked]
        ends = self.model.generation_config.eos_token_id
        found = self.model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            max_new_tokens=max(limits),
            do_sample=False,
            eos_token_id=None if self.prefixes else ends,
            stopping_criteria=StoppingCriteriaList([_Lengths(limits)]),
        )
        ends = [] if self.prefixes else [ends] if isinstance(ends, int) else ends
        rows_of_tokens = [_until(row.tolist()[:limit], ends) for row, limit in zip(found, limits, strict=True)]
        decode = self.engine.trunk.tokenizer.decode
        return [Written(decode(tokens), len(tokens)) for tokens in rows_of_tokens]

    def _embed(self, question: Question) -> Tensor:
        """The embedded prompt [tokens, width]."""
        embed = self.model.get_input_embeddings()
        if self.prefixes:
            ids = branch_span(0, Branch(0, question.text), self.engine.trunk.tokenizer).tokens
            return torch.cat([self.prefixes[question.image], embed(torch.tensor(ids))])
        messages = [{"role": "user", "content": question.text}]
        chat = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return embed(torch.tensor(chat["input_ids"]))


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Tokens before the first end token."""
    places = [tokens.index(end) for end in ends if end in tokens]
    return tokens[: min(places)] if places else tokens


class Served:
    """`transformers serve` as a process of its own on this machine; each user is a client of its HTTP API."""

    def __init__(self, llm: Path, port: int):
        self.llm, self.port = llm, port

    def write(self, asked: list[Question], users: int) -> list[Written]:
        """As `Ours.write`."""
        with ThreadPoolExecutor(users) as threads:
            return list(threads.map(self._answer, asked))

    def _answer(self, question: Question) -> Written:
        body = {
            "model": str(self.llm),
            "messages": [{"role": "user", "content": question.text}],
            "max_tokens": question.limit,
            "temperature": 0,
            "stream": False,
        }
        url = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=600) as response:
            answer = json.loads(response.read())
        return Written(answer["choices"][0]["message"]["content"].strip(), answer["usage"]["completion_tokens"])


#: What `transformers serve` logs when it does not batch after all.
_SEQUENTIAL = "Falling back to sequential"


@contextmanager
def serving(llm: Path, threads: int, log: Path) -> Iterator[Served]:
    """Runs `transformers serve` with continuous batching while the context lasts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    options += ["--continuous-batching", "--cb-num-blocks", "512", "--cb-block-size", "32"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    code = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "serve", str(llm), *options]
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
        try:
            _await_port(process, port, log)
            yield Served(llm, port)
        finally:
            process.terminate()
    if _SEQUENTIAL in log.read_text():
        raise UserError("transformers serve fell back to one answer at a time; its speed means nothing", "no_batching")


def _await_port(process: subprocess.Popen[bytes], port: int, log: Path, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.5)
    raise UserError(f"transformers serve did not start: {log.read_text()[-400:]}", "no_server")


#: Run by the interpreter of an environment that holds vLLM: reads JSON [folder, threads, users, turns of [text,
#: limit]], and prints RESULT and JSON [tokens per second of each turn, texts of the last].
_VLLM = """
import json, os, sys, time
folder, threads, users, turns = json.loads(sys.stdin.read())
cores = sorted(os.sched_getaffinity(0))[:threads]
os.environ.update(VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, cores)), VLLM_CPU_KVCACHE_SPACE="2", HF_HUB_OFFLINE="1")
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(folder, dtype="float32", max_model_len=1024, enforce_eager=True, max_num_seqs=users,
              enable_prefix_caching=False)
    rates = []
    for asked in [[[text, 4] for text, _ in turns[0]], *turns]:
        chats = [[{"role": "user", "content": text}] for text, _ in asked]
        settings = [SamplingParams(temperature=0, max_tokens=limit) for _, limit in asked]
        began = time.perf_counter()
        found = llm.chat(chats, settings, use_tqdm=False)
        rates.append(sum(len(answer.outputs[0].token_ids) for answer in found) / (time.perf_counter() - began))
    print("RESULT", json.dumps([rates[1:], [answer.outputs[0].text.strip() for answer in found]]))
"""


def run_vllm(
    python: str, llm: Path, asked: list[Question], users: int, turns: int, threads: int
) -> tuple[list[float], list[str]]:
    """(tokens per second of each turn, texts of the last one's answers) of vLLM in the environment of `python`. Raises
    `subprocess.CalledProcessError` if it fails."""
    given = json.dumps([str(llm), threads, users, [[[q.text, q.limit] for q in asked]] * turns])
    done = subprocess.run([python, "-c", _VLLM], input=given, capture_output=True, text=True, timeout=3600, check=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    rates, texts = json.loads(line.removeprefix("RESULT"))
    return rates, texts
