"""Messages of OpenAI's format as conversations, and those that the model cannot read."""

import json

import pytest
from support.serve_fakes import base64_png, png

from lumen_ray.errors import UserError
from lumen_ray.wire.conversation import ChatMessage, Conversation, read_conversation

IMAGE = {"type": "image_url", "image_url": base64_png()}


def text(words):
    return {"type": "text", "text": words}


def read(*messages):
    """The conversation of (role, content) pairs."""
    return read_conversation([ChatMessage(role=role, content=content) for role, content in messages], max_images=3)


def test_text_alone():
    assert read(("user", "hello")) == Conversation("hello", [], None, [], [], [])


@pytest.mark.parametrize("role", ["system", "developer"])
def test_turns_behind_a_system_text(role):
    found = read((role, "be brief"), ("user", "one"), ("assistant", "1"), ("user", [text("two"), text("three")]))
    assert found == Conversation("two three", [("one", "1")], "be brief", [], [], [])


def test_an_earlier_question_is_stripped_as_the_last_is_and_an_answer_is_kept():
    assert read(("user", " one\n"), ("assistant", " 1 "), ("user", "two")).history == [("one", " 1 ")]


@pytest.mark.parametrize("place", [0, 2, 4])
def test_the_image_stands_in_any_user_message(place):
    messages = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    messages[place] = ("user", [IMAGE, text("here")])
    found = read(*messages)
    assert (found.images, found.image_turns) == ([png()], [place // 2]) and len(found.history) == 2
    assert "here" in (found.question, *(question for question, _ in found.history))


@pytest.mark.parametrize("system", [(), (("system", "s"),)])
def test_images_come_with_the_number_of_their_question(system):
    other = {"type": "image_url", "image_url": base64_png(8, 8)}
    found = read(
        *system, ("user", [IMAGE, text("a"), other]), ("assistant", "b"), ("user", "c"), ("assistant", "d"),
        ("user", [text("e"), other]),
    )  # fmt: skip
    assert found.images == [png(), png(8, 8), png(8, 8)] and found.image_turns == [0, 0, 2]
    assert found.places[2] == f"messages.{4 + len(system)}.content.1.image_url"
    assert found.history == [("a", "b"), ("c", "d")] and found.question == "e"


USER, SYSTEM, ANSWER = ("user", "a"), ("system", "s"), ("assistant", "b")
#: messages -> reason, and words of the sentence
REFUSED = {
    "ends with an answer": ((USER, ANSWER), "unsupported_conversation", "'messages.1' is the last and of role"),
    "system alone": ((SYSTEM,), "unsupported_conversation", "end with a user message"),
    "begins with an answer": ((ANSWER, USER), "unsupported_conversation", "'messages.0' is of role 'assistant'; begin"),
    "answer behind system": ((SYSTEM, ANSWER, USER), "unsupported_conversation", "'messages.1' is of role 'assistant'"),
    "two questions": ((USER, USER), "unsupported_conversation", "'messages.1' follows another user message; join"),
    "two answers": ((USER, ANSWER, ANSWER, USER), "unsupported_conversation", "'messages.2' follows another assistant"),
    "system in between": ((USER, ANSWER, SYSTEM, USER), "unsupported_conversation", "'messages.2' is of role 'system'"),
    "two systems": ((SYSTEM, ("developer", "t"), USER), "unsupported_conversation", "'messages.1' is of role 'develop"),
    "tool": (
        (USER, ("tool", "x"), USER),
        "unsupported_conversation",
        "'messages.1' is a result of no call",
    ),
    "function": ((("function", "x"), USER), "unsupported_conversation", "'messages.0' is of role 'function'"),
    "no content": ((("user", None),), "missing_content", "'messages.0.content' is empty; give a text"),
    "no parts": ((USER, ("assistant", []), USER), "missing_content", "'messages.1.content' is empty"),
    "empty text": ((USER, ("assistant", ""), USER), "empty_text", "'messages.1.content' has no text"),
    "blank system": ((("system", " \n"), USER), "empty_text", "'messages.0.content' has no text"),
    "image without text": ((("user", [IMAGE]),), "empty_text", "'messages.0.content' has no text"),
    "image of the system": (
        (("system", [text("s"), IMAGE]), USER),
        "unexpected_image",
        "'messages.0.content.1.image_url' is an image of the system; give it in a user message",
    ),
    "four images": (
        (("user", [text("a"), IMAGE, IMAGE]), ANSWER, ("user", [text("c"), IMAGE, IMAGE])),
        "too_many_images",
        "the conversation has 4 images; give at most 3",
    ),
    "four images in a message": ((("user", [text("a"), *[IMAGE] * 4]),), "too_many_images", "at most 3"),
}


@pytest.mark.parametrize(("messages", "reason", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_in_a_sentence_that_names_the_message(messages, reason, words):
    with pytest.raises(UserError) as error:
        read(*messages)
    assert error.value.reason == reason and words in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_image_is_named_by_its_place():
    empty = {"type": "image_url", "image_url": ""}
    with pytest.raises(UserError, match=r"messages\.2\.content\.1\.image_url\.url"):
        read(USER, ANSWER, ("user", [text("c"), empty]))


def test_an_answer_comes_back_with_the_keys_that_clients_give_it():
    keys = {"refusal": None, "annotations": [], "audio": None, "tool_calls": None, "function_call": None}
    answer = ChatMessage(role="assistant", content="b", **keys)
    asked = ChatMessage(role="user", content="a")
    assert read_conversation([asked, answer, asked], 1).history == [("a", "b")]


def question(text="a"):
    return ChatMessage(role="user", content=text)


def calls(*ids, content=None):
    given = [{"id": i, "function": {"name": "detect", "arguments": "{}"}} for i in ids]
    return ChatMessage(role="assistant", content=content, tool_calls=given)


def result(number, content="circle: 2 found"):
    return ChatMessage(role="tool", content=content, tool_call_id=number)


def answer(text="two"):
    return ChatMessage(role="assistant", content=text)


def test_results_of_tools_are_read_with_the_answer_that_called_them():
    found = read_conversation([question(), calls("x"), result("x"), question("b")], 1)
    assert (found.question, found.history, found.result) == ("b", [("a", "circle: 2 found")], None)
    spoken = [question(), calls("x", "y", content="see"), result("y", "second"), result("x", "first"), answer()]
    found = read_conversation([*spoken, question("b")], 1)
    assert found.history == [("a", "see second first two")]
    again = [question(), calls("x"), result("x"), calls("y"), result("y", "more"), question("b")]
    assert read_conversation(again, 1).history == [("a", "circle: 2 found more")]


def test_results_at_the_end_stand_alone():
    given = [question("hi"), answer(), question(), calls("x", "y", content="see"), result("x"), result("y", "one")]
    found = read_conversation(given, 1)
    assert (found.question, found.history, found.result) == ("a", [("hi", "two")], "circle: 2 found, one")


def test_of_a_result_that_the_server_gave_its_text_is_read():
    part = {"type": "instances", "instances": [], "text": "square: 0 found", "tool_call_id": "x"}
    other = {"square": 0, "text": "mine"}
    for content, read_as in [(json.dumps(part), part["text"]), (json.dumps(other), json.dumps(other))]:
        assert read_conversation([question(), calls("x"), result("x", content)], 1).result == read_as


def test_the_image_of_a_turn_with_calls_is_of_its_question():
    image = ChatMessage(role="user", content=[IMAGE, text("b")])
    found = read_conversation([question(), calls("x"), result("x"), answer(), image, calls("y"), result("y")], 1)
    assert found.image_turns == [1] and found.places == ["messages.4.content.0.image_url"]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([question(), calls("x")], "'messages.1' is the last; give the result of its call 'x'"),
        ([question(), calls("x"), question("b")], "'messages.2' stands before the result of the call 'x'"),
        ([question(), calls("x", "y"), result("x"), answer()], "'messages.3' stands before the result of the call 'y'"),
        ([question(), calls("x"), result("z")], "'messages.2' is a result of the call 'z'; put it behind that call"),
        ([question(), calls("x"), result("x"), result("x")], "'messages.3' is a result of the call 'x'"),
        ([question(), calls("x"), result(None)], "'messages.2' is a result of no call"),
        ([question(), answer(), result("x")], "'messages.2' is a result of the call 'x'"),
        ([question(), calls("x"), result("x", " ")], "'messages.2.content' has no text"),
        ([question(), calls("x"), result("x"), answer()], "is the last and of role 'assistant'"),
    ],
)
def test_calls_and_results_that_do_not_fit_are_refused(messages, words):
    with pytest.raises(UserError) as error:
        read_conversation(messages, 1)
    assert words in str(error.value)


def test_errors_name_the_places_of_another_format():
    with pytest.raises(UserError, match=r"'input\.1' follows another user message"):
        read_conversation([question(), question()], 1, places=["input.0", "input.1"])
