"""Prefix and branches: all prompts for an image in one pass, against one pass per prompt."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lumen_ray import config
from lumen_ray.answer import Answer
from lumen_ray.bench.timing import Result, SidesDiffer, in_turns
from lumen_ray.data.images import decode
from lumen_ray.data.scenes import render as scenes
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.protocol import EngineProtocol
from lumen_ray.inference.request import Request, make_request
from lumen_ray.model.build import LoadedModel, ModelMeta, build_model
from lumen_ray.model.settings import ModelSettings
from lumen_ray.presets import model_path
from lumen_ray.tasks import TASKS
from lumen_ray.trunk.tokenizer import LumenTokenizer

CLASSES = 80
QUESTIONS = ("how many circles are there ?", "is there a red square ?", "what colour is the triangle ?")
TOLERANCE = 1e-4
AIM = 10.0
REPEATS = 10  # of the single pass per turn: both sides are timed over seconds, so that noise affects them alike


def fresh_engine(preset: str = "nano", seed: int = 0) -> Engine:
    """An engine with random weights, whose speed is that of a trained model."""
    settings = config.load(ModelSettings, model_path(preset))
    texts = [t for task in TASKS.values() for t in task.templates] + class_names(CLASSES) + list(QUESTIONS)
    tokenizer = LumenTokenizer.train(texts, settings.vocab_size)
    model = build_model(settings, len(tokenizer), seed).eval()
    return Engine(LoadedModel(model, settings, tokenizer, ModelMeta(settings.name), "0" * 12))


def class_names(count: int) -> list[str]:
    """`count` different short names."""
    names = [f"{colour} {shape}" for colour in scenes.COLOURS for shape in scenes.SHAPES]
    return [names[i % len(names)] + (f" {i // len(names)}" if i >= len(names) else "") for i in range(count)]


def prompts(classes: int) -> list[Request]:
    """One request per prompt: a class each, a caption, three questions."""
    detections = [make_request("detect", classes=[name]) for name in class_names(classes)]
    return [*detections, make_request("caption"), *(make_request("vqa", text=text) for text in QUESTIONS)]


def together(single: list[Request]) -> list[Request]:
    """The same prompts with all classes in one request."""
    classes = [phrase for request in single for phrase in request.phrases]
    return [make_request("detect", classes=classes), *(request for request in single if not request.phrases)]


def one_pass(engine: EngineProtocol, image: np.ndarray, single: list[Request], limit: int) -> list[Answer]:
    """Answers in the order of `single`, from one pass."""
    detect, *texts = engine.run([image], [together(single)], max_new_tokens=limit)[0]
    return [Answer("detect", detect.size, [p], route=detect.route) for p in detect.predictions] + texts


def pass_per_prompt(engine: EngineProtocol, image: np.ndarray, single: list[Request], limit: int) -> list[Answer]:
    """Answers in the order of `single`, from one pass each."""
    return [engine.run([image], [[request]], max_new_tokens=limit)[0][0] for request in single]


@torch.inference_mode()
def raw_outputs(engine: Engine, image: np.ndarray, requests: list[Request], limit: int) -> list[torch.Tensor]:
    """Outputs before thresholds: link embeddings of the decoder that serves `detect` and, if it reads dense features,
    its logits and boxes at every place."""
    name = engine.serving["detect"]
    out = engine.trunk.links([image], [requests], max_new_tokens=limit)
    if name not in out.decoder_inputs:
        return []
    link = out.decoder_inputs[name].link
    decoder: Any = engine.decoders[name].decoder
    if decoder.spec.reads != "dense":
        return [link.embeddings]
    raw: Any = decoder(link, out.dense)
    return [link.embeddings, raw.logits, decoder.all_boxes(raw) / engine.image_size]


def difference(engine: Engine, image: np.ndarray, single: list[Request], limit: int) -> float:
    """Largest difference between the sides, relative to the largest value; infinite if a text or a count differs."""
    for one, other in zip(
        one_pass(engine, image, single, limit), pass_per_prompt(engine, image, single, limit), strict=True
    ):
        if one.text != other.text or [len(p) for p in one.predictions] != [len(p) for p in other.predictions]:
            return float("inf")
    packed = raw_outputs(engine, image, together(single), limit)
    alone = [raw_outputs(engine, image, [request], limit) for request in single if request.phrases]
    differences = []
    for kind, values in enumerate(packed):
        expected = torch.cat([outputs[kind] for outputs in alone])
        differences.append((values - expected).abs().max() / expected.abs().max().clamp_min(1.0))
    return float(torch.stack(differences).max())  # not Python's `max`, which may lose a NaN


def bench(
    engine: Engine, *, classes: int = CLASSES, turns: int = 5, max_new_tokens: int = 16, threads: int | None = None
) -> Result:
    """Images per second of both sides. Raises `SidesDiffer` if their results differ."""
    threads = threads or torch.get_num_threads()
    image = decode(scenes.scene_row(0, 0, engine.image_size)["image"])
    single = prompts(classes)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        worst = difference(engine, image, single, max_new_tokens)  # warms both sides up, too
        if not worst <= TOLERANCE:
            raise SidesDiffer(f"one pass and a pass per prompt differ by {worst:.2e}, more than {TOLERANCE:g}")

        def rate(side: Callable[..., object], repeats: int) -> float:
            began = time.perf_counter()
            for _ in range(repeats):
                side(engine, image, single, max_new_tokens)
            return repeats / (time.perf_counter() - began)

        rates = in_turns(
            {"one pass": lambda: rate(one_pass, REPEATS), "a pass per prompt": lambda: rate(pass_per_prompt, 1)}, turns
        )
    finally:
        torch.set_num_threads(before)
    return Result(
        "prompts",
        "images/s",
        rates,
        AIM,
        equal=f"texts, counts; links, heatmaps and boxes to {worst:.1e} (at most {TOLERANCE:g})",
        budget=f"{threads} threads",
        details={"prompts": len(single), "model": engine.preset, "max_new_tokens": max_new_tokens},
    )


def load_engine(model: str | Path | None, preset: str = "nano") -> Engine:
    """The engine of a model folder, or one with random weights if none is given."""
    return Engine.load(model) if model else fresh_engine(preset)
