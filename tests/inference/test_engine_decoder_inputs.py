"""Images at a decoder's input size: resampled from the stored image and sent only to decoders that read them."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_models import EXPERTS, SIDE, tiny_loaded, tiny_tokenizer

from lumen_ray.data.batches.collate import Collator
from lumen_ray.data.shards.schema import make_message, make_row
from lumen_ray.errors import UserError
from lumen_ray.inference.decoder_stage import MAX_DECODER_GROUPS
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.outputs import merge
from lumen_ray.inference.request import make_request
from lumen_ray.structures import Boxes, Keypoints, Masks, Prediction, SampleSettings

RULE = [2 * SIDE, 3 * SIDE]
SERVED = {"detect": "grounding_dino", "segment": "grounding_dino", "pose": "unipose"}
DETECT = make_request("detect", classes=["red circle", "blue square"])
SEGMENT = make_request("segment", classes=["red circle"])
POSE = make_request("pose", classes=["figure"], keypoints=["head"])
EDIT = make_request("edit", text="make it blue", sample=SampleSettings(steps=1))


def experts(**keys):
    return {name: {**EXPERTS[name], **(keys if name in ("grounding_dino", "unipose") else {})} for name in EXPERTS}


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_loaded(decoders=SERVED, **experts(input_size=RULE)))


@pytest.fixture(scope="module")
def plain():
    return Engine(tiny_loaded(decoders=SERVED, **experts()))


def photo(height, width, box):
    """Stripes of a pixel each, and a bright square."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, ::2] = 60
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = 250
    return image


BOXES = [(30, 20, 90, 80), (20, 40, 70, 110), (8, 8, 60, 70)]
PHOTOS = [photo(*size, box) for size, box in zip([(128, 192), (160, 100), (90, 90)], BOXES, strict=True)]


def test_an_expert_gets_the_stored_image(engine, plain):
    out = engine.trunk.links(PHOTOS, [[DETECT, POSE]] * 3)
    for name in ("grounding_dino", "unipose"):
        part = out.decoder_inputs[name]
        own = {image: part.pixels[i] for i, image in enumerate(part.link.image_index.tolist())}
        assert [tuple(own[i].shape) for i in range(3)] == [(3, 128, 192), (3, 192, 120), (3, 128, 128)]
        assert np.array_equal(own[0].permute(1, 2, 0), PHOTOS[0])  # its size is the rule's
    part = out.decoder_inputs["grounding_dino"]
    assert part.pixels[0] is part.pixels[1]
    seen = plain.trunk.links(PHOTOS, [[DETECT]] * 3).decoder_inputs["grounding_dino"].pixels
    assert {tuple(image.shape) for image in seen} == {(3, SIDE, SIDE)}


def find_bright(monkeypatch, stage):
    """In place of what it has learned, a decoder finds what is bright in the pixels it gets."""
    decoder = stage.decoder
    monkeypatch.setattr(decoder, "forward", lambda link, pixels: (link, pixels))

    def predict(raw, frames, prompts, settings):
        link, pixels = raw
        found = []
        for image, spec in zip(link.image_index.tolist(), prompts, strict=True):
            frame, (height, width) = frames[image], pixels.extents[image].tolist()
            assert frame.extent == (height, width)
            inside = pixels.images[image, 0, :height, :width] > 180
            assert pixels.images[image, :, height:].sum() == 0 or stage.input_rule is None
            ys, xs = torch.nonzero(inside, as_tuple=True)
            box = np.array([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]]) / frame.scale
            points = Keypoints([[[*box[0, :2], 1]]], ("head",), frame.size)
            masks = Masks.from_arrays(np.zeros((1, *frame.size), bool))
            found.append(spec and Prediction(spec.phrase, Boxes(box, frame.size), [0.9], masks, points))
        return found

    monkeypatch.setattr(decoder, "predict", predict)


@pytest.mark.parametrize("name", ["grounding_dino", "unipose"])
@pytest.mark.parametrize("together", [True, False])
def test_predictions_lie_in_stored_pixels(engine, plain, monkeypatch, name, together):
    request = DETECT if name == "grounding_dino" else POSE
    for model, off in ((engine, 1.0), (plain, 2.5)):
        find_bright(monkeypatch, model.decoders[name])
        groups = [PHOTOS] if together else [[image] for image in PHOTOS]
        answers = [row for images in groups for row in model.run(images, [[request]] * len(images))]
        for image, box, (answer,) in zip(PHOTOS, BOXES, answers, strict=True):
            for prediction in answer.predictions:
                assert np.abs(prediction.boxes.xyxy[0] - box).max() <= off
                assert np.abs(prediction.keypoints.xyv[0, 0, :2] - box[:2]).max() <= off
                assert prediction.boxes.size == image.shape[:2]


