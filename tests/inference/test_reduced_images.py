"""Images that were decoded at reduced scale: answers are in pixels of the stored image, as with all of its pixels."""

import io

import numpy as np
import pytest
from PIL import Image
from support.tiny_models import EXPERTS, tiny_loaded

from lumen_ray.data.images import decode, decode_reduced
from lumen_ray.data.scenes.render import render
from lumen_ray.errors import UserError
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request
from lumen_ray.structures import Region


@pytest.fixture(scope="module")
def nano():
    return Engine.load("nano")


@pytest.fixture(scope="module")
def photo():
    """A JPEG file of 1024 x 1024 pixels of a scene."""
    buffer = io.BytesIO()
    Image.fromarray(render(10000, 5).image).resize((1024, 1024), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def test_boxes_masks_and_texts_are_those_of_the_whole_image(nano, photo):
    reduced = decode_reduced(photo, nano.largest_side)
    assert (reduced.reduction, reduced.pixels.shape, reduced.size) == (8, (128, 128, 3), (1024, 1024))
    requests = [make_request("segment", classes=nano.classes), make_request("caption")]
    (whole, text), (small, small_text) = nano.run([decode(photo), reduced], [requests] * 2, score_threshold=0.5)
    assert small_text.text == text.text and small.size == (1024, 1024)
    assert sum(map(len, whole.predictions)) > 0
    for one, other in zip(whole.predictions, small.predictions, strict=True):
        assert len(one) == len(other)
        np.testing.assert_allclose(one.boxes.xyxy, other.boxes.xyxy, atol=8)  # a pixel of the input
        assert all(rle["size"] == [1024, 1024] for rle in other.masks.rles)


def test_regions_are_in_pixels_of_the_stored_image(nano, photo):
    reduced = decode_reduced(photo, nano.largest_side)
    region = Region("box", (1024, 1024), [[100, 100], [600, 600]])
    request = make_request("region_caption", region=region)
    ((whole,), (small,)) = nano.run([decode(photo), reduced], [[request]] * 2)
    assert whole.text == small.text
    with pytest.raises(UserError, match="the image is 1024x1024 pixels"):
        nano.run([reduced], [[make_request("region_caption", region=Region("box", (128, 128), [[0, 0], [9, 9]]))]])


def test_an_expert_reads_the_reduced_image_at_its_own_size(photo):
    engine = Engine(tiny_loaded(grounding_dino={**EXPERTS["grounding_dino"], "input_size": [96, 128]}))
    assert engine.largest_side == 128  # the trunk reads 64
    reduced = decode_reduced(photo, engine.largest_side)
    assert reduced.reduction > 1
    request = make_request("detect", classes=["cell"])
    answers = engine.run([decode(photo), reduced], [[request]] * 2, score_threshold=0.0, max_per_phrase=1)
    one, other = (answer.predictions[0] for (answer,) in answers)
    np.testing.assert_allclose(one.boxes.xyxy, other.boxes.xyxy, atol=1024 / 96)
