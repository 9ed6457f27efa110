"""Branches in the turns of a published LLM: tokens, what is learned, and the same text as without an image."""

import pytest
import torch
from support.chat_templates import FAMILIES, renderer
from support.released_fakes import gpt_tokenizer
from tokenizers import AddedToken

from lumen_ray.errors import UserError
from lumen_ray.trunk.branch import IGNORE, Branch
from lumen_ray.trunk.layout import build_layout
from lumen_ray.trunk.masks import branch_allowed, prefix_allowed, prefix_segments
from lumen_ray.trunk.tokenizer import EXTRA_FILES, TURNS_FILE, LumenTokenizer
from lumen_ray.trunk.turns import read_template

HISTORY = (("Two and two?", "Four."),)


def taught_tokenizer(name="qwen2"):
    template, bos, eos, others = FAMILIES[name]
    backend, special = gpt_tokenizer(), [token for token in (bos, eos, *others) if token]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    turns = read_template(renderer(template, bos, eos), special, eos)
    return LumenTokenizer.extend(backend, {"<eos>": eos}, ("perception",), turns=turns)[0]


@pytest.fixture(scope="module", params=FAMILIES)
def taught(request):
    template, bos, eos, _ = FAMILIES[request.param]
    return taught_tokenizer(request.param), renderer(template, bos, eos)


def messages(*texts, system=""):
    roles = ["user", "assistant"] * 3
    found = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + found


def tokens_of(layout, row=0):
    return layout.input_ids[row][layout.branch_ids[row] >= 0].tolist()


def test_text_alone_is_the_template_tokenised_as_a_whole(taught):
    tokenizer, render = taught
    branch = Branch(0, "And three?", history=HISTORY)
    layout = build_layout([branch], 1, tokenizer, has_image=[False])
    expected = tokenizer.encode(render(messages(*HISTORY[0], "And three?")))
    assert tokens_of(layout) == list(expected) and layout.alone.tolist() == [True]


def test_with_an_image_the_beginning_is_the_lead(taught):
    tokenizer, render = taught
    layout = build_layout([Branch(0, "And three?", history=HISTORY)], 1, tokenizer)
    assert layout.alone.tolist() == [False]
    whole = render(messages(*HISTORY[0], "And three?"))
    assert tokens_of(layout) == list(tokenizer.encode(whole.removeprefix(tokenizer.turns.begin)))


def test_answers_and_what_ends_them_are_learned(taught):
    tokenizer, _ = taught
    turns = tokenizer.turns
    layout = build_layout([Branch(0, "And three?", history=HISTORY, response="Six.")], 1, tokenizer, has_image=[False])
    labels = layout.labels[0]
    learned = tokenizer.backend.decode([t for t in labels.tolist() if t != IGNORE], skip_special_tokens=False)
    answers = [f"{turns.gap}{answer}{turns.end}" for answer in ("Four.", "Six.")]
    assert learned.replace(" ", "") == "".join(answers).replace(" ", "")
    assert int(labels[-1]) in tokenizer.end_ids


def test_a_system_text(taught):
    tokenizer, render = taught
    branch = Branch(0, "Hi", system="Be brief.")
    if tokenizer.turns.system is None:
        with pytest.raises(UserError, match="no system turn"):
            build_layout([branch], 1, tokenizer, has_image=[False])
        return
    layout = build_layout([branch], 1, tokenizer, has_image=[False])
    assert tokens_of(layout) == list(tokenizer.encode(render(messages("Hi", system="Be brief."))))
    pictured = build_layout([branch], 1, tokenizer)
    assert tokens_of(pictured) == list(tokenizer.encode(f"Be brief.\n\nHi{tokenizer.turns.to_assistant}"))


def test_routed_branches_end_in_the_queries(taught):
    tokenizer, _ = taught
    layout = build_layout([Branch(0, "detect cat", route="[DET]", response=None)], 1, tokenizer)
    question = list(tokenizer.encode(f"detect cat{tokenizer.turns.to_assistant}"))
    found = tokens_of(layout)
    assert found[: len(question) + 1] == [*question, tokenizer.ids["[DET]"]]
    assert layout.query_slots["perception"][0, :, 1].tolist() == list(range(len(question) + 1, len(found)))


def test_a_row_by_itself_attends_to_no_prefix():
    seen, alone = torch.tensor([[1, 1], [0, 0], [0, 0]]), torch.tensor([False, False, True])
    allowed = branch_allowed(torch.zeros(3, 2, dtype=torch.int64), seen, prefix_segments(1, 2, 1), alone)
    assert allowed[:, 0, :3].tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert allowed[2].tolist() == [[False, False, False, True, False], [False, False, False, True, True]]


def test_the_lead_never_attends_to_the_image():
    allowed = prefix_allowed(prefix_segments(2, 2, 1), "full")
    assert allowed.tolist() == [[True, False, False, False], [True, True, False, False], [True] * 4, [True] * 4]


def test_turns_are_stored_with_the_tokenizer(tmp_path):
    tokenizer = taught_tokenizer("llama3")
    tokenizer.save(tmp_path / "tokenizer.json")
    again = LumenTokenizer.load(tmp_path / "tokenizer.json")
    assert (again.turns, again.end_ids, again.ids) == (tokenizer.turns, tokenizer.end_ids, tokenizer.ids)
    assert "<user>" not in again.ids and TURNS_FILE in EXTRA_FILES
    LumenTokenizer(gpt_and_ours()).save(tmp_path / "tokenizer.json")
    assert not (tmp_path / TURNS_FILE).exists()


def gpt_and_ours():
    return LumenTokenizer.extend(gpt_tokenizer(), {}, ("perception",))[0].backend
