"""Links in a text: each routing token in a response is followed by queries, and the text goes on, learned."""

import dataclasses

import pytest
import torch
from support.chat_templates import FAMILIES
from support.tiny_models import plain_batch, random_images, scrambled, tiny_model, tiny_tokenizer
from test_taught_turns import taught_tokenizer

from lumen_ray.errors import UserError
from lumen_ray.tasks import ROUTING_TOKENS, text_pieces
from lumen_ray.trunk.branch import IGNORE, Branch
from lumen_ray.trunk.layout import branch_span, branch_tokens, build_layout
from lumen_ray.trunk.tokenizer import ASSISTANT, EOS, PAD, USER

TOKENIZER = tiny_tokenizer()
IDS = TOKENIZER.ids
ANSWER = "a red circle [DET] and two blue squares [SEG] ."
LINKED = Branch(0, "what ?", response=ANSWER, links=2)
PLAIN = Branch(0, "detect red circle", route="[DET]")
QUERIES = [IDS[PAD]] * 4


def test_queries_stand_behind_routing_tokens_and_the_rest_is_learned():
    tokens, labels, trailing = branch_tokens(LINKED, TOKENIZER)
    words = [list(TOKENIZER.encode(text)) for text in ("a red circle", "and two blue squares", ".")]
    answer = [*words[0], IDS["[DET]"], *QUERIES, *words[1], IDS["[SEG]"], *QUERIES, *words[2], IDS[EOS]]
    question = [IDS[USER], *TOKENIZER.encode("what ?"), IDS[ASSISTANT]]
    assert tokens == [*question, *answer] and trailing == 0
    assert labels[: len(question)] == [IGNORE] * len(question)
    learned = [IGNORE if n in range(len(words[0]) + 1, len(words[0]) + 5) else t for n, t in enumerate(answer)]
    second = len(words[0]) + 5 + len(words[1]) + 1
    learned[second : second + 4] = [IGNORE] * 4
    assert labels[len(question) :] == learned
    # without links the same text has routing tokens that are words like any other
    bare = branch_tokens(dataclasses.replace(LINKED, links=0), TOKENIZER)[0]
    assert len([t for t in bare if t != IDS[PAD]]) == len(bare) and bare.count(IDS["[DET]"]) == 1


def test_every_link_has_an_entry_and_those_of_an_answer_are_one_group():
    other = dataclasses.replace(LINKED, image=1, group=2)
    layout = build_layout([PLAIN, LINKED, other], 2, TOKENIZER)
    assert layout.link_branches["perception"].tolist() == [0, 1, 1, 2, 2]
    assert layout.link_images["perception"].tolist() == [0, 0, 0, 1, 1]
    assert layout.link_parents["perception"].tolist() == [-1] * 5
    groups = layout.link_groups["perception"].tolist()
    assert groups[1] == groups[2] and groups[3] == groups[4] and len(set(groups)) == 2
    routes = layout.text_routes["perception"].tolist()
    assert [ROUTING_TOKENS[r] if r >= 0 else None for r in routes] == [None, "[DET]", "[SEG]", "[DET]", "[SEG]"]
    assert layout.link_tasks("perception", ["count", "chat", "chat"]) == ["count", *["detect", "segment"] * 2]
    for link, (row, first) in enumerate(layout.query_slots["perception"][:, 0].tolist()):
        before = layout.input_ids[row, first - 1]
        assert int(before) == IDS["[SEG]" if link in (2, 4) else "[DET]"]
    plain = build_layout([PLAIN, Branch(0, "what ?", response="red")], 1, TOKENIZER)
    assert plain.text_routes == plain.link_words == {} and plain.link_tasks("perception", ["count", "chat"]) == [
        "count"
    ]


def test_the_words_of_a_link_are_those_since_the_one_before():
    history = (("what ?", "a figure [DET] . red circle [DET]"),)
    branch = dataclasses.replace(LINKED, history=history, links=4)
    layout = build_layout([PLAIN, branch], 1, TOKENIZER)
    found = [
        TOKENIZER.decode(layout.input_ids[layout.link_words["perception"] == link].tolist())
        for link in range(len(layout.text_routes["perception"]))
    ]
    assert found == ["", "a figure", ". red circle", "a red circle", "and two blue squares"]


