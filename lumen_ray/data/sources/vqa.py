"""Visual questions as a source: VQA v2 (questions and annotations in two files), GQA, and plain json records.

Answers: `majority` keeps one answer per question, the data set's `multiple_choice_answer` or else the most common one
(ties: the first given). `all` keeps every annotator's answer as a separate message, repeats included, so that a common
answer is trained as often as it was given.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lumen_ray.data import files, urls
from lumen_ray.data.shards.schema import make_message, make_row
from lumen_ray.data.sources.base import Listing, Outcome, Source
from lumen_ray.data.sources.chat_images import IMAGE_MARKER
from lumen_ray.data.sources.chat_media import check_markers
from lumen_ray.data.sources.groups import Images, finished_group, lost_group, open_group
from lumen_ray.data.sources.record_parsing import (
    IMAGE_ID_KEYS,
    LINE_SUFFIXES,
    Record,
    as_mapping,
    check_choice,
    check_pattern,
    clean_text,
    first_of,
    image_ref,
    load_json,
    load_records,
    records_in,
    short,
)
from lumen_ray.data.values import id_key
from lumen_ray.errors import UserError

ITEMS = "questions"
ANSWERS = ("majority", "all")


@dataclass
class VqaSource(Source):
    """`questions`: json or jsonl files of questions, with their answers or with answers in the files `annotations`.

    `image_pattern`: image file of an `image_id`, for records without a file name; by default that of VQA v2,
    ``COCO_<data_subtype>_%012d.jpg``. `answers`: one of `ANSWERS`.
    """

    questions: list[str]
    images: str
    annotations: list[str] = field(default_factory=list)
    image_pattern: str | None = None
    answers: str = "majority"
    kind = "vqa"

    def read_listing(self) -> Listing:
        check_choice("answers", self.answers, ANSWERS)
        check_pattern(self.image_pattern)
        self.images = urls.absolute(self.images)
        if not files.is_dir(self.images):
            raise UserError(f"image folder '{self.images}' does not exist", "missing_images")
        given = load_answers(self.annotations)
        groups = Images(ITEMS)
        asked: set[str | None] = set()
        for location in dict.fromkeys(self.questions):
            records, pattern = _read(location)
            for origin, record in records:
                self._add(groups, origin, record, self.image_pattern or pattern, given)
                asked.add(id_key(record.get("question_id")) if isinstance(record, dict) else None)
        unasked = len(given.keys() - asked)
        notes = [f"{unasked} annotations answer questions that no file of questions has"] if unasked else []
        inputs = {"images": len(groups), ITEMS: groups.listed}
        return Listing(groups.listing(), inputs, rejected=groups.rejected, notes=notes)

    def _add(
        self, groups: Images, origin: str, record: Any, pattern: str | None, given: dict[str, Record | None]
    ) -> None:
        image = None
        try:
            record = as_mapping(record)
            image = image_ref(record, pattern)
            if image is None:
                has_id = first_of(record, IMAGE_ID_KEYS) is not None
                why = "only an image id; give --image-pattern" if has_id else "neither image nor image_id"
                raise UserError(f"the question has {why}", "invalid_image_id" if has_id else "missing_image")
            question = _question(record.get("question"))
            answers = self._answers(record, given)
        except UserError as error:
            groups.reject(image, origin, error)
        else:
            groups.add(image, origin, {"question": question, "answers": answers})

    def _answers(self, record: Record, given: dict[str, Record | None]) -> list[str]:
        """The answers to keep. Raises `UserError` if there is none or one of them cannot be used."""
        if given:
            key = id_key(record.get("question_id")) or ""
            annotation = given.get(key)
            if annotation is None:
                which = "two different annotations answer" if key in given else "no annotation answers"
                raise UserError(f"{which} question {short(record.get('question_id'))}", "missing_answer")
            record = annotation
        singles = [record.get(key) for key in ("multiple_choice_answer", "answer")]
        single = next((text for text in singles if not _is_blank(text)), None)
        several = first_of(record, ("answers", "direct_answers"))
        several = several if isinstance(several, list) else [several]
        texts = [a.get("answer") if isinstance(a, dict) else a for a in several]
        texts = [text for text in texts if not _is_blank(text)]
        if single is not None and (self.answers == "majority" or not texts):
            return [answer_text(single, "the answer")]
        if not texts:
            raise UserError("it has no answer (keys: answer, answers, multiple_choice_answer)", "missing_answer")
        answers = [answer_text(text, "an answer") for text in texts]
        return answers if self.answers == "all" else [Counter(answers).most_common(1)[0][0]]

    def rows(self, record: Record, shared: Any) -> Iterator[Outcome]:
        try:
            data, frame = open_group(self.images, record)
        except UserError as error:
            yield lost_group(self.row_kind, ITEMS, record, error)
            return
        messages = [make_message("vqa", i["question"], answer) for i in record["items"] for answer in i["answers"]]
        row = make_row(record["id"], data, frame.rotated_size, self.kind, tasks=["vqa"], messages=messages)
        yield from finished_group(self.row_kind, ITEMS, Outcome(row), record, [])


def _question(value: Any) -> str:
    """The text of a question, without a marker for its image. Raises `UserError` for markers of anything else."""
    if isinstance(value, str):
        value = value.replace(IMAGE_MARKER, " ", 1)
        if IMAGE_MARKER in value:
            raise UserError(f"the question has several {IMAGE_MARKER} markers", "several_images")
        check_markers([{"role": "user", "content": value}], "the question")
    return clean_text(value, "the question")


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def answer_text(value: Any, what: str) -> str:
    """An answer as a text: numbers in digits (2.0 as "2"), true and false as yes and no, see `clean_text`."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) < 10**40:
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)
    return clean_text(value, what)


def load_answers(locations: list[str]) -> dict[str, Record | None]:
    """VQA v2's annotations by question id, None where two differ. Raises `UserError` if the files have none."""
    found: dict[str, Record | None] = {}
    for location in locations:
        for _, entry in load_records(location, ("annotations",)):
            key = id_key(entry.get("question_id")) if isinstance(entry, dict) else None
            if key is not None and found.setdefault(key, entry) != entry:
                found[key] = None
    if locations and not found:
        raise UserError(f"'{locations[0]}' answers no question (key: question_id)", "invalid_annotations")
    return found


def _read(location: str) -> tuple[list[tuple[str, Any]], str | None]:
    """The (origin, question) pairs of a file, and the image pattern of its `data_subtype` (VQA v2: a split of COCO)."""
    if location.lower().endswith(LINE_SUFFIXES):
        return load_records(location), None
    data = load_json(location)
    split = data.get("data_subtype") if isinstance(data, dict) else None
    known = isinstance(split, str) and split.replace("-", "").isalnum()
    pattern = f"COCO_{split}_%012d.jpg" if known else None
    return records_in(data, location, ("questions", "annotations", "data")), pattern
