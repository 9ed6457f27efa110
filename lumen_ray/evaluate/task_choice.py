"""The tasks that an evaluation scores, from the annotations of a split and the tasks of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lumen_ray.errors import UserError
from lumen_ray.inference.request import no_decoder
from lumen_ray.tasks import TASKS, get_task


class ServesTasks(Protocol):
    """The part of an engine that the choice depends on."""

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the tasks that the model serves."""

    @property
    def serving(self) -> Mapping[str, str]:
        """Task -> decoder that serves it; text tasks are absent."""


def choose_tasks(
    manifest: dict[str, Any], named: Sequence[str] | None, engine: ServesTasks
) -> tuple[list[str], list[str]]:
    """(tasks to score, tasks that free chat asks for besides).

    named: the caller's choice; None for every annotated task that the model serves. Raises `UserError` for tasks that
    the split is not annotated for, or that the model cannot serve or be scored on.
    """
    annotated = _annotated(manifest)
    if named is None:
        tasks = _default_tasks(annotated, engine)
        # pictures are not scored unless named, but whether the LLM routes to them is
        spoken = [name for name in annotated if name in engine.tasks and makes_pictures(name)]
    else:
        tasks, spoken = _named_tasks(named, annotated), []
    _check_annotated(tasks, annotated)
    for name in tasks:
        _check_served(name, engine)
    return tasks, spoken


def makes_pictures(task: str) -> bool:
    return TASKS[task].result == "image"


def _annotated(manifest: dict[str, Any]) -> list[str]:
    """Free chat needs no annotation of its own: any annotated task can be asked for in it."""
    return [name for name, task in TASKS.items() if manifest["tasks"].get(task.annotation) and name != "chat"]


def _listed(annotated: Sequence[str]) -> str:
    return f"its tasks: {', '.join(annotated) or 'none'}"


def _default_tasks(annotated: Sequence[str], engine: ServesTasks) -> list[str]:
    """The annotated tasks that the model serves, and free chat. Tasks scored on another's annotations must be named."""
    served = [name for name in annotated if name in engine.tasks and not TASKS[name].annotated_as]
    return [*(name for name in served if _has_judge(engine) or not makes_pictures(name)), "chat"]


def _has_judge(engine: ServesTasks) -> bool:
    """Whether the model can score pictures, which its own detector does."""
    return "detect" in engine.serving


def _named_tasks(named: Sequence[str], annotated: Sequence[str]) -> list[str]:
    if not named:
        raise UserError(
            f"no task given; give some that the split is annotated for, {_listed(annotated)}", "empty_tasks"
        )
    return list(dict.fromkeys(get_task(name).name for name in named))


def _check_annotated(tasks: Sequence[str], annotated: Sequence[str]) -> None:
    missing = [name for name in tasks if name not in annotated and name != "chat"]
    if missing or not annotated:
        raise UserError(
            f"the split is not annotated for {', '.join(missing) or 'any task'}; {_listed(annotated)}",
            "nothing_to_evaluate",
        )
    if list(tasks) == ["chat"]:
        raise UserError(
            f"task 'chat' asks for the other tasks in free chat; name some of them too, {_listed(annotated)}",
            "nothing_to_evaluate",
        )


def _check_served(task: str, engine: ServesTasks) -> None:
    if not TASKS[task].is_text and task not in engine.serving:
        raise no_decoder(task, engine.tasks)
    if makes_pictures(task) and not _has_judge(engine):
        raise UserError(
            f"task '{task}' is scored by detecting objects in the pictures, but the model has no decoder for task "
            "'detect'; leave it out",
            "no_decoder",
        )