@pytest.mark.parametrize("family", FAMILIES)
def test_links_in_the_turns_of_a_published_llm(family):
    tokenizer = taught_tokenizer(family)
    branch = Branch(
        0, "And now?", history=(("What?", "A cat [GRD] ."),), response="a dog [DET] and cats [SEG]", links=3
    )
    layout = build_layout([branch], 1, tokenizer)
    tokens, pad = layout.input_ids[0].tolist(), tokenizer.ids[PAD]
    slots = layout.query_slots["perception"][..., 1]
    assert [tokens[first - 1] for first in slots[:, 0].tolist()] == [
        tokenizer.ids[t] for t in ("[GRD]", "[DET]", "[SEG]")
    ]
    assert all(tokens[place] == pad for place in slots.flatten().tolist())
    assert (layout.labels[0, slots.flatten()] == IGNORE).all()
    assert (layout.labels[0, slots[:, 0] - 1] != IGNORE).all()  # the routing tokens
    assert int(layout.labels[0, -1]) in tokenizer.end_ids
    words = layout.link_words["perception"][0]
    found = [tokenizer.decode([tokens[i] for i in torch.nonzero(words == n).flatten().tolist()]) for n in range(3)]
    assert [text.split() for text in found] == [["A", "cat"], ["a", "dog"], ["and", "cats"]]
    queries = set(slots.flatten().tolist())
    rest = [t for n, t in enumerate(tokens) if n not in queries]
    bare = build_layout([dataclasses.replace(branch, links=0, response="a dog[DET] and cats[SEG]",
                                             history=(("What?", "A cat[GRD] ."),))], 1, tokenizer)  # fmt: skip
    assert rest == bare.input_ids[0].tolist()


def test_a_cut_never_parts_queries():
    whole = branch_span(0, LINKED, TOKENIZER)
    for limit in range(5, len(whole.tokens) + 1):
        span = branch_span(0, dataclasses.replace(LINKED, limit=limit), TOKENIZER)
        assert span.tokens == whole.tokens[: len(span.tokens)] and span.labels == whole.labels[: len(span.tokens)]
        assert span.queries == [slots for slots in whole.queries if slots.end <= limit]
        kept = limit
        for slots in whole.queries:
            if slots.start - 1 < limit < slots.end:
                kept = slots.start - 1
        assert len(span.tokens) == kept


def test_links_need_the_branches_layout_and_as_many_routing_tokens():
    with pytest.raises(UserError, match="needs prompt_layout 'branches'") as error:
        build_layout([LINKED], 1, TOKENIZER, "sequential")
    assert error.value.reason == "wrong_layout"
    with pytest.raises(ValueError, match="2 routing tokens but 1 links"):
        build_layout([dataclasses.replace(LINKED, links=1)], 1, TOKENIZER)
    assert text_pieces("a [DET] b") == [("a ", "[DET]"), (" b", "")]
    for text, message in (
        ("[DET] a", "no words before"), ("a [DET] [SEG]", "no words before"), ("a [GEN]", r"behind \[GEN\]"),
        ("a [POSE]", r"behind \[POSE\]"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            text_pieces(text)


@torch.no_grad()
def test_links_of_other_branches_are_the_same_beside_a_text_with_links():
    trunk = scrambled(tiny_model().trunk)
    images = random_images(1)

    def links(branches):
        return trunk(plain_batch(images, build_layout(branches, 1, TOKENIZER))).links["lumen"].embeddings

    alone = links([PLAIN])
    beside = links([PLAIN, dataclasses.replace(LINKED, group=1)])
    torch.testing.assert_close(beside[:1], alone, atol=1e-5, rtol=1e-5)
    # a link reads the words before it, not those behind
    longer = dataclasses.replace(LINKED, response=ANSWER + " yes and more red")
    torch.testing.assert_close(links([longer]), beside[1:], atol=1e-5, rtol=1e-5)
    renamed = links([dataclasses.replace(LINKED, response=ANSWER.replace("blue", "green"))])
    torch.testing.assert_close(renamed[0], beside[1], atol=1e-5, rtol=1e-5)
    assert (renamed[1] - beside[2]).abs().max() > 1e-2


def test_what_follows_the_queries_trains_them():
    model = tiny_model()
    layout = build_layout([LINKED], 1, TOKENIZER)
    out = model.trunk(plain_batch(random_images(1), layout))
    (place,) = torch.nonzero(layout.input_ids[0] == IDS["[DET]"])[0].tolist()
    out.lm_losses[0, place + 4].backward()  # the word behind the last query
    assert model.trunk.queries.queries["perception"].grad.abs().max() > 0
