"""Pictures as answers: generated from text alone, or edited from an image."""

import numpy as np
import pytest
import torch
from support.forced_answers import force_answers
from support.tiny_models import EXPERTS, SIDE, scene_batch, tiny_loaded, tiny_settings

from lumen_ray.answer import Answer
from lumen_ray.data.images import decode
from lumen_ray.data.scenes import render as scenes
from lumen_ray.errors import UserError
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.outputs import merge
from lumen_ray.inference.request import make_request
from lumen_ray.structures import SampleSettings

QUICK = SampleSettings(steps=2, seed=5)
DRAW = make_request("generate", text="a red circle .", sample=QUICK)
EDIT = make_request("edit", text="make the circle blue", sample=QUICK)
PICTURE = decode(scenes.scene_row(0, 0, SIDE)["image"])


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_loaded(**EXPERTS))


def test_pictures_have_the_requested_size_and_number(engine):
    sample = SampleSettings(steps=2, size=(16, 32), num_images=2)
    (answer,) = engine.run([None], [[make_request("generate", text="a red circle .", sample=sample)]])[0]
    assert (answer.route, answer.predictions, answer.text) == ("[GEN]", [], None)
    assert [(p.shape, p.dtype) for p in answer.images] == [((16, 32, 3), np.uint8)] * 2
    assert not np.array_equal(*answer.images) and answer.size == (16, 32)
    again = Answer.from_dict(answer.to_dict())
    assert all(np.array_equal(a, b) for a, b in zip(again.images, answer.images, strict=True))


def test_an_edit_has_the_shape_of_its_image(engine):
    wide = PICTURE[: SIDE // 2]
    answer = engine.run([wide], [[EDIT]])[0][0]
    height, width = answer.images[0].shape[:2]
    assert answer.route == "[EDIT]" and width > 1.5 * height  # both are multiples of 8


def test_a_picture_depends_on_its_own_prompt_alone(engine):
    requests = [[EDIT, make_request("detect", classes=["circle"])], [DRAW], [EDIT]]
    together = engine.run([PICTURE, None, PICTURE[::-1].copy()], requests)
    assert together[0][1].images is None and len(together[0][1].predictions) == 1
    for image, asked, answers in zip([PICTURE, None, PICTURE[::-1].copy()], requests, together, strict=True):
        alone = engine.run([image], [asked[:1]])[0][0]
        assert np.abs(alone.images[0].astype(int) - answers[0].images[0]).max() <= 1
    other = make_request("generate", text="a red circle .", sample=SampleSettings(steps=2, seed=6))
    assert not np.array_equal(engine.run([None], [[other]])[0][0].images[0], together[1][0].images[0])


def test_the_picture_made_of_words_does_not_see_an_image(engine):
    with pytest.raises(UserError, match="'generate' takes no image"):
        engine.run([PICTURE], [[DRAW]])
    for request in (EDIT, make_request("detect", classes=["circle"]), make_request("caption")):
        with pytest.raises(UserError, match=f"'{request.task}' needs an image"):
            engine.run([None], [[request]])


def test_a_model_without_the_decoder_says_what_it_serves():
    plain = Engine(tiny_loaded())
    with pytest.raises(UserError, match="no decoder for task 'generate'; it serves: chat, caption"):
        plain.run([None], [[DRAW]])


def test_outputs_of_several_calls_are_decoded_as_one(engine):
    outputs = [engine.trunk.links([PICTURE], [[EDIT]]), engine.trunk.links([PICTURE[::-1].copy()], [[EDIT]])]
    decoder = engine.decoders["instruct_pix2pix"]
    together = decoder.predict(merge(outputs))
    for found, output in zip(together, outputs, strict=True):
        assert np.abs(found[0].astype(int) - decoder.predict(output)[0][0]).max() <= 1
    assert set(outputs[0].decoder_inputs) == {"instruct_pix2pix"} and outputs[0].dense is None


@pytest.mark.parametrize(("task", "family"), [("generate", "generation"), ("edit", "editing")])
def test_the_loss_of_the_noise_reaches_the_llm_and_the_queries(engine, task, family):
    model = engine.loaded.model
    rows = [scenes.scene_row(0, n, SIDE) for n in range(2)]
    batch = scene_batch(rows, (task,)) if task == "generate" else edit_batch(rows)
    model.train()
    torch.manual_seed(0)  # a prompt may be dropped for guidance, and then nothing reaches the LLM
    losses = model(batch)
    model.zero_grad()
    losses[task].total.backward()
    assert float(losses[task].count) == 2
    queries = model.trunk.queries.queries[family].grad
    layer = next(p for name, p in model.trunk.llm.named_parameters() if "layers.0" in name and p.ndim > 1)
    assert queries.abs().sum() > 0 and layer.grad.abs().sum() > 0
    (vae,) = (losses[name] for name in losses if name.endswith("vae"))
    assert torch.isfinite(vae.total) and float(vae.count) == 2
    model.eval()


def edit_batch(rows):
    """Each row has its own picture."""
    from support.tiny_models import tiny_tokenizer

    from lumen_ray.data.batches.collate import Collator
    from lumen_ray.data.shards.schema import make_message

    rows = [{**row, "messages": [make_message("edit", "make it blue", None)]} for row in rows]
    pictures = [decode(row["image"]) for row in rows]
    rngs = [np.random.default_rng(i) for i in range(len(rows))]
    input_rules = tiny_settings(**EXPERTS).input_rules
    return Collator(tiny_tokenizer(), SIDE, ("edit",), {}, input_rules=input_rules)(rows, pictures, rngs, pictures)


@pytest.mark.parametrize(
    ("token", "image", "text"), [("[GEN]", None, "draw a circle"), ("[EDIT]", PICTURE, "edit : x")]
)
def test_route_only_draws_no_picture(engine, monkeypatch, token, image, text):
    def draw(*args):
        raise AssertionError("a decoder was called")

    force_answers(monkeypatch, engine.trunk.loop, [engine.trunk.tokenizer.ids[token]])
    for decoder in engine.decoders.values():
        monkeypatch.setattr(decoder, "predict", draw)
    chat = make_request("chat", text=text)
    (answer,) = engine.run([image], [[chat]], route_only=True)[0]
    assert (answer.route, answer.text, answer.images, answer.predictions) == (token, None, None, [])
    with pytest.raises(AssertionError, match="was called"):
        engine.run([image], [[chat]])


@pytest.mark.parametrize("route_only", [True, False])
def test_a_route_without_a_decoder_is_not_written(monkeypatch, route_only):
    plain = Engine(tiny_loaded())
    ids = plain.trunk.tokenizer.ids
    force_answers(monkeypatch, plain.trunk.loop, [ids["[GEN]"]] * 2)
    detect = make_request("detect", classes=["circle"])
    requests = [[make_request("chat", text="draw a circle"), detect]]
    ((chat, place),) = plain.run([PICTURE], requests, route_only=route_only, max_new_tokens=2, score_threshold=0)
    assert chat.route is None and len(chat.tokens) == 2 and chat.images is None and chat.predictions == []
    assert route_only or len(place.predictions[0]) > 0
