"""Visual questions: VQA v2's two files, records with their answers, and what is refused."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.language_fakes import damaged, prepared, write_photos
from support.tiny_models import scene_batch

from lumen_ray.data.sources.vqa import VqaSource
from lumen_ray.errors import UserError

NAMES = [f"COCO_val2014_{n:012d}.jpg" for n in range(3)]
QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 0, "question": "What colour is it?", "question_id": 1},
        {"image_id": 0, "question": "How many?", "question_id": 2},
        {"image_id": 1, "question": "Is it day?", "question_id": 3},
    ],
}


def annotation(question_id, answers, **more):
    listed = [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers, 1)]
    return {"question_id": question_id, "answers": listed, **more}


ANNOTATIONS = {
    "annotations": [
        annotation(1, ["red", "dark red", "red", "blue"], multiple_choice_answer="red"),
        annotation(2, ["3", "2", "2", "3", "1"]),
        annotation(3, ["yes"], multiple_choice_answer="yes"),
    ]
}


@pytest.fixture
def make(tmp_path):
    images = write_photos(tmp_path / "images", NAMES)

    def write(questions, annotations=None, name="questions.json", **changes):
        lines = name.endswith(".jsonl")
        text = "\n".join(map(json.dumps, questions)) if lines else json.dumps(questions)
        (tmp_path / name).write_text(text)
        if annotations is not None:
            (tmp_path / "annotations.json").write_text(json.dumps(annotations))
            changes["annotations"] = [str(tmp_path / "annotations.json")]
        return VqaSource([str(tmp_path / name)], str(images), **changes)

    return write


def asked(rows):
    return {row["image_id"]: [tuple(t["content"] for t in m["turns"]) for m in row["messages"]] for row in rows}


def test_majority_answers(make):
    rows, rejected, counts = prepared(make(QUESTIONS, ANNOTATIONS, image_pattern="val2014/COCO_val2014_%012d.jpg"))
    assert rejected == []  # images that lie flat are found by their bare name
    assert asked(rows) == {
        f"val2014/{NAMES[0]}": [("What colour is it?", "red"), ("How many?", "3")],
        f"val2014/{NAMES[1]}": [("Is it day?", "yes")],
    }
    assert counts["questions"] == {"in": 3, "written": 3, "rejected": 0}
    assert {task for row in rows for task in row["tasks"]} == {"vqa"}


def test_all_answers_and_the_pattern_of_the_file(make):
    rows, rejected, counts = prepared(make({**QUESTIONS, "questions": QUESTIONS["questions"][:2]}, ANNOTATIONS,
                                           answers="all"))  # fmt: skip
    assert rejected == []
    assert [a for _, a in asked(rows)[NAMES[0]]] == ["red", "dark red", "red", "blue", "3", "2", "2", "3", "1"]
    assert counts["questions"]["written"] == 2


@pytest.mark.parametrize("form", ["list", "lines", "gqa"])
def test_plain_records(make, form):
    records = [
        {"image": NAMES[0], "question": "a ?", "answer": "x"},
        {"image": NAMES[0], "question": "b ?", "answers": ["y", "z", "z"]},
    ]
    name, changes = "questions.json", {}
    if form == "lines":
        name = "questions.jsonl"
    elif form == "gqa":
        records = {"q7": {"imageId": NAMES[0][:-4], "question": "a ?", "answer": "x", "fullAnswer": "It is x."}}
        changes = {"image_pattern": "%s.jpg"}
    rows, rejected, _ = prepared(make(records, name=name, **changes))
    assert rejected == []
    assert asked(rows)[NAMES[0]][0] == ("a ?", "x")
    assert asked(rows)[NAMES[0]][1:] == ([] if form == "gqa" else [("b ?", "z")])


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"image_id": 1, "question": "x ?", "question_id": 9}, "no annotation answers question 9"),
        ({"image_id": 1, "question": "", "question_id": 3}, "the question is empty"),
        ({"image_id": 1, "question": "<region> ?", "question_id": 3}, "reserved token <region>"),
        ({"image_id": "one", "question": "x ?", "question_id": 3}, "does not fit the pattern"),
        ({"question": "x ?", "question_id": 3}, "neither image nor image_id"),
        ({"image": ["a", "b"], "question": "x ?", "question_id": 3}, "has 2 images"),
        ({"image": "https://x/y.jpg", "question": "x ?", "question_id": 3}, "web address"),
        (None, "must be a mapping"),
    ],
)
def test_a_bad_question_alone_is_rejected(make, bad, reason):
    rows, rejected, counts = prepared(make({**QUESTIONS, "questions": [*QUESTIONS["questions"], bad]}, ANNOTATIONS))
    (record,) = rejected
    assert reason in record["reason"]
    assert record["origin"] == "questions.json record 3"
    assert counts["questions"] == {"in": 4, "written": 3, "rejected": 1}


def test_a_bad_image_takes_its_questions_along(make, tmp_path):
    path = tmp_path / "images" / NAMES[0]
    path.write_bytes(path.read_bytes()[:300])
    rows, rejected, counts = prepared(make(QUESTIONS, ANNOTATIONS, image_pattern="val2014/COCO_val2014_%012d.jpg"))
    assert counts == {
        "images": {"in": 2, "written": 1, "rejected": 1},
        "questions": {"in": 3, "written": 1, "rejected": 2},
    }


def test_settings_that_cannot_work_are_refused(make):
    plain = [{"image_id": 1, "question": "x ?", "answer": "y"}]
    for pattern in ("no id", "%d_%d.jpg", "%q.jpg"):
        with pytest.raises(UserError, match="must contain the image id once"):
            make(plain, image_pattern=pattern).read_listing()
    with pytest.raises(UserError, match="answers 'best' is not one of: majority, all"):
        make(plain, answers="best").read_listing()
    with pytest.raises(UserError, match="answers no question"):
        make(QUESTIONS, {"annotations": [{"id": 1}]}).read_listing()
    assert "give --image-pattern" in make(plain).read_listing().rejected[0]["reason"]
    with pytest.raises(UserError, match="lists no images that can be used; the first record: .* give --image-pattern"):
        prepared(make(plain))


@pytest.mark.parametrize("part", ["questions", "annotations"])
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_records_never_stop_the_job(make, part, data):
    questions, annotations = QUESTIONS["questions"], ANNOTATIONS["annotations"]
    if part == "questions":
        questions = data.draw(damaged(questions))
    else:
        annotations = data.draw(damaged(annotations))
    sound = {"image_id": 2, "question": "sound ?", "question_id": 77}
    source = make(
        {**QUESTIONS, "questions": [*questions, sound]}, {"annotations": [*annotations, annotation(77, ["a"])]}
    )
    rows, _, _ = prepared(source)
    assert ("sound ?", "a") in asked(rows)[NAMES[2]]
    scene_batch(rows, ("vqa",))


def test_real_photos(test_data, tmp_path):
    folder = test_data / "coco_photos"
    images = json.loads((folder / "annotations" / "captions_train.json").read_text())["images"]
    questions = [{"image_id": i["id"], "question": "how wide is it?", "question_id": i["id"]} for i in images]
    answers = {"annotations": [annotation(i["id"], [str(i["width"])] * 10) for i in images]}
    (tmp_path / "q.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "a.json").write_text(json.dumps(answers))
    source = VqaSource([str(tmp_path / "q.json")], str(folder / "images"), [str(tmp_path / "a.json")], "%012d.jpg")
    rows, rejected, counts = prepared(source)
    assert rejected == []
    assert counts["questions"]["written"] == len(images)
    assert all(row["messages"][0]["turns"][1]["content"] == str(row["width"]) for row in rows)


@pytest.mark.parametrize(
    ("record", "answer"),
    [({"answer": 2}, "2"), ({"answer": 2.0}, "2"), ({"answer": 2.5}, "2.5"), ({"answer": True}, "yes"),
     ({"answer": False}, "no"), ({"answers": [2, 2, 3]}, "2"), ({"answers": ["", "red", None, "red"]}, "red"),
     ({"answers": [{"answer": 0}]}, "0"), ({"answer": 8005551234}, "8005551234"), ({"answer": 1e9}, "1000000000"),
     ({"answer": "", "answers": ["z"]}, "z"), ({"answers": "red"}, "red"), ({"direct_answers": ["a", "a", "b"]}, "a")],
)  # fmt: skip
def test_answers_by_value(make, record, answer):
    rows, rejected, _ = prepared(make([{"image": NAMES[0], "question": "a ?", **record}]))
    assert rejected == [] and asked(rows)[NAMES[0]] == [("a ?", answer)]


def test_question_ids_compare_by_value_and_two_answers_are_none(make):
    questions = [{"image": NAMES[0], "question": f"{n} ?", "question_id": n} for n in ("1", 2.0, 3)]
    answers = [{"question_id": 1, "answer": "a"}, {"question_id": "2", "answer": "b"}]
    answers += [{"question_id": 3, "answer": text} for text in "cd"]
    rows, rejected, _ = prepared(make({"questions": questions}, {"annotations": answers}))
    assert [a for _, a in asked(rows)[NAMES[0]]] == ["a", "b"]
    assert rejected[0]["reason"] == "two different annotations answer question 3"


def test_no_question_lands_on_another_sets_picture(make):
    records = [{"image": f"{s}/{NAMES[0]}", "question": "a ?", "answer": s} for s in ("gqa", "vg")]
    rows, rejected, _ = prepared(make([*records, {"image": NAMES[1], "question": "a ?", "answer": "x"}]))
    assert [row["image_id"] for row in rows] == [NAMES[1]]
    assert {r["rule"] for r in rejected} == {"ambiguous_image", "image_rejected"}


@pytest.mark.parametrize(("question", "text"), [("<image>\nWhat?", "What?"), ("What? <image>", "What?")])
def test_a_marker_of_the_image_is_no_part_of_the_question(make, question, text):
    rows, rejected, _ = prepared(make([{"image": NAMES[0], "question": question, "answer": "x"}]))
    assert rejected == [] and asked(rows)[NAMES[0]] == [(text, "x")]


@pytest.mark.parametrize(
    "question", ["<video> What?", "<image> <image> What?", "<img>b.jpg</img>What?", "![](b.jpg) x"]
)
def test_other_markers_are_rejected(make, question):
    sound = {"image": NAMES[1], "question": "a ?", "answer": "x"}
    _, rejected, _ = prepared(make([{"image": NAMES[0], "question": question, "answer": "x"}, sound]))
    assert rejected[0]["rule"] == ("several_images" if "<image>" in question else "other_media")


def test_answers_that_no_question_asks_for_are_told(make):
    questions = [{"image": NAMES[0], "question_id": 1, "question": "what?"}]
    answers = {"annotations": [{"question_id": n, "multiple_choice_answer": "cat"} for n in (1, 77, 78)]}
    assert make(questions, answers).read_listing().notes == [
        "2 annotations answer questions that no file of questions has"
    ]
    answers["annotations"] = answers["annotations"][:1]
    assert make(questions, answers).read_listing().notes == []
