"""Texts: empty, damaged, or the same again and again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from lumen_ray.data.lint.check import Check, SetFacts
from lumen_ray.data.lint.findings import Rule
from lumen_ray.data.lint.rows import LintRow, fingerprint
from lumen_ray.data.shards.schema import message_links
from lumen_ray.errors import UserError
from lumen_ray.tasks import ROUTING_TOKENS

#: characters that are left by a wrong encoding
DAMAGED = {"\ufffd": "a replacement character (U+FFFD)", "\ufeff": "a byte order mark (U+FEFF)"}
#: share of the captioned images that one caption may have
MOST_EQUAL = 0.2
#: smallest number of captioned images to draw conclusions from
MIN_IMAGES = 10
_NOTED_FROM = 3  # a caption is kept as text from this often on; a fifth of `MIN_IMAGES` images are fewer


class Texts(Check):
    """Answers without words, and characters that no one wrote."""

    empty = Rule(
        "text-empty", "problem", "texts",
        "answers or phrases are empty, which trains a model to say nothing; write them, or delete them",
    )  # fmt: skip
    damaged = Rule(
        "text-damaged", "warning", "texts",
        "texts have characters left by a wrong encoding; read the annotations as UTF-8 and write them again",
    )  # fmt: skip
    links = Rule(
        "links-wrong", "problem", "messages",
        "answers have routing tokens without links, or links that do not fit; give each token one, with objects of its "
        "row",
    )  # fmt: skip
    rules = (empty, damaged, links)

    def row(self, row: LintRow) -> None:
        for message in row.row["messages"]:
            if problem := _link_problem(message, len(row.row["instances"])):
                self.add(self.links, row, problem)
        for what, text, learned in texts_of(row):
            if learned and not text.strip():
                self.add(self.empty, row, f"{what} is empty")
            for character, name in DAMAGED.items():
                if character in text:
                    self.add(self.damaged, row, f"{what} has {name}: '{text}'")


def _link_problem(message: dict[str, Any], instances: int) -> str | None:
    """Why the links of a message cannot be trained, None if they can; `instances`: of the row."""
    try:
        links = message_links(message)
    except UserError as error:
        return str(error)
    if wrong := [i for link in links for i in link["instances"] if not 0 <= i < instances]:
        return f"a link names instance {wrong[0]} of {instances}"
    answers = [turn["content"] or "" for turn in message["turns"] if turn["role"] == "assistant"]
    tokens = [token for token in ROUTING_TOKENS if any(token in answer for answer in answers)]
    return f"the answer ({message['task']}) has {tokens[0]} and no link" if tokens and not links else None


def texts_of(row: LintRow) -> Iterator[tuple[str, str, bool]]:
    """(what it is, the text, whether it must not be empty) of the row's texts."""
    for message in row.row["messages"]:
        for turn in message["turns"]:
            answer = turn["role"] == "assistant"
            yield f"{'the answer' if answer else 'the question'} ({message['task']})", turn["content"] or "", answer
    for phrase in row.row["phrases"]:
        yield f"the phrase ({phrase['task']})", phrase["phrase"] or "", True
    for name in dict.fromkeys([*row.row["classes"], *row.names]):
        yield "the class name", name or "", True


class RepeatedCaptions(Check):
    """One caption on many images."""

    repeated = Rule(
        "caption-repeated", "warning", "images",
        f"more than {MOST_EQUAL:.0%} of the captioned images have the same caption, which a model then says of any "
        "image; write a caption for each image, or leave these out",
    )  # fmt: skip
    rules = (repeated,)

    def begin(self) -> None:
        self._captioned = 0
        self._images: Counter[int] = Counter()  # by hash of the caption
        self._texts: dict[int, str] = {}

    def row(self, row: LintRow) -> None:
        messages = [m for m in row.row["messages"] if m["task"] == "caption" and m["turns"]]
        captions = {" ".join((m["turns"][-1]["content"] or "").split()) for m in messages} - {""}
        self._captioned += bool(captions)
        for caption in captions:
            key = fingerprint(caption.encode("utf-8", "replace"))
            self._images[key] += 1
            if self._images[key] >= _NOTED_FROM:
                self._texts[key] = caption

    def finish(self, facts: SetFacts) -> None:
        if self._captioned < MIN_IMAGES:
            return
        for key, number in self._images.most_common():
            if number <= MOST_EQUAL * self._captioned:
                break
            self.add(self.repeated, None, f"'{self._texts[key]}' on {number:,} of {self._captioned:,}", number=number)
