"""Questions in a row about one image are answered as from their whole history, and streamed as they are written."""

import numpy as np
import pytest
from support.forced_answers import force_answers
from support.tiny_models import tiny_loaded

from lumen_ray.errors import UserError
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request
from lumen_ray.inference.sampling import Sampling

IMAGE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_loaded())


@pytest.fixture
def words(engine, monkeypatch):
    """Every answer is of these words."""
    ids = engine.trunk.tokenizer.encode("a red circle and a blue square")
    force_answers(monkeypatch, engine.trunk.loop, [*ids, *engine.trunk.tokenizer.end_ids])
    return "a red circle and a blue square"


def test_a_question_is_answered_as_from_the_whole_history(engine, monkeypatch):
    encoded = []
    encode = engine.trunk.trunk.encode
    monkeypatch.setattr(engine.trunk.trunk, "encode", lambda *args: encoded.append(1) or encode(*args))
    chat = engine.conversation(IMAGE, sampling=Sampling(temperature=1.0, seed=4))
    answers = [chat.ask(text, max_new_tokens=6) for text in ("what is red ?", "what is blue ?")]
    assert len(encoded) == 1
    assert chat.history == [("what is red ?", answers[0].text), ("what is blue ?", answers[1].text)]
    request = make_request("chat", text="what is blue ?", history=chat.history[:1], sampling=chat.sampling)
    ((whole,),) = engine.run([IMAGE], [[request]], max_new_tokens=6)
    assert whole.text == answers[1].text


def test_an_answer_is_streamed_as_it_is_written(engine, words):
    for image in (IMAGE, None):
        *pieces, answer = engine.conversation(image).stream("what is there ?")
        assert len(pieces) > 2 and "".join(pieces) == answer.text == words


def test_a_stream_holds_back_what_may_begin_a_stop_text(engine, words):
    chat = engine.conversation(IMAGE, sampling=Sampling(stop=("circle and a red", "blue square")))
    *pieces, answer = chat.stream("what is there ?")
    assert "".join(pieces) == answer.text == words.partition("blue")[0]


def test_a_stream_that_is_closed_gives_its_answer_up(engine, words):
    chat = engine.conversation(IMAGE)
    stream = chat.stream("what is there ?")
    assert isinstance(next(stream), str)
    stream.close()
    assert engine.trunk.loop.bytes_held == 0 and chat.history == []
    assert engine.conversation(IMAGE).ask("what is there ?").text == words


def test_a_stream_that_is_closed_ends_though_no_text_comes(engine, monkeypatch):
    stops = [engine.trunk.tokenizer.encode("red")[0], *[engine.trunk.tokenizer.ids["<region>"]] * 390]
    force_answers(monkeypatch, engine.trunk.loop, stops)
    writings = []
    submit = engine.trunk.loop.submit
    monkeypatch.setattr(engine.trunk.loop, "submit", lambda *args: writings.extend(submit(*args)) or writings)
    stream = engine.conversation(IMAGE).stream("what is there ?", max_new_tokens=390)
    assert next(stream) == "red"
    stream.close()
    assert writings[0].end == "cancelled" and len(writings[0].tokens) < 380


def test_an_answer_may_hold_a_special_token_of_other_models(engine):
    chat = engine.conversation()
    chat.history.append(("what ?", "<image>"))
    assert chat.ask("what ?", max_new_tokens=2) is not None
    chat.history.append(("what ?", "a <region>"))
    with pytest.raises(UserError, match="an earlier answer may not contain '<region>'"):
        chat.ask("what ?")


def test_errors_reach_the_reader_of_a_stream(engine):
    with pytest.raises(UserError, match="needs a text"):
        list(engine.conversation().stream(" "))
    with pytest.raises(UserError, match="more than the LLM's context") as error:
        list(engine.conversation().stream("what ?", max_new_tokens=100_000))
    assert error.value.reason == "context_too_long"


def test_new_text_is_numbered_by_image_and_request(engine, words):
    found = {}

    def on_text(image, request, text):
        found[image, request] = found.get((image, request), "") + text

    tall = np.ascontiguousarray(IMAGE.transpose(1, 0, 2))
    chats = [make_request("chat", text="what ?"), make_request("detect", classes=["circle"])]
    engine.run([IMAGE, None, tall], [chats, [chats[0]], [chats[1], chats[0]]], on_text=on_text)
    assert found == {(0, 0): words, (1, 0): words, (2, 1): words}


def test_encoded_images_give_the_same_answers(engine):
    requests = [
        [make_request("detect", classes=["circle"]), make_request("chat", text="what ?")],
        [make_request("caption")],
    ]
    images = [IMAGE, IMAGE[::-1].copy()]
    encoded = engine.encode(images)
    for _ in range(2):
        for one, other in zip(engine.run(encoded, requests), engine.run(images, requests), strict=True):
            for a, b in zip(one, other, strict=True):
                assert a.text == b.text
                for p, q in zip(a.predictions, b.predictions, strict=True):
                    np.testing.assert_allclose(p.scores, q.scores, atol=1e-5)
    with pytest.raises(UserError, match="images that are encoded together"):
        engine.encode([])
