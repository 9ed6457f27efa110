"""Serving a new version of the model folder: all replicas load it beside the old one, then requests ask for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ray import exceptions as ray_errors
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from lumen_ray.errors import UserError
from lumen_ray.serve.http import logger
from lumen_ray.serve.versions import Stamp, stamp_of

T = TypeVar("T")


class Reloads:
    """Watches the model folder of an ingress replica. Several of them do so independently: replicas load a version
    once, and hold the old one as long as any ingress may ask for it.

    `version`: the one that requests ask for, empty until it is known; `refused`: why the one in the folder is not
    served.
    """

    def __init__(
        self,
        model: str,
        deployments: Mapping[str, DeploymentHandle],
        keep_s: float,
        on_switch: Callable[[], None] = lambda: None,
    ):
        """`keep_s`: seconds that a request of the old version may still take; `on_switch`: called when `version` has
        changed."""
        self._model, self._deployments, self._keep_s, self._on_switch = model, deployments, keep_s, on_switch
        self.version = ""
        self.refused: str | None = None
        self._seen: Stamp | str | None = None
        self._switching: asyncio.Task[bool] | None = None
        self._settling: asyncio.Task[None] | None = None

    async def watch(self, every_s: float) -> None:
        """Looks at the folder for ever."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.look()
            except Exception:  # a look that fails is repeated
                logger.exception("the model folder could not be looked at; version %s goes on", self.version)

    async def look(self) -> None:
        """Serves what the folder has now if it has changed since the last look."""
        try:
            seen: Stamp | str = await asyncio.to_thread(stamp_of, self._model)
        except UserError as error:
            seen = str(error)
        if seen == self._seen:
            return
        if isinstance(seen, str):
            self._refuse(seen)
        elif not await self.switch():
            return
        self._seen = seen

    async def switch(self) -> bool:
        """Serves what the folder has now, once for all who ask at the same time; returns whether all replicas have
        said what they think of it."""
        if self._switching is None or self._switching.done():
            self._switching = asyncio.create_task(self._switch())
        return await asyncio.shield(self._switching)

    async def _switch(self) -> bool:
        if not self.version:
            return False  # nothing was answered yet; the replicas load what is new once something was
        found = await self._all("update", self.version)
        if lost := [one for one in found if not isinstance(one, str | UserError)]:
            logger.warning("a replica was lost while it loaded the model folder: %s", lost[0])
            return False
        versions = {one for one in found if isinstance(one, str)}
        if refusals := [str(one) for one in found if isinstance(one, UserError)]:
            self._refuse(refusals[0])
        elif len(versions) != 1:
            self._refuse(f"the replicas read several versions in '{self._model}': {', '.join(sorted(versions))}")
        else:
            self.refused = None
            self._serve(versions.pop())
            return True
        await self._all("keep", self.version)
        return True

    def _serve(self, version: str) -> None:
        if version == self.version:
            return
        logger.warning("serving version %s of '%s' in place of %s", version, self._model, self.version)
        old, self.version = self.version, version
        self._on_switch()
        if self._settling is not None:
            self._settling.cancel()
        self._settling = asyncio.create_task(self._settle(old))

    async def _settle(self, old: str) -> None:
        """Drops the old version once requests that ask for it are over. Others may ask for a newer one by then, so
        nothing else is dropped."""
        await asyncio.sleep(self._keep_s)
        await self._all("drop", old)

    def _refuse(self, why: str) -> None:
        if why != self.refused:
            logger.warning("version %s goes on, since what is in the model folder is refused: %s", self.version, why)
        self.refused = why

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        """What each replica of every deployment returns or raises."""
        found = await asyncio.gather(*(_of_each(h, method, *arguments) for h in self._deployments.values()))
        return [one for of_deployment in found for one in of_deployment]


async def _of_each(handle: DeploymentHandle, method: str, *arguments: Any) -> list[Any]:
    try:
        return await handle.broadcast(method, *arguments).results_async(return_exceptions=True)
    except DeploymentUnavailableError:  # no replica, as of a decoder that is scaled to zero
        return []
    except (ray_errors.RayError, RayServeException) as error:
        return [error]
