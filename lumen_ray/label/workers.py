"""The workers of a label job, on the cluster's machines or in this process: reading, decoding, the model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lumen_ray.data.images import decode
from lumen_ray.errors import UserError
from lumen_ray.inference.device import find_device
from lumen_ray.inference.protocol import EngineProtocol
from lumen_ray.inference.records import answer_records
from lumen_ray.inference.request import Request
from lumen_ray.label.inputs import read_bytes
from lumen_ray.label.ledger import Fragment
from lumen_ray.presets import model_folder

#: Seconds without a result after which Ray Data gives up (its default: 30 minutes); loading a large model must fit.
NO_PROGRESS_TIMEOUT_S = 900
_SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True)
class WorkerSettings:
    """The settings of a model actor. `model`: folder, or a function that returns an engine; `decoders`: task ->
    decoder, overriding the folder's choice; `device`: None for a GPU if there is one."""

    model: str | Path | Callable[[], EngineProtocol]
    requests: tuple[Request, ...]
    device: str | None = None
    batch_size: int = 8
    num_actors: int = 1
    score_threshold: float = 0.3
    max_per_phrase: int = 300
    max_new_tokens: int = 48
    decoders: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "float32"


def fingerprint(model: str | Path | Callable[[], EngineProtocol]) -> str:
    """Identifies a model folder without loading it, whatever its dates: names, sizes and both ends of each file.

    Raises `UserError` if the folder does not exist.
    """
    if callable(model):
        return getattr(model, "__qualname__", type(model).__qualname__)
    folder = model_folder(model)
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def read_fragment(fragment: Fragment) -> Iterator[dict[str, Any]]:
    """One row per image of the fragment: its pixels as bytes, or `reason` and `message`."""
    for index, (item, data) in enumerate(read_bytes(fragment.items)):
        row = {"fragment": fragment.index, "index": index, "image_id": item.image_id, "path": item.path}
        row.update(height=0, width=0, pixels=b"", reason="", message="")
        try:
            if isinstance(data, UserError):
                raise data
            image = decode(data)
            row.update(height=image.shape[0], width=image.shape[1], pixels=image.tobytes())
        except UserError as error:
            row.update(reason=error.reason, message=str(error))
        yield row


