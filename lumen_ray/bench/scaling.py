"""Replicas of every deployment over time while the load of one task rises and falls, as a picture.

    python -m lumen_ray.bench.scaling docs/scaling.svg

Serves `nano-experts` with random weights, without its decoders of pictures, and asks for boxes alone, by the last of
its decoders that finds them.
"""

from __future__ import annotations

import base64
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from lumen_ray import config
from lumen_ray.data.scenes.render import encode_jpeg
from lumen_ray.decoders.registry import DECODERS, serves
from lumen_ray.model.build import ModelMeta, build_model, save_model
from lumen_ray.model.settings import ModelSettings, read_settings
from lumen_ray.presets import model_path
from lumen_ray.serve.app import APP_NAME, run
from lumen_ray.serve.settings import Autoscaling, Deployment, Http, ModelDeployment, ServeSettings, TrunkDeployment
from lumen_ray.trunk.tokenizer import LumenTokenizer

#: seconds before, of and after the load, and between samples
BEFORE_S, LOAD_S, AFTER_S, EVERY_S = 10, 45, 45, 0.5
CLIENTS = 8
TASK = "detect"
COLOURS = ("#4c78a8", "#72b7b2", "#54a24b", "#e4572e", "#b279a2")
WIDTH, ROW, LEFT, TOP = 760, 64, 150, 34


@dataclass
class Sample:
    """`replicas` that run, by deployment; `answers`: of the load since the last sample, per second."""

    seconds: float
    replicas: dict[str, int]
    answers: float


def model(folder: Path) -> Path:
    """The preset with random weights."""
    preset = config.load_yaml(model_path("nano-experts"))
    drawing = {name for name in DECODERS if serves(name, "generate") or serves(name, "edit")}
    settings = config.validate(ModelSettings, {k: v for k, v in preset.items() if k not in drawing}, "nano-experts")
    tokenizer = LumenTokenizer.train(["detect red circle and blue square"], settings.vocab_size)
    state = build_model(settings, len(tokenizer)).state_dict()
    return save_model(folder, state, settings, tokenizer, ModelMeta("nano-experts", ["red circle"]))


def settings_of(folder: Path, port: int) -> ServeSettings:
    """Every deployment may have up to three replicas, of little CPU each, so that only load decides."""
    scales = Autoscaling(
        min_replicas=1, max_replicas=3, target_ongoing_requests=2, upscale_delay_s=2, downscale_delay_s=10
    )
    names = read_settings(folder).decoder_names
    return ServeSettings(
        model=str(folder),
        http=Http(port=port),
        ingress=Deployment(num_cpus=0.1, max_ongoing_requests=64),
        trunk=TrunkDeployment(num_cpus=0.1, max_ongoing_requests=32, autoscaling=scales),
        decoders=dict.fromkeys(names, ModelDeployment(num_cpus=0.1, autoscaling=scales)),
        serving={TASK: [name for name in names if serves(name, TASK)][-1]},
    )


def record(folder: Path) -> list[Sample]:
    """Serves the model and samples its replicas around a step in load."""
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = run(settings_of(model(folder), port), blocking=False)
    answered: Counter[str] = Counter()
    is_over = threading.Event()
    clients = [threading.Thread(target=_ask, args=(server.url, is_over, answered)) for _ in range(CLIENTS)]
    samples: list[Sample] = []
    start, known = time.monotonic(), 0
    try:
        while (now := time.monotonic() - start) < BEFORE_S + LOAD_S + AFTER_S:
            if now > BEFORE_S and clients[0].ident is None:
                for client in clients:
                    client.start()
            if now > BEFORE_S + LOAD_S:
                is_over.set()
            found = serve.status().applications[APP_NAME].deployments
            replicas = {
                name: sum(n for state, n in one.replica_states.items() if state == "RUNNING")
                for name, one in found.items()
            }
            count = answered["all"]
            since = samples[-1].seconds if samples else -EVERY_S
            samples.append(Sample(now, replicas, (count - known) / (now - since)))
            known = count
            time.sleep(EVERY_S)
    finally:
        is_over.set()
        for client in clients:
            if client.ident is not None:
                client.join()
        server.end()
    return samples


def _ask(url: str, is_over: threading.Event, answered: Counter[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)
    body = {"image": base64.b64encode(encode_jpeg(pixels)).decode(), "classes": ["red circle", "blue square"]}
    with httpx.Client(base_url=url, timeout=90) as client:
        while not is_over.is_set():
            if client.post(f"/v1/{TASK}", json=body).status_code == 200:
                answered["all"] += 1


def draw(samples: Sequence[Sample], load: tuple[float, float]) -> str:
    """An SVG: a row of steps for each deployment, and one of answers; the time of the `load` is shaded."""
    names = list(samples[0].replicas)
    most = float(max(max(sample.replicas.values()) for sample in samples))
    end, height = samples[-1].seconds, TOP + ROW * (len(names) + 1) + 30

    def x(seconds: float) -> float:
        return LEFT + (WIDTH - LEFT - 20) * seconds / end

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<rect x="{x(load[0]):.1f}" y="{TOP - 14}" width="{x(load[1]) - x(load[0]):.1f}" '
        f'height="{height - TOP - 12}" fill="#f3efe2"/>',
        f'<text x="{x(load[0]) + 6:.1f}" y="{TOP - 20}">{CLIENTS} clients ask for boxes</text>',
    ]
    for row, name in enumerate(names):
        values = [(sample.seconds, float(sample.replicas[name])) for sample in samples]
        parts += _row(name, "replicas", values, most, row, COLOURS[row % len(COLOURS)], x)
    answers = [(sample.seconds, sample.answers) for sample in samples]
    fastest = max(1.0, *(value for _, value in answers))
    parts += _row("answers", "per second", answers, fastest, len(names), "#777777", x)
    parts += [
        f'<text x="{x(second):.1f}" y="{height - 8}" text-anchor="middle">{second:g} s</text>'
        for second in range(0, int(end) + 1, 20)
    ]
    return "\n".join([*parts, "</svg>\n"])


def _row(
    name: str,
    unit: str,
    values: Sequence[tuple[float, float]],
    most: float,
    row: int,
    colour: str,
    x: Callable[[float], float],
) -> list[str]:
    """Name, largest value and the steps of one row, which is as high as the value `most`."""
    bottom = TOP + ROW * (row + 1) - 8
    points: list[str] = []
    before = None
    for seconds, value in [*values, (values[-1][0], None)]:
        if value == before:
            continue
        if before is not None:
            points.append(f"{x(seconds):.1f},{bottom - (ROW - 22) * before / most:.1f}")
        if value is not None:
            points.append(f"{x(seconds):.1f},{bottom - (ROW - 22) * value / most:.1f}")
        before = value
    largest = max(value for _, value in values)
    return [
        f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{bottom}" y2="{bottom}" stroke="#cccccc"/>',
        f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>',
        f'<text x="10" y="{bottom - 22}" font-weight="bold">{name}</text>',
        f'<text x="10" y="{bottom - 6}" fill="#555555">{unit}, up to {largest:.3g}</text>',
    ]


def main(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        samples = record(Path(folder) / "model")
    Path(path).write_text(draw(samples, (BEFORE_S, BEFORE_S + LOAD_S)))
    most = {name: max(sample.replicas[name] for sample in samples) for name in samples[0].replicas}
    print(f"most replicas: {most}; at the end: {samples[-1].replicas}; picture -> {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
