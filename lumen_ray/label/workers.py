"""The workers of a label job, on the cluster's machines or in this process: reading, decoding, the model, publishing.

An actor reads the images of a fragment where the model is, decodes them at the scale that the model needs, and
publishes the fragment's labels itself: what travels between processes is where images are, and counts.
"""

from __future__ import annotations

import hashlib
import json
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from lumen_ray.answer import Answer
from lumen_ray.data import urls
from lumen_ray.data.images import Picture, as_picture
from lumen_ray.errors import UserError
from lumen_ray.inference.device import find_device
from lumen_ray.inference.protocol import EngineProtocol
from lumen_ray.inference.records import answer_records
from lumen_ray.inference.request import Request
from lumen_ray.inference.tiles import Tiles
from lumen_ray.label.asking import Asker, SecondLookSettings
from lumen_ray.label.content_index import Index
from lumen_ray.label.duplicates import Duplicates
from lumen_ray.label.inputs import Item, Reader
from lumen_ray.label.ledger import Ledger
from lumen_ray.label.metrics import count_actor
from lumen_ray.label.passes import Passes
from lumen_ray.label.plan import Fragment, read_fragments
from lumen_ray.label.reading import ImageInHand, read_images
from lumen_ray.label.vocabulary import AUTO, is_named_by_caption
from lumen_ray.presets import model_folder

_SAMPLE_BYTES = 1 << 20
#: images of a store that an actor fetches at once
FETCHED_AT_ONCE = 8
#: fragments that are being published while the model has the next one
PUBLISHED_BEHIND = 2
#: of `StoreError`: where no image of a fragment can be read for these, the job stops instead of recording all of them
_STORE_REASONS = ("store_unreachable", "unknown_store")


@dataclass(frozen=True)
class WorkerSettings:
    """The settings of a model actor. `model`: folder, or a function that returns an engine; `decoders`: task ->
    decoder, overriding the folder's choice; `device`: None for a GPU if there is one; `threads`: of an actor, for
    arithmetic on a CPU and for decoding; None in a process of the user's, whose threads are left alone. `output`: the
    folder to publish in. `proven`: the model has answered about an image of this job before. `tiles`: for images larger
    than a tile; None looks at whole images only. `second`: what is asked about the answers. `index`: of the content
    that the job has labelled, of which duplicates are copies; None labels every image. `round`: see `Ledger`."""

    model: str | Path | Callable[[], EngineProtocol]
    requests: tuple[Request, ...]
    device: str | None = None
    batch_size: int = 8
    score_threshold: float = 0.3
    max_per_phrase: int = 300
    max_new_tokens: int = 48
    decoders: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "float32"
    threads: int | None = None
    output: str = ""
    proven: bool = False
    tiles: Tiles | None = None
    second: SecondLookSettings = SecondLookSettings()
    index: Index | None = None
    round: int = 0


@dataclass
class Outcome:
    """What came of some `fragments`: the numbers of images `done`, and of `errors` and `copied` ones among them.

    `seconds`: since the worker reported last, or had loaded the model; `busy_seconds`: of these in the model.
    `bytes_read`: of encoded images; `reasons`: number of errors by reason. `failures`: messages of failures of the
    model; `fault`: why the model cannot be used at all; `stop`: why the job cannot go on; `withheld`: fragments
    (number, images, errors) that an actor whose model never succeeded did not publish.
    """

    done: int = 0
    errors: int = 0
    copied: int = 0
    fragments: int = 0
    seconds: float = 0.0
    busy_seconds: float = 0.0
    bytes_read: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    fault: str = ""
    stop: tuple[str, str] | None = None
    withheld: list[tuple[int, int, list[dict[str, str]]]] = field(default_factory=list)

    def count_errors(self, errors: Sequence[Mapping[str, str]]) -> None:
        """Adds errors, rows of `ERROR_SCHEMA`."""
        self.errors += len(errors)
        for error in errors:
            self.reasons[error["reason"]] = self.reasons.get(error["reason"], 0) + 1

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        return cls(**json.loads(text))


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


