"""Errors that end a run, each told in one sentence: where, on which samples, in which module, and what to change."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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


def resumption(run: Path) -> str:
    """What a run can go on with, for the end of a message."""
    newest = checkpoint.latest(run)
    return f"the last checkpoint, '{newest.name}', is intact" if newest else "there is no checkpoint yet"


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it comes from, out of the wrappers of Python, torch and Ray.

    A wrapper that Ray gave the type of what it wraps is left out: its text is a traceback.
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


def as_user_error(error: BaseException, run: Path) -> BaseException:
    """The user's or the run's own error out of its wrappers, as a `UserError`; else the error as it is."""
    for cause in causes(error):
        if isinstance(cause, (UserError, DivergedError)):
            return UserError(str(cause), getattr(cause, "reason", "training_diverged"))
        if (full := _ran_out(cause, run)) is not None:
            return full
    return error


@contextmanager
def explained(place: str, run: Path, model: nn.Module, device: torch.device) -> Iterator[None]:
    """Turns running out of memory, or of disk, into a `UserError` that says where, and what to change."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        for cause in causes(error):
            used = f" at {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""
            if (full := _ran_out(cause, run, f"{place}: ", used + module_of(cause, model))) is not None:
                raise full from error
        raise


def _ran_out(error: BaseException, run: Path, place: str = "", where: str = "") -> UserError | None:
    """The sentence about an error that says that a disk or memory is full; None when it says neither.

    `place`: what was being done; `where`: how much memory was used in which module.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        file = f" at '{error.filename}'" if error.filename else ""
        advice = "free space and run the same command again"
        message = f"{place}the disk of the run folder is full{file}; {advice}; {resumption(run)}"
        return UserError(message, "disk_full")
    if _ended_by_ray(error):
        done = last_step(run)
        after = "before the first step was done" if done is None else f"after step {done}"
        who = f"a worker's machine ran out of memory {after}, and Ray ended the worker"
    elif _out_of_memory(error):
        who = f"rank {parallel.rank()} ran out of memory{where}"
    else:
        return None
    advice = "raise 'accumulate', turn on 'activation_checkpointing' or lower 'batch_size' in the recipe"
    return UserError(f"{place}{who}; {advice}; {resumption(run)}", "out_of_memory")


def _out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's, or this process's, memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def _ended_by_ray(error: BaseException) -> bool:
    """Whether Ray's memory monitor ended a worker. Ray is not imported here: where it is not, no error is its own."""
    ray = sys.modules.get("ray.exceptions")
    return ray is not None and isinstance(error, ray.OutOfMemoryError)


def module_of(error: BaseException, model: nn.Module) -> str:
    """`` in trunk.llm.model.layers.1.mlp``: what the innermost of the frames that an error passed through works for.

    A module of the model, the optimizer or, where the autograd engine runs no code of a module, the backward pass;
    empty when it is none of them.
    """
    names = {id(module): name or "the model" for name, module in model.named_modules()}
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if id(owner) in names:
            found = names[id(owner)]
        elif isinstance(owner, torch.optim.Optimizer):
            found = "the optimizer"
        elif frame.f_code is Tensor.backward.__code__:
            found = "the backward pass"
    return f" in {found}" if found else ""


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
