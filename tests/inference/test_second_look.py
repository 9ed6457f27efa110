"""The second look of a real engine: one set of modules, agreement by masks or boxes, and yes or no from one token."""

import numpy as np
import pytest
import torch
from support.tiny_models import EXPERTS, SIDE, answering, scrambled, tiny_loaded

from lumen_ray.answer import Answer
from lumen_ray.data.images import decode
from lumen_ray.data.scenes import render as scenes
from lumen_ray.errors import UserError
from lumen_ray.inference import region_questions
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.protocol import EncodingEngine
from lumen_ray.inference.request import RegionQuestion, box_region, make_request
from lumen_ray.inference.sampling import GREEDY, Sampler
from lumen_ray.inference.second_look import SecondLook, with_agreement
from lumen_ray.inference.writing import TextPrompt
from lumen_ray.structures import Boxes, Masks, Prediction
from lumen_ray.tasks import region_question
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.regions import region_mask

PICTURES = [decode(scenes.scene_row(3, n, SIDE)["image"]) for n in range(2)]
SIZE = (SIDE, SIDE)
QUESTIONS = [
    RegionQuestion(image, box_region(Boxes([box], SIZE), 0), phrase)
    for image, box, phrase in (
        (0, [0, 0, 30, 30], "red circle"), (1, [5, 9, 20, 31], "blue square"), (0, [10, 10, 40, 20], "figure"),
        (0, [0, 0, 30, 30], "blue square"),
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    loaded = tiny_loaded(grounding_dino=EXPERTS["grounding_dino"])
    scrambled(loaded.model.trunk)
    return Engine(answering(loaded))


def test_the_engine_implements_the_protocol(engine):
    assert isinstance(engine, EncodingEngine)


def test_the_engine_beside_has_the_same_modules(engine):
    other = engine.beside("grounding_dino", ["detect", "caption"])
    assert (other.serving["detect"], engine.serving["detect"]) == ("grounding_dino", "lumen")
    assert other.serving["segment"] == "lumen"
    assert other.trunk.trunk is engine.trunk.trunk and other.decoders is engine.decoders
    request = make_request("detect", classes=["red circle", "blue square"])
    encoded = engine.encode(PICTURES)
    with_dino = {"grounding_dino": EXPERTS["grounding_dino"], "decoders": {"detect": "grounding_dino"}}
    chosen = Engine(answering(tiny_loaded(**with_dino)))
    chosen.loaded.model.load_state_dict(engine.loaded.model.state_dict())
    found = other.run(encoded, [[request]] * 2, score_threshold=0.0)
    wanted = chosen.run(PICTURES, [[request]] * 2, score_threshold=0.0)
    for (one,), (two,) in zip(found, wanted, strict=True):
        for p, q in zip(one.predictions, two.predictions, strict=True):
            assert np.allclose(p.boxes.xyxy, q.boxes.xyxy, atol=1e-2) and np.allclose(p.scores, q.scores, atol=1e-4)


def test_agreement_is_of_masks_where_both_have_them():
    square, half = np.zeros((1, 20, 20), bool), np.zeros((1, 20, 20), bool)
    square[:, :10, :10], half[:, :10, :5] = True, True
    box = Boxes([[0, 0, 10, 10]], (20, 20))
    one = Prediction("a", box, [0.9], Masks.from_arrays(square))
    other = Prediction("a", Boxes([[15, 15, 20, 20], [0, 0, 10, 10]], (20, 20)), [0.9, 0.5])

    def agreement(first, second):
        answer = with_agreement(Answer("segment", (20, 20), [first]), Answer("segment", (20, 20), [second]))
        return answer.predictions[0].marks["agreement"].tolist()

    assert agreement(one, other) == [1]
    assert agreement(one, Prediction("a", box, [0.9], Masks.from_arrays(half))) == [0.5]
    assert agreement(one, Prediction("a", Boxes([], (20, 20)), [])) == [0]
    assert agreement(Prediction("a", Boxes([], (20, 20)), []), other) == []


def test_a_question_is_answered_as_it_would_be_written(engine, monkeypatch):
    """Where the LLM may write nothing but yes or no, the probability of what it writes is the one that is read."""
    stage = engine.trunk
    tokens = stage.region_questions.answer_tokens()
    (yes, *_), (no, *_) = tokens
    monkeypatch.setattr(stage.region_questions, "answer_tokens", lambda: ([yes], [no]))
    encoded = engine.encode(PICTURES)
    never = [i for i in range(len(stage.tokenizer)) if i not in (yes, no)]
    for question in QUESTIONS:
        branch = Branch(question.image, region_question(question.phrase), regions=(0,))
        mask = torch.from_numpy(region_mask(question.region, SIZE))
        prompt = TextPrompt(branch, Sampler(GREEDY, []), 1, mask, never=never)
        (writing,) = stage.loop.submit(encoded.prefix, [prompt])
        stage.loop.wait([writing])
        written = np.exp(prompt.sampler.log_probs[0])
        said = engine.ask_regions(encoded, [question])
        assert said[0] == pytest.approx(written if writing.tokens[0] == yes else 1 - written, abs=1e-4)


def test_answers_depend_on_image_region_and_phrase_but_not_on_the_pass(engine, monkeypatch):
    encoded = engine.encode(PICTURES)
    together = engine.ask_regions(encoded, QUESTIONS)
    assert len({round(value, 4) for value in together}) == len(QUESTIONS) and all(0 < v < 1 for v in together)
    monkeypatch.setattr(region_questions, "AT_ONCE", 1)
    assert engine.ask_regions(encoded, QUESTIONS) == pytest.approx(together, abs=1e-5)
    alone = engine.encode(PICTURES[1:])
    moved = RegionQuestion(0, QUESTIONS[1].region, QUESTIONS[1].phrase)
    assert engine.ask_regions(alone, [moved]) == pytest.approx(together[1:2], abs=1e-5)
    assert engine.ask_regions(encoded, []) == []


@pytest.mark.parametrize("box", [[-5, -5, 200, 200], [SIDE, SIDE, SIDE, SIDE], [3, 3, 3, 3], [9.5, 0, 9.6, 0.1]])
def test_any_box_is_a_region(box):
    box_region(Boxes([box], SIZE), 0)  # raises for an empty one, or one outside


def test_a_tokenizer_that_begins_both_words_alike_is_refused():
    with pytest.raises(UserError, match="leave verify out") as error:
        SecondLook(Engine(tiny_loaded()), ["detect"], None, True)
    assert error.value.reason == "cannot_verify"


def test_images_of_several_sizes_and_requests_of_several_tasks():
    engine = Engine.load("nano")
    rows = [scenes.scene_row(7, n) for n in range(3)]
    images = [decode(row["image"]) for row in rows]
    requests = [make_request("caption"), make_request("detect", classes=list(engine.classes))]
    look = SecondLook(engine, ["caption", "detect"], None, True)
    for (caption, found), (plain, wanted), row in zip(
        look.run(images, [requests] * 3, score_threshold=0.3),
        engine.run(images, [requests] * 3, score_threshold=0.3),
        rows,
        strict=True,
    ):
        assert caption.text == plain.text
        assert sum(map(len, found.predictions)) == len(row["instances"])
        for p, q in zip(found.predictions, wanted.predictions, strict=True):
            assert np.allclose(p.boxes.xyxy, q.boxes.xyxy, atol=1e-3)
            if len(p):
                assert p.marks["verified"].shape == p.scores.shape
                assert (p.marks["presence"] >= p.scores - 1e-6).all() and (p.marks["presence"] <= 1).all()
