"""Turns read from chat templates render as the templates do."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_templates import CHATML, FAMILIES, renderer

from lumen_ray.errors import UserError
from lumen_ray.trunk.turns import Turns, read_template

WITHOUT_SYSTEM = {"mistral", "mistral-v3", "gemma"}
ENDS = {"qwen2": "<|im_end|>", "qwen3": "<|im_end|>", "llama2": " </s>", "llama3": "<|eot_id|>", "mistral": "</s>",
        "mistral-v3": "</s>", "gemma": "<end_of_turn>", "vicuna": "</s>"}  # fmt: skip


def read(name):
    template, bos, eos, others = FAMILIES[name]
    special = [token for token in (bos, eos, *others) if token]
    return read_template(renderer(template, bos, eos), special, eos), renderer(template, bos, eos)


@pytest.fixture(scope="module")
def families():
    return {name: read(name) for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_ends_an_answer_and_whether_there_is_a_system_turn(families, name):
    turns, _ = families[name]
    assert turns.end == ENDS[name]
    assert (turns.system is None) == (name in WITHOUT_SYSTEM)
    roles = {"llama3": ("user", "assistant", "system"), "mistral-v3": ("assistant",)}
    both = ("user", "assistant") if name in ("llama2", "gemma", "vicuna") else ()
    assert turns.strips == roles.get(name, both)


WORDS = st.text("abc ä例\n.", min_size=1, max_size=12).filter(str.strip)


@pytest.mark.parametrize("name", FAMILIES)
@given(texts=st.lists(WORDS, min_size=5, max_size=5), questions=st.integers(1, 3), system=st.booleans())
@settings(max_examples=25, deadline=None)
def test_rendered_as_by_the_template(families, name, texts, questions, system):
    turns, render = families[name]
    texts = [text.strip() for text in texts]  # templates differ in what they strip; see the next test
    roles = ["user", "assistant"] * 3
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts[: 2 * questions - 1], strict=False)]
    if system and turns.system is not None:
        messages.insert(0, {"role": "system", "content": "be brief"})
    assert turns.render(messages) == render(messages)


@pytest.mark.parametrize("name", FAMILIES)
def test_blanks_around_texts_are_kept_or_stripped_as_by_the_template(families, name):
    turns, render = families[name]
    messages = [{"role": r, "content": f" {r} \n"} for r in ("user", "assistant", "user")]
    if name != "qwen3":  # strips line breaks before an answer alone
        assert turns.render(messages) == render(messages)


def test_a_system_text_where_there_is_no_system_turn(families):
    with pytest.raises(UserError, match="has no system turn") as error:
        families["gemma"][0].opening("be brief")
    assert error.value.reason == "no_system_turn"


def test_json_and_back(families):
    for turns, _ in families.values():
        assert Turns.from_dict(json.loads(json.dumps(turns.to_dict()))) == turns


UNKNOWN = {
    "counts turns": "{% for m in messages %}{{ loop.index }}{{ m.content }}<e>{% endfor %}",
    "reversed": "{% for m in messages | reverse %}{{ m.role }}{{ m.content }}<e>{% endfor %}",
    "repeats": "{% for m in messages %}{{ m.content }}{{ m.content }}<e>{% endfor %}",
    "leaves out": "{{ messages[-1].content }}<e>",
    "upper case": "{% for m in messages %}{{ m.content | upper }}<e>{% endfor %}",
    "two at most": "{% if messages | length > 3 %}{{ raise_exception('too many') }}{% endif %}" + CHATML,
    "broken": "{{ messages[0].content",
    "later prompt": "{% for m in messages %}{{ m.role }}{{ m.content }}<e>{% endfor %}"
    "{% if messages | length > 1 %}again{% endif %}",
    "title case": "{% for m in messages %}{{ m.role }}:{{ m.content | title }}<e>{% endfor %}",
}


@pytest.mark.parametrize("template", UNKNOWN.values(), ids=UNKNOWN)
def test_templates_that_are_no_fixed_texts_are_refused(template):
    with pytest.raises(UserError, match="cannot be expressed as fixed texts around turns: ") as error:
        read_template(renderer(template), ["<e>", "<|im_end|>"], "<e>")
    assert error.value.reason == "unknown_template" and "\n" not in str(error.value)


def test_a_template_without_an_end_token_needs_an_end_of_sequence():
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    assert read_template(renderer(plain), ["</s>"], "</s>").end == "</s>"
    with pytest.raises(UserError, match="no token that ends an answer"):
        read_template(renderer(plain), ["</s>"], None)
