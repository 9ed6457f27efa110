"""The jobs of this package as Python functions: `prepare`, `train`, `evaluate`, `calibrate`, `label`, `answer_batch`,
`export_labels` and `serve`.

Import them from `lumen_ray`. The command line calls the same functions, so options and results are the same. All of
them raise `UserError` (a `ValueError`: one sentence, with a machine-readable `reason`) for input that the caller must
change. Ray reads its settings when it is imported, so call them before your own `import ray`, or start Ray yourself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumen_ray.errors import UserError

if TYPE_CHECKING:
    from lumen_ray.evaluate.calibrate import Fit
    from lumen_ray.exemplars import ClassByExample
    from lumen_ray.inference.engine import Engine
    from lumen_ray.label.progress import Status
    from lumen_ray.recipe import Recipe
    from lumen_ray.serve.app import Server
    from lumen_ray.serve.settings import ServeSettings

PathOrUrl = str | PathLike[str]


def prepare(
    source: str,
    output: PathOrUrl,
    *,
    shuffle_seed: int = 0,
    rows_per_group: int = 8,
    rows_per_file: int = 512,
    overwrite: bool = False,
    max_rejected: str | float | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Writes training shards from synthetic scenes or annotated data; returns a summary.

    source: "scenes", "coco", "panoptic", "voc", "yolo", "refer", "chat", "vqa", "pairs" or "edits".
    output: shard folder to write: a path, s3:// or gs://.
    shuffle_seed: seed of the order of the rows.
    rows_per_group: images per row group; batch sizes in training are multiples of it.
    rows_per_file: images per file, the unit of work.
    overwrite: replace the shards in `output`.
    max_rejected: largest share of any kind of record that may be rejected, in percent, such as "5%"; None: any.
    workers: most tasks at once; None: one per core, on a cluster as many as it has room for; 0: without Ray.
    progress: called with (records done, records in all) after each file.
    options: those of ``lumen-ray prepare SOURCE``, with ``_`` for ``-``, e.g. ``num=64``.

    The summary holds ``output``, ``files``, ``bytes``, ``rows``, ``tasks`` (task -> rows annotated for it), ``counts``
    (kind -> {"in", "written", "rejected"}), ``rejected``, ``rules`` (by which records were rejected, each with its
    number, its first record and how to mend it), ``changed``, ``untrained`` (rows without a task) and ``notes`` (how
    the input was read). Rejected records are in ``rejected.parquet`` with their reasons. Raises `UserError` for an
    unknown source or option, for input of which not one row can be written or more is rejected than `max_rejected`, and
    for an output that holds shards already, unless `overwrite`.

    >>> from lumen_ray import prepare
    >>> summary = prepare("scenes", "shards/val", num=64, seed=1)
    >>> summary["rows"], summary["rejected"]
    (64, 0)
    """
    _prepare_environment()
    from lumen_ray.data.shards.prepare import prepare_source
    from lumen_ray.data.sources.options import make_source
    from lumen_ray.ray_env import tasks_at_once

    return prepare_source(
        output,
        make_source(source, options),
        shuffle_seed=shuffle_seed,
        rows_per_group=rows_per_group,
        rows_per_file=rows_per_file,
        overwrite=overwrite,
        max_rejected=max_rejected,
        workers=tasks_at_once() if workers is None else workers,
        progress=progress,
    )


