"""Errors that end a run, each in one sentence: where, on which samples, in which module, and what to change."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lumen_ray.data.files import StoreError
from lumen_ray.data.urls import Location, base_name
from lumen_ray.errors import UserError
from lumen_ray.train import parallel
from lumen_ray.train.metrics.metrics import last_step
from lumen_ray.train.run import checkpoint

SHOWN = 8  # samples named in a message


class DivergedError(RuntimeError):
    """A loss or a gradient is not a finite number."""


def where(step: int, stage: str, image_ids: list[str]) -> str:
    """``step 12 (stage joint), images a, b and 6 more``."""
    more = f" and {len(image_ids) - SHOWN} more" if len(image_ids) > SHOWN else ""
    return f"step {step} (stage {stage}), images {', '.join(image_ids[:SHOWN])}{more}"


def resumption(run: Location) -> str:
    """Which checkpoint a run can resume from, for the end of a message."""
    try:
        newest = checkpoint.latest(run)
    except StoreError:
        return "its checkpoints cannot be listed now"
    return f"the last checkpoint, '{base_name(newest)}', is intact" if newest else "there is no checkpoint yet"


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes, unwrapped from Python's, torch's and Ray's chains.

    A wrapper with the type of its cause, as Ray makes them, is left out: its text is a traceback.
    """
    queue: list[Any] = [error]
    seen: set[int] = set()
    while queue:
        current = queue.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        inner = getattr(current, "cause", None)
        if not isinstance(inner, BaseException):
            yield current
        queue += [current.__cause__, current.__context__, inner]
        queue += [getattr(current, name, None) for name in ("controller_failure", "health_check_failure", "_base_exc")]
        queue += getattr(current, "worker_failures", {}).values()


def as_user_error(error: BaseException, run: Location) -> BaseException:
    """A `UserError` for the first cause that the user can act on; the error itself if there is none."""
    for cause in causes(error):
        if isinstance(cause, (UserError, DivergedError)):
            return UserError(str(cause), getattr(cause, "reason", "training_diverged"))
        if (exhausted := _exhausted(cause, run)) is not None:
            return exhausted
    return error


@contextmanager
def explained(place: str, run: Location, model: nn.Module, device: torch.device) -> Iterator[None]:
    """Turns an out-of-memory or disk-full error into a `UserError` that names the place and what to change."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        for cause in causes(error):
            used = f" at {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""
            if (exhausted := _exhausted(cause, run, f"{place}: ", used + module_of(cause, model))) is not None:
                raise exhausted from error
        raise


def _exhausted(error: BaseException, run: Location, place: str = "", where: str = "") -> UserError | None:
    """A `UserError` for an error of a full disk or exhausted memory; None for any other.

    `place`: the activity that failed; `where`: how much memory was used, in which module.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        file = f" at '{error.filename}'" if error.filename else ""
        advice = "free space and run the same command again"
        message = f"{place}the disk of the run folder is full{file}; {advice}; {resumption(run)}"
        return UserError(message, "disk_full")
    if _ended_by_ray(error):
        done = last_step(run)
        after = "before the first step was complete" if done is None else f"after step {done}"
        who = f"a worker's machine ran out of memory {after}, and Ray ended the worker"
    elif _out_of_memory(error):
        who = f"rank {parallel.rank()} ran out of memory{where}"
    else:
        return None
    advice = "raise 'accumulate', turn on 'activation_checkpointing' or lower 'batch_size' in the recipe"
    return UserError(f"{place}{who}; {advice}; {resumption(run)}", "out_of_memory")


def _out_of_memory(error: BaseException) -> bool:
    """Whether a device, or this process, ran out of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def _ended_by_ray(error: BaseException) -> bool:
    """Whether Ray's memory monitor ended a worker. Does not import Ray: without it no error comes from it."""
    ray = sys.modules.get("ray.exceptions")
    return ray is not None and isinstance(error, ray.OutOfMemoryError)


def module_of(error: BaseException, model: nn.Module) -> str:
    """`` in trunk.llm.model.layers.1.mlp``: where an error was raised, by the innermost of these stack frames.

    A module of the model, the optimizer, or the backward pass where autograd runs no code of a module; else empty.
    """
    names = {id(module): name or "the model" for name, module in model.named_modules()}
    place = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if id(owner) in names:
            place = names[id(owner)]
        elif isinstance(owner, torch.optim.Optimizer):
            place = "the optimizer"
        elif frame.f_code is Tensor.backward.__code__:
            place = "the backward pass"
    return f" in {place}" if place else ""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors in the output of a module: a tensor, or containers and dataclasses of such."""
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


class _FiniteCheck:
    """Records the first module whose output, or whose output's gradient, is not finite."""

    def __init__(self, model: nn.Module):
        self.output: str | None = None
        self.gradient: str | None = None
        self._hooks = [
            module.register_forward_hook(self._on_output(name or "the model")) for name, module in model.named_modules()
        ]

    def _on_output(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in tensors_in(output):
                if self.output is None and not _finite(tensor):
                    broken = [n for n, p in module.named_parameters(recurse=False) if not _finite(p)]
                    self.output = name + (f" (its {broken[0]} is not finite)" if broken else "")
                if tensor.requires_grad:
                    tensor.register_hook(self._on_gradient(name))

        return hook

    def _on_gradient(self, name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if self.gradient is None and not _finite(gradient):
                self.gradient = name

        return hook

    def source(self) -> str | None:
        """The first tensor that was not finite, in words; None if all were finite."""
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


def find_module(model: nn.Module, runs: Sequence[tuple[Callable[[], object], list[str]]]) -> tuple[str, list[str]]:
    """(module whose output or gradient is not finite, ids of the images), by repeating micro-steps with checks.

    `runs`: a function that does a micro-step, forward and backward, and the ids of its images. A collective. Of
    compiled blocks the block is named, not a module inside.
    """
    first = None
    for run, image_ids in runs:
        check = _FiniteCheck(model)
        try:
            run()
        finally:
            check.close()
        if first is None and (source := check.source()):
            first = source, image_ids
    everywhere = [entry for entry in parallel.from_all_ranks(first) if entry]
    return everywhere[0] if everywhere else ("not reproduced when the step is repeated", runs[0][1])
