"""The requests of a label job, the same about every image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lumen_ray.errors import UserError
from lumen_ray.exemplars import ClassByExample
from lumen_ray.inference.request import Request, make_request
from lumen_ray.label.vocabulary import AUTO
from lumen_ray.tasks import TASKS, get_task

_EXAMPLES: dict[str, str] = {
    "question": "how many dogs are there ?",
    "sentence": "a dog on a red sofa",
    "expression": "the dog on the left",
}
#: tasks that take a text about each image
TEXT_TASKS = sorted(name for name, task in TASKS.items() if task.needs in _EXAMPLES)


def build_requests(
    tasks: Sequence[str],
    classes: Sequence[str] | None = None,
    prompts: Mapping[str, Sequence[str]] | None = None,
    keypoints: Sequence[str] | None = None,
    exemplars: Sequence[ClassByExample] = (),
) -> list[Request]:
    """The requests about every image.

    Tasks that need classes get `classes`, those of a name in `exemplars` by example, and the rest of `exemplars`; a
    task that takes classes by name only gets `classes` alone. With `vocabulary.AUTO` they have none yet. Tasks that
    need a text get one request per text in `prompts[task]`. Raises `UserError` for unknown tasks, missing classes or
    texts, a text for a task that takes none, and exemplars or 'auto' that no task takes.
    """
    prompts = prompts or {}
    by_caption = classes == AUTO
    if by_caption and not any(get_task(name).needs == "classes" for name in tasks):
        raise UserError(
            "classes are 'auto', but no task takes classes; add one such as detect, segment or count", "unused_classes"
        )
    if by_caption and exemplars:
        raise UserError("classes are 'auto' and others are given by example; give one of the two", "invalid_classes")
    all_classes = [] if by_caption else _with_exemplars(classes or (), exemplars)
    if not tasks:
        raise UserError("no task given; give e.g. tasks 'detect,segment,caption'", "empty_tasks")
    for name in prompts:
        if get_task(name).needs in ("classes", "nothing"):
            raise UserError(f"task '{name}' takes no text; tasks that take one: {', '.join(TEXT_TASKS)}", "unused_text")
        if name not in tasks:
            raise UserError(f"texts are given for task '{name}', which is not among the tasks; add it", "unused_text")
    requests = []
    for name in dict.fromkeys(tasks):
        needs = get_task(name).needs
        if get_task(name).result == "image":
            raise UserError(
                f"task '{name}' makes pictures, which a label table does not hold; leave it out, or use a server",
                "invalid_task",
            )
        if needs == "region":
            raise UserError(
                f"task '{name}' needs a region in each image and cannot label a corpus; leave it out", "invalid_task"
            )
        if needs == "classes" and by_caption:
            posed = get_task(name).keypoint_template
            requests.append(Request(name, keypoints=tuple(keypoints) if posed and keypoints else None))
        elif needs == "classes" and get_task(name).keypoint_template:
            if exemplars and not classes:
                raise UserError(
                    f"task '{name}' takes classes by name only, and all are given by example; name some, or leave the "
                    "task out",
                    "empty_classes",
                )
            requests.append(make_request(name, classes=list(classes or ()), keypoints=keypoints))
        elif needs == "classes":
            requests.append(make_request(name, classes=all_classes))
        elif needs == "nothing":
            requests.append(make_request(name))
        else:
            given = prompts.get(name, ())
            texts = [given] if isinstance(given, str) else given
            if not texts:
                raise UserError(
                    f"task '{name}' needs a text ({needs}); give one, such as --text \"{name}={_EXAMPLES[needs]}\", in "
                    f"Python text={{'{name}': '{_EXAMPLES[needs]}'}}",
                    "empty_text",
                )
            requests += [make_request(name, text=text) for text in texts]
    if exemplars and not any(request.examples for request in requests):
        raise UserError(
            "classes are given by example, but no task takes them; add one such as detect, segment or count",
            "unused_exemplars",
        )
    return requests


def _with_exemplars(classes: Sequence[str], exemplars: Sequence[ClassByExample]) -> list[str | ClassByExample]:
    """`classes` in their order, then the exemplars of other names."""
    shown = {given.name: given for given in exemplars}
    named = [shown.pop(name.strip(), name) if isinstance(name, str) else name for name in classes]
    return [*named, *shown.values()]
