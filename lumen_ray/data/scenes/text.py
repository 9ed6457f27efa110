"""Texts of the synthetic scenes: captions, questions, expressions and short exchanges about their objects.

All text is lowercase with blanks around punctuation, so that a small vocabulary covers it. The functions take the
scene's objects (anything with `.colour`, `.shape`, `.area`, `.centre`), most of them a `numpy.random.Generator`, and
return columns of `shards.schema`. Questions and expressions must have one clear answer: an extreme ("left", "largest")
must win by a margin.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lumen_ray.data.shards.schema import make_message
from lumen_ray.tasks import get_task

COLOURS = ("red", "green", "blue")
SHAPES = ("circle", "square", "triangle", "figure")
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
NUMBERS = ("zero", "one", "two", "three", "four", "five")
COUNT_ANSWERS = NUMBERS[:5]
#: the question of grounded captions
GROUNDED_CAPTION = "describe the image and show each object ."

AREA_MARGIN = 1.4  # the largest object has at least this many times the area of the next
PLACE_MARGIN = 0.1  # the leftmost object is left of the next by at least this fraction of the image's side
YES_NO_SHARE = 0.25  # share of scenes with a yes/no question, which makes about 8 % of all questions
_PLACES = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}  # axis, sign: smallest wins


def noun(name: str, count: int) -> str:
    """``("blue square", 2) -> "blue squares"``."""
    return name if count == 1 else name + "s"


def class_counts(objects: Sequence[Any]) -> dict[str, int]:
    """Number of objects per class, in the order of `CLASSES`, without absent ones."""
    counts = Counter(f"{o.colour} {o.shape}" for o in objects)
    return {name: counts[name] for name in CLASSES if counts[name]}


def caption(objects: Sequence[Any]) -> str:
    """``"a red circle , two blue squares and a blue figure ."``: classes in the order of `CLASSES`."""
    groups = [f"{'a' if n == 1 else NUMBERS[n]} {noun(name, n)}" for name, n in class_counts(objects).items()]
    return " and ".join(filter(None, [" , ".join(groups[:-1]), groups[-1]])) + " ."


def grounded_caption(objects: Sequence[Any]) -> dict[str, Any]:
    """A chat whose answer names each group of equal objects and locates it: ``"a red circle [DET] and two blue squares
    [DET] ."``, with all objects of a group in its link."""
    groups = ground_phrases(objects)
    counts = (len(group["instances"]) for group in groups)
    named = [f"{'a' if n == 1 else NUMBERS[n]} {g['phrase']} [DET]" for n, g in zip(counts, groups, strict=True)]
    answer = " and ".join(filter(None, [" , ".join(named[:-1]), named[-1]])) + " ."
    links = [{"phrase": group["phrase"], "instances": group["instances"]} for group in groups]
    return {**make_message("chat", GROUNDED_CAPTION, answer), "links": links}


def _winner(values: np.ndarray, margin: float, ratio: bool = False) -> int | None:
    """Index of the smallest value if the next one is larger by `margin` (`ratio`: by that factor), else None."""
    order = np.argsort(values)
    first, second = values[order[0]], values[order[1]]
    clear = second >= first * margin if ratio else second - first >= margin
    return int(order[0]) if clear else None


def extremes(objects: Sequence[Any], members: Sequence[int], side: int) -> dict[str, int]:
    """`{"largest": i, "left": j, ...}` among two or more `members` (indices into `objects`), clear cases only."""
    areas = np.array([objects[i].area for i in members], float)
    found = {
        "largest": _winner(1 / areas, AREA_MARGIN, ratio=True),
        "smallest": _winner(areas, AREA_MARGIN, ratio=True),
    }
    for word, (axis, sign) in _PLACES.items():
        found[word] = _winner(np.array([sign * objects[i].centre[axis] for i in members]), PLACE_MARGIN * side)
    return {word: members[i] for word, i in found.items() if i is not None}


def expressions(objects: Sequence[Any], side: int) -> list[tuple[str, int]]:
    """All (expression, index) that match exactly one object: plain names ("the red circle", "the circle") if they do,
    else comparisons ("the left square")."""
    options: list[tuple[str, int]] = []
    names = {f"{o.colour} {o.shape}" for o in objects} | {o.shape for o in objects}
    for name in sorted(names):
        members = [i for i, o in enumerate(objects) if name in (o.shape, f"{o.colour} {o.shape}")]
        if len(members) == 1:
            options.append((f"the {name}", members[0]))
        else:
            options += [(f"the {word} {name}", i) for word, i in extremes(objects, members, side).items()]
    return options


def refer_phrases(objects: Sequence[Any], side: int, rng: np.random.Generator, limit: int = 3) -> list[dict[str, Any]]:
    """Expressions that match exactly one object, and sometimes one that matches none (`instances` is empty).

    Plain names ("the red circle") are drawn more often than comparisons ("the left square").
    """
    options = expressions(objects, side)
    if not options:  # objects of one class that no comparison distinguishes
        return []
    weights = np.array([1.0 if text.count(" ") == 1 or text.split()[1] in COLOURS else 0.3 for text, _ in options])
    chosen = rng.choice(len(options), min(limit, len(options)), replace=False, p=weights / weights.sum())
    picked = [options[i] for i in chosen]
    phrases = [{"task": "refer", "phrase": text, "instances": [i]} for text, i in picked]
    if rng.random() < 0.15:
        present = class_counts(objects)
        absent = [name for name in CLASSES if name not in present]
        phrases.append({"task": "refer", "phrase": f"the {rng.choice(absent)}", "instances": []})
    return phrases