def train(
    shards: PathOrUrl,
    output: PathOrUrl,
    *,
    recipe: str | PathLike[str] | Recipe = "quickstart",
    init_from: PathOrUrl | None = None,
    workers: int | None = None,
    validate: PathOrUrl | None = None,
    profile: str | tuple[int, int] | None = None,
    wandb: str | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    waiting: Callable[[str], None] | None = None,
) -> Path | str:
    """Trains a recipe over shards on Ray Train; returns the model folder, ``OUTPUT/model``, as a URL in a bucket.

    shards: shard folder, a path or URL.
    output: run folder, on a file system that all workers share, or in a bucket. Called again with the same arguments,
        it resumes from the newest checkpoint; with other ones it raises.
    recipe: name in ``configs/recipes``, path of a YAML file, or a `lumen_ray.recipe.Recipe`.
    init_from: model folder (or name of bundled weights) to start from, instead of the recipe's; decoders that it lacks
        start from fresh weights.
    workers: Ray Train workers, instead of the recipe's.
    validate: shard folder of a held-out split to score during training, instead of the recipe's ``validation.shards``;
        the best model goes to ``OUTPUT/model-best``.
    profile: steps to profile, "FIRST:END" or (first, end), instead of the recipe's; writes ``OUTPUT/profile``.
    wandb: project of Weights & Biases to log to, instead of the recipe's.
    progress: called with each line of ``metrics.jsonl``, a dict with "step", "stage", "loss/...", "samples_per_s", ...
    waiting: called with a sentence while the run waits for room in the cluster.

    Raises `UserError` for an unknown recipe, shards that do not fit it, and a run folder that holds another run or that
    another process trains into.

    >>> from lumen_ray import train
    >>> model = train("shards/train", "runs/first", recipe="quickstart", workers=1)
    >>> sorted(path.name for path in model.iterdir())
    ['config.yaml', 'meta.json', 'model.safetensors', 'tokenizer.json']
    """
    _prepare_environment()
    from lumen_ray.evaluate.during_training import validator_of
    from lumen_ray.train.launch import train as launch

    changed = _with_run_settings(load_recipe(recipe, workers), validate, profile, wandb)
    return launch(
        fspath(shards),
        changed,
        fspath(output),
        init_from=None if init_from is None else fspath(init_from),
        validator=validator_of(changed),
        progress=progress,
        waiting=waiting,
    )


