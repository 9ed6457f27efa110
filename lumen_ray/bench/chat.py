"""Chat with a published LLM: answers of the engine to many users at once, against `transformers` on the same weights.

Every side writes the same questions' answers greedily in float32, of lengths that are drawn from `LENGTHS`: questions
ask for long stories, and beside `transformers serve`, where that is impossible, end tokens are ignored. Users ask their
next question when they have their answer; `generate` of `transformers` answers the users' questions in padded
batches, each row up to its own length. vLLM runs in an environment of its own, on text alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lumen_ray import config
from lumen_ray.bench.timing import Result, SidesDiffer, in_turns
from lumen_ray.errors import UserError
from lumen_ray.inference.decode_loop import TextPrompt
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request
from lumen_ray.inference.sampling import GREEDY, Sampler
from lumen_ray.inference.trunk_stage import EncodedImages
from lumen_ray.model.convert.pretrained import Sources, assemble
from lumen_ray.model.settings import ModelSettings
from lumen_ray.presets import model_path
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import branch_span

USERS = 16
IMAGES = 4
LENGTHS = (16, 128)
#: questions per user in a turn
ROUNDS = 3
#: the required ratios of tokens per second
AIMS = {"images": 2.0, "single": 1.0, "serve": 1.3, "vllm": 0.7}
#: keys and values of `USERS` answers about one image over those of one answer, at most
MEMORY_AIM = 1.3
#: share of answers that must be equal on both sides: sums in another order turn a choice between near-equal logits
EQUAL = 0.9
SIDE, LARGE_SIDE = 224, 448  # pixels of the input: 256 and 1,024 image tokens
ENCODER: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
SUBJECTS = (
    "a lighthouse", "a slow train", "two brothers", "the moon", "an old clock", "a garden", "a lost key", "the sea",
    "a brave mouse", "a long winter", "a bakery", "a red kite", "the desert", "a violin", "a small robot", "a forest",
)  # fmt: skip


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


def questions(count: int, lengths: tuple[int, int] | None = None, seed: int = 0) -> list[Question]:
    """Questions in the order in which they are asked, the images in turn. `lengths`: see `LENGTHS`."""
    draw = random.Random(seed)
    return [
        Question(
            f"Tell me a long story about {SUBJECTS[n % len(SUBJECTS)]}.",
            n % IMAGES,
            draw.randint(*(lengths or LENGTHS)),
        )
        for n in range(count)
    ]


def make_model(llm: Path, folder: Path, side: int = SIDE) -> Engine:
    """The engine of a published LLM behind small encoders with random weights, which cost next to nothing."""
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**ENCODER, image_size=side, intermediate_size=64)).save_pretrained(folder / "clip")
    Dinov2Model(Dinov2Config(**ENCODER, image_size=side, mlp_ratio=2)).save_pretrained(folder / "dinov2")
    preset = config.load(ModelSettings, model_path("nano"))
    vision = {"clip": {**ENCODER, "intermediate_size": 64}, "dinov2": {**ENCODER, "mlp_ratio": 2}, "mlp_ratio": 2}
    changes = {"image_size": side, "vision": vision, "prefix_attention": "causal", "tokens_read_stem": False}
    settings = ModelSettings.model_validate(preset.model_dump() | changes)
    assemble(settings, Sources(llm, folder / "clip", folder / "dinov2"), folder / "model")
    return Engine.load(folder / "model")


def pictures(count: int, side: int) -> list[np.ndarray]:
    """Images of noise, uint8 [side, side, 3]."""
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count)]


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


def compare(name: str, ours: Ours, other: Any, theirs: str, users: int, turns: int, threads: int) -> Result:
    """Tokens per second of both sides. Raises `SidesDiffer` if fewer than `EQUAL` of the answers are equal."""
    sides = {"engine": ours, theirs: other}
    asked = questions(users * ROUNDS)
    answers: dict[str, list[Written]] = {}
    for side in sides.values():
        side.write(questions(users, (2, 4)), users)  # warms up

    def rate(name: str) -> float:
        began = time.perf_counter()
        answers[name] = sides[name].write(asked, users)
        return sum(answer.length for answer in answers[name]) / (time.perf_counter() - began)

    rates = in_turns({name: partial(rate, name) for name in sides}, turns)
    same = sum(one.text == two.text for one, two in zip(*answers.values(), strict=True))
    if same < EQUAL * len(asked):
        raise SidesDiffer(f"only {same} of {len(asked)} answers are equal to those of {theirs}")
    lengths = [answer.length for answer in answers["engine"]]
    return Result(
        name,
        "tokens/s",
        rates,
        AIMS[name],
        equal=f"{same} of {len(asked)} answers",
        budget=f"{threads} threads",
        details={"users": users, "answers": len(asked), "tokens": [min(lengths), max(lengths)]},
    )


def memory(engine: Engine) -> Result:
    """Keys and values of `USERS` short answers about one image of 1,024 tokens, over those of one."""
    stage = engine.trunk
    stage.tokenizer.end_ids = frozenset()  # so that they are not done at once
    (picture,) = pictures(1, LARGE_SIDE)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None]
    branch = Branch(0, "What is this?")
    ids = branch_span(0, branch, stage.tokenizer).tokens

    def held(answers: int) -> float:
        prefix = stage.trunk.encode(pixels)
        prompts = [TextPrompt(branch, Sampler(GREEDY, ids), 4) for _ in range(answers)]
        most = 0
        writings = stage.loop.submit(prefix, prompts)

        def on_token(_: Any) -> None:
            nonlocal most
            most = max(most, stage.loop.bytes_held)

        stage.loop.wait(writings, on_token)
        return float(most)

    one, many = held(1), held(USERS)
    return Result(
        "memory",
        "MB",
        {"one answer": [one / 1e6], f"{USERS} answers": [many / 1e6]},
        1 / MEMORY_AIM,
        note=f"{len(ids) + 4} tokens of question and answer each, {prefix_tokens(engine)} of the image",
        details={"image_tokens": prefix_tokens(engine), "own_tokens": len(ids) + 4},
    )


def prefix_tokens(engine: Engine) -> int:
    return engine.trunk.trunk.settings.image_tokens((engine.image_size, engine.image_size))


#: Run by the interpreter of an environment that holds vLLM: reads JSON [folder, threads, turns of [text, limit]], and
#: prints RESULT and JSON [tokens per second of each turn, texts of the last].
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


def beside_vllm(engine: Engine, llm: Path, python: str, users: int, turns: int, threads: int) -> Result:
    """Tokens per second on text alone, beside vLLM in an environment of its own, one after the other: vLLM keeps its
    memory and threads while it lives."""
    asked = questions(users * ROUNDS)
    ours = Ours(engine)
    answers = ours.write(questions(users, (2, 4)), users)  # warms up
    rates = []
    for _ in range(turns):
        began = time.perf_counter()
        answers = ours.write(asked, users)
        rates.append(sum(answer.length for answer in answers) / (time.perf_counter() - began))
    given = json.dumps([str(llm), threads, users, [[[q.text, q.limit] for q in asked]] * turns])
    done = subprocess.run([python, "-c", _VLLM], input=given, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        return Result("vllm", "tokens/s", {}, skipped=f"vLLM failed: {done.stderr.strip().splitlines()[-1:]}")
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    theirs, texts = json.loads(line.removeprefix("RESULT"))
    same = sum(answer.text == text for answer, text in zip(answers, texts, strict=True))
    return Result(
        "vllm",
        "tokens/s",
        {"engine": rates, "vllm": theirs},
        AIMS["vllm"],
        equal=f"{same} of {len(asked)} answers",
        budget=f"{threads} threads",
    )


def check(llm: str | None) -> None:
    """Raises `UserError` if there is no such LLM."""
    if llm is not None and not (Path(llm) / "config.json").is_file():
        raise UserError(
            f"--llm '{llm}' is no folder with a config.json; give that of a published LLM", "invalid_option"
        )


def bench(
    name: str,
    folder: Path,
    llm: str | None,
    *,
    vllm: str | None = None,
    turns: int = 3,
    users: int = USERS,
    threads: int | None = None,
) -> Result:
    """One comparison: 'images', 'single', 'serve', 'vllm' or 'memory'; see `AIMS`. `llm`: folder of a published causal
    LLM with a chat template; without one nothing is measured. `vllm`: Python of an environment with vLLM."""
    if llm is None:
        return Result(name, "tokens/s", {}, skipped="give --llm FOLDER, a published LLM with a chat template")
    if name == "serve" and importlib.util.find_spec("openai") is None:
        return Result(name, "tokens/s", {}, skipped="install 'transformers[serving]'")
    if name == "vllm" and vllm is None:
        return Result(name, "tokens/s", {}, skipped="give --vllm PYTHON, of an environment with vllm or vllm-cpu")
    source = Path(llm).resolve()
    before = torch.get_num_threads()
    torch.set_num_threads(threads := threads or before)
    try:
        if name == "memory":
            return memory(make_model(source, folder, LARGE_SIDE))
        engine = make_model(source, folder)
        if name == "serve":
            with serving(source, threads, folder / "serve.log") as served:
                return compare(name, Ours(engine), served, "transformers serve", users, turns, threads)
        if name == "vllm" and vllm is not None:
            return beside_vllm(engine, source, vllm, users, turns, threads)
        images = pictures(IMAGES, SIDE)
        library = Library(source, engine, images)
        users = 1 if name == "single" else users
        return compare(name, Ours(engine, images), library, "transformers generate", users, turns, threads)
    finally:
        torch.set_num_threads(before)
