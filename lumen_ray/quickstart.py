"""`lumen-ray quickstart`: the whole pipeline, small but real, on one machine with nothing downloaded."""

from __future__ import annotations

import base64
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumen_ray import config
from lumen_ray.console import bar, console, say, seconds, training_note
from lumen_ray.data import files
from lumen_ray.data.command import prepared_line
from lumen_ray.errors import UserError
from lumen_ray.label.pipeline import labelled_line
from lumen_ray.presets import recipe_path

if TYPE_CHECKING:
    from lumen_ray.serve.app import Server
    from lumen_ray.serve.settings import ServeSettings

VAL_SEED = 10_000
LABELLED = 24  # images that are labelled and looked at
ROWS_PER_GROUP = 8


@contextmanager
def _step(number: int, title: str, timings: dict[str, float]) -> Iterator[None]:
    say(f"\n[bold]{number}/5 {title}[/bold]")
    started = time.monotonic()
    yield
    timings[title] = round(time.monotonic() - started, 1)
    say(f"  done in {seconds(timings[title])}")


def quickstart(
    output: str | Path,
    *,
    recipe_name: str = "quickstart",
    scenes: int = 4096,
    held_out: int = 192,
    port: int = 8000,
    keep_serving: bool = False,
) -> dict[str, Any]:
    """Prepare, train, evaluate, label and serve in `output`; returns the report of the evaluation.

    Run again, it continues: shards and stages that are finished are kept.
    """
    from lumen_ray.serve.app import prepare_serve_environment

    prepare_serve_environment()
    from lumen_ray.ray_env import init_local, shutdown
    from lumen_ray.recipe import Recipe

    output = files.local_folder(output)
    recipe = config.load(Recipe, recipe_path(recipe_name))
    serving = _serve_settings(output / "train" / "model", port)
    timings: dict[str, float] = {}
    started = time.monotonic()
    say(f"lumen-ray quickstart -> {output}/  ({os.cpu_count()} cores)")
    try:
        with _step(1, "prepare", timings):
            init_local()
            _prepare(output / "shards" / "train", scenes, recipe.seed)
            _prepare(output / "shards" / "val", held_out, VAL_SEED)
        with _step(2, "train", timings):
            model = _train(output, recipe)
        with _step(3, "evaluate", timings):
            report = _evaluate(output, model)
        with _step(4, "label", timings):
            _label(output, model)
        with _step(5, "serve", timings):
            server = _serve(output, serving.model_copy(update={"model": str(model)}))
        say(f"\nall of it in {seconds(time.monotonic() - started)}")
        (output / "timings.json").write_text(json.dumps(timings, indent=1))
        say(f"look at {output}/labels/gallery.html, {output}/served/*.png and {output}/evaluation/report.json")
        if keep_serving:
            say(f"serving at {server.url}; stop with Ctrl-C")
            server.wait()
        server.stop()
    finally:
        shutdown()
    return report


def _prepare(folder: Path, num: int, seed: int) -> None:
    from lumen_ray.data.shards.prepare import prepare_source
    from lumen_ray.data.shards.shards import read_manifest
    from lumen_ray.data.sources.scenes import ScenesSource
    from lumen_ray.ray_env import tasks_at_once

    if (folder / "manifest.json").is_file():
        origin, rows = read_manifest(folder)["origin"], read_manifest(folder)["rows"]
        if rows != num or origin.get("seed") != seed:
            raise UserError(f"'{folder}' holds {rows} other scenes; choose another --output", "exists")
        say(f"  {num} scenes are already in {folder}")
        return
    with bar("scenes") as progress:
        summary = prepare_source(
            folder,
            ScenesSource(num, seed),
            rows_per_group=ROWS_PER_GROUP,
            rows_per_file=256,
            workers=tasks_at_once(),
            progress=progress.update,
        )
    say("  " + prepared_line(summary))


def _train(output: Path, recipe: Any) -> Path:
    from lumen_ray.ray_env import cluster_resources
    from lumen_ray.train.launch import train
    from lumen_ray.train.run.resources import fitted

    recipe = fitted(cluster_resources(), recipe)
    with bar(f"train {recipe.model}") as progress:
        model = train(
            output / "shards" / "train",
            recipe,
            output / "train",
            progress=lambda line: progress.update(line["step"] + 1, recipe.total_steps, training_note(line)),
            waiting=progress.line,
        )
    stages = ", ".join(f"{stage.name} {stage.steps}" for stage in recipe.stages)
    say(f"  {recipe.total_steps} steps of {recipe.batch_size} images ({stages}) on {recipe.workers} FSDP workers")
    say(f"  model -> {model}; logs -> {output}/train/metrics.jsonl, tensorboard --logdir {output}/train/tensorboard")
    return model


def _evaluate(output: Path, model: Path) -> dict[str, Any]:
    import torch

    from lumen_ray.evaluate.report import print_report
    from lumen_ray.evaluate.run import evaluate
    from lumen_ray.inference.device import find_device
    from lumen_ray.inference.engine import Engine

    torch.set_num_threads(os.cpu_count() or 1)
    with bar("evaluate") as progress:
        report = evaluate(
            Engine.load(model, find_device()),
            output / "shards" / "val",
            output / "evaluation",
            batch_size=16,
            chat_limit=48,
            progress=progress.update,
        )
    print_report(report, console)
    say(f"  report -> {output}/evaluation/report.json")
    return report


