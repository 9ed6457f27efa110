"""An answer with links in its text has parts in the order of writing; without the model's flag it ends at the first."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.forced_answers import force_answers
from support.tiny_models import tiny_loaded

from lumen_ray.answer import Answer
from lumen_ray.decoders.base import PredictSettings
from lumen_ray.errors import UserError
from lumen_ray.inference.branches import last_phrase
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.outputs import assemble, finish, merge
from lumen_ray.inference.request import make_request
from lumen_ray.inference.sampling import Sampling

IMAGE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
WRITTEN = "a red circle[DET] and two blue squares[SEG] , yes ."
TEXT = "a red circle and two blue squares , yes ."
CHAT = make_request("chat", text="describe the image and show each object .")


def make_engine(flag=True):
    loaded = tiny_loaded()
    return Engine(replace(loaded, meta=replace(loaded.meta, writes_behind_routes=flag)))


@pytest.fixture(scope="module")
def engine():
    return make_engine()


def force(monkeypatch, engine, text=WRITTEN):
    ids = [*engine.trunk.tokenizer.encode(text), *engine.trunk.tokenizer.end_ids]
    force_answers(monkeypatch, engine.trunk.loop, ids)
    return ids


def run(engine, request=CHAT, image=IMAGE, **options):
    ((answer,),) = engine.run([image], [[request]], **{"score_threshold": 0.0, "max_new_tokens": 60} | options)
    return answer


def same(one, other):
    torch.testing.assert_close(one.boxes.xyxy, other.boxes.xyxy, atol=1e-2, rtol=1e-4)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)


def test_parts_are_in_the_order_of_writing(engine, monkeypatch):
    force(monkeypatch, engine)
    answer = run(engine)
    assert [part.text for part in answer.parts] == ["a red circle", "", " and two blue squares", "", " , yes ."]
    assert [part.route for part in answer.parts] == [None, "[DET]", None, "[SEG]", None]
    assert answer.text == TEXT == "".join(part.text for part in answer.parts)
    found = [part.prediction for part in answer.parts if part.route]
    assert found == answer.predictions and [p.phrase for p in found] == ["red circle", "blue squares"]
    assert all(len(p) for p in found) and answer.route == "[DET]" and not answer.is_cut
    assert found[0].masks is None and found[1].masks is not None
    assert "".join(answer.tokens).strip() == TEXT and len(answer.log_probs) == len(answer.tokens)


def test_other_requests_beside_it_change_nothing(engine, monkeypatch):
    detect = make_request("detect", classes=["red circle"])
    alone = run(engine, detect)
    force(monkeypatch, engine)
    expected = run(engine)
    other = IMAGE[::-1].copy()
    rows = [[detect, CHAT, replace(CHAT, text="what ?")], [CHAT], [detect]]
    (first, second, third) = engine.run([IMAGE, other, IMAGE], rows, score_threshold=0.0, max_new_tokens=60)
    same(first[0].predictions[0], alone.predictions[0])
    same(third[0].predictions[0], alone.predictions[0])
    assert third[0].parts is None
    for one, two in zip(first[1].predictions, expected.predictions, strict=True):
        same(one, two)
    assert first[1].text == second[0].text == TEXT
    assert not np.allclose(second[0].predictions[0].scores[:5], expected.predictions[0].scores[:5], atol=1e-3)


def test_without_the_flag_the_answer_ends_at_its_routing_token(monkeypatch):
    engine = make_engine(flag=False)
    force(monkeypatch, engine)
    answer = run(engine)
    assert answer.parts is None and answer.text == "a red circle" and answer.route == "[DET]"
    assert [p.phrase for p in answer.predictions] == [CHAT.text] and answer.log_probs is None
    assert engine.trunk.loop.bytes_held == 0


@pytest.mark.parametrize(
    ("text", "before", "route"), [("[DET] red", None, "[DET]"), ("a figure[POSE] red", "a figure", "[POSE]")]
)
def test_tokens_that_no_text_follows_route_the_prompt_as_before(engine, monkeypatch, text, before, route):
    force(monkeypatch, engine, text)
    answer = run(engine)
    assert (answer.parts, answer.text, answer.route) == (None, before, route)
    assert len(answer.predictions) == 1


def test_text_alone_and_other_tasks_have_no_parts(engine, monkeypatch):
    force(monkeypatch, engine)
    answer = run(engine, image=None)
    assert (answer.parts, answer.route, answer.predictions) == (None, None, [])
    assert answer.text.startswith("a red circle") and "[DET]" not in answer.tokens
    answer = run(engine, make_request("caption"))
    assert (answer.parts, answer.text, answer.route) == (None, "a red circle", None)
    answer = run(engine, route_only=True)
    assert (answer.parts, answer.text, answer.route, answer.predictions) == (None, TEXT, "[DET]", [])


def test_links_behind_a_stop_text_are_left_out(engine, monkeypatch):
    force(monkeypatch, engine)
    answer = run(engine, replace(CHAT, sampling=Sampling(stop=("circle and",))))
    assert (answer.text, answer.parts, answer.route, answer.predictions) == ("a red ", None, None, [])
    answer = run(engine, replace(CHAT, sampling=Sampling(stop=("squares , yes",))))
    assert [part.text or part.route for part in answer.parts] == ["a red circle", "[DET]", " and two blue "]


def test_an_answer_is_cut_at_its_limit(engine, monkeypatch):
    ids = force(monkeypatch, engine)
    answer = run(engine, max_new_tokens=1 + ids.index(engine.trunk.tokenizer.ids["[DET]"]))
    assert answer.is_cut and [part.text or part.route for part in answer.parts] == ["a red circle", "[DET]"]


def test_limits_apply_to_parts(engine, monkeypatch):
    force(monkeypatch, engine)
    answer = run(engine)
    for cut in (
        answer.best(3),
        finish(answer, PredictSettings(0.0, 2), PredictSettings(0.0, 300)),
        run(engine, replace(CHAT, max_per_phrase=2)),
    ):
        found = [part.prediction for part in cut.parts if part.route]
        assert found == cut.predictions and sum(map(len, found)) in (3, 4)


def test_json_has_the_parts_and_comes_back(engine, monkeypatch):
    force(monkeypatch, engine, "a red circle[DET] and a red circle[DET]")
    answer = run(engine, max_per_phrase=2)
    data = answer.to_dict()
    assert [part["type"] for part in data["parts"]] == ["text", "instances"] * 2
    assert data["parts"][0] == {"type": "text", "text": "a red circle"}
    assert data["parts"][1]["task"] == "detect" and data["parts"][1]["phrase"] == "red circle"
    assert data["instances"] == data["parts"][1]["instances"] + data["parts"][3]["instances"]
    assert len(data["instances"]) == 4 and data["phrases"] == ["red circle"] * 2
    assert Answer.from_dict(data).to_dict() == data


def test_outputs_for_the_wire_keep_the_parts(engine, monkeypatch):
    detect = make_request("detect", classes=["red circle"])
    force(monkeypatch, engine)
    rows = [[detect, CHAT], [CHAT]]
    output = engine.trunk.links([IMAGE, IMAGE[::-1].copy()], rows, max_new_tokens=60)
    again = merge([output.select(1), output.select(0)])
    settings = PredictSettings(0.0)
    found = assemble(again.plans, {"lumen": engine.decoders["lumen"].predict(again, settings)})
    expected = assemble(output.plans, {"lumen": engine.decoders["lumen"].predict(output, settings)})
    assert assemble(output.plans, {})[1] == [None]  # answered by the decoder
    for one, two in ((found[0][0], expected[1][0]), (found[1][1], expected[0][1])):
        assert [part.route for part in one.parts] == [None, "[DET]", None, "[SEG]", None]
        for a, b in zip(one.predictions, two.predictions, strict=True):
            same(a, b)


def test_queries_count_in_the_context(engine, monkeypatch):
    force(monkeypatch, engine, "red")
    assert run(engine, max_new_tokens=390).text == "red"
    with pytest.raises(UserError, match="answer may have 450 and 64 queries"):
        run(engine, max_new_tokens=450)
    plain = make_engine(flag=False)
    force(monkeypatch, plain, "red")
    assert run(plain, max_new_tokens=450).text == "red"


def test_streams_go_on_behind_links_and_history_has_the_text(engine, monkeypatch):
    force(monkeypatch, engine)
    chat = engine.conversation(IMAGE)
    *pieces, answer = chat.stream(CHAT.text, max_new_tokens=60)
    assert "".join(pieces) == TEXT == answer.text and len(pieces) > 5 and len(answer.parts) == 5
    assert chat.history == [(CHAT.text, TEXT)]
    assert chat.ask("and what is red ?", max_new_tokens=60).text == TEXT


def test_the_phrase_of_a_link_is_the_last_before_its_token():
    assert last_phrase(" and two blue squares") == "blue squares"
    assert last_phrase("a blue square by a circle and the blue square") == "blue square"
    assert last_phrase("circles and red circles") == "red circles"
    assert last_phrase(" , ") == ","