def test_images_of_several_shapes_do_not_change_each_others_answers(engine):
    asked = [[DETECT, SEGMENT, POSE], [SEGMENT], [POSE, DETECT]]
    together = engine.run(PHOTOS, asked, score_threshold=0.0)
    for image, requests, answers in zip(PHOTOS, asked, together, strict=True):
        alone = engine.run([image], [requests], score_threshold=0.0)[0]
        for one, other in zip(alone, answers, strict=True):
            for a, b in zip(one.predictions, other.predictions, strict=True):
                assert len(a) > 0 and np.allclose(a.scores, b.scores, atol=1e-4)
                assert np.allclose(a.boxes.xyxy, b.boxes.xyxy, atol=2e-2)
                assert a.masks is None or a.masks.size == image.shape[:2]


def test_large_images_travel_only_to_who_reads_them(engine):
    out = engine.trunk.links(PHOTOS, [[DETECT, SEGMENT], [make_request("refer", text="a circle")], [POSE]])
    sent = [out.select(i) for i in range(3)]
    assert [sorted(output.decoder_inputs) for output in sent] == [["grounding_dino"], ["lumen"], ["unipose"]]
    assert sent[1].decoder_inputs["lumen"].pixels == []
    image, weight = 128 * 192 * 3, [len(pickle.dumps(output)) for output in sent]
    dense = sent[0].dense.numel() * 4
    assert image < weight[0] - dense < image + 20_000  # once, for the prompts of both requests
    assert weight[1] - dense < 20_000
    again = merge(sent)
    part, own = again.decoder_inputs["grounding_dino"], engine.decoders["grounding_dino"]
    for found, alone in zip(own.predict(again), own.predict(sent[0]), strict=True):
        assert np.allclose(found.scores, alone.scores, atol=1e-4)
    assert all(map(torch.equal, part.pixels, out.decoder_inputs["grounding_dino"].pixels))


def test_few_large_images_share_a_pass(engine, monkeypatch):
    stage, seen = engine.decoders["grounding_dino"], []
    look = stage.decoder.forward
    monkeypatch.setattr(
        stage.decoder, "forward", lambda link, pixels: seen.append(len(pixels.images)) or look(link, pixels)
    )
    for most, expected in ((2 * 192 * 192, [2, 1]), (2 * 192 * 192 - 1, [1, 1, 1]), (1, [1, 1, 1]), (1 << 30, [3])):
        monkeypatch.setattr("lumen_ray.inference.decoder_stage.MAX_DECODER_PIXELS", most)
        seen.clear()
        engine.run(PHOTOS, [[DETECT]] * 3)
        assert seen == expected and len(PHOTOS) <= MAX_DECODER_GROUPS


# -- pictures ---------------------------------------------------------------------------------------------------------


def learned_from(engine, image):
    """The picture that editing learns to start from."""
    height, width = image.shape[:2]
    message = make_message("edit", "make it blue", "")
    message["turns"] = message["turns"][:1]
    row = make_row("photo", b"", (height, width), "test", tasks=["edit"], messages=[message])
    collator = Collator(tiny_tokenizer(), SIDE, ("edit",), {}, input_rules=engine.loaded.settings.input_rules)
    batch = collator([row], [image], [np.random.default_rng(0)], [image])
    assert torch.equal(batch.targets["editing"].images, batch.pixels["instruct_pix2pix"].images)
    return batch.pixels["instruct_pix2pix"].images[0]


@pytest.mark.parametrize("shape", [(128, 128), (100, 200), (211, 97), (16, 16), (10, 300)])
def test_a_picture_is_edited_in_the_size_and_shape_it_was_learned_in(engine, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    source = learned_from(engine, image)
    (edited,) = engine.trunk.links([image], [[EDIT]]).decoder_inputs["instruct_pix2pix"].pixels
    assert torch.equal(edited, source)
    answer = engine.run([image], [[EDIT]])[0][0]
    assert answer.images[0].shape[:2] == source.shape[1:]


def test_a_larger_picture_is_edited_from_the_stored_image(engine):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    large = make_request("edit", text="x", sample=SampleSettings(steps=1, size=(48, 64)))
    out = engine.trunk.links([np.asarray(image)], [[EDIT, large]])
    small, stored = out.decoder_inputs["instruct_pix2pix"].pixels
    assert small.shape == (3, 16, 16) and np.array_equal(stored.permute(1, 2, 0), np.asarray(image))
    answers = engine.run([np.asarray(image)], [[EDIT, large]])[0]
    assert [answer.images[0].shape for answer in answers] == [(16, 16, 3), (48, 64, 3)]
    for size in ((1 << 40, 8), (-8, 8), (20, 20)):
        wrong = make_request("edit", text="x", sample=SampleSettings(steps=1, size=size))
        with pytest.raises(UserError, match="cannot be drawn|too large"):
            engine.trunk.links([np.asarray(image)], [[wrong]])


def test_what_draws_from_words_gets_no_image(engine):
    draw = make_request("generate", text="a red circle", sample=SampleSettings(steps=1))
    assert engine.trunk.links([None], [[draw]]).decoder_inputs["stable_diffusion"].pixels == []
