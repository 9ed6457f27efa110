"""Errors that end a run, each told in one sentence: where, on which samples, in which module, and what to change."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lumen_ray.errors import UserError
from lumen_ray.train import parallel

SHOWN = 8  # samples named in a message


class DivergedError(RuntimeError):
    """A loss or a gradient is not a finite number."""


def where(step: int, stage: str, image_ids: list[str]) -> str:
    """``step 12 (stage joint), images a, b and 6 more``."""
    more = f" and {len(image_ids) - SHOWN} more" if len(image_ids) > SHOWN else ""
    return f"step {step} (stage {stage}), images {', '.join(image_ids[:SHOWN])}{more}"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: a device's, this process's, or a worker's that Ray ended for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or type(error).__name__ == "OutOfMemoryError":
        return True  # Ray's own, of a worker that its memory monitor ended, is known by name: no Ray is imported here
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def full_disk(error: BaseException | None) -> OSError | None:
    """The "no space left" behind an error, if that is what it comes from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


MEMORY_ADVICE = (
    "raise 'accumulate', turn on 'activation_checkpointing' or lower 'batch_size' in the recipe; the last checkpoint "
    "is intact"
)


@contextmanager
def explained(place: str, device: torch.device) -> Iterator[None]:
    """Turns running out of memory, or of disk, into a `UserError` that says where, and what to change."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if (full := full_disk(error)) is not None:
            file = f" at '{full.filename}'" if full.filename else ""
            raise UserError(
                f"{place}: the disk of the run folder is full{file}; free space and run the same command again: the "
                "last checkpoint is intact",
                "disk_full",
            ) from error
        if out_of_memory(error):
            used = f" at {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""
            raise UserError(
                f"{place}: rank {parallel.rank()} ran out of memory{used}; {MEMORY_ADVICE}",
                "out_of_memory",
            ) from error
        raise


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors in what a module returned."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors_in(inner)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name))


class _Watch:
    """Notes the first module whose output, or whose output's gradient, is not finite."""

    def __init__(self, model: nn.Module):
        self.output: str | None = None
        self.gradient: str | None = None
        self._hooks = [
            module.register_forward_hook(self._on_output(name or "the model")) for name, module in model.named_modules()
        ]

    def _on_output(self, name: str):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in tensors_in(output):
                if self.output is None and not _finite(tensor):
                    broken = [n for n, p in module.named_parameters(recurse=False) if not _finite(p)]
                    self.output = name + (f" (its {broken[0]} is not finite)" if broken else "")
                if tensor.requires_grad:
                    tensor.register_hook(self._on_gradient(name))

        return hook

    def _on_gradient(self, name: str):
        def hook(gradient: Tensor) -> None:
            if self.gradient is None and not _finite(gradient):
                self.gradient = name

        return hook

    @property
    def told(self) -> str | None:
        if self.output:
            return f"the output of {self.output}"
        return f"the gradient of the output of {self.gradient}" if self.gradient else None

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _finite(tensor: Tensor) -> bool:
    local = tensor.detach()
    local = local.to_local() if hasattr(local, "to_local") else local
    return bool(torch.isfinite(local).all())


def find_module(model: nn.Module, runs: list[tuple[Callable[[], None], list[str]]]) -> tuple[str, list[str]]:
    """(which module made a number that is not finite, on which images), by doing the micro-steps again under watch.

    `runs`: a function that does a micro-step, forward and backward, and the ids of its images. A collective. Modules
    inside compiled blocks are not seen; their block is.
    """
    found = None
    for run, image_ids in runs:
        watch = _Watch(model)
        try:
            run()
        finally:
            watch.close()
        found = found or ((watch.told, image_ids) if watch.told else None)
    everywhere = [entry for entry in parallel.from_all_ranks(found) if entry]
    return everywhere[0] if everywhere else ("none is found when the step is done again", runs[0][1])
