"""Saving of checkpoints while training goes on."""

from __future__ import annotations

import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from lumen_ray.data.files import StoreError
from lumen_ray.data.output_folder import OutputFolder
from lumen_ray.recipe import Recipe
from lumen_ray.train import parallel
from lumen_ray.train.run import checkpoint
from lumen_ray.train.run.failures import explained

#: before the first further try of a save; each waits twice as long as the one before
RETRY_SECONDS = 5.0


class Saver:
    """Writes the checkpoints of a run: training waits only until the state is copied to this machine's memory.

    A thread writes the copy, with collectives over a group of its own. At most one save is in flight: `save` waits for
    the one before. All methods are collectives, and raise an error of a save on all ranks. Failures of a bucket are
    tried again, `checkpoint_retries` times.
    """

    def __init__(self, files: OutputFolder, recipe: Recipe, device: torch.device):
        self._files, self._recipe, self._device = files, recipe, device
        self._saving: Future[None] | None = None
        self._group = parallel.cpu_group() if recipe.async_checkpoints else None
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        on_gpu = device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu
            )
        )

    def save(
        self,
        position: dict[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: dict[str, Tensor] | None = None,
    ) -> None:
        """Saves a checkpoint; see `checkpoint.save`. Without `async_checkpoints` it is complete on return."""
        self.wait()
        place = f"saving the checkpoint of step {position['step']} (stage {position['stage']})"
        with explained(place, self._files.location, model, self._device):
            state = checkpoint.state_of(model, optimizer, average)
            if self._recipe.async_checkpoints:
                staged = cast("dict[str, Any]", self._stager.stage(state))  # no future, without `use_async_staging`
                self._saving = self._writer.submit(self._write_explained, place, position, staged, model)
            else:
                self._write(position, state)

    @property
    def is_idle(self) -> bool:
        """Whether no save is in flight on this rank."""
        return self._saving is None or self._saving.done()

    def wait(self) -> None:
        """Waits for the save in flight, and raises its error."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def settle(self) -> None:
        """Waits for the save in flight, after an error of another kind that is about to be raised. Not a collective."""
        with suppress(Exception):
            self.wait()

    def _write_explained(self, place: str, position: dict[str, Any], state: dict[str, Any], model: nn.Module) -> None:
        with explained(place, self._files.location, model, self._device):
            self._write(position, state)

    def _write(self, position: dict[str, Any], state: dict[str, Any]) -> None:
        for left in range(self._recipe.checkpoint_retries, -1, -1):
            try:
                self._upload()  # metrics of the steps before a checkpoint, which are not repeated
                checkpoint.save(self._files.location, position, state, self._recipe.keep_checkpoints, self._group)
                return
            except StoreError as error:  # on all ranks
                if not left:
                    raise
                pause = RETRY_SECONDS * 2 ** (self._recipe.checkpoint_retries - left)
                warnings.warn(f"saving step {position['step']} is tried again in {pause:g} s: {error}", stacklevel=2)
                time.sleep(pause)

    def _upload(self) -> None:
        failure = None
        try:
            self._files.upload()
        except StoreError as error:
            failure = error
        parallel.raise_together(failure, self._group)
