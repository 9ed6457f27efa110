"""The versions of a model that a replica holds: usually one, and while the served folder changes two.

A request is answered by one version from its image to its boxes: the trunk says which one made its links, and only
that version of a decoder reads them (`OtherVersion` elsewhere). Replicas load a new version beside the old one, so that
none is missing in between.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from lumen_ray.errors import UserError
from lumen_ray.presets import model_folder
from lumen_ray.serve.batching import MANY
from lumen_ray.serve.decoder import Answers, DecoderReplica, load_decoder
from lumen_ray.serve.job import TrunkJob, TrunkReply
from lumen_ray.serve.room import Room
from lumen_ray.serve.trunk import TrunkReplica, load_trunk
from lumen_ray.structures import Size

if TYPE_CHECKING:
    from lumen_ray.inference.decoder_stage import DecoderStage
    from lumen_ray.inference.outputs import TrunkOutput
    from lumen_ray.inference.request import Request
    from lumen_ray.inference.trunk_stage import TrunkStage

_FILES = ("config.yaml", "meta.json", "tokenizer.json", "model.safetensors")
Stamp = tuple[str, tuple[tuple[int, int, int], ...]]


class OtherVersion(Exception):
    """A replica does not hold the version that made the links it was sent."""


def stamp_of(model: str) -> Stamp:
    """What changes when another version is published at a path, without reading it. Raises `UserError` if a file of the
    model folder is missing."""
    folder = model_folder(model).resolve()
    try:
        found = [os.stat(folder / name) for name in _FILES]
    except OSError as error:
        name = Path(str(error.filename)).name
        message = f"'{folder}' is not a complete model folder: {name} is missing; publish whole folders"
        raise UserError(message, "not_a_model") from None
    return str(folder), tuple((status.st_mtime_ns, status.st_size, status.st_ino) for status in found)


class _Replica(Protocol):
    """One version of a trunk or decoder."""

    def reconfigure(self, settings: dict[str, Any]) -> None: ...

    async def ping(self) -> bool: ...

    async def check_health(self) -> None: ...


R = TypeVar("R", bound=_Replica)


class Versions(Generic[R]):
    """A deployment's replica, with an `R` for each version that it holds.

    `model`: path of the model folder, which may be a symlink that moves; `make`: from a folder.
    """

    def __init__(self, model: str, make: Callable[[str], R]):
        self._model, self._make = model, make
        self._settings: dict[str, Any] | None = None
        self.room = Room(MANY, -1)
        self._held: dict[str, R] = {}
        self._loading = asyncio.Lock()
        self._stamp, self.newest, made = self._load()
        self._held[self.newest] = made

    def reconfigure(self, settings: dict[str, Any]) -> None:
        """Called by Serve at the start and on every change of the settings, without a restart."""
        self._settings = settings
        self.room = Room(settings["max_ongoing_requests"], settings["max_queued_requests"])
        for replica in self._held.values():
            replica.reconfigure(settings)

    async def ping(self) -> bool:
        """Whether the model gets on."""
        return all([await replica.ping() for replica in list(self._held.values())])

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica after several errors in a row."""
        for replica in list(self._held.values()):
            await replica.check_health()

    async def update(self, current: str) -> str | UserError:
        """Loads what the folder has now, unless it is held, beside version `current`, which is in use. Returns the
        version of the folder, or why it cannot be loaded: the versions that are held stay in use then."""
        async with self._loading:
            try:
                if await asyncio.to_thread(stamp_of, self._model) == self._stamp:
                    return self.newest
                kept = current if current in self._held else self.newest
                for version in set(self._held) - {kept}:  # so that at most two are held at a time
                    await self.drop(version)
                stamp, version, made = await asyncio.to_thread(self._load)
            except UserError as error:
                return error
            if self._settings is not None:
                made.reconfigure(self._settings)
            self._stamp, self.newest = stamp, version
            self._held.setdefault(version, made)
            return version

    async def drop(self, version: str) -> None:
        """Holds a version no longer, unless it is the only one. Calls that have begun are answered."""
        if version not in self._held or len(self._held) == 1:
            return
        del self._held[version]
        if self.newest == version:
            self.newest, self._stamp = next(reversed(self._held)), ("", ())  # looks at the folder again next time
        await asyncio.to_thread(_free_memory)

    def _of(self, version: str) -> R:
        if (found := self._held.get(version)) is None:
            raise OtherVersion(f"this replica holds version {', '.join(self._held)}, not {version}")
        return found

    def _load(self) -> tuple[Stamp, str, R]:
        from lumen_ray.model.build import model_version

        stamp = stamp_of(self._model)
        made, version = self._make(stamp[0]), model_version(stamp[0])
        if stamp_of(self._model) != stamp:
            raise UserError(f"'{self._model}' changed while it was read; publish whole folders", "model_changed")
        return stamp, version, made


def _free_memory() -> None:
    """Collects what was dropped: replicas and their threads refer to each other."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class TrunkVersions(Versions[TrunkReplica]):
    """The Trunk deployment. Arguments and methods are those of `TrunkReplica`."""

    def __init__(
        self,
        model: str,
        device: str,
        serving: Mapping[str, str],
        load: Callable[[str, str, Mapping[str, str]], TrunkStage] = load_trunk,
    ):
        super().__init__(model, lambda folder: TrunkReplica(folder, device, serving, load))

    def preferred(self, version: str) -> tuple[str, TrunkReplica]:
        """The version that the ingress asks for if it is held, else the newest."""
        found = version if version in self._held else self.newest
        return found, self._held[found]

    async def link(self, job: TrunkJob) -> TrunkReply:
        async with self.room.place():
            version, replica = self._chosen(job)
            return _named(await replica.link(job), version, replica)

    async def link_streaming(self, job: TrunkJob) -> AsyncGenerator[str | TrunkReply, None]:
        async with self.room.place():
            version, replica = self._chosen(job)
            async with aclosing(replica.link_streaming(job)) as pieces:
                async for piece in pieces:
                    yield _named(piece, version, replica) if isinstance(piece, TrunkReply) else piece

    def _chosen(self, job: TrunkJob) -> tuple[str, TrunkReplica]:
        """The version that answers a job. Raises `UserError` if the request names one that is not held."""
        version, replica = self.preferred(job.version)
        if job.is_pinned and version != job.version:
            message = f"version '{job.version}' of the model is not served any more; models: {replica.preset}"
            raise UserError(message, "unknown_model", "model")
        return version, replica

    async def image_size(self, image_id: str, version: str = "") -> Size | None:
        return await self.preferred(version)[1].image_size(image_id)

    async def info(self, version: str = "") -> dict[str, Any]:
        return await self.preferred(version)[1].info()


def _named(reply: TrunkReply, version: str, replica: TrunkReplica) -> TrunkReply:
    return replace(reply, version=version, model=f"{replica.preset}@{version}")


class DecoderVersions(Versions[DecoderReplica]):
    """The deployment of a decoder. Arguments and methods are those of `DecoderReplica`."""

    def __init__(
        self, model: str, name: str, device: str, load: Callable[[str, str, str], DecoderStage] = load_decoder
    ):
        super().__init__(model, lambda folder: DecoderReplica(folder, name, device, load))

    async def decode(
        self, output: TrunkOutput, requests: tuple[Request, ...], sender: str = "", version: str = ""
    ) -> Answers:
        async with self.room.place():
            return await self._of(version or self.newest).decode(output, requests, sender)
