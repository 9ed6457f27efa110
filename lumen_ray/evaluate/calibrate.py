"""`calibrate` = ask a model about a labelled split, and fit what its scores mean (see `inference.calibration`)."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from lumen_ray.errors import UserError
from lumen_ray.evaluate.calibration import Reliability
from lumen_ray.evaluate.run import collect_instances
from lumen_ray.inference.calibration import Calibration, Curve, log_odds
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.protocol import EngineProtocol
from lumen_ray.model.build import load_model, write_meta

#: Tasks whose instances have scores that can be checked.
TASKS = ("detect", "segment", "count", "ground", "refer")
#: Instances, right and wrong ones, that a task needs at least for a curve, and a class for a shift of its own.
LEAST, LEAST_OF_CLASS = 10, 50
#: Strength of the pull of a class's shift to that of its task, and of a task's slope to 1: as of so many instances.
PRIOR, SLOPE_PRIOR = 10.0, 1.0


@dataclass(frozen=True)
class Fit:
    """The curve of a task, the number of `instances` it is fitted to, how many of them are `right`, and the expected
    calibration error of these `before` and `after`. Without enough right and wrong instances the curve is None."""

    curve: Curve | None
    instances: int
    right: int
    before: float | None
    after: float | None


def fit_curve(scores: np.ndarray, hits: np.ndarray, phrases: Sequence[str], decoder: str = "") -> Curve | None:
    """The most likely curve of a decoder: scores float [N], hits bool [N], phrases [N], empty where instances have no
    class. None without enough right and wrong instances."""
    if min(hits.sum(), (~hits).sum()) < LEAST:
        return None
    x = log_odds(scores)
    slope, shift = _most_likely(x, hits)
    classes: dict[str, float] = {}
    names = np.asarray(phrases, dtype=object)
    for name, number in Counter(phrases).items():
        own = names == name
        if name and number >= LEAST_OF_CLASS and 0 < hits[own].sum() < number:
            classes[name] = _shift(slope * x[own], hits[own], shift)
    return Curve(slope, shift, classes, decoder)


def _most_likely(x: np.ndarray, hits: np.ndarray) -> tuple[float, float]:
    """(slope, shift) with the smallest negative log likelihood; the slope is positive.

    Of few instances the right and the wrong ones may be told apart by their scores, and the likelihood would grow with
    the slope for ever. As in Platt (1999, sec. 2.2) the targets are therefore not 1 and 0 but what so many instances
    leave open.
    """
    right = int(hits.sum())
    targets = np.where(hits, (right + 1) / (right + 2), 1 / (len(hits) - right + 2))

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        slope, shift = np.exp(values[0]), values[1]
        z = slope * x + shift
        error = expit(z) - targets
        likelihood = (np.logaddexp(0, z) - targets * z).sum()
        gradient = np.array([(error * x).sum() * slope + SLOPE_PRIOR * values[0], error.sum()])
        return float(likelihood + SLOPE_PRIOR / 2 * values[0] ** 2), gradient

    found = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=[(-4, 4), (-20, 20)]).x
    return float(np.exp(found[0])), float(found[1])


def _shift(x: np.ndarray, hits: np.ndarray, of_task: float) -> float:
    """The most likely shift of a class, pulled to that of its task."""

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        z = x + values[0]
        error = (expit(z) - hits).sum() + PRIOR * (values[0] - of_task)
        likelihood = (np.logaddexp(0, z) - hits * z).sum()
        return float(likelihood + PRIOR / 2 * (values[0] - of_task) ** 2), np.array([error])

    return float(minimize(loss, np.array([of_task]), jac=True, method="L-BFGS-B").x[0])


def calibrate(
    engine: EngineProtocol,
    shards_dir: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Fit]:
    """The fit of each task from a labelled split.

    engine: with the scores of the decoders as they are. tasks: of `TASKS`, by default all that the model serves and the
    split is annotated for. limit: images at most. Raises `UserError` for other tasks, and where no task has enough
    right and wrong instances.
    """
    if other := [task for task in tasks or () if task not in TASKS]:
        raise UserError(f"task '{other[0]}' has no scores to calibrate; tasks: {', '.join(TASKS)}", "invalid_setting")
    found = collect_instances(engine, shards_dir, tasks, TASKS, limit=limit, progress=progress)
    fits: dict[str, Fit] = {}
    for task, (scores, hits, phrases) in found.items():
        # expressions are all different
        names = list(phrases) if task in ("detect", "segment", "count") else [""] * len(scores)
        curve = fit_curve(scores, hits, names, engine.serving[task])
        after = scores
        if curve is not None:
            after = np.array([curve(scores[i : i + 1], name)[0] for i, name in enumerate(names)])
        before, left = (Reliability.of(values, hits).error for values in (scores, after))
        fits[task] = Fit(curve, len(scores), int(hits.sum()), before, left)
    if all(fit.curve is None for fit in fits.values()):
        seen = ", ".join(f"{task} {fit.right} and {fit.instances - fit.right}" for task, fit in fits.items())
        raise UserError(
            f"no task has {LEAST} right and {LEAST} wrong instances on this split ({seen}); give one with more images",
            "too_few_instances",
        )
    return fits


def calibrate_folder(
    folder: Path,
    shards_dir: str,
    output: str | None,
    *,
    tasks: Sequence[str] | None,
    limit: int | None,
    decoders: Mapping[str, str] | None,
    device: str,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Fit]:
    """`calibrate` for a model folder: the curves go into its `meta.json`, or into that of a copy in `output`."""
    loaded = load_model(folder, decoders, device)
    loaded.meta.calibration = {}  # curves are of the decoders' own scores
    fits = calibrate(Engine(loaded, device), shards_dir, tasks=tasks, limit=limit, progress=progress)
    curves = {task: fit.curve for task, fit in fits.items() if fit.curve is not None}
    loaded.meta.calibration = Calibration(curves).to_dict()
    if output is not None:
        shutil.copytree(folder, output)
    write_meta(folder if output is None else output, loaded.meta)
    return fits
