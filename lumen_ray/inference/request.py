"""What a caller asks of the engine about one image. Label, evaluate and serve build these; nothing else reaches it."""

from __future__ import annotations

from dataclasses import dataclass

from lumen_ray.errors import UserError
from lumen_ray.structures import Region
from lumen_ray.tasks import check_classes, get_task, split_phrases


@dataclass(frozen=True)
class Request:
    """One task about one image. Build it with `make_request`, which validates.

    `phrases`: what each branch asks for, in the order of the answer's predictions (classes, phrases, expression);
    `text`: the question of chat and vqa, else the sentence or expression as given;
    `keypoints`: names of the keypoints of a pose request; None for the skeleton the model was trained with.
    """

    task: str
    phrases: tuple[str, ...] = ()
    text: str = ""
    region: Region | None = None
    keypoints: tuple[str, ...] | None = None
    template: int = 0


def make_request(
    task: str,
    *,
    classes: list[str] | tuple[str, ...] | None = None,
    text: str | None = None,
    region: Region | None = None,
    keypoints: list[str] | tuple[str, ...] | None = None,
    template: int = 0,
) -> Request:
    """A validated `Request`. Raises `UserError` (one sentence, machine-readable reason) for what cannot be asked.

    detect, segment, pose and count need `classes`; ground, refer, vqa and chat need `text`; region_caption needs
    `region`; caption needs nothing.
    """
    needs = get_task(task).needs
    points = tuple(keypoints) if keypoints else None
    if needs == "classes":
        return Request(task, tuple(check_classes(classes or (), task)), keypoints=points, template=template)
    text = (text or "").strip()
    if needs in ("question", "sentence", "expression"):
        if not text:
            raise UserError(f"task '{task}' needs a text ({needs}); give one", "empty_text")
        if needs == "sentence":
            return Request(task, tuple(split_phrases(text)), text, template=template)
        return Request(task, (text,) if needs == "expression" else (), text, template=template)
    if needs == "region":
        if region is None:
            raise UserError(f"task '{task}' needs a region (box, point, scribble, polygon or mask)", "missing_region")
        return Request(task, region=region, template=template)
    return Request(task, template=template)
