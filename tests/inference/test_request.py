"""Invalid requests are refused in one sentence; valid ones cannot break the prompt layout."""

import pytest

from lumen_ray.errors import UserError
from lumen_ray.inference.request import make_request
from lumen_ray.structures import Region
from lumen_ray.trunk.tokenizer import SPECIAL_TOKENS


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
