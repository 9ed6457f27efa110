"""Scores of text about scenes: the objects that a caption names, and the scores of guessing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from lumen_ray.data.scenes.text import COLOURS, COUNT_ANSWERS, NUMBERS, SHAPES

ColourShape = tuple[str, str]

_COUNT_WORDS = {"a": 1, "an": 1, **{word: number for number, word in enumerate(NUMBERS)}}
_SHAPE_WORDS = {form: shape for shape in SHAPES for form in (shape, shape + "s")}
_ANSWER_SPACES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"what color is the \w+", COLOURS),
    (r"what shape is (on|at) the \w+", SHAPES),
    (r"how many \w+( \w+)* are there in total", NUMBERS[1:]),
    (r"how many \w+( \w+)* are there", COUNT_ANSWERS),
    (r"is there an? \w+ \w+", ("yes", "no")),
)


def vqa_answer_space(question: str) -> tuple[str, ...]:
    """The possible answers to a scene's question, e.g. the three colours; empty for any other question."""
    question = question.strip().lower().rstrip(" ?")
    for pattern, answers in _ANSWER_SPACES:
        if re.fullmatch(pattern, question):
            return answers
    return ()


def vqa_chance(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Accuracy of two guessers on the (question, answer) pairs with a `vqa_answer_space`; both 0 without any.

    `uniform` draws from the answer space; `majority` gives the commonest answer to each exact question.
    """
    known = [(q, a) for q, a in pairs if vqa_answer_space(q)]
    if not known:
        return {"uniform": 0.0, "majority": 0.0}
    uniform = sum(1 / len(vqa_answer_space(q)) for q, _ in known) / len(known)
    answers: dict[str, Counter[str]] = {}
    for question, answer in known:
        answers.setdefault(question, Counter())[answer] += 1
    majority = sum(max(counter.values()) for counter in answers.values()) / len(known)
    return {"uniform": uniform, "majority": majority}


def caption_attributes(text: str) -> Counter[ColourShape]:
    """Objects per (colour, shape) that a text names: ``"two red circles ." -> {("red", "circle"): 2}``.

    Unknown words are skipped. A shape takes the last colour and number since the previous shape; without a number it
    counts once, without a colour not at all.
    """
    found: Counter[ColourShape] = Counter()
    number, colour = 1, None
    for word in re.findall(r"[a-z]+|\d+", text.lower()):
        if word in _COUNT_WORDS:
            number = _COUNT_WORDS[word]
        elif word.isdigit():
            number = int(word[:4])
        elif word in COLOURS:
            colour = word
        elif word in _SHAPE_WORDS:
            if colour is not None and number > 0:
                found[colour, _SHAPE_WORDS[word]] += number
            number, colour = 1, None
    return found


def caption_score(text: str, truth: str) -> float:
    """F1 over the (colour, shape, count) items of a caption against the true one's, 0..1; 1 if neither has any."""
    said, true = set(caption_attributes(text).items()), set(caption_attributes(truth).items())
    if not said and not true:
        return 1.0
    return 2 * len(said & true) / (len(said) + len(true))


def caption_attribute_chance(captions: Sequence[str], shifts: int = 50) -> float:
    """Mean `caption_score` of the caption of another scene, over `shifts` pairings of the set.

    Deterministic: scene i is answered with the caption of scene i + s, s = 1..shifts. 0 for fewer than two captions.
    """
    number = len(captions)
    if number < 2:
        return 0.0
    rounds = range(1, min(shifts, number - 1) + 1)
    scores = [caption_score(captions[(i + s) % number], captions[i]) for s in rounds for i in range(number)]
    return sum(scores) / len(scores)
