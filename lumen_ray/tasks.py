"""The one registry of tasks: what a task needs, which routing token it uses and what it returns.

Which decoders can serve a task is said by the decoders (`decoders.spec.DecoderSpec.tasks`). Adding a task touches this
file and, where it needs a new decoder, one folder under `decoders/`.

A *prompt* is the natural-language instruction of one branch. Each task has several phrasings so that the
routing token is learned from meaning and not from one fixed string (VisionLLM v2, sec. 3.2).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lumen_ray.errors import UserError, unknown

# What the caller must give with the task.
Needs = Literal["question", "classes", "sentence", "expression", "region", "description", "instruction", "nothing"]
ResultType = Literal["text", "boxes", "masks", "keypoints", "count", "image"]

REGION_TOKEN = "<region>"


@dataclass(frozen=True)
class LinkFamily:
    """Decoders whose links come from the same super-link queries, each through a link head of its own.

    `num_queries` learned queries follow the routing token (VisionLLM v2, sec. 3.3: 4 for perception).
    """

    name: str
    routing_tokens: tuple[str, ...]
    num_queries: int


@dataclass(frozen=True)
class Task:
    name: str
    needs: Needs
    result: ResultType
    templates: tuple[str, ...]
    routing_token: str | None = None
    #: phrasing of the branch that asks for one keypoint of an object (pose only)
    keypoint_template: str | None = None
    #: the task whose annotations in shards serve this one as well; no annotation names this task
    annotated_as: str | None = None
    #: the task whose answers this one's are computed from; a model is trained for that task instead
    derived_from: str | None = None

    @property
    def annotation(self) -> str:
        """The name under which shards annotate this task."""
        return self.annotated_as or self.name

    @property
    def sees_image(self) -> bool:
        """False when the answer is a picture made from words alone."""
        return self.needs != "description"

    @property
    def may_have_regions(self) -> bool:
        """Whether its prompts can name regions of the image."""
        return self.is_text or self.needs == "region"

    @property
    def is_text(self) -> bool:
        """True when the answer is written by the LLM and no decoder is involved."""
        return self.routing_token is None

    def keypoint_prompt(self, keypoint: str, phrase: str) -> str:
        """The instruction of the branch that asks for one keypoint of the objects of a class (pose only)."""
        if self.keypoint_template is None:
            raise ValueError(f"task '{self.name}' has no keypoints")
        return self.keypoint_template.replace("{keypoint}", keypoint).replace("{}", phrase)

    def prompt(self, phrase: str = "", template: int = 0) -> str:
        """The instruction of one branch. `template` selects a phrasing, modulo their number."""
        return self.templates[template % len(self.templates)].replace("{}", phrase)


LINK_FAMILIES: dict[str, LinkFamily] = {
    "perception": LinkFamily("perception", ("[DET]", "[GRD]", "[SEG]", "[POSE]"), num_queries=4),
    "generation": LinkFamily("generation", ("[GEN]",), num_queries=64),
    "editing": LinkFamily("editing", ("[EDIT]",), num_queries=64),
}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("chat", "question", "text", ("{}",)),
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

#: the tasks whose answers are texts and places, not pictures
UNDERSTANDING = tuple(name for name, task in TASKS.items() if task.result != "image")
#: those of them that training steps have prompts for
TRAINABLE_TASKS = tuple(name for name in UNDERSTANDING if not TASKS[name].derived_from)
ROUTING_TOKENS: tuple[str, ...] = tuple(t for family in LINK_FAMILIES.values() for t in family.routing_tokens)


def get_task(name: str) -> Task:
    """The task of that name; a `UserError` that lists the valid names otherwise."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


def in_words(wanted: Callable[[Task], bool]) -> str:
    """The names of the tasks that are `wanted`, e.g. ``"detect, pose and count"``."""
    *names, end = [task.name for task in TASKS.values() if wanted(task)]
    return f"{', '.join(names)} and {end}" if names else end


def family_of(routing_token: str) -> LinkFamily:
    """The link family whose decoders a routing token addresses."""
    for family in LINK_FAMILIES.values():
        if routing_token in family.routing_tokens:
            return family
    raise unknown("routing token", routing_token, ROUTING_TOKENS)


def task_of_prompt(text: str) -> tuple[str, str] | None:
    """The (task, phrase) whose template `text` fits, e.g. ``"find every red circle" -> ("detect", "red circle")``.

    None for text that fits no template with a phrase in it.
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
    """Class names stripped of blanks and repeats, in the given order; a `UserError` when none is left."""
    names = list(dict.fromkeys(name.strip() for name in classes if name and name.strip()))
    if not names:
        raise UserError(
            f"task '{task}' needs at least one class name, such as red circle or blue square; give some",
            "empty_classes",
        )
    return names


_PHRASE_BREAKS = re.compile(
    r"\s*(?:[,.;:!?]|\b(?:and|or|with|near|next to|left of|right of|above|below|behind|under|over|on|in|at|is|are|"
    r"there|to|of|by|beside|between|while|from)\b)\s*",
    re.IGNORECASE,
)
_DETERMINERS = re.compile(r"^(?:(?:a|an|the|some|one|two|three|four|five|several|many)\s+)+", re.IGNORECASE)


def split_phrases(sentence: str) -> list[str]:
    """Noun phrases of a sentence for the `ground` task, in order of appearance, without repeats.

    Phrases the caller marks in square brackets win: ``"a [red circle] by [two squares]"``. Without marks the
    sentence is cut at punctuation, conjunctions and prepositions, and leading determiners are dropped.

    Raises `UserError` when no phrase is found.
    """
    phrases = re.findall(r"\[([^\[\]]+)\]", sentence)
    if not phrases:
        phrases = [_DETERMINERS.sub("", piece.strip()) for piece in _PHRASE_BREAKS.split(sentence)]
    phrases = list(dict.fromkeys(p.strip().lower() for p in phrases if p and p.strip()))
    if not phrases:
        raise UserError(
            f"no phrase found in sentence {sentence!r}; mark phrases like 'a [red circle] by a [square]'",
            "empty_sentence",
        )
    return phrases
