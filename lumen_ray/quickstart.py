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

from lumen_ray import api
from lumen_ray.console import bar, console, say, seconds
from lumen_ray.data import files
from lumen_ray.data.command import prepared_line
from lumen_ray.errors import UserError
from lumen_ray.training_report import TrainingReport

if TYPE_CHECKING:
    from lumen_ray.recipe import Recipe
    from lumen_ray.serve.app import Server
    from lumen_ray.serve.settings import ServeSettings

VAL_SEED = 10_000
LABELLED = 24  # images to label
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
    """Prepares, trains, evaluates, labels and serves in `output`; returns the report of the evaluation.

    Run again, it continues: shards, finished stages and the newest checkpoint (of a recipe with `checkpoint_every`) are
    kept. Raises `UserError` for an unknown recipe, a port that is taken, and an `output` that holds other scenes.
    """
    from lumen_ray.serve.app import prepare_serve_environment

    prepare_serve_environment()
    from lumen_ray.ray_env import init_local, shutdown

    output = files.local_folder(output)
    recipe = api.load_recipe(recipe_name)
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
        say(f"\nall steps in {seconds(time.monotonic() - started)}")
        (output / "timings.json").write_text(json.dumps(timings, indent=1))
        say(f"see {output}/labels/gallery.html, {output}/served/*.png and {output}/evaluation/report.json")
        if keep_serving:
            say(f"serving at {server.url}; stop with Ctrl-C")
            server.wait()
        server.stop()
    finally:
        shutdown()
    return report


def _prepare(folder: Path, num: int, seed: int) -> None:
    from lumen_ray.data.shards.shards import read_manifest

    if (folder / "manifest.json").is_file():
        manifest = read_manifest(folder)
        if manifest["rows"] != num or manifest["origin"].get("seed") != seed:
            raise UserError(f"'{folder}' holds {manifest['rows']} other scenes; choose another --output", "exists")
        say(f"  {num} scenes are already in {folder}")
        return
    with bar("scenes") as progress:
        summary = api.prepare(
            "scenes",
            folder,
            num=num,
            seed=seed,
            rows_per_group=ROWS_PER_GROUP,
            rows_per_file=256,
            progress=progress.update,
        )
    say("  " + prepared_line(summary))


def _train(output: Path, recipe: Recipe) -> Path:
    from lumen_ray.ray_env import cluster_resources
    from lumen_ray.train.run.resources import fitted

    recipe = fitted(cluster_resources(), recipe)
    with bar(f"train {recipe.model}") as progress:
        report = TrainingReport(progress, recipe.total_steps, output / "train")
        model = api.train(
            output / "shards" / "train",
            output / "train",
            recipe=recipe,
            progress=report.update,
            waiting=progress.line,
        )
    stages = ", ".join(f"{stage.name} {stage.steps}" for stage in recipe.stages)
    say(f"  {recipe.total_steps} steps of {recipe.batch_size} images ({stages}) on {recipe.workers} FSDP workers")
    say(f"  model -> {model}; logs -> {output}/train/metrics.jsonl, tensorboard --logdir {output}/train/tensorboard")
    return Path(model)


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
    from lumen_ray.label.pipeline import labelled_line

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
        summary = api.label(
            images,
            output / "labels",
            model=model,
            tasks=["detect", "segment", "pose", "caption"],
            progress=lambda s: progress.update(s.done, s.total, f"{s.rate:.1f} img/s"),
        )
    say("  " + labelled_line(summary, output / "labels"))


def _requests(row: dict[str, Any], posed: Collection[str]) -> dict[str, dict[str, Any]]:
    """One request body per task about one scene, with classes, texts and a region from its annotations.

    posed: the classes that the model has keypoints for; without any there is no pose request.
    """
    classes = list(dict.fromkeys(i["phrase"] for i in row["instances"]))
    question = next(
        (m["turns"][0]["content"] for m in row["messages"] if m["task"] == "vqa"), "how many circles are there ?"
    )
    caption = next((m["turns"][1]["content"] for m in row["messages"] if m["task"] == "caption"), ", ".join(classes))
    expression = next((p["phrase"] for p in row["phrases"] if p["task"] == "refer" and p["instances"]), classes[0])
    x1, y1, x2, y2 = (float(c) for c in row["instances"][0]["box"])
    requests: dict[str, dict[str, Any]] = {
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
    """The settings of step 5, checked before the minutes that steps 1 to 4 take."""
    from lumen_ray.serve.app import check_port
    from lumen_ray.serve.config_file import load_settings

    settings = load_settings("nano", model=str(model), port=port)
    if not os.environ.get("RAY_ADDRESS"):  # there, the cluster's own Serve may hold the port
        check_port(settings.http.host, settings.http.port)
    return settings


def _serve(output: Path, settings: ServeSettings) -> Server:
    """Starts the server, sends one request per task over HTTP and saves the answers, as JSON and drawn."""
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
        result = answer.get("text") or answer.get("counts") or f"{len(answer.get('instances') or [])} instances"
        prompt = body.get("text") or ", ".join(body.get("classes", [])) or ("a box" if "region" in body else "")
        say(f"  /v1/{task:15s} {prompt[:60]!r} -> {result}")
    say(f"  drawn answers -> {folder}/*.png")
    return server


def _scene_with_figure(shards: Path) -> dict[str, Any]:
    """The row of the first shard file with most instances, of those with keypoints if there are any."""
    from lumen_ray.data.shards.shards import read_manifest, read_row_group

    first = read_manifest(shards)["files"][0]
    rows = [row for i in range(len(first["row_groups"])) for row in read_row_group(shards, first["path"], i)]
    return max(rows, key=lambda row: ("pose" in row["tasks"], len(row["instances"])))


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The JSON answer to a JSON request. Raises `UserError` with the server's message if it refuses."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        message = error.read().decode(errors="replace")
        try:
            message = json.loads(message)["error"]["message"]
        except (ValueError, KeyError, TypeError):  # another server's error body
            message = " ".join(message.split())[:300]
        raise UserError(f"{url} answered {error.code}: {message}", "refused") from None


def draw_served(image: bytes, task: str, answer: dict[str, Any], path: Path) -> None:
    """Draws an answer of the HTTP API on its image and writes it to `path` as PNG."""
    from PIL import Image

    from lumen_ray.answer import Answer
    from lumen_ray.data.images import decode
    from lumen_ray.viz import draw

    Image.fromarray(draw(decode(image), Answer.from_dict(answer | {"task": task}))).save(path)
