"""Conversations about several images: answers, their batches, and the image that decoders look at."""

import numpy as np
import pytest
import torch
from support.forced_answers import force_answers
from support.tiny_models import scrambled, tiny_loaded

from lumen_ray.data.batches.transforms import fit
from lumen_ray.errors import UserError
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request
from lumen_ray.inference.sampling import Sampling
from lumen_ray.structures import Region

A, B, C = (np.random.default_rng(n).integers(0, 256, (60, 80 - 10 * n, 3), dtype=np.uint8) for n in range(3))
HISTORY = (("what is red ?", "a circle"),)


@pytest.fixture(scope="module")
def engine():
    loaded = tiny_loaded()
    scrambled(loaded.model.trunk)  # fresh weights hardly tell images apart
    return Engine(loaded)


def ask(engine, shown, **fields):
    """The answer to a question about the images, by itself."""
    request = make_request("chat", text="what differs ?", sampling=Sampling(temperature=1.0, seed=5), **fields)
    ((answer,),) = engine.run([shown], [[request]], max_new_tokens=8)
    return answer.tokens, np.array(answer.log_probs)


def same(one, other):
    return one[0] == other[0] and np.allclose(one[1], other[1], atol=1e-4)


def test_each_image_and_its_order_matter(engine):
    answers = [ask(engine, shown) for shown in ([A, B], [B, A], [A, C], [A, B, C], [B, A, C], A, [B])]
    for n, one in enumerate(answers):
        assert not any(same(one, other) for other in answers[n + 1 :])


def test_images_stand_in_the_order_given(engine):
    trunk = engine.trunk.trunk
    encoded = engine.encode([C[:, :60], [A, B, C], A, [B, A]])
    fitted = torch.stack([torch.from_numpy(fit(image, (64, 64))[0].copy()).permute(2, 0, 1) for image in (A, B, C)])
    for row, order in ((1, [0, 1, 2]), (3, [1, 0])):
        apart = trunk.encode(fitted[order], places=torch.arange(len(order))).joined(range(len(order)))
        for ours, theirs in zip(encoded.conversations[row].cache.layers, apart.cache.layers, strict=True):
            torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(ours.values, theirs.values, atol=1e-4, rtol=1e-4)
    assert set(encoded.conversations) == {1, 3}


def test_a_list_of_one_is_that_image(engine):
    assert same(ask(engine, [A]), ask(engine, A))


def test_the_question_that_brings_an_image_matters(engine):
    first, later = (ask(engine, [A, B], history=HISTORY, image_turns=turns) for turns in ((0,), (1,)))
    assert not same(first, later)
    assert same(first, ask(engine, [A, B], history=HISTORY))


def test_answers_in_one_batch_are_as_alone(engine):
    shown = [[A, B], A, [B, C, A], None, C]
    request = make_request("chat", text="what differs ?", sampling=Sampling(temperature=1.0, seed=5))
    detect = make_request("detect", classes=["red circle"])
    rows = [[request], [request, detect], [request], [request], [detect]]
    together = engine.run(shown, rows, max_new_tokens=8)
    for images, row, answers in zip(shown, rows, together, strict=True):
        if request in row:
            assert same((answers[0].tokens, np.array(answers[0].log_probs)), ask(engine, images))
    ((alone,),) = engine.run([C], [[detect]])
    np.testing.assert_allclose(together[4][0].predictions[0].scores, alone.predictions[0].scores, atol=1e-4)
    encoded = engine.encode([[A, B], C, [B, C, A]])
    again = engine.run(encoded, [[request], [detect], [request]], max_new_tokens=8)
    assert again[0][0].tokens == together[0][0].tokens and again[2][0].tokens == together[2][0].tokens
    assert engine.trunk.loop.bytes_held == 0


def test_a_conversation_that_brings_images_is_as_from_its_history(engine):
    chat = engine.conversation(A, sampling=Sampling(temperature=1.0, seed=3))
    first = chat.ask("what is red ?", max_new_tokens=6)
    second = chat.ask("what is blue ?", [B, C], max_new_tokens=6)
    assert chat.image_turns == (0, 1, 1) and len(chat.images) == 3
    request = make_request(
        "chat",
        text="what is blue ?",
        history=[("what is red ?", first.text)],
        sampling=chat.sampling,
        image_turns=[1, 1],
    )
    ((whole,),) = engine.run([[A, B, C]], [[request]], max_new_tokens=6)
    assert whole.tokens == second.tokens
    *pieces, streamed = engine.conversation([A, B]).stream("what is there ?", C, max_new_tokens=4)
    assert "".join(pieces) == streamed.text


