"""The requests of a label job, the same about every image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lumen_ray.errors import UserError
from lumen_ray.inference.request import Request, make_request
from lumen_ray.tasks import get_task


def build_requests(
    tasks: Sequence[str],
    classes: Sequence[str] | None = None,
    prompts: Mapping[str, Sequence[str]] | None = None,
    keypoints: Sequence[str] | None = None,
) -> list[Request]:
    """The requests about every image.

    Tasks that need classes get `classes`; tasks that need a text get one request per text in `prompts[task]`.
    Raises `UserError` for unknown tasks, missing classes or texts.
    """
    prompts = prompts or {}
    if not tasks:
        raise UserError("no task given; give e.g. tasks 'detect,segment,caption'", "empty_tasks")
    for name in prompts:
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
        if needs == "classes":
            requests.append(
                make_request(name, classes=list(classes or ()), keypoints=keypoints if name == "pose" else None)
            )
        elif needs == "nothing":
            requests.append(make_request(name))
        else:
            given = prompts.get(name, ())
            texts = [given] if isinstance(given, str) else given
            if not texts:
                raise UserError(f"task '{name}' needs a text ({needs}) for its requests; give one", "empty_text")
            requests += [make_request(name, text=text) for text in texts]
    return requests
