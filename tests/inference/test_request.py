"""Invalid requests are refused in one sentence; valid ones cannot break the prompt layout."""

import numpy as np
import pytest
from PIL import Image

from lumen_ray.errors import UserError
from lumen_ray.inference.request import check_call, make_request
from lumen_ray.structures import Region
from lumen_ray.trunk.tokenizer import SPECIAL_TOKENS

ASK = make_request("detect", classes=["red circle"])


def refused(reason, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        make_request(*args, **kwargs)
    assert caught.value.reason == reason and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_texts_may_not_hold_special_tokens(token):
    for task, more in (
        ("chat", {"text": f"what is {token} ?"}),
        ("vqa", {"text": token}),
        ("ground", {"text": f"a circle and {token}"}),
        ("refer", {"text": f"the {token}"}),
        ("detect", {"classes": ["circle", f"x{token}"]}),
        ("pose", {"classes": ["circle"], "keypoints": ["head", token]}),
    ):
        assert token in refused("reserved_text", task, **more)


def test_needs():
    refused("empty_classes", "detect", classes=[" ", ""])
    refused("empty_classes", "count")
    refused("empty_text", "vqa", text="  ")
    refused("empty_text", "refer")
    refused("missing_region", "region_caption")
    assert "did you mean 'detect'?" in refused("unknown_task", "detct", classes=["a"])


def test_requests_hold_their_arguments():
    assert make_request("detect", classes=[" a ", "b", "a"]).phrases == ("a", "b")
    assert make_request("refer", text=" the cat ").phrases == ("the cat",)
    grounded = make_request("ground", text="A [red circle] by a [square]")
    assert grounded.phrases == ("red circle", "square")
    assert make_request("vqa", text="why ?").phrases == () and make_request("caption").text == ""
    region = Region("point", (10, 10), [[1, 2]])
    assert make_request("region_caption", region=region).region is region
    assert make_request("pose", classes=["a"], keypoints=["b"]).keypoints == ("b",)


def test_phrases_are_lower_case_when_they_are_checked():
    refused("reserved_text", "ground", text="a [<EOS>]")


@pytest.mark.parametrize(
    ("images", "requests", "threshold", "message"),
    [
        ([np.zeros((8, 8), np.uint8)], [[ASK]], 0.1, r"uint8 array \[height, width, 3\] \(RGB\), got uint8 \[8, 8\]"),
        ([np.zeros((8, 8, 3))], [[ASK]], 0.1, r"got float64 \[8, 8, 3\]"),
        ([Image.new("RGB", (8, 8))], [[ASK]], 0.1, "got Image; for a PIL image give np.asarray"),
        ([np.zeros((0, 8, 3), np.uint8)], [[ASK]], 0.1, "an image is empty"),
        (np.zeros((8, 8, 3), np.uint8), [[ASK]], 0.1, "give a list of images"),
        ([np.zeros((8, 8, 3), np.uint8)] * 2, [[ASK]], 0.1, "for each image, a list of requests"),
        ([np.zeros((8, 8, 3), np.uint8)], [ASK], 0.1, "the requests of one image are a list"),
        ([np.zeros((8, 8, 3), np.uint8)], [[{"task": "detect"}]], 0.1, "a list of make_request's results"),
        ([np.zeros((8, 8, 3), np.uint8)], [[ASK]], 2, "score_threshold must be from 0 to 1, got 2"),
        ([np.zeros((8, 8, 3), np.uint8)], [[ASK]], "x", "score_threshold must be from 0 to 1, got 'x'"),
    ],
)
def test_calls_that_cannot_be_answered_are_refused(images, requests, threshold, message):
    with pytest.raises(UserError, match=message):
        check_call(images, requests, threshold)


def test_one_class_may_be_given_as_a_text():
    assert make_request("detect", classes="red circle").phrases == ("red circle",)
    with pytest.raises(UserError, match="names of classes and keypoints are texts, got 1"):
        make_request("detect", classes=[1])
    with pytest.raises(UserError, match="'region' takes a lumen_ray.structures.Region"):
        make_request("region_caption", region=[64, 40])


def test_half_of_a_surrogate_pair_is_refused():
    for fields in ({"text": "\ud800"}, {"text": "a", "history": [("a", "\ud800")]}, {"text": "a", "system": "\ud800"}):
        with pytest.raises(UserError, match="half of a surrogate pair") as error:
            make_request("chat", **fields)
        assert error.value.reason == "invalid_text"