def test_an_image_may_come_after_a_question_in_text_alone(engine):
    chat = engine.conversation()
    chat.history.append(("what is red ?", "a circle"))
    answer = chat.ask("what is there ?", A, max_new_tokens=3)
    assert answer.size == (60, 80)
    request = make_request("chat", text="what is there ?", history=[("what is red ?", "a circle")])
    ((whole,),) = engine.run([A], [[request]], max_new_tokens=3)
    assert answer.tokens == whole.tokens
    assert chat.image_turns == (1,)


def test_a_question_that_fails_or_is_given_up_leaves_no_image(engine, monkeypatch):
    chat = engine.conversation(A)
    for text, images in (("circle " * 3000, B), (" ", B), ("what ?", A[..., 0])):
        with pytest.raises(UserError):
            chat.ask(text, images)
    with monkeypatch.context() as patch:
        force_answers(patch, engine.trunk.loop, [engine.trunk.tokenizer.encode("red")[0]] * 200)
        stream = chat.stream("what is there ?", B, max_new_tokens=200)
        assert isinstance(next(stream), str)
        stream.close()
    assert len(chat.images) == 1 and chat.image_turns == (0,) and chat.history == []
    fresh = engine.conversation(A)
    assert chat.ask("what ?", B, max_new_tokens=4).tokens == fresh.ask("what ?", B, max_new_tokens=4).tokens


def test_decoders_look_at_the_last_image(engine, monkeypatch):
    force_answers(monkeypatch, engine.trunk.loop, [engine.trunk.tokenizer.ids["[DET]"]])
    request = make_request("chat", text="detect red circle")
    ((found,), (alone,)) = engine.run([[B, C, A], A], [[request], [request]], score_threshold=0)
    assert found.route == "[DET]" and found.size == (60, 80)
    np.testing.assert_allclose(found.predictions[0].scores, alone.predictions[0].scores, atol=1e-4)
    np.testing.assert_allclose(found.predictions[0].boxes.xyxy, alone.predictions[0].boxes.xyxy, atol=1e-2)


def test_the_memory_of_several_images_is_reserved(engine, monkeypatch):
    held = []
    images = engine.trunk.loop.images
    monkeypatch.setattr(engine.trunk.loop, "images", lambda tokens: held.append(tokens) or images(tokens))
    ask(engine, A)
    ask(engine, [A, B, C])
    assert held[1] == 6 * held[0]  # each, and their keys and values once more in a row


def test_captions_and_questions_may_be_about_several_images(engine):
    requests = [make_request("caption"), make_request("vqa", text="what differs ?")]
    (answers,) = engine.run([[A, B]], [requests], max_new_tokens=3)
    assert all(answer.text is not None for answer in answers)


def test_bad_input_is_a_sentence(engine):
    def refusal(shown, request, reason):
        with pytest.raises(UserError) as error:
            engine.run([shown], [[request]])
        assert error.value.reason == reason
        return str(error.value)

    chat = make_request("chat", text="what ?", history=HISTORY, image_turns=[0, 1])
    assert "2 numbers for 2 images" in refusal([A, B], chat, "invalid_image_turns")
    assert "about one image, got 2" in refusal([A, B], make_request("detect", classes=["cat"]), "several_images")
    region = make_request("region_caption", region=Region("box", (60, 80), np.array([1, 1, 30, 30])))
    assert "about one image" in refusal([B, A], region, "several_images")
    refusal([], make_request("chat", text="what ?"), "invalid_image")
    refusal([A, A[..., 0]], make_request("chat", text="what ?"), "invalid_image")
    long = make_request("chat", text="what ?")
    assert "LLM's context" in refusal([A] * 100, long, "context_too_long")
    for turns in ([1], [-1], [1, 0], ["0"], [True]):
        with pytest.raises(UserError, match="numbers of questions from 0 to 0"):
            make_request("chat", text="what ?", image_turns=turns)
    with pytest.raises(UserError, match="is no conversation"):
        make_request("vqa", text="what ?", image_turns=[0])


def test_the_sequential_layout_takes_one_image():
    sequential = Engine(tiny_loaded(prompt_layout="sequential", prefix_attention="causal", link_reads_words=False))
    with pytest.raises(UserError, match="one image per conversation"):
        sequential.run([[A, B]], [[make_request("chat", text="what ?")]])
