"""The settings that labels depend on, as ``job.json`` keeps them, and checks of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from lumen_ray.data import urls
from lumen_ray.errors import UserError
from lumen_ray.exemplars import ClassByExample, no_exemplars
from lumen_ray.inference.protocol import EngineProtocol
from lumen_ray.label.asking import SecondLookSettings
from lumen_ray.label.vocabulary import AUTO, check_auto
from lumen_ray.label.workers import WorkerSettings, fingerprint
from lumen_ray.tasks import TASKS


def job_settings(
    worker: WorkerSettings,
    input: str | Path,
    tasks: Sequence[str],
    classes: Sequence[str] | None,
    prompts: Mapping[str, Sequence[str]] | None,
    keypoints: Sequence[str] | None,
    image_column: str | None,
) -> dict[str, Any]:
    """The settings that labels depend on, as ``job.json`` keeps them (JSON types)."""
    tiles = {} if worker.tiles is None else {"tiles": asdict(worker.tiles)}
    return {
        "input": urls.shown(urls.absolute(input)),
        "model": fingerprint(worker.model),
        "tasks": list(dict.fromkeys(tasks)),
        "classes": AUTO if classes == AUTO else list(classes or ()),
        "prompts": {name: list(texts) for name, texts in (prompts or {}).items()},
        "keypoints": list(keypoints or ()),
        "decoders": dict(worker.decoders) or None,  # null, as in folders older than this setting
        "dtype": None if worker.dtype == "float32" else worker.dtype,  # likewise
        "score_threshold": worker.score_threshold,
        "max_per_phrase": worker.max_per_phrase,
        "max_new_tokens": worker.max_new_tokens,
        **tiles,  # absent in folders older than this setting
        **({"image_column": image_column} if image_column else {}),  # likewise
        **worker.second.as_dict(),  # likewise
    }


def exemplar_settings(exemplars: Sequence[ClassByExample]) -> dict[str, Any]:
    """The part of the job's settings that identifies the examples; empty without any, as in older folders."""
    if not exemplars:
        return {}
    found = [
        {
            "name": shown.name,
            "named": shown.named,
            "examples": [
                {"box": [float(value) for value in e.box], "positive": e.positive, "key": e.key} for e in shown.examples
            ],
        }
        for shown in exemplars
    ]
    return {"exemplars": found}


def check_numbers(
    num_actors: int | range | None, gpus_per_actor: float, batch_size: int, score_threshold: float, fragment_size: int
) -> None:
    """Raises `UserError` for what is no number or out of its range, by its name in `lumen_ray.label`."""
    if not isinstance(num_actors, range):
        _check_number("actors", 0 if num_actors is None else num_actors, Integral, 0, math.inf, "0 or more, or a range")
    elif not (len(num_actors) and num_actors[0] >= 1):
        raise UserError("actors is an empty range; give at least 1, and no less at most", "invalid_setting")
    _check_number("batch_size", batch_size, Integral, 1, math.inf, "1 or more")
    _check_number("fragment_size", fragment_size, Integral, 1, math.inf, "1 or more")
    _check_number("gpus_per_actor", gpus_per_actor, Real, 0.01, 1, "a share of a GPU from 0.01 to 1")
    _check_number("score_threshold", score_threshold, Real, 0, 1, "a value from 0 to 1")


def _check_number(name: str, value: Any, kind: type, least: float, most: float, valid: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:  # type: ignore[operator]
        raise UserError(f"{name} is {value!r}; give {valid}", "invalid_setting")


def chosen_decoders(model: str | Path | Callable[[], EngineProtocol], decoders: Mapping[str, str]) -> dict[str, str]:
    """The entries of `decoders` that differ from the model folder's choice, which its fingerprint covers."""
    if not decoders:
        return {}
    if callable(model):
        raise UserError("decoders can be chosen for a model folder only; give one as the model", "invalid_setting")
    from lumen_ray.model.settings import read_settings

    settings = read_settings(model)
    return settings.choose(decoders, str(model)).chosen_over(settings)


def check_second_look(
    model: str | Path | Callable[[], EngineProtocol],
    second: SecondLookSettings,
    tasks: Sequence[str],
    decoders: Mapping[str, str],
) -> None:
    """Raises `UserError` for a second look that the decoders of the model folder cannot take, before an actor is
    started."""
    if second.verify and all(TASKS[task].is_text for task in tasks):
        raise UserError(
            "verify asks about instances, and no task finds any; add one such as detect, or leave verify out",
            "nothing_to_verify",
        )
    if second.agree_with is None or callable(model):
        return
    from lumen_ray.model.settings import read_settings

    read_settings(model).choose(decoders, str(model)).beside(second.agree_with, tasks)


def check_auto_classes(
    model: str | Path | Callable[[], EngineProtocol], tasks: Sequence[str], keypoints: Sequence[str] | None
) -> None:
    """Raises `UserError` if a model folder cannot name classes by captions, before an actor is started."""
    if callable(model):
        return
    from lumen_ray.model.build import read_meta

    meta = read_meta(model)
    check_auto(tasks, meta.tasks or list(TASKS), meta.skeletons, keypoints)


def check_exemplars(model: str | Path | Callable[[], EngineProtocol], exemplars: Sequence[ClassByExample]) -> None:
    """Raises `UserError` for exemplars if the model folder does not take them, before an actor is started."""
    if not exemplars or callable(model):
        return
    from lumen_ray.model.build import read_meta
    from lumen_ray.model.settings import read_settings

    layout = read_settings(model).prompt_layout
    if not read_meta(model).reads_exemplars or layout == "sequential":
        raise no_exemplars(exemplars[0].name, layout)
