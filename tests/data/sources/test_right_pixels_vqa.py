"""Visual questions: every question is of its picture and has its own answers."""

import json
from collections import Counter
from dataclasses import dataclass

from hypothesis import strategies as st
from support.coloured_sets import (
    ColouredSet,
    Picture,
    Place,
    Truth,
    check,
    draw_fates,
    for_sets,
    pictures,
    places,
    spelled,
    stored_files,
)

from lumen_ray.data.sources.vqa import VqaSource

ANSWERS = {  # as given: as it must be written
    '"a cat"': "a cat", '" a  cat "': "a cat", "2": "2", "2.0": "2", "0": "0", "-1.5": "-1.5", "true": "yes",
    "false": "no", '"0"': "0", '"no"': "no",
}  # fmt: skip


@dataclass
class Question:
    """A question with its record and, if answers are in a file of their own, that file's entry. `answers`: those that
    must be written, None if the question must be rejected."""

    picture: Picture
    place: Place
    text: str
    record: dict
    answers: list | None
    entry: dict | None = None


@st.composite
def vqa_sets(draw):
    made = draw(pictures())
    by_id = draw(st.booleans())
    given = draw(numbered_places(made)) if by_id else draw(places(made))
    contents = stored_files(made, given)
    fates = draw_fates(draw, made, given, contents, ("broken",))
    options = {"answers": draw(st.sampled_from(["majority", "all"])), "questions": ["questions.json"]}
    two_files = draw(st.booleans())
    questions = []
    for picture, place in zip(made, given, strict=True):
        for _ in range(draw(st.sampled_from([1, 2, 3]))):
            questions.append(draw_question(draw, picture, place, len(questions), options["answers"], two_files))
            if by_id:
                del questions[-1].record["image"]
                questions[-1].record["image_id"] = draw(spelled(picture.number))
    records = [question.record for question in draw(st.permutations(questions))]
    subtype = {"data_subtype": "val2014"} if by_id and draw(st.booleans()) else {}
    if by_id and not subtype:
        options["image_pattern"] = "COCO_val2014_%012d.jpg"
    if not subtype and draw(st.booleans()):
        options["questions"] = ["questions.jsonl"]
        contents["questions.jsonl"] = "\ufeff" + "\n".join(map(json.dumps, records))
    else:
        contents["questions.json"] = json.dumps({"questions": records} | subtype)
    if two_files:
        entries = [question.entry for question in questions if question.entry is not None]
        contents["answers.json"] = json.dumps({"annotations": [*entries, {"question_id": "of no question"}]})
        options["annotations"] = ["answers.json"]
    return ColouredSet(contents, truth_of(made, questions, fates), options)


@st.composite
def numbered_places(draw, made):
    """The places of pictures that are named by their number."""
    for picture in made:
        picture.suffix = ".jpg"
    names = [f"COCO_val2014_{picture.number:012}.jpg" for picture in made]
    return [draw(st.sampled_from([Place(name, name)] * 4 + [Place(name, None, False)])) for name in names]


def draw_question(draw, picture, place, number, rule, two_files):
    """A question whose text has a number of its own."""
    text = f"{number}: what is on {picture.text}"
    question = Question(picture, place, text, {"question": text}, None)
    name = place.listed
    question.record |= draw(st.sampled_from([{"image": name}, {"image": [name]}, {"image": {"path": name}}]))
    kind = draw(st.sampled_from(["one", "several", "dicts", "both"] * 4 + ["blank", "none", "no question"]))
    given = [draw(st.sampled_from(list(ANSWERS))) for _ in range(draw(st.integers(1, 4)))]
    values, wanted = [json.loads(value) for value in given], [ANSWERS[value] for value in given]
    most = [Counter(wanted).most_common(1)[0][0]]
    answers = {
        "one": {"answer": values[0]},
        "several": {"answers": [*values, None, " "]},
        "dicts": {"answers": [{"answer": value, "answer_confidence": "yes"} for value in values]},
        "both": {"multiple_choice_answer": values[0], "answers": values},
        "blank": draw(st.sampled_from([{"answer": " "}, {"answers": [" ", None]}, {"answer": ""}])),
        "no question": {"answer": values[0]},
    }.get(kind, {})
    question.answers = {
        "one": wanted[:1],
        "several": wanted if rule == "all" else most,
        "dicts": wanted if rule == "all" else most,
        "both": wanted if rule == "all" else wanted[:1],
    }.get(kind)
    if kind == "no question":
        question.record["question"] = draw(st.sampled_from(["", None, 5, "What is [DET]?"]))
    if two_files:
        question.record["question_id"] = draw(spelled(number))
        question.entry = answers | {"question_id": draw(spelled(number))}
        if draw(st.sampled_from([False] * 8 + [True])):
            question.entry = question.answers = None
    else:
        question.record |= answers
    return question


def truth_of(made, questions, fates):
    """What must be in the shards."""
    truth = Truth(made)
    fine = [q for q in questions if q.answers is not None and fates[q.picture.number] == "fine"]
    truth.came_in = {"questions": len(questions)}
    truth.ids = {question.picture.number: question.place.listed for question in fine}
    truth.written = {"questions": len(fine), "images": len(truth.ids)}
    truth.answers = {question.text: question.answers for question in fine}
    truth.refused = not fine
    return truth


def check_answers(made, rows):
    """Every question has its own answers, and all that can be used are there."""
    found = {}
    for row in (row for rows_of_it in rows.values() for row in rows_of_it):
        for message in row["messages"]:
            question, answer = (turn["content"] for turn in message["turns"])
            found.setdefault(question, []).append(answer)
    assert found == (made.truth.answers if rows else {})


@for_sets(vqa_sets())
def test_questions_belong_to_their_pictures(made):
    def source(folder, questions, annotations=(), **options):
        paths = [[f"{folder}/{name}" for name in names] for names in (questions, annotations)]
        return VqaSource(paths[0], f"{folder}/images", paths[1], **options)

    check_answers(made, check(made, source))
