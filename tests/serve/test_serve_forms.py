"""Fields of forms: lists in commas, quotes or JSON, and inputs that were left empty."""

from __future__ import annotations

import pytest
from support.serve_fakes import png

LISTS = {
    "red circle,blue square": ["red circle", "blue square"],
    " red circle ,  blue square ": ["red circle", "blue square"],
    '"red circle","blue square"': ["red circle", "blue square"],
    '"red circle" , "blue square" ': ["red circle", "blue square"],
    '"red, round",blue': ["red, round", "blue"],
    '"a ""big"" one",blue': ['a "big" one', "blue"],
    'a 5" pipe,blue': ['a 5" pipe', "blue"],
    "red circle\r\nblue square\n": ["red circle", "blue square"],
    "red,,blue,": ["red", "blue"],
    '["red circle","blue square"]': ["red circle", "blue square"],
    ' ["red, round", "blue"]\n': ["red, round", "blue"],
}


def detect(client, fields, task="detect"):
    """The answer to a form with `fields`, (name, value) pairs."""
    parts = [(name, (None, value)) for name, value in fields]
    return client.post(f"/v1/{task}", files=[*parts, ("image", ("x.png", png()))])


@pytest.mark.parametrize(("text", "items"), LISTS.items(), ids=LISTS)
def test_a_list_field(client, backend, text, items):
    response = detect(client, [("classes", text)])
    assert response.status_code == 200 and response.json()["phrases"] == items, response.text
    response = detect(client, [("classes", "figure"), ("keypoints", text)], "pose")
    assert response.status_code == 200 and backend.calls[-1][1][0].keypoints == tuple(items)


def test_repeated_fields_add_up(client):
    fields = [("classes", "a,b"), ("classes", ""), ("classes", '["c"]'), ("classes", '"d, e"')]
    assert detect(client, fields).json()["phrases"] == ["a", "b", "c", "d, e"]


@pytest.mark.parametrize("name", ["classes", "keypoints", "region"])
@pytest.mark.parametrize("text", ['["a"', "[a, b]", "[" * 100_000])
def test_invalid_json_names_the_field(client, name, text):
    error = detect(client, [(name, text)]).json()["error"]
    assert error["reason"] == "invalid_json" and f"'{name}'" in error["message"] and len(error["message"]) < 100


@pytest.mark.parametrize(
    ("text", "words"), [('"a,b', "not closed"), ("x" * 140_000, "comma-separated"), ("[1]", "'classes.0'")]
)
def test_a_list_that_is_none(client, text, words):
    response = detect(client, [("classes", text)])
    message = response.json()["error"]["message"]
    assert response.status_code == 400 and "classes" in message and words in message, message


def test_empty_fields_are_as_if_left_out(client, backend):
    names = ("score_threshold", "max_per_phrase", "max_new_tokens", "text", "region", "keypoints", "seed", "height")
    response = detect(client, [("classes", "a"), *((name, "") for name in names)])
    assert response.status_code == 200, response.text
    assert backend.calls[0][1][0].score_threshold == 0.3  # the server's default
    assert detect(client, [("classes", "")]).json()["error"]["reason"] == "empty_classes"


def test_an_empty_file_is_as_if_left_out(client):
    boundary = "x1"
    body = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename=""\r\n\r\n\r\n--{boundary}--\r\n'
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    assert client.post("/v1/caption", content=body, headers=headers).json()["error"]["reason"] == "missing_image"


def test_a_sentence_may_begin_with_a_bracket(client, backend):
    response = detect(client, [("text", "[red circle] by a [blue square]")], "ground")
    assert response.status_code == 200 and response.json()["phrases"] == ["red circle", "blue square"]


def test_region_of_another_kind_is_told_by_its_field(client):
    message = detect(client, [("region", "5")], "region_caption").json()["error"]["message"]
    assert "'region' is invalid: it must be an object, not a number" in message