def evaluate(
    model: PathOrUrl | Engine,
    shards: PathOrUrl,
    output: PathOrUrl,
    *,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    pictures: int = 32,
    exemplars: PathOrUrl | Sequence[ClassByExample] | None = None,
    absent_classes: Sequence[str] = (),
    decoders: Mapping[str, str] | None = None,
    device: str | None = None,
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Scores a model on a shard folder; writes ``report.json`` and ``predictions.parquet``, returns the report.

    model: model folder (a path or URL), name of bundled weights, or an `Engine`.
    shards: shard folder of the held-out split, a path or URL.
    output: folder to write, a path or URL.
    tasks: tasks to score; None: all that the model serves and the split is annotated for.
    limit: score the first images only.
    pictures: images to generate or edit pictures for, from the first on.
    exemplars: classes of the split that detect, segment and count ask for by example: a file (see
        `lumen_ray.exemplar_file`) or a list of `ClassByExample`.
    absent_classes: names of things that no image shows, for which detect should find nothing at score 0.3; the split's
        own classes are left out.
    decoders: task -> decoder that serves it, where it should be another than the model's settings say.
    device: "cpu", "cuda" or "cuda:N"; None: "cuda" where torch finds a GPU, else "cpu".
    dtype: "float32" or "bfloat16", of weights and matrix products.
    progress: called with (images done, images in all) after each batch.

    The report holds ``metrics`` (name -> value in 0..1, or None where the split has no annotations for it), ``tables``,
    ``settings``, ``images == scored + skipped``, ``errors`` and timings in seconds. Raises `UserError` for an unknown
    model, a task that the split is not annotated for or that no decoder serves, exemplars that the split has no class
    for, and a device that is not there; `decoders`, `device` and `dtype` of an `Engine` are those it was loaded with.

    >>> from lumen_ray import evaluate
    >>> report = evaluate("nano", "shards/val", "evaluation", tasks=["detect", "count"], limit=16)
    >>> report["images"], report["skipped"]
    (16, 0)
    >>> report["metrics"]["box_AP50"] > 0.5
    True
    """
    shown = load_exemplars(exemplars)
    engine = load_engine(model, decoders, device, dtype)
    from lumen_ray.evaluate.run import evaluate as score

    return score(
        engine,
        fspath(shards),
        fspath(output),
        tasks=None if tasks is None else _names(tasks),
        limit=limit,
        picture_limit=pictures,
        exemplars=shown,
        absent_classes=_names(absent_classes),
        progress=progress,
    )


def calibrate(
    model: PathOrUrl,
    shards: PathOrUrl,
    *,
    output: PathOrUrl | None = None,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    decoders: Mapping[str, str] | None = None,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Fit]:
    """Fits a model's scores to a labelled split, so that they are the share of instances that are right; the model
    folder keeps the curves, and everything that uses it then has calibrated scores.

    model: model folder, or name of bundled weights, which needs an `output`.
    shards: shard folder of a labelled split that the model was not trained on, a path or URL.
    output: folder for a copy of the model with the curves; None: they go into `model`.
    tasks: of detect, segment, count, ground and refer; None: all that the model serves and the split is annotated for.
    limit: use the first images only.
    decoders: task -> decoder that serves it, where it should be another than the model's settings say.
    device: "cpu", "cuda" or "cuda:N"; None: "cuda" where torch finds a GPU, else "cpu".
    progress: called with (images done, images in all) after each batch.

    Returns for each task its `lumen_ray.evaluate.calibrate.Fit`. Curves fitted before are replaced, those of other
    tasks too. Raises `UserError` as `evaluate`, and where there are too few right or wrong instances.

    >>> from lumen_ray import calibrate
    >>> fits = calibrate("nano", "shards/calibration", output="calibrated", tasks=["detect"])
    >>> fits["detect"].after < fits["detect"].before
    True
    """
    from lumen_ray.presets import model_folder

    folder = model_folder(fspath(model))
    if output is None and not Path(fspath(model)).is_dir():
        raise UserError(f"'{fspath(model)}' cannot be written; give a folder for the copy as output", "usage")
    if output is not None and Path(fspath(output)).exists():
        raise UserError(f"'{fspath(output)}' exists; give a new folder for the copy of the model", "output_exists")
    _prepare_environment()
    from lumen_ray.evaluate.calibrate import calibrate_folder
    from lumen_ray.inference.device import find_device

    return calibrate_folder(
        folder,
        fspath(shards),
        None if output is None else fspath(output),
        tasks=None if tasks is None else _names(tasks),
        limit=limit,
        decoders=decoders,
        device=find_device(device),
        progress=progress,
    )


def label(
    images: PathOrUrl,
    output: PathOrUrl,
    *,
    model: PathOrUrl = "nano",
    tasks: Sequence[str] = ("detect",),
    classes: Sequence[str] | None = None,
    text: Mapping[str, Sequence[str]] | None = None,
    exemplars: PathOrUrl | Sequence[ClassByExample] | None = None,
    decoders: Mapping[str, str] | None = None,
    agree_with: str | None = None,
    verify: bool = False,
    device: str | None = None,
    dtype: str = "float32",
    actors: int | range | None = None,
    gpus_per_actor: float = 1,
    batch_size: int = 8,
    score_threshold: float = 0.3,
    tile: int | None = None,
    overlap: float | None = None,
    image_column: str | None = None,
    refresh: bool = False,
    retry_errors: bool = False,
    max_errors: str | int | None = None,
    dedup: bool = False,
    usd_per_hour: float | None = None,
    exports: Sequence[str] | None = None,
    progress: Callable[[Status], None] | None = None,
) -> dict[str, Any]:
    """Labels a corpus of images: Parquet, and exports such as COCO json and an HTML gallery; returns a summary.

    images: folder, glob, shard folder, list, table or tar of images, a path or URL.
    output: folder to write, a path or URL. Called again with the same arguments, it continues where it stopped.
    model: model folder (a path or URL), or name of bundled weights ("nano" is trained on the synthetic scenes only).
    tasks: tasks to run on every image.
    classes: class names for the tasks that need them, as a list, or one name without a comma; None: the classes that
        the model was trained on, or with
        `exemplars` none but those; "auto": what the model's caption of each image names, which adds task caption.
    text: task -> texts, for the tasks that need one (vqa, refer, ground, chat); these run in addition to `tasks`.
    exemplars: classes given by example, also where `classes` has their names: a file (see `lumen_ray.exemplar_file`) or
        a list of `ClassByExample`. Task pose takes classes by name only.
    decoders: task -> decoder that serves it, where it should be another than the model's settings say.
    agree_with: a second decoder of the model, asked the same where it can serve the task: column ``agreement`` of the
        labels is the IoU of an instance with its best one.
    verify: ask the LLM about each instance: column ``verified`` is the probability of yes.
    device: "cpu" or "cuda", with ``actors=0`` also "cuda:N"; None: a GPU for each actor where the cluster has any.
    dtype: "float32" or "bfloat16", of weights and matrix products.
    actors: model actors on Ray; a range, such as ``range(1, 33)``, for a pool of 1 to 32 that follows the load; None:
        one for each GPU, or core of a machine without; 0: in this process, without Ray.
    gpus_per_actor: share of a GPU that an actor reserves, so that several may share one.
    batch_size: images per forward pass.
    score_threshold: instances below this score (0..1) are left out.
    tile: side in pixels of tiles, in which larger images are searched, beside the whole image; None: no tiles.
    overlap: of neighbouring tiles, as a share of their side; None: 0.2. Goes with `tile` only.
    image_column: the column of images or of their paths, where ``images`` is a table with an unusual name for it.
    refresh: look for images that were added since the input was listed.
    retry_errors: ask the images that could not be labelled again, each once; what comes of it replaces their errors.
    max_errors: stop once more images than this cannot be labelled: a number, or a share such as "5%".
    dedup: label images with the same bytes once, copy the labels to the others, and record perceptual hashes. Other
        labels it does not change: a job that was stopped may go on with or without it.
    usd_per_hour: price of the whole cluster for an hour; the cost of all runs is then in the progress and the summary.
    exports: formats to export in, as in `export_labels`; none: only the Parquet tables; None: "coco" and "gallery",
        nothing for an output in a bucket.
    progress: called after every few images with a `Status`: ``done``, ``total`` (listed so far, all if ``is_listed``),
        ``errors``, ``copied``, ``rate`` in images per second, ``model_busy`` (share of the actors' time, 0..1), and
        ``facts()``, which has all of them and the cost.

    The summary holds ``images == labelled + errors``, ``copied`` (of the labelled), ``instances`` (task -> count),
    ``first_error``, ``left_out`` (number of files that are no pictures, by suffix), ``seconds``, ``model_busy``,
    ``spent_seconds`` and ``usd`` of all runs, ``exports`` (format -> path) and, with classes "auto", ``vocabulary``
    (task -> class -> counts of the most frequent ones). Raises `UserError` for an unknown model, task, device or
    format, a task without its classes or text, an input without images, an output folder that holds labels made with
    other settings or that another job is writing, too many errors, and when not one image could be labelled.

    >>> from lumen_ray import label
    >>> questions = {"vqa": ["how many circles are there ?"]}
    >>> summary = label("shards/val", "labels", tasks=["detect"], text=questions, actors=0)
    >>> summary["images"], summary["errors"]
    (64, 0)
    """
    from lumen_ray.presets import model_folder

    images, output, model = _path(images, "images"), _path(output, "output"), _path(model, "model")
    model_folder(model)  # before the imports that take seconds
    if overlap is not None and tile is None:
        raise UserError("overlap is of neighbouring tiles; give tile with it, or leave it out", "invalid_setting")
    if isinstance(classes, str) and "," in classes:
        raise UserError(
            f"classes are the one text '{classes}'; give a list of names, such as {classes.split(',')}",
            "invalid_classes",
        )
    shown = load_exemplars(exemplars)
    _prepare_environment()
    from lumen_ray.inference.tiles import Tiles
    from lumen_ray.label.pipeline import label as run
    from lumen_ray.label.vocabulary import AUTO
    from lumen_ray.model.build import read_meta
    from lumen_ray.tasks import get_task

    texts = {task: _names(given) for task, given in (text or {}).items()}
    all_tasks = list(dict.fromkeys([*_names(tasks), *texts]))
    if classes == AUTO:
        pass
    elif classes is not None:
        classes = _names(classes)
    elif not shown and any(get_task(name).needs == "classes" for name in all_tasks):
        classes = read_meta(model).classes
    return run(
        model,
        images,
        output,
        tasks=all_tasks,
        classes=classes,
        prompts=texts,
        exemplars=shown,
        decoders=decoders,
        agree_with=agree_with,
        verify=verify,
        device=device,
        dtype=dtype,
        num_actors=actors,
        gpus_per_actor=gpus_per_actor,
        batch_size=batch_size,
        score_threshold=score_threshold,
        tiles=None if tile is None else Tiles(tile, 0.2 if overlap is None else overlap),
        image_column=image_column,
        refresh=refresh,
        retry_errors=retry_errors,
        max_errors=max_errors,
        dedup=dedup,
        usd_per_hour=usd_per_hour,
        exports=None if exports is None else _names(exports),
        progress=progress,
    )


def answer_batch(
    requests: PathOrUrl,
    output: PathOrUrl,
    *,
    model: PathOrUrl = "nano",
    decoders: Mapping[str, str] | None = None,
    device: str | None = None,
    dtype: str = "float32",
    actors: int | range | None = None,
    gpus_per_actor: float = 1,
    batch_size: int = 8,
    score_threshold: float = 0.3,
    max_errors: str | int | None = None,
    usd_per_hour: float | None = None,
    progress: Callable[[Status], None] | None = None,
) -> dict[str, Any]:
    """Answers a file of chat requests in the format of OpenAI's Batch API, as a server answers each; returns a summary.

    requests: JSON lines ``{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}``, a path
        or URL. Images in a body are data URLs, paths relative to the file, or URLs of stores.
    output: folder to write ``output.jsonl`` and ``errors.jsonl`` in, a path or URL. Called again with the same
        arguments, it continues where it stopped.
    model: model folder, or name of bundled weights.
    decoders: task -> decoder that serves it, where it should be another than the model's settings say.
    device: as of `label`.
    dtype: "float32" or "bfloat16", of weights and matrix products.
    actors: as of `label`.
    gpus_per_actor: as of `label`.
    batch_size: requests that are given to the model together.
    score_threshold: instances below this score (0..1) are left out of answers.
    max_errors: stop once more requests than this have failed: a number, or a share such as "5%".
    usd_per_hour: as of `label`.
    progress: as of `label`, with requests for images.

    The summary holds ``requests == answered + errors``, ``reasons`` (of errors -> count), ``first_error``, ``usage``
    (tokens), ``seconds``, ``model_busy``, ``spent_seconds`` and ``usd`` of all runs. A line that cannot be answered is
    a line of ``errors.jsonl`` and stops nothing. Raises `UserError` for an unknown model or device, a file that is
    missing or empty, an output folder that holds something else or that another job is writing, and too many errors.

    >>> import json
    >>> from lumen_ray import answer_batch
    >>> body = {"messages": [{"role": "user", "content": "how are you ?"}], "max_tokens": 8}
    >>> line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    >>> with open("requests.jsonl", "w") as file:
    ...     _ = file.write(json.dumps(line))
    >>> summary = answer_batch("requests.jsonl", "answers", actors=0)
    >>> summary["requests"], summary["errors"]
    (1, 0)
    """
    from lumen_ray.presets import model_folder

    requests, output, model = _path(requests, "requests"), _path(output, "output"), _path(model, "model")
    model_folder(model)  # before the imports that take seconds
    _prepare_environment()
    from lumen_ray.label.batch.job import answer_batch as run

    return run(
        model,
        requests,
        output,
        decoders=decoders,
        device=device,
        dtype=dtype,
        num_actors=actors,
        gpus_per_actor=gpus_per_actor,
        batch_size=batch_size,
        score_threshold=score_threshold,
        max_errors=max_errors,
        usd_per_hour=usd_per_hour,
        progress=progress,
    )


def export_labels(
    labels: PathOrUrl,
    formats: Sequence[str],
    *,
    output: PathOrUrl | None = None,
    tasks: Sequence[str] | None = None,
    max_images_per_file: int | None = None,
    copy_images: bool = False,
    image_url: str | None = None,
    review_budget: int = 100,
    near_distance: int = 6,
    gallery_images: int | None = 1000,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Writes the labels of a folder in the formats of annotation tools and trainers; returns what it wrote.

    labels: output folder of `label`.
    formats: names of formats, those of ``lumen-ray label export --help``, e.g. "coco", "yolo-detect", "voc".
    output: folder in which each format gets a folder of its name; None: `labels` itself.
    tasks: tasks to export; None: all that a format can hold.
    max_images_per_file: images in one JSON, XML, CSV or tar file; None: all, in tars 1000.
    copy_images: copy image files, for formats that have them, instead of linking them where the disk allows.
    image_url: prefix of the images' addresses in Label Studio; None: its local files.
    review_budget: images that format "review" chooses.
    near_distance: bits of 64, 0 to 16, in which the perceptual hashes of near duplicates differ at most.
    gallery_images: images that format "gallery" shows, the first of the input; None: all.
    progress: called with (format, images done, images in all).

    Each export is whole or not there at all, and replaces an earlier one of its format. Returns format -> ``output``
    (path), ``files`` (number), ``tasks``, ``left_out`` (tasks that the format cannot hold), ``images`` and ``missing``
    (images that could not be read any more, or have another size now). Raises `UserError` for an unknown format, a
    folder without labels, a task that was not labelled or that a format cannot hold, and an output that holds something
    else.

    >>> from lumen_ray import export_labels
    >>> written = export_labels("labels", ["yolo-detect", "csv"])
    >>> written["yolo-detect"]["tasks"], written["csv"]["images"]
    (['detect'], 64)
    """
    from lumen_ray.label.exporters.base import ExportSettings
    from lumen_ray.label.exporters.export import export

    return export(
        fspath(labels),
        _names(formats),
        None if output is None else fspath(output),
        tasks=None if tasks is None else _names(tasks),
        settings=ExportSettings(
            max_images_per_file, copy_images, image_url, review_budget, near_distance, gallery_images
        ),
        progress=progress,
    )


def serve(
    model: PathOrUrl | None = None,
    *,
    config: str = "nano",
    host: str | None = None,
    port: int | None = None,
    decoders: Mapping[str, str] | None = None,
    blocking: bool = True,
) -> Server:
    """Serves a model over HTTP with Ray Serve; returns once it answers.

    model: model folder (a path or URL) or name of bundled weights, instead of the config's.
    config: name in ``configs/serve``, or path of a YAML file: replicas, resources, limits.
    host: address to listen on, instead of the config's.
    port: port to listen on, instead of the config's.
    decoders: task -> decoder that serves it, where it should be another than the model's settings say.
    blocking: serve until SIGINT or SIGTERM, then stop; in the main thread only. Otherwise end it with ``stop()``.

    The server's ``url`` has a page at ``/`` and the API at ``/docs``. Raises `UserError` for an unknown model or
    config, a port that is taken, and a Ray cluster that has no room for the deployments.

    >>> from urllib.request import urlopen
    >>> from lumen_ray import serve
    >>> server = serve("nano", port=8123, blocking=False)
    >>> urlopen(f"{server.url}/readyz").status
    200
    >>> server.stop()
    """
    settings = serve_settings(model, config=config, host=host, port=port, decoders=decoders)
    from lumen_ray.serve.app import run

    return run(settings, blocking=blocking)


def load_recipe(recipe: str | PathLike[str] | Recipe, workers: int | None = None) -> Recipe:
    """The recipe of a name in ``configs/recipes`` or a YAML file, or the one given, with `workers` in place of its own.

    Raises `UserError` for an unknown name and for settings that do not fit.
    """
    from lumen_ray import config
    from lumen_ray.presets import recipe_path
    from lumen_ray.recipe import Recipe

    loaded = recipe if isinstance(recipe, Recipe) else config.load(Recipe, recipe_path(fspath(recipe)))
    if workers is None:
        return loaded
    return config.validate(Recipe, loaded.model_dump(mode="json") | {"workers": workers}, "--workers")


def _with_run_settings(
    recipe: Recipe, validate: PathOrUrl | None, profile: str | tuple[int, int] | None, wandb: str | None
) -> Recipe:
    """The recipe with settings of its run that were given beside it. Raises `UserError` for steps that are none."""
    from lumen_ray.run_settings import ValidationSettings, WandbSettings, parse_profile

    changes: dict[str, Any] = {}
    if validate is not None:
        settings = recipe.validation or ValidationSettings()
        changes["validation"] = settings.model_copy(update={"shards": fspath(validate)})
    if profile is not None:
        changes["profile"] = parse_profile(profile)
    if wandb is not None:
        changes["wandb"] = (recipe.wandb or WandbSettings()).model_copy(update={"project": wandb})
    return recipe.model_copy(update=changes)


def load_engine(
    model: PathOrUrl | Engine,
    decoders: Mapping[str, str] | None = None,
    device: str | None = None,
    dtype: str = "float32",
) -> Engine:
    """The engine of a model folder or of bundled weights, or the one given, which has its decoders and device already.

    Raises `UserError` as `evaluate` does.
    """
    if not isinstance(model, str | PathLike):
        if decoders or device is not None or dtype not in ("float32", model.dtype):
            raise UserError("the engine is loaded already; give decoders, device and dtype to Engine.load", "usage")
        return model
    from lumen_ray.presets import model_folder

    model_folder(fspath(model))  # before the imports that take seconds
    _prepare_environment()
    from lumen_ray.inference.device import find_device
    from lumen_ray.inference.engine import Engine

    return Engine.load(fspath(model), find_device(device), dict(decoders or {}), dtype)


def load_exemplars(given: PathOrUrl | Sequence[ClassByExample] | None) -> list[ClassByExample]:
    """The classes by example of a file, or those given, none for None. Raises `UserError` for what does not fit."""
    if given is None:
        return []
    from lumen_ray.exemplar_file import load_exemplars as load

    return load(given)


def serve_settings(
    model: PathOrUrl | None = None,
    *,
    config: str = "nano",
    host: str | None = None,
    port: int | None = None,
    decoders: Mapping[str, str] | None = None,
) -> ServeSettings:
    """The settings that `serve` runs with. Raises `UserError` for what does not fit, before Ray is imported."""
    from lumen_ray.presets import model_folder

    if model is not None:
        model_folder(fspath(model))
    _prepare_environment()
    from lumen_ray.model.build import read_meta
    from lumen_ray.serve.config_file import load_settings

    settings = load_settings(
        config, model=None if model is None else fspath(model), host=host, port=port, serving=dict(decoders or {})
    )
    read_meta(settings.model)  # raises here for a folder without a model, not in a replica
    return settings


def _prepare_environment() -> None:
    """Sets the environment that Ray reads when it is imported; Serve's too, which this process may start later."""
    from lumen_ray.serve.environment import prepare_serve_environment

    prepare_serve_environment()


def _path(given: PathOrUrl, name: str) -> str:
    """The path or URL that is given as argument `name`. Raises `UserError` for anything else."""
    if not isinstance(given, str | PathLike):
        raise UserError(f"{name} is {given!r}; give one path or URL", f"invalid_{name}")
    return fspath(given)


def _names(names: Sequence[str]) -> list[str]:
    """A list of names; one name given as a plain text is a list of one."""
    return [names] if isinstance(names, str) else list(names)
