"""The registry of tasks: the input each needs, its prompts, its routing token and the type of its result.

Decoders list the tasks they can serve (`decoders.spec.DecoderSpec.tasks`). To add a task, edit this file and, if it
needs a new decoder, add one folder under `decoders/`.

A *prompt* is the natural-language instruction of one branch. Tasks have several phrasings, so that the routing token is
learned from meaning and not from one fixed string (VisionLLM v2, sec. 3.2).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lumen_ray.errors import UserError, unknown

# The input that a request for a task must have, besides the image.
Needs = Literal["question", "classes", "sentence", "expression", "region", "description", "instruction", "nothing"]
ResultType = Literal["text", "boxes", "masks", "keypoints", "count", "image"]

REGION_TOKEN = "<region>"


@dataclass(frozen=True)
class LinkFamily:
    """A set of super-link queries that several decoders can read, each through a separate link head.

    `num_queries` learned queries follow the routing token (VisionLLM v2, sec. 3.3: 4 for perception).
    """

    name: str
    routing_tokens: tuple[str, ...]
    num_queries: int


@dataclass(frozen=True)
class Task:
    """One task. `templates`: phrasings of its prompt, with `{}` for a class, phrase or question."""

    name: str
    needs: Needs
    result: ResultType
    templates: tuple[str, ...]
    routing_token: str | None = None
    #: phrasing of the branch for one keypoint of an object (pose only)
    keypoint_template: str | None = None
    #: the task whose annotations in shards this one uses; annotations never name this task
    annotated_as: str | None = None
    #: the task whose answers this task's are computed from; a model is trained for that task instead
    derived_from: str | None = None
    #: free conversation: takes earlier turns and a system text, works without an image, and the LLM may route it
    is_conversation: bool = False
    #: one mask for all objects of a class together, instead of one for each
    joins_objects: bool = False

    @property
    def annotation(self) -> str:
        """The task name that annotations in shards have."""
        return self.annotated_as or self.name

    @property
    def sees_image(self) -> bool:
        """False if the result is a picture drawn from text alone."""
        return self.needs != "description"

    def link_reads_image(self, links_see_image: bool) -> bool:
        """Whether the links of its prompts read the image in a model with this `links_see_image`. Those that name
        something of the image at hand always do: a kept link would not be asked for again, and referring expressions
        compare objects."""
        return links_see_image or self.needs not in ("classes", "sentence")

    @property
    def may_have_regions(self) -> bool:
        """Whether its prompts can refer to regions of the image."""
        return self.is_text or self.needs == "region"

    @property
    def is_text(self) -> bool:
        """True if the LLM writes the answer and no decoder is involved."""
        return self.routing_token is None

    def keypoint_prompt(self, keypoint: str, phrase: str) -> str:
        """The instruction of the branch for one keypoint of the objects of a class (pose only)."""
        if self.keypoint_template is None:
            raise ValueError(f"task '{self.name}' has no keypoints")
        return self.keypoint_template.replace("{keypoint}", keypoint).replace("{}", phrase)

    def prompt(self, phrase: str = "", template: int = 0) -> str:
        """The instruction of one branch. `template`: number of the phrasing, modulo their count."""
        return self.templates[template % len(self.templates)].replace("{}", phrase)


LINK_FAMILIES: dict[str, LinkFamily] = {
    "perception": LinkFamily("perception", ("[DET]", "[GRD]", "[SEG]", "[POSE]"), num_queries=4),
    "generation": LinkFamily("generation", ("[GEN]",), num_queries=64),
    "editing": LinkFamily("editing", ("[EDIT]",), num_queries=64),
}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("chat", "question", "text", ("{}",), is_conversation=True),
        Task("caption", "nothing", "text", ("describe the image .", "what is in the image ?")),
        Task("vqa", "question", "text", ("{}",)),
        Task("region_caption", "region", "text", ("describe <region> .", "what is <region> ?")),
        Task("detect", "classes", "boxes", ("detect {}", "find every {}", "locate all {}"), "[DET]"),
        Task("ground", "sentence", "boxes", ("ground {}", "where in the image is {} ?"), "[GRD]"),
        Task("refer", "expression", "boxes", ("point to {}", "which one is {} ?"), "[GRD]"),
        Task("segment", "classes", "masks", ("segment {}", "outline every {}"), "[SEG]"),
        Task(
            "pose",
            "classes",
            "keypoints",
            ("pose of {}", "estimate the pose of every {}"),
            "[POSE]",
            keypoint_template="{keypoint} of {}",
        ),
        Task(
            "region_segment",
            "region",
            "masks",
            (f"segment {REGION_TOKEN}", f"outline what is at {REGION_TOKEN}"),
            "[SEG]",
            annotated_as="segment",
        ),
        Task(
            "semantic",
            "classes",
            "masks",
            ("segment {}", "outline every {}"),
            "[SEG]",
            annotated_as="segment",
            derived_from="segment",
            joins_objects=True,
        ),
        Task("count", "classes", "count", ("count {}", "count every {}"), "[DET]"),
        Task(
            "generate",
            "description",
            "image",
            ("draw {}", "generate a picture of {}"),
            "[GEN]",
            annotated_as="caption",
        ),
        Task("edit", "instruction", "image", ("edit : {}", "in this picture {}"), "[EDIT]"),
    )
}

#: the tasks whose results are not pictures
UNDERSTANDING = tuple(name for name, task in TASKS.items() if task.result != "image")
#: tasks about all objects of each class, which differ in wording, routing token and result
CLASS_TASKS = ("detect", "segment", "count")
#: those of `UNDERSTANDING` that can be trained
TRAINABLE_TASKS = tuple(name for name in UNDERSTANDING if not TASKS[name].derived_from)
ROUTING_TOKENS: tuple[str, ...] = tuple(t for family in LINK_FAMILIES.values() for t in family.routing_tokens)
#: tokens behind whose queries the text of an answer may go on; those of poses are followed by keypoint prompts instead
TEXT_ROUTES: tuple[str, ...] = tuple(t for t in LINK_FAMILIES["perception"].routing_tokens if t != "[POSE]")
#: most links in one answer
MAX_TEXT_LINKS = 16
_ROUTES = re.compile("|".join(map(re.escape, ROUTING_TOKENS)))


def get_task(name: str) -> Task:
    """The task of that name. Raises `UserError` with the valid names if there is none."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


