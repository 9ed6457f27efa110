"""The run folder beside checkpoints and metrics: the record of the run's start, its tokenizer, and its locks."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lumen_ray import config
from lumen_ray.config import Settings
from lumen_ray.data import files, urls
from lumen_ray.data.batches.feed import read_texts
from lumen_ray.data.claim import STALE_S, Claim
from lumen_ray.data.urls import Location
from lumen_ray.decoders.registry import DECODERS
from lumen_ray.errors import UserError
from lumen_ray.model.build import read_meta
from lumen_ray.model.settings import ModelSettings
from lumen_ray.model.warm_start import start_tokenizer
from lumen_ray.presets import model_folder
from lumen_ray.recipe import CARRIED_OUT, Recipe
from lumen_ray.tasks import TASKS
from lumen_ray.trunk.tokenizer import CAPTIONS_FILE, TURNS_FILE, LumenTokenizer

#: settings of decoders that no weight depends on: they only affect how a step is carried out (`pixels_at_once` also the
#: order of its noise) or how pictures are drawn
NOT_LEARNED = ("pixels_at_once", "guidance", "image_guidance", "sampler", "presence_threshold")
#: how long a new try waits for the processes of the last one to end; Ray takes seconds to end those of a dead driver,
#: and in a bucket those of a lost node seem alive for `STALE_S`
LOCK_SECONDS = STALE_S + 30.0


def start_record(
    recipe: Recipe, settings: ModelSettings, manifest: dict[str, Any], init_from: str | None
) -> dict[str, Any]:
    """Everything that a run's result depends on, as plain values; shards and `init_from` by the hash of their contents,
    since folders may move or change."""
    data = [[file["sha256"] for file in manifest["files"]], manifest["categories"]]
    return {
        "recipe": recipe.model_dump(mode="json"),
        "model": settings.model_dump(mode="json"),
        "shards": hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest(),
        "init_from": _digest_of_model(init_from) if init_from else None,
    }


def _digest_of_model(folder: str) -> str:
    """sha256 of a model folder's weights and tokenizers. Raises `UserError` if it is not a model folder."""
    read_meta(folder)
    digest = hashlib.sha256()
    paths = (model_folder(folder) / name for name in ("model.safetensors", "tokenizer.json", CAPTIONS_FILE, TURNS_FILE))
    for path in filter(Path.is_file, paths):  # the last two are not in every folder
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def keep_record(run: Path, record: dict[str, Any], resumes: bool) -> None:
    """Writes a `start_record` to `RUN/recipe.json`. Raises `UserError` if the run it resumes has another one.

    Settings that do not affect the result (`CARRIED_OUT`) may change, and so may the paths of the model and of
    `init_from`: their contents are compared. For the process that holds the folder (`sole_starter`, `sole_writer`).
    """
    saved = run / "recipe.json"
    if resumes and saved.is_file():
        before = json.loads(saved.read_text())
        for name, kind in (("recipe", Recipe), ("model", ModelSettings)):
            before[name] = _upgraded(kind, before.get(name))
        names = {
            "recipe": "recipe",
            "model": "model settings",
            "shards": "set of shards",
            "init_from": "model to start from",
        }
        other = [text for name, text in names.items() if _compared(before.get(name)) != _compared(record[name])]
        if other:
            raise UserError(
                f"'{run}' holds a run of another {' and '.join(other)}; choose another output folder, or resume it "
                "with the recipe, model and shards it was started with",
                "run_exists",
            )
    files.write_atomically(saved, lambda temporary: temporary.write_text(json.dumps(record)))


def keep_tokenizer(
    run: Path, shards: str | Path, settings: ModelSettings, init_from: str | None, resumes: bool
) -> LumenTokenizer:
    """The tokenizer of the run, also written to `RUN/tokenizer.json`: of `init_from`, of the run it resumes, or trained
    on the shards' text."""
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


def _upgraded(kind: type[Settings], saved: Any) -> Any:
    """Settings that an earlier version saved, with newer ones at their defaults, and without tasks that can no longer
    be trained (they never had prompts)."""
    for stage in saved.get("stages", ()) if isinstance(saved, dict) else ():
        for group in stage.get("groups", ()):
            group["tasks"] = [
                name for name in group.get("tasks", ()) if name not in TASKS or not TASKS[name].derived_from
            ]
    try:
        return config.validate(kind, saved, "recipe.json").model_dump(mode="json")
    except UserError:
        return saved


def _compared(value: Any) -> Any:
    """An entry of the record without settings that may change; paths are left out, their contents are other entries."""
    if not isinstance(value, dict):
        return value
    ignored = (*CARRIED_OUT, "model", "init_from")
    sections = {k: v for k, v in value.items() if k in DECODERS and isinstance(v, dict)}
    kept = {name: {k: v for k, v in section.items() if k not in NOT_LEARNED} for name, section in sections.items()}
    return {k: v for k, v in value.items() if k not in ignored} | kept


@contextmanager
def sole_starter(run: Location) -> Iterator[None]:
    """Makes the run folder and holds `RUN/start.lock`: for the process that starts a run and waits for its end.

    Raises `UserError` at once if another process holds it (`run_busy`), or if the folder cannot be made or written to
    (`invalid_output`, in a bucket `store_unreachable`). Rank 0 of the last try can outlive a killed starter by seconds;
    `sole_writer` waits for it.
    """
    files.make_folder(run)
    with _held(run, "start.lock", 0.0):
        yield


@contextmanager
def sole_writer(run: Location, wait_s: float = LOCK_SECONDS) -> Iterator[None]:
    """Holds `RUN/lock`, which the system releases when the process ends, however it ends; in a bucket a `Claim`, which
    is renewed as long as the process lives.

    So no rank of an earlier try publishes a checkpoint or writes metrics beside a new one. Raises `UserError` if
    another process still holds the lock after `wait_s` seconds.
    """
    with _held(run, "lock", wait_s):
        yield


@contextmanager
def _held(run: Location, name: str, wait_s: float) -> Iterator[None]:
    deadline = time.monotonic() + wait_s
    with ExitStack() as held:
        while (busy := _claim(run, name, held) if urls.is_url(run) else _lock(Path(run), name, held)) is not None:
            if time.monotonic() >= deadline:
                raise UserError(busy, "run_busy")
            time.sleep(0.2)
        yield


def _claim(run: Location, name: str, held: ExitStack) -> str | None:
    """Holds a file in a bucket until `held` is closed; why not, if another process does."""
    try:
        held.enter_context(Claim(run, name))
    except UserError as error:
        if error.reason != "output_in_use":
            raise
        return str(error)
    return None


def _lock(run: Path, name: str, held: ExitStack) -> str | None:
    """Locks a file of a folder until `held` is closed; why not, if another process does."""
    try:
        file = open(run / name, "w")  # noqa: SIM115  closed with `held`, or below
    except OSError as error:
        raise UserError(
            f"run folder '{run}' cannot be written to: {error.strerror}; choose another output folder", "invalid_output"
        ) from None
    if _locked(file):
        held.enter_context(file)
        return None
    file.close()
    return f"another process trains into '{run}'; wait for it, end it, or choose another output folder"


def _locked(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            raise
    return True  # also on storage without locks, where other processes cannot be detected