class Labeller:
    """A model with the requests about every image. `fault`: why the model cannot be used, else empty."""

    def __init__(self, settings: WorkerSettings):
        self.settings = settings
        self.fault = ""
        try:
            self.engine = _load(settings)
            self.requests = _fit_requests(settings.requests, self.engine)
        except UserError as error:  # Ray would restart an actor whose constructor raises, again and again
            self.fault = str(error)
            return
        provenance: dict[str, Any] = {
            "model": "" if callable(settings.model) else str(settings.model),
            "version": self.engine.version,
            "preset": self.engine.preset,
            "settings": self._run_settings(),
        }
        if self.engine.chosen_decoders:
            provenance["settings"]["decoders"] = dict(self.engine.chosen_decoders)
        if settings.dtype != "float32":
            provenance["settings"]["dtype"] = settings.dtype
        if any(request.task == "pose" for request in self.requests):
            provenance["edges"] = self.engine.edges  # to draw and export skeletons without the model
        self.provenance = json.dumps(provenance, sort_keys=True)

    def _run_settings(self) -> dict[str, Any]:
        s = self.settings
        return {
            "score_threshold": s.score_threshold,
            "max_per_phrase": s.max_per_phrase,
            "max_new_tokens": s.max_new_tokens,
        }

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Columns of `read_fragment` -> ``fragment, index, reason, message, records`` (JSON), one row per image."""
        names = ("fragment", "index", "image_id", "path", "height", "width", "pixels", "reason", "message")
        rows = [dict(zip(names, values, strict=True)) for values in zip(*(batch[n] for n in names), strict=True)]
        results = self.label(rows)
        return {name: [r[name] for r in results] for name in ("fragment", "index", "reason", "message", "records")}

    def label(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The result of each row of `read_fragment`, in order."""
        results = []
        for row in rows:
            result = {"fragment": int(row["fragment"]), "index": int(row["index"]), "records": ""}
            fault = ("unusable_model", self.fault) if self.fault else (row["reason"], row["message"])
            results.append({**result, "reason": str(fault[0]), "message": str(fault[1])})
        good = [(row, result) for row, result in zip(rows, results, strict=True) if not result["reason"]]
        self._answer(good)
        return results

    def _answer(self, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
        """Fills in the records of the (row, result) pairs. A batch that fails is retried image by image."""
        if not pairs:
            return
        try:
            images = [
                np.frombuffer(row["pixels"], np.uint8).reshape(int(row["height"]), int(row["width"]), 3)
                for row, _ in pairs
            ]
            answers = self.engine.run(images, [self.requests] * len(images), **self._run_settings())
        except Exception as error:  # one image must not stop the others
            if len(pairs) > 1:
                for pair in pairs:
                    self._answer([pair])
                return
            where = traceback.extract_tb(error.__traceback__)[-1]
            message = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            pairs[0][1].update(reason="model_error", message=message)
            return
        for (row, result), found in zip(pairs, answers, strict=True):
            records = [
                record
                for request, answer in zip(self.requests, found, strict=True)
                for record in answer_records(str(row["image_id"]), str(row["path"]), request, answer, self.provenance)
            ]
            result["records"] = json.dumps(records)


class LabelActor(Labeller):
    """A `Labeller` of the actor pool."""

    def __init__(self, settings: WorkerSettings):
        import torch

        torch.set_num_threads(1)  # actors share the machine's cores
        super().__init__(settings)


def _load(settings: WorkerSettings) -> EngineProtocol:
    if callable(settings.model):
        return settings.model()
    from lumen_ray.inference.engine import Engine

    return Engine.load(settings.model, find_device(settings.device), settings.decoders, settings.dtype)


def _fit_requests(requests: Iterable[Request], engine: EngineProtocol) -> list[Request]:
    """Narrows pose requests without keypoints to the classes that the model has a skeleton for.

    One list of classes then serves all tasks. Raises `UserError` if no class is left.
    """
    fitted = []
    for request in requests:
        if request.task == "pose" and not request.keypoints and engine.skeletons:
            posed = tuple(name for name in request.phrases if name in engine.skeletons)
            if not posed:
                raise UserError(
                    f"task 'pose' has no class with keypoints; classes with keypoints in this model: "
                    f"{', '.join(sorted(engine.skeletons))} (or name the keypoints)",
                    "no_skeleton",
                )
            request = replace(request, phrases=posed)
        fitted.append(request)
    return fitted


def label_in_process(fragments: Sequence[Fragment], settings: WorkerSettings) -> Iterator[dict[str, Any]]:
    """The result of every image, in order, without Ray."""
    labeller = Labeller(settings)
    batch: list[dict[str, Any]] = []
    for row in (row for fragment in fragments for row in read_fragment(fragment)):
        batch.append(row)
        if len(batch) == settings.batch_size:
            yield from labeller.label(batch)
            batch = []
    yield from labeller.label(batch)


def label_on_ray(fragments: Sequence[Fragment], settings: WorkerSettings) -> Iterator[dict[str, Any]]:
    """The result of every image in no particular order. Starts a local Ray if none is running."""
    from lumen_ray.ray_env import cluster_resources, init_local, prepare_environment
    from lumen_ray.ray_log import native_lines_in_file

    prepare_environment()
    import ray
    import ray.data

    if not ray.is_initialized():
        init_local()
    settings, (num_cpus, num_gpus) = actor_resources(settings, cluster_resources())
    rows = [{"item": fragment} for fragment in fragments]
    with _data_context(ray.data.DataContext.get_current()):
        dataset = (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            .flat_map(lambda row: read_fragment(row["item"]))
            .map_batches(
                LabelActor,
                fn_constructor_args=(settings,),
                batch_size=settings.batch_size,
                batch_format="numpy",
                compute=ray.data.ActorPoolStrategy(size=settings.num_actors),
                num_cpus=num_cpus,
                num_gpus=num_gpus,
            )
        )
        with native_lines_in_file():
            yield from dataset.iter_rows()


def actor_resources(settings: WorkerSettings, available: Mapping[str, float]) -> tuple[WorkerSettings, tuple[int, int]]:
    """The settings of an actor with its device, and the (CPUs, GPUs) to reserve: Ray hides other GPUs from it.

    available: "CPU" and "GPU" of the cluster. GPUs are used if there are any. Raises `UserError` if the actors do not
    fit.
    """
    on_gpu = settings.device == "cuda" or (settings.device is None and available.get("GPU", 0) >= 1)
    _check_resources(available, settings.num_actors, on_gpu)
    if on_gpu:
        return settings, (0, 1)
    return replace(settings, device="cpu"), (1, 0)


def _check_resources(available: Mapping[str, float], num_actors: int, on_gpu: bool) -> None:
    """Raises `UserError` for actors that do not fit, for which Ray Data would wait silently; reading needs one CPU."""
    kind, need = ("GPU", num_actors) if on_gpu else ("CPU", num_actors + 1)
    have = int(available.get(kind, 0))
    if need > have:
        others = ([f"at most {have}"] if have else []) + ["device 'cpu'"] if on_gpu else [f"at most {max(have - 1, 0)}"]
        raise UserError(
            f"num_actors {num_actors} needs {need} {kind}s but the Ray cluster has {have}; give {' or '.join(others)}",
            "too_many_actors",
        )


@contextlib.contextmanager
def _data_context(context: Any) -> Iterator[None]:
    """Applies Ray Data's settings for a job, and restores the previous ones afterwards."""
    changes = {
        "enable_progress_bars": False,
        "execution_no_progress_timeout_s": NO_PROGRESS_TIMEOUT_S,
        "target_max_block_size": 8 << 20,
    }
    before = {name: getattr(context, name) for name in changes}
    for name, value in changes.items():
        setattr(context, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