class Labeller:
    """A model with the requests about every image. `fault`: why the model cannot be used, else empty."""

    def __init__(self, settings: WorkerSettings):
        self.settings = settings
        self.ledger = Ledger(settings.output, round=settings.round)
        self.fault = ""
        self._proven = settings.proven
        self._reader = ThreadPoolExecutor(1, "label-read")
        threads = settings.threads or 1
        self._decoders = ThreadPoolExecutor(threads, "label-decode") if threads > 1 else None
        self._fetchers = ThreadPoolExecutor(FETCHED_AT_ONCE, "label-fetch")
        self._publisher = ThreadPoolExecutor(1, "label-publish")
        self._row_groups = Reader()
        self._duplicates = Duplicates(self.ledger, settings.index) if settings.index is not None else None
        self._busy_seconds = 0.0
        try:
            self.engine = _load(settings)
            self.asker = Asker(
                self.engine, settings.requests, settings.second, settings.tiles, settings.batch_size,
                self._run_settings(),
            )  # fmt: skip
        except UserError as error:  # Ray would restart an actor whose constructor raises, again and again
            self.fault = str(error)
            return
        provenance: dict[str, Any] = {
            "model": "" if callable(settings.model) else urls.shown(settings.model),
            "version": self.engine.version,
            "preset": self.engine.preset,
            "settings": self._run_settings(),
        }
        if self.engine.chosen_decoders:
            provenance["settings"]["decoders"] = dict(self.engine.chosen_decoders)
        if settings.dtype != "float32":
            provenance["settings"]["dtype"] = settings.dtype
        if settings.tiles is not None:
            provenance["settings"]["tiles"] = asdict(settings.tiles)
        provenance["settings"] |= settings.second.as_dict()
        if any(map(is_named_by_caption, settings.requests)):
            provenance["settings"]["classes"] = AUTO
        if any(request.task == "pose" for request in self.asker.requests):
            provenance["skeletons"] = sorted(self.engine.skeletons)  # the classes that are asked for, of those given
            provenance["edges"] = self.engine.edges  # to draw and export skeletons without the model
        self.provenance = json.dumps(provenance, sort_keys=True)
        self._reported = time.monotonic()

    def _run_settings(self) -> dict[str, Any]:
        s = self.settings
        return {
            "score_threshold": s.score_threshold,
            "max_per_phrase": s.max_per_phrase,
            "max_new_tokens": s.max_new_tokens,
        }

    def label(self, fragments: Sequence[Fragment]) -> Outcome:
        """Labels and publishes fragments. One that is done already, by an actor that died before it reported, is only
        counted."""
        outcome = Outcome(fault=self.fault, fragments=len(fragments))
        if self.fault:
            return outcome
        waiting: list[Fragment] = []
        entries = self._fetchers.map(self.ledger.entry, [fragment.index for fragment in fragments])
        for fragment, entry in zip(fragments, entries, strict=True):
            if entry is None:
                waiting.append(fragment)
            elif self.ledger.asks_again(entry):
                waiting.append(fragment.only({error["image_id"] for error in entry["errors"]}))
            else:
                asked = entry.get("asked", entry)
                outcome.done += asked["images"]
                outcome.count_errors(entry["errors"])
                outcome.copied += asked.get("copied", 0)
        publishing: deque[Future[None]] = deque()
        try:
            for fragment, images in self._answered(waiting):
                publishing.append(self._publisher.submit(self._publish, fragment, images, outcome))
                if len(publishing) > PUBLISHED_BEHIND:
                    publishing.popleft().result()
            while publishing:
                publishing.popleft().result()
        except UserError as error:  # the store of the images or of the labels is gone, the disk is full
            outcome.stop = (str(error), error.reason)
        finally:
            wait(publishing)  # `outcome` is theirs until then
        now = time.monotonic()
        outcome.seconds, self._reported = now - self._reported, now
        outcome.busy_seconds, self._busy_seconds = self._busy_seconds, 0.0
        return outcome

    def _answered(self, fragments: Sequence[Fragment]) -> Iterator[tuple[Fragment, list[ImageInHand]]]:
        """The fragments with all their images answered. The next batch is read while the model has this one.

        Which images share a pass depends on their fragment alone, so that a resumed job gets the same results; copies
        of other images take no part."""
        size = self.settings.batch_size
        batches = [
            (fragment, fragment.items[start : start + size], start + size >= len(fragment.items))
            for fragment in fragments
            for start in range(0, len(fragment.items), size)
        ]
        coming: list[Future[list[ImageInHand]]] = []

        side = None if self.settings.tiles else self.engine.largest_side

        def read_ahead(number: int) -> None:
            if number < len(batches):
                coming.append(self._reader.submit(self._read, batches[number][1], side))

        read_ahead(0)
        images: list[ImageInHand] = []
        passes: Passes[ImageInHand] = Passes(size, self.engine.image_size)
        for number, (fragment, _, is_last) in enumerate(batches):
            batch = coming.pop(0).result()
            read_ahead(number + 1)
            images += batch
            for image in batch:
                if image.is_ready:
                    for some in [[image]] if self._is_tiled(image) else self._full_passes(passes, image):
                        self._look(some)
            if is_last:
                for rest in passes.rest():
                    self._look(rest)
                if self._duplicates is not None:
                    for place in self._duplicates.copy(images):  # those whose twin failed are looked at themselves
                        images[place] = self._reader.submit(self._read, [images[place].item], side, False).result()[0]
                        self._look([images[place]] if images[place].is_ready else [])
                yield fragment, images
                images = []

    def _read(self, items: Sequence[Item], side: int | None, can_copy: bool = True) -> list[ImageInHand]:
        """can_copy: images that have been labelled before are not decoded."""
        found = self._duplicates
        look_up = found.look_up if found is not None and can_copy else None
        reader, decoders, fetchers = self._row_groups, self._decoders, self._fetchers
        tiled = self.settings.tiles is not None
        return read_images(items, side, reader, decoders, fetchers, tiled, look_up, with_phash=found is not None)

    def _full_passes(self, passes: Passes[ImageInHand], image: ImageInHand) -> list[list[ImageInHand]]:
        shown = _shown(image)
        return passes.add(image, self.engine.input_size(shown), as_picture(shown).pixels.nbytes)

    def _look(self, images: Sequence[ImageInHand]) -> None:
        """Answers a pass."""
        began = time.monotonic()
        self._answer(images)
        self._busy_seconds += time.monotonic() - began

    def _publish(self, fragment: Fragment, images: Sequence[ImageInHand], outcome: Outcome) -> None:
        """Runs in a thread, fragment after fragment, so that the model does not wait for a store.

        Nothing that the model failed on is published before its first success, so that a bad model leaves no errors to
        clean up."""
        errors = [image.error() for image in images if image.reason]
        if len(errors) == len(images) > 1 and all(error["reason"] in _STORE_REASONS for error in errors):
            raise UserError(errors[0]["message"], errors[0]["reason"])
        failures = [image.message for image in images if image.reason == "model_error"]
        outcome.done += len(images)
        outcome.bytes_read += sum(image.num_bytes for image in images)
        outcome.count_errors(errors)
        outcome.copied += sum(bool(i.records) and i.records[0].get("duplicate_of") is not None for i in images)
        outcome.failures += failures
        self._proven |= len(errors) < len(images)
        if failures and not self._proven:
            outcome.withheld.append((fragment.index, len(images), errors))
            return
        records = [record for image in images for record in image.records]
        self.ledger.publish(fragment.index, len(images), records, errors, fragment.order)
        if self._duplicates is not None:
            self._duplicates.published(fragment.index, images)

    def _answer(self, images: Sequence[ImageInHand]) -> None:
        """Fills in the records of images, and forgets their pixels. A pass that fails is retried image by image."""
        if not images:
            return
        try:
            answers = self._ask(images)
        except Exception as error:  # one image must not stop the others
            if len(images) > 1:
                for image in images:
                    self._answer([image])
                return
            images[0].picture = images[0].large = None
            if isinstance(error, UserError) and error.reason == "broken_image":  # of one that is read by window
                images[0].reason, images[0].message = error.reason, str(error)
                return
            where = traceback.extract_tb(error.__traceback__)[-1]
            images[0].reason = "model_error"
            images[0].message = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            return
        now = datetime.now(UTC)
        for image, found in zip(images, answers, strict=True):
            image.picture = image.large = None
            shared = {"sha256": image.sha256, "phash": image.phash, "labelled_at": now}
            image.records = [
                record | shared
                for request, answer in zip(self.asker.requests, found, strict=True)
                for record in answer_records(
                    image.item.image_id, urls.shown(image.item.path), request, answer, self.provenance
                )
            ]

    def _ask(self, images: Sequence[ImageInHand]) -> list[list[Answer]]:
        """The answers about each image of a pass, or about one that is searched in tiles."""
        first = images[0]
        if not self._is_tiled(first):
            return self.asker.about([_shown(image) for image in images])
        assert len(images) == 1
        if first.large is not None:
            with first.large.open() as windows:
                return [self.asker.in_tiles(windows)]
        assert first.picture is not None, "images that could not be decoded are not asked about"
        return [self.asker.in_tiles(first.picture.pixels)]

    def _is_tiled(self, image: ImageInHand) -> bool:
        tiles = self.settings.tiles
        if image.picture is None or tiles is None:
            return image.large is not None
        return image.picture.reduction == 1 and len(tiles.windows(image.picture.size)) > 1


