"""Classes that a job takes from the model's own captions, and the vocabulary that they add up to.

The classes of an image are the noun phrases of its caption, split as the task `ground` splits a sentence, in lower case
and in the singular: "two red circles and a dog" -> "red circle", "dog".
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from lumen_ray.data import files, urls
from lumen_ray.errors import UserError
from lumen_ray.inference.request import Request
from lumen_ray.label.ledger import Ledger
from lumen_ray.tasks import get_task, noun_phrases
from lumen_ray.trunk.tokenizer import SPECIAL_TOKENS

#: the value of `classes` for classes from captions
AUTO = "auto"
#: file in the output folder: a line for every class of every task
VOCABULARY = "vocabulary.csv"
#: classes of each task in the summary
LISTED = 20
#: determiners of one thing: the word that they stand before is no plural, whatever its end ("a bus")
_SINGULAR = frozenset(("a", "an", "one", "the"))
_IRREGULAR = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "feet": "foot", "teeth": "tooth",
    "mice": "mouse", "geese": "goose", "knives": "knife", "leaves": "leaf", "loaves": "loaf", "shelves": "shelf",
    "wolves": "wolf", "halves": "half", "calves": "calf", "lives": "life", "wives": "wife", "thieves": "thief",
    "buses": "bus", "lenses": "lens", "canvases": "canvas", "gases": "gas",
    "cookies": "cookie", "movies": "movie", "hoodies": "hoodie", "brownies": "brownie", "smoothies": "smoothie",
}  # fmt: skip
#: names of one thing that end like a plural
_NO_PLURALS = frozenset((
    "canvas", "christmas", "clothes", "gas", "glasses", "goggles", "headphones", "jeans", "lens", "news", "pajamas",
    "pants", "pliers", "scissors", "series", "shorts", "species", "stairs", "sunglasses", "trousers", "tweezers",
))  # fmt: skip


def caption_classes(caption: str) -> list[str]:
    """The classes that a caption names, each once, in order; none for a caption without a noun phrase."""
    named = []
    for determiners, phrase in noun_phrases(caption):
        words = phrase.strip("\"'()[]*_-").split()
        if not words or not any(c.isalnum() for c in phrase) or any(token in phrase for token in SPECIAL_TOKENS):
            continue
        if not _SINGULAR & set(determiners.split()):
            words[-1] = singular(words[-1])
        named.append(" ".join(words))
    return list(dict.fromkeys(named))


def singular(word: str) -> str:
    """The singular of an English noun in lower case; a word that does not end like a plural stays as it is."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word in _NO_PLURALS or len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "zzes", "oes")) and word not in ("shoes", "toes", "axes"):
        return word[:-2]
    return word[:-1]


def is_named_by_caption(request: Request) -> bool:
    """Whether the request's classes are those that the caption names: one that has none yet."""
    return get_task(request.task).needs == "classes" and not request.phrases


def classes_for(
    task: str, keypoints: Sequence[str] | None, classes: Sequence[str], skeletons: Collection[str] | None
) -> tuple[str, ...]:
    """The classes of captions that a task can be asked for: of poses without named keypoints, those in `skeletons`;
    None: all."""
    if skeletons is not None and get_task(task).keypoint_template and not keypoints:
        return tuple(name for name in classes if name in skeletons)
    return tuple(classes)


def check_auto(
    tasks: Sequence[str], served: Sequence[str], skeletons: Mapping[str, Any], keypoints: Sequence[str] | None
) -> None:
    """Raises `UserError` for classes from captions if a model that serves the tasks `served` and has these skeletons
    writes no captions, or knows no keypoints."""
    if "caption" not in served:
        raise UserError(
            f"classes 'auto' are named by the model's captions, but it serves no task caption, only: "
            f"{', '.join(served)}; name the classes",
            "no_caption",
        )
    posed = [task for task in tasks if get_task(task).keypoint_template]
    if posed and not skeletons and not keypoints:
        raise UserError(
            f"task '{posed[0]}' knows no keypoints for classes 'auto', since the model has no skeletons; name the "
            "classes and keypoints, or leave the task out",
            "no_skeleton",
        )


def write_vocabulary(ledger: Ledger) -> dict[str, dict[str, dict[str, int]]]:
    """Writes `VOCABULARY` from the label tables, one after the other; returns its first `LISTED` classes by task.

    By class of a task: ``named``, the images whose captions name it; ``images``, those in which it was found, and its
    ``instances``. A task that needs keypoints has the classes that it was asked for. Memory: the vocabulary.
    """
    settings = ledger.settings() or {}
    skeletons: list[str] | None = None
    named: Counter[str] = Counter()
    images: Counter[tuple[str, str]] = Counter()
    instances: Counter[tuple[str, str]] = Counter()
    tasks = [task for task in settings.get("tasks", ()) if get_task(task).needs == "classes"]
    for table in ledger.tables():
        if skeletons is None and len(table):
            skeletons = json.loads(table["provenance"][0].as_py() or "{}").get("skeletons")
        captions = table.filter(pc.equal(table["task"], "caption"))["text"].to_pylist()
        for caption in captions:
            named.update(caption_classes(caption))
        found = table.filter(table["box"].is_valid()).select(["image_id", "path", "task", "phrase"]).to_pylist()
        found = [row for row in found if row["task"] in tasks]
        instances.update((row["task"], row["phrase"]) for row in found)
        seen = {(row["image_id"], row["path"], row["task"], row["phrase"]) for row in found}
        images.update((task, phrase) for _, _, task, phrase in seen)
    rows = [
        (task, phrase, named[phrase], images[task, phrase], instances[task, phrase])
        for task in tasks
        for phrase in classes_for(task, settings.get("keypoints"), list(named), skeletons)
    ]
    rows.sort(key=lambda row: (tasks.index(row[0]), -row[4], -row[2], row[1]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("task", "phrase", "named", "images", "instances"))
    writer.writerows(rows)
    files.write_bytes(urls.join(ledger.output, VOCABULARY), text.getvalue().encode())
    top: dict[str, dict[str, dict[str, int]]] = {task: {} for task in tasks}
    for task, phrase, *numbers in rows:
        if len(top[task]) < LISTED:
            top[task][phrase] = dict(zip(("named", "images", "instances"), numbers, strict=True))
    return top