def ground_phrases(objects: Sequence[Any]) -> list[dict[str, Any]]:
    """One phrase per class in the caption, e.g. ``"blue squares"``, with all its instances."""
    return [
        {
            "task": "ground",
            "phrase": noun(name, count),
            "instances": [i for i, o in enumerate(objects) if f"{o.colour} {o.shape}" == name],
        }
        for name, count in class_counts(objects).items()
    ]


def _colour_questions(objects: Sequence[Any]) -> list[tuple[str, str]]:
    shapes = Counter(o.shape for o in objects)
    return [(f"what color is the {o.shape} ?", o.colour) for o in objects if shapes[o.shape] == 1]


def _count_questions(objects: Sequence[Any], rng: np.random.Generator) -> list[tuple[str, str]]:
    """A question about a shape or colour, one in five about an absent one, so that answers are not mostly 'one'."""
    counts = Counter(o.shape for o in objects) + Counter(o.colour for o in objects)
    absent = rng.random() < 0.2
    subjects = [word for word in (*SHAPES, *COLOURS) if (counts[word] == 0) == absent and counts[word] <= 4]
    if not subjects:
        return []
    # larger counts are drawn more often, to even out the answers
    weights = np.array([1 + 2 * max(counts[word] - 1, 0) for word in subjects], float)
    word = subjects[rng.choice(len(subjects), p=weights / weights.sum())]
    plural = f"{word} objects" if word in COLOURS else f"{word}s"
    return [(f"how many {plural} are there ?", NUMBERS[counts[word]])]


def _place_questions(objects: Sequence[Any], side: int) -> list[tuple[str, str]]:
    if len(objects) < 2:
        return []
    found = extremes(objects, range(len(objects)), side)
    where = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
    return [(f"what shape is {where[word]} ?", objects[i].shape) for word, i in found.items() if word in where]


def questions(objects: Sequence[Any], side: int, rng: np.random.Generator, number: int = 3) -> list[dict[str, Any]]:
    """Up to `number` vqa messages of different kinds, fewer if the scene does not answer as many."""
    kinds = [_colour_questions(objects), _place_questions(objects, side), _count_questions(objects, rng)]
    kinds = [list(rng.permutation(np.array(k, object))) for k in kinds if k]
    if rng.random() < YES_NO_SHARE:
        present = list(class_counts(objects))
        answer = rng.choice(["yes", "no"])
        name = rng.choice(present if answer == "yes" else [c for c in CLASSES if c not in present])
        kinds.append([(f"is there a {name} ?", answer)])
    chosen: list[tuple[str, str]] = []
    while len(chosen) < number and any(kinds):
        for i in rng.permutation(len(kinds)):
            if kinds[i] and len(chosen) < number:
                chosen.append(tuple(kinds[i].pop()))
    return [make_message("vqa", str(question), str(answer)) for question, answer in chosen]


_SMALL_TALK = (
    ("hello", "hello , ask me about the image ."),
    ("who are you ?", "i am lumen , i look at images ."),
    ("thank you", "you are welcome ."),
)


def chat(objects: Sequence[Any], rng: np.random.Generator) -> dict[str, Any]:
    """A short exchange: small talk, a question about the whole image, or both in this order."""
    colours = [c for c in COLOURS if any(o.colour == c for o in objects)]
    about_image = (
        ("how many objects are there in total ?", NUMBERS[len(objects)]),
        ("which colors do you see ?", " and ".join(filter(None, [" , ".join(colours[:-1]), colours[-1]])) + " ."),
    )
    talk = _SMALL_TALK[rng.integers(len(_SMALL_TALK))]
    question = about_image[rng.integers(len(about_image))]
    exchanges = {0: [talk], 1: [question], 2: [talk, question]}[int(rng.integers(3))]
    message = make_message("chat", *exchanges[0])
    for exchange in exchanges[1:]:
        message["turns"] += make_message("chat", *exchange)["turns"]
    return message


def caption_message(objects: Sequence[Any], rng: np.random.Generator) -> dict[str, Any]:
    """The scene's caption as the answer to one of the registry's caption prompts."""
    return make_message("caption", get_task("caption").prompt(template=int(rng.integers(8))), caption(objects))


def region_message(obj: Any, region: int, rng: np.random.Generator) -> dict[str, Any]:
    """``"describe <region> ." -> "red circle"``; `region`: index into the row's regions."""
    prompt = get_task("region_caption").prompt(template=int(rng.integers(8)))
    return make_message("region_caption", prompt, f"{obj.colour} {obj.shape}", (region,))


_RECOLOUR = ("make {} {colour}", "change {} to {colour}", "paint {} {colour}")
_REMOVE = ("remove {}", "delete {}", "take away {}")


def edit_instruction(expression: str, colour: str | None, rng: np.random.Generator) -> str:
    """``("the red circle", "blue") -> "make the red circle blue"``; without a colour, the object is to be removed."""
    template = str(rng.choice(_REMOVE if colour is None else _RECOLOUR))
    return template.format(expression, colour=colour)