def in_words(wanted: Callable[[Task], bool]) -> str:
    """The names of the tasks for which `wanted` is true, e.g. ``"detect, pose and count"``."""
    *names, end = [task.name for task in TASKS.values() if wanted(task)]
    return f"{', '.join(names)} and {end}" if names else end


def family_of(routing_token: str) -> LinkFamily:
    """The link family of a routing token."""
    for family in LINK_FAMILIES.values():
        if routing_token in family.routing_tokens:
            return family
    raise unknown("routing token", routing_token, ROUTING_TOKENS)


def task_of_route(routing_token: str) -> Task:
    """The first task of the registry whose prompts that token answers."""
    return next(task for task in TASKS.values() if task.routing_token == routing_token)


def text_pieces(text: str) -> list[tuple[str, str]]:
    """(words, the routing token behind them) of every piece of an answer with links, in order; the last has no token.

    Raises `UserError` if a token has no words before it, or if text cannot go on behind it.
    """
    pieces: list[tuple[str, str]] = []
    start = 0
    for match in _ROUTES.finditer(text):
        words, token = text[start : match.start()], match.group()
        if token not in TEXT_ROUTES:
            raise UserError(
                f"an answer cannot go on behind {token}; tokens that may stand in a text: {', '.join(TEXT_ROUTES)}",
                "invalid_links",
            )
        if not words.strip():
            raise UserError(f"{token} has no words before it in the answer {text!r}; name the objects", "invalid_links")
        pieces.append((words, token))
        start = match.end()
    return [*pieces, (text[start:], "")]


def task_of_prompt(text: str) -> tuple[str, str] | None:
    """The (task, phrase) of a prompt, e.g. ``"find every red circle" -> ("detect", "red circle")``.

    None for text that matches no template with a phrase.
    """
    for task in TASKS.values():
        if task.is_text:
            continue
        for template in sorted((t for t in task.templates if "{}" in t), key=len, reverse=True):
            pattern = re.escape(template).replace(r"\{\}", "(.+)")
            if match := re.fullmatch(pattern, text.strip()):
                return task.name, match.group(1).strip()
    return None


def check_classes(classes: list[str] | tuple[str, ...], task: str) -> list[str]:
    """Class names without surrounding blanks and duplicates, in order. Raises `UserError` if none is left."""
    names = list(dict.fromkeys(name.strip() for name in classes if name and name.strip()))
    if not names:
        raise UserError(
            f"task '{task}' needs at least one class name, such as red circle or blue square; give some",
            "empty_classes",
        )
    return names


def region_question(phrase: str) -> str:
    """The question whether a region shows what a phrase names, to be answered with yes or no. Reads alike for class
    names, plurals and referring expressions."""
    return f"does {REGION_TOKEN} show {phrase} ?"


_PHRASE_BREAKS = re.compile(
    r"\s*(?:[,.;:!?]|\b(?:and|or|with|near|next to|left of|right of|above|below|behind|under|over|on|in|at|is|are|"
    r"there|to|of|by|beside|between|while|from)\b)\s*",
    re.IGNORECASE,
)
_DETERMINERS = re.compile(r"^(?:(?:a|an|the|some|one|two|three|four|five|several|many)\s+)+", re.IGNORECASE)


def noun_phrases(sentence: str) -> list[tuple[str, str]]:
    """(its determiners, a noun phrase without them) of a sentence, lower case, in order: ``"A dog by two cats." ->
    [("a", "dog"), ("two", "cats")]``. Split at punctuation, conjunctions and prepositions."""
    found = []
    for piece in _PHRASE_BREAKS.split(sentence.lower()):
        determiners = _DETERMINERS.match(piece := piece.strip())
        start = determiners.end() if determiners else 0
        if phrase := piece[start:].strip():
            found.append((piece[:start].strip(), phrase))
    return found


def split_phrases(sentence: str) -> list[str]:
    """Noun phrases of a sentence for the `ground` task, in order of appearance, without duplicates.

    If phrases are marked by square brackets, only those: ``"a [red circle] by [two squares]"``. Otherwise those of
    `noun_phrases`.

    Raises `UserError` if there is no phrase.
    """
    phrases = re.findall(r"\[([^\[\]]+)\]", sentence)
    if not phrases:
        phrases = [phrase for _, phrase in noun_phrases(sentence)]
    phrases = list(dict.fromkeys(p.strip().lower() for p in phrases if p and p.strip()))
    if not phrases:
        raise UserError(
            f"no phrase found in sentence {sentence!r}; mark phrases like 'a [red circle] by a [square]'",
            "empty_sentence",
        )
    return phrases
