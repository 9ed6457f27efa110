"""A request says to which decoders the LLM may send a chat, and whether it has to."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.forced_answers import force_answers
from support.tiny_models import tiny_loaded

from lumen_ray.errors import UserError
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import Routing, make_request
from lumen_ray.inference.sampling import GREEDY, Sampling

IMAGE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
EVERYTHING = {"score_threshold": 0.0, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def engine():
    loaded = tiny_loaded()
    return Engine(replace(loaded, meta=replace(loaded.meta, writes_behind_routes=True)))


def chat(routing, text="segment red circle", sampling=GREEDY):
    return make_request("chat", text=text, routing=routing, sampling=sampling)


def run(engine, *requests, image=IMAGE):
    return engine.run([image], [list(requests)], **EVERYTHING)[0]


def test_a_required_route_gives_the_answer_of_the_structured_request(engine):
    routed, plain, expected = run(
        engine, chat(Routing(("[SEG]",), True)), chat(Routing(())), make_request("segment", classes=["red circle"])
    )
    assert (routed.route, routed.text, plain.route) == ("[SEG]", None, None)
    torch.testing.assert_close(
        routed.predictions[0].boxes.xyxy, expected.predictions[0].boxes.xyxy, atol=1e-2, rtol=1e-4
    )
    assert routed.usage.completion == 1 and plain.text is not None


def test_of_several_required_routes_the_llm_chooses_one_however_it_is_drawn(engine):
    hot = [Sampling(temperature=2.0, seed=seed) for seed in range(12)]
    answers = run(engine, *(chat(Routing(("[SEG]", "[DET]"), True), sampling=sampling) for sampling in hot))
    assert {answer.route for answer in answers} == {"[SEG]", "[DET]"} and all(a.text is None for a in answers)


def test_a_route_that_is_not_allowed_is_not_written(engine, monkeypatch):
    tokenizer = engine.trunk.tokenizer
    ids = [*tokenizer.encode("a red circle[DET] , yes ."), *tokenizer.end_ids]
    force_answers(monkeypatch, engine.trunk.loop, ids)
    allowed, excluded = run(engine, chat(Routing(("[DET]",))), chat(Routing(("[SEG]",))))
    assert allowed.route == "[DET]" and excluded.route is None and excluded.predictions == []


def test_a_single_route_ends_the_answer(engine, monkeypatch):
    tokenizer = engine.trunk.tokenizer
    force_answers(monkeypatch, engine.trunk.loop, [*tokenizer.encode("a red circle[DET] , yes ."), *tokenizer.end_ids])
    many, single = run(engine, chat(Routing()), chat(Routing(is_single=True)))
    assert many.text == "a red circle , yes ." and many.parts is not None
    assert (single.text, single.route, single.parts) == ("a red circle", "[DET]", None)
    assert len(single.predictions) == 1


def test_a_route_that_cannot_be_followed_cannot_be_required(engine):
    for routing, image in [(Routing(("[SEG]",), True), None), (Routing((), True), IMAGE)]:
        with pytest.raises(UserError, match="sent to a decoder") as error:
            run(engine, chat(routing), image=image)
        assert error.value.reason == "no_decoder"


def test_routing_belongs_to_chats_and_knows_its_tokens():
    with pytest.raises(UserError, match="is no conversation"):
        make_request("vqa", text="what ?", routing=Routing(()))
    with pytest.raises(UserError, match=r"'\[DOG\]' is no routing token; give some of: \[DET\]"):
        make_request("chat", text="what ?", routing=Routing(("[DOG]",)))