def _shown(image: ImageInHand) -> np.ndarray | Picture:
    """What the engine gets: an image at full scale as its pixels."""
    assert image.picture is not None, "images that could not be decoded are not asked about"
    picture = image.picture
    return picture.pixels if picture.reduction == 1 else picture


class LabelActor(Labeller):
    """A `Labeller` of Ray Data's actor pool."""

    def __init__(self, settings: WorkerSettings):
        import torch

        torch.set_num_threads(settings.threads or 1)  # actors share the machine's cores
        super().__init__(settings)
        if not self.fault:
            count_actor(settings.output)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """``fragments`` (their `plan.reference`) or ``outcome`` of the listing -> ``outcome``, as JSON."""
        outcomes = []
        for reference, failed in zip(batch["fragments"], batch["outcome"], strict=True):
            outcomes.append(str(failed) if failed else self._label_planned(str(reference)).to_json())
        return {"outcome": outcomes}

    def _label_planned(self, reference: str) -> Outcome:
        try:
            fragments = read_fragments(reference)
        except UserError as error:  # the store of the plan is gone
            return Outcome(stop=(str(error), error.reason))
        return self.label(fragments)


def _load(settings: WorkerSettings) -> EngineProtocol:
    if callable(settings.model):
        return settings.model()
    from lumen_ray.inference.engine import Engine

    return Engine.load(settings.model, find_device(settings.device), settings.decoders, settings.dtype)
