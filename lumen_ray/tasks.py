"""The one registry of tasks: what a task asks, which routing token it uses and who can serve it.

Adding a task touches this file and, if it needs a new decoder, one file under `decoders/`.

A *prompt* is the natural-language instruction of one branch. Each task has several phrasings so that the
routing token is learned from meaning and not from one fixed string (VisionLLM v2, sec. 3.2).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
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
class DecoderInfo:
    """What can be said of a decoder without importing it. `path`: module:class; `losses`: their names, which recipes
    weigh."""

    path: str
    family: str
    losses: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    name: str
    needs: Needs
    result: ResultType
    templates: tuple[str, ...]
    metric: str
    routing_token: str | None = None
    decoders: tuple[str, ...] = ()
    #: phrasing of the branch that asks for one keypoint of an object (pose only)
    keypoint_template: str | None = None
    #: the task whose annotations in shards also are this one's, which none name: it is learned from and scored on them
    annotated_as: str | None = None
    #: the task whose answers this one's are made of: what a model is trained for in its place
    made_of: str | None = None

    @property
    def annotation(self) -> str:
        """The task that shards name where they are annotated for this one."""
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

#: the decoders a model can have, by the name of their section in its settings
DECODERS: dict[str, DecoderInfo] = {
    "lumen": DecoderInfo(
        "lumen_ray.decoders.lumen.decoder:LumenDecoder", "perception", ("heatmap", "match", "box", "mask", "keypoint")
    ),
    "grounding_dino": DecoderInfo(
        "lumen_ray.decoders.grounding_dino.decoder:GroundingDinoDecoder",
        "perception",
        ("gdino_class", "gdino_box", "gdino_mask"),
    ),
    "unipose": DecoderInfo(
        "lumen_ray.decoders.unipose.decoder:UniPoseDecoder",
        "perception",
        ("unipose_class", "unipose_box", "unipose_keypoint", "unipose_oks", "unipose_visible"),
    ),
    "stable_diffusion": DecoderInfo(
        "lumen_ray.decoders.diffusion.stable_diffusion:StableDiffusionDecoder",
        "generation",
        ("generate", "generate_align", "generate_vae"),
    ),
    "instruct_pix2pix": DecoderInfo(
        "lumen_ray.decoders.diffusion.instruct_pix2pix:InstructPix2PixDecoder",
        "editing",
        ("edit", "edit_align", "edit_vae"),
    ),
}

_PERCEPTION = ("lumen", "grounding_dino")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("chat", "question", "text", ("{}",), "accuracy"),
        Task("caption", "nothing", "text", ("describe the image .", "what is in the image ?"), "caption_attributes"),
        Task("vqa", "question", "text", ("{}",), "vqa_accuracy"),
        Task(
            "region_caption",
            "region",
            "text",
            ("describe <region> .", "what is <region> ?"),
            "caption_attributes",
        ),
        Task(
            "detect",
            "classes",
            "boxes",
            ("detect {}", "find every {}", "locate all {}"),
            "box_ap",
            "[DET]",
            _PERCEPTION,
        ),
        Task(
            "ground",
            "sentence",
            "boxes",
            ("ground {}", "where in the image is {} ?"),
            "ground_p50",
            "[GRD]",
            _PERCEPTION,
        ),
        Task("refer", "expression", "boxes", ("point to {}", "which one is {} ?"), "refer_p50", "[GRD]", _PERCEPTION),
        Task(
            "segment",
            "classes",
            "masks",
            ("segment {}", "outline every {}"),
            "mask_ap",
            "[SEG]",
            _PERCEPTION,
        ),
        Task(
            "pose",
            "classes",
            "keypoints",
            ("pose of {}", "estimate the pose of every {}"),
            "keypoint_ap",
            "[POSE]",
            ("lumen", "unipose"),
            keypoint_template="{keypoint} of {}",
        ),
        Task(
            "region_segment",
            "region",
            "masks",
            (f"segment {REGION_TOKEN}", f"outline what is at {REGION_TOKEN}"),
            "region_segment_iou",
            "[SEG]",
            _PERCEPTION,
            annotated_as="segment",
        ),
        Task(
            "semantic",
            "classes",
            "masks",
            ("segment {}", "outline every {}"),
            "semantic_miou",
            "[SEG]",
            _PERCEPTION,
            annotated_as="segment",
            made_of="segment",
        ),
        Task("count", "classes", "count", ("count {}", "count every {}"), "count_error", "[DET]", _PERCEPTION),
        Task(
            "generate",
            "description",
            "image",
            ("draw {}", "generate a picture of {}"),
            "generate_objects",
            "[GEN]",
            ("stable_diffusion",),
            annotated_as="caption",
        ),
        Task(
            "edit",
            "instruction",
            "image",
            ("edit : {}", "in this picture {}"),
            "edit_done",
            "[EDIT]",
            ("instruct_pix2pix",),
        ),
    )
}

#: the tasks whose answers are texts and places, not pictures
UNDERSTANDING = tuple(name for name, task in TASKS.items() if task.result != "image")
#: those of them that a training step can have prompts of
LEARNED = tuple(name for name in UNDERSTANDING if not TASKS[name].made_of)
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


def decoder_class(name: str) -> type:
    """The class of a decoder, imported now."""
    module, _, attribute = DECODERS[name].path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def reads_dense(decoders: Iterable[str] | None) -> bool:
    """Whether one of the decoders (None: any there may be) reads the trunk's dense features."""
    return decoders is None or any(decoder_class(name).reads == "dense" for name in decoders)


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
