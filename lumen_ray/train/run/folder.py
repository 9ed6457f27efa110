"""What a run folder says besides checkpoints and metrics: what the run was started with, and who may write to it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lumen_ray import config
from lumen_ray.config import Settings
from lumen_ray.data import files
from lumen_ray.data.batches.feed import read_texts
from lumen_ray.decoders.registry import DECODERS
from lumen_ray.errors import UserError
from lumen_ray.model.build import read_meta
from lumen_ray.model.settings import ModelSettings
from lumen_ray.model.warm_start import start_tokenizer
from lumen_ray.recipe import CARRIED_OUT, Recipe
from lumen_ray.tasks import TASKS
from lumen_ray.trunk.tokenizer import CAPTIONS_FILE, LumenTokenizer

#: of decoders' settings, those that only say how a step is carried out (`pixels_at_once` also in which order it draws
#: its noise) or how pictures are drawn
NOT_LEARNED = ("pixels_at_once", "guidance", "image_guidance", "sampler")
#: how long a new try waits for the last one's processes to be gone; Ray takes seconds to end what a dead driver left
LOCK_SECONDS = 60.0


def start_of(
    recipe: Recipe, settings: ModelSettings, manifest: dict[str, Any], init_from: str | None
) -> dict[str, Any]:
    """Everything that decides a run's result; `init_from` by what is in it, since a model folder may move or change."""
    data = [[file["sha256"] for file in manifest["files"]], manifest["categories"]]
    return {
        "recipe": recipe.model_dump(mode="json"),
        "model": settings.model_dump(mode="json"),
        "shards": hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest(),
        "init_from": _digest_of_model(init_from) if init_from else None,
    }


def _digest_of_model(folder: str) -> str:
    """sha256 of a model folder's weights and tokenizers; `UserError` when it is none."""
    read_meta(folder)
    digest = hashlib.sha256()
    paths = (Path(folder) / name for name in ("model.safetensors", "tokenizer.json", CAPTIONS_FILE))
    for path in filter(Path.is_file, paths):  # the last is not in every folder
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def keep_start(run: Path, start: dict[str, Any], resumes: bool) -> None:
    """Writes `RUN/recipe.json`; `UserError` when the run was started with something else than it is continued with.

    Settings that do not decide the result (`CARRIED_OUT`) may change, and so may the recipe's words for the model and
    for where it starts: what they stand for is compared by itself. For the process that holds the folder
    (`sole_starter`, `sole_writer`).
    """
    saved = run / "recipe.json"
    if resumes and saved.is_file():
        before = json.loads(saved.read_text())
        for name, kind in (("recipe", Recipe), ("model", ModelSettings)):
            before[name] = _of_today(kind, before.get(name))
        names = {"recipe": "recipe", "model": "model settings", "shards": "shards", "init_from": "model to start from"}
        other = [text for name, text in names.items() if _deciding(before.get(name)) != _deciding(start[name])]
        if other:
            raise UserError(
                f"'{run}' holds a run of another {' and '.join(other)}; choose another output folder, or continue it "
                "with what it was started with",
                "run_exists",
            )
    files.write_atomically(saved, lambda temporary: temporary.write_text(json.dumps(start)))


def keep_tokenizer(
    run: Path, shards: str | Path, settings: ModelSettings, init_from: str | None, resumes: bool
) -> LumenTokenizer:
    """The tokenizer of the run, written to `RUN/tokenizer.json`."""
    file = run / "tokenizer.json"
    if init_from:
        tokenizer = start_tokenizer(settings, init_from)
    elif resumes and file.is_file():
        tokenizer = LumenTokenizer.load(file)
    else:
        tokenizer = LumenTokenizer.train(
            read_texts(shards, families=settings.families), settings.vocab_size, settings.families
        )
    files.write_atomically(file, tokenizer.save)
    return tokenizer


def _of_today(kind: type[Settings], saved: Any) -> Any:
    """Settings that an earlier version saved, with those that it did not know at their defaults, and without the tasks
    that it named and gave no prompt to."""
    for stage in saved.get("stages", ()) if isinstance(saved, dict) else ():
        for group in stage.get("groups", ()):
            group["tasks"] = [
                name for name in group.get("tasks", ()) if name not in TASKS or not TASKS[name].derived_from
            ]
    try:
        return config.validate(kind, saved, "recipe.json").model_dump(mode="json")
    except UserError:
        return saved


def _deciding(value: Any) -> Any:
    """Of a mapping, without what is compared by itself, as what it stands for; of a decoder's section, without what its
    weights do not depend on."""
    if not isinstance(value, dict):
        return value
    apart = (*CARRIED_OUT, "model", "init_from")
    decoders = {k: v for k, v in value.items() if k in DECODERS and isinstance(v, dict)}
    kept = {name: {k: v for k, v in own.items() if k not in NOT_LEARNED} for name, own in decoders.items()}
    return {k: v for k, v in value.items() if k not in apart} | kept


@contextmanager
def sole_starter(run: Path) -> Iterator[None]:
    """Makes the run folder and holds `RUN/start.lock`: for the process that starts a training and waits for its end.

    Another one is refused at once (`UserError`, `run_busy`). Who gets it may still find the last try's rank 0 at the
    folder, which outlives a killed starter for seconds: `sole_writer` waits for that one. `UserError`
    (`invalid_output`) when the folder cannot be made or written to.
    """
    files.make_folder(run)
    lock = run / "start.lock"
    try:
        lock.touch()
    except OSError as error:
        raise UserError(
            f"run folder '{run}' cannot be written to: {error.strerror}; choose another output folder", "invalid_output"
        ) from None
    with open(lock, "w") as file:
        _lock(file, run, 0.0)
        yield


@contextmanager
def sole_writer(run: Path, wait_s: float = LOCK_SECONDS) -> Iterator[None]:
    """Holds `RUN/lock`, which the system releases when the process dies, however it dies.

    So no rank of a try that is not quite dead publishes a checkpoint or writes metrics beside a new one. Waits for
    `wait_s` seconds; then somebody else trains there: `UserError`.
    """
    with open(run / "lock", "w") as file:
        _lock(file, run, wait_s)
        yield


def _lock(file: Any, run: Path, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while not _locked(file):
        if time.monotonic() >= deadline:
            raise UserError(
                f"another process trains into '{run}'; wait for it, end it, or choose another output folder",
                "run_busy",
            )
        time.sleep(0.2)


def _locked(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            raise
    return True  # also on storage without locks, where nothing can be said