def _label(output: Path, model: Path) -> None:
    from lumen_ray.data.shards.shards import read_manifest, read_row_group
    from lumen_ray.label.pipeline import label
    from lumen_ray.model.build import read_meta

    images = output / "images"
    images.mkdir(exist_ok=True)
    shards = output / "shards" / "val"
    rows = (
        row
        for file in read_manifest(shards)["files"]
        for index in range(len(file["row_groups"]))
        for row in read_row_group(shards, file["path"], index)
    )
    for row, _ in zip(rows, range(LABELLED), strict=False):
        (images / f"{row['image_id'].replace('/', '_')}.jpg").write_bytes(row["image"])
    with bar("label") as progress:
        summary = label(
            model,
            images,
            output / "labels",
            tasks=["detect", "segment", "pose", "caption"],
            classes=read_meta(model).classes,
            progress=lambda s: progress.update(s.done, s.total, f"{s.rate:.1f} img/s"),
        )
    say("  " + labelled_line(summary, output / "labels"))


def _requests(row: dict[str, Any], posed: Collection[str]) -> dict[str, dict[str, Any]]:
    """One request per task about one scene, from what the scene is annotated for.

    posed: the classes that the model knows keypoints of; no request for poses where there are none.
    """
    classes = list(dict.fromkeys(i["phrase"] for i in row["instances"]))
    question = next(
        (m["turns"][0]["content"] for m in row["messages"] if m["task"] == "vqa"), "how many circles are there ?"
    )
    caption = next((m["turns"][1]["content"] for m in row["messages"] if m["task"] == "caption"), ", ".join(classes))
    expression = next((p["phrase"] for p in row["phrases"] if p["task"] == "refer" and p["instances"]), classes[0])
    x1, y1, x2, y2 = (float(c) for c in row["instances"][0]["box"])
    requests = {
        "detect": {"classes": classes},
        "segment": {"classes": classes},
        "pose": {"classes": [c for c in classes if c in posed] or sorted(posed)[:1]},
        "count": {"classes": classes},
        "ground": {"text": caption},
        "refer": {"text": expression},
        "vqa": {"text": question},
        "caption": {},
        "region_caption": {"region": {"kind": "box", "points": [[x1, y1], [x2, y2]]}},
        "chat": {"text": f"find every {classes[0]}"},
    }
    if not posed:
        del requests["pose"]
    return requests


def _serve_settings(model: Path, port: int) -> ServeSettings:
    """What step 5 serves with, checked before the minutes that the steps before it take."""
    from lumen_ray.serve.app import check_port
    from lumen_ray.serve.settings import load_settings

    settings = load_settings("nano", model=str(model), port=port)
    if not os.environ.get("RAY_ADDRESS"):  # there, the cluster's own Serve may hold the port
        check_port(settings.http.host, settings.http.port)
    return settings


def _serve(output: Path, settings: ServeSettings) -> Server:
    """Starts the application, sends one request per task over HTTP and saves the drawn answers."""
    from lumen_ray.model.build import read_meta
    from lumen_ray.serve.app import run

    posed = read_meta(settings.model).skeletons
    server = run(settings, blocking=False)
    say(f"  {server.url} is up (page at /, API at /docs); log -> {server.log}")
    row = _scene_with_figure(output / "shards" / "val")
    folder = output / "served"
    folder.mkdir(exist_ok=True)
    for task, body in _requests(row, posed).items():
        answer = post(f"{server.url}/v1/{task}", body | {"image": base64.b64encode(row["image"]).decode()})
        (folder / f"{task}.json").write_text(json.dumps(answer, indent=1))
        draw_served(row["image"], task, answer, folder / f"{task}.png")
        told = answer.get("text") or answer.get("counts") or f"{len(answer.get('instances') or [])} instances"
        asked = body.get("text") or ", ".join(body.get("classes", [])) or ("a box" if "region" in body else "")
        say(f"  /v1/{task:15s} {asked[:60]!r} -> {told}")
    say(f"  drawn answers -> {folder}/*.png")
    return server


def _scene_with_figure(shards: Path) -> dict[str, Any]:
    from lumen_ray.data.shards.shards import read_manifest, read_row_group

    first = read_manifest(shards)["files"][0]
    rows = [row for i in range(len(first["row_groups"])) for row in read_row_group(shards, first["path"], i)]
    return max(rows, key=lambda row: ("pose" in row["tasks"], len(row["instances"])))


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The JSON answer to a JSON request; `UserError` with the server's words when it refuses."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        told = error.read().decode(errors="replace")
        try:
            told = json.loads(told)["error"]["message"]
        except (ValueError, KeyError, TypeError):  # not from our server: its words as they are
            told = " ".join(told.split())[:300]
        raise UserError(f"{url} answered {error.code}: {told}", "refused") from None


def draw_served(image: bytes, task: str, answer: dict[str, Any], path: Path) -> None:
    """The answer of the HTTP API drawn onto the picture it is about."""
    from PIL import Image

    from lumen_ray.data.images import decode
    from lumen_ray.structures import Answer
    from lumen_ray.viz import draw

    Image.fromarray(draw(decode(image), Answer.from_dict(answer | {"task": task}))).save(path)
