"""Links in a text: the LLM reads their queries while it writes, and goes on behind them."""

from dataclasses import replace

import pytest
import torch
from support.chat_templates import FAMILIES, renderer
from support.forced_answers import force_answers
from support.released_fakes import gpt_tokenizer
from support.tiny_models import llm, plain_batch, random_images, scrambled, tiny_model, tiny_settings, tiny_tokenizer
from tokenizers import AddedToken

from lumen_ray.inference.decode_loop import DecodeLoop
from lumen_ray.inference.sampling import GREEDY, Sampler
from lumen_ray.inference.writing import TextPrompt, Writing
from lumen_ray.model.build import build_model
from lumen_ray.tasks import MAX_TEXT_LINKS, TEXT_ROUTES
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import branch_span, build_layout
from lumen_ray.trunk.tokenizer import EOS, LumenTokenizer
from lumen_ray.trunk.turns import read_template

TOKENIZER = tiny_tokenizer()
IMAGES = random_images(2)
QUESTION = "describe the image ."
ANSWER = "a red circle[DET] and two blue squares[SEG] , yes ."
NUM_QUERIES = 4


def make_trunk(model_type="llama", mode="full"):
    return scrambled(tiny_model(llm=llm(model_type), prefix_attention=mode).trunk)


def prompt(question=QUESTION, image=0, limit=60, routes=TEXT_ROUTES):
    branch = Branch(image, question)
    ids = branch_span(0, branch, TOKENIZER).tokens
    return TextPrompt(branch, Sampler(GREEDY, ids), limit, routes=routes)


@torch.inference_mode()
def write(loop, prefix, prompts):
    written = loop.submit(prefix, prompts)
    loop.wait(written)
    assert loop.bytes_held == 0
    return written


def force(monkeypatch, loop, text):
    ids = [*TOKENIZER.encode(text), TOKENIZER.ids[EOS]]
    force_answers(monkeypatch, loop, ids + [ids[-1]] * 40)
    return ids[:-1]


def link_embeddings(trunk, writing):
    words = [writing.tokens[link.start : link.end] for link in writing.links]
    return trunk.text_links("lumen", torch.stack([torch.stack(link.states) for link in writing.links]), words)


@torch.no_grad()
def trained_links(trunk, answer, image):
    """The links of a training pass over the same tokens."""
    layout = build_layout([Branch(0, QUESTION, response=answer, links=2)], 1, TOKENIZER)
    return trunk(plain_batch(IMAGES[image : image + 1], layout, tasks=["chat"])).links["lumen"].embeddings


@pytest.mark.parametrize(("model_type", "mode"), [("llama", "full"), ("qwen3", "causal")])
def test_links_are_those_of_a_training_pass_alone_and_beside_other_answers(monkeypatch, model_type, mode):
    trunk = make_trunk(model_type, mode)
    expected = [trained_links(trunk, ANSWER, image) for image in (0, 1)]
    assert (expected[0] - expected[1]).abs().max() > 1e-2 < (expected[0][0] - expected[0][1]).abs().max()
    loop, prefix = DecodeLoop(trunk, TOKENIZER), trunk.encode(IMAGES)
    ids = force(monkeypatch, loop, ANSWER)
    (alone,) = write(loop, prefix, [prompt()])
    many = [prompt(image=image, routes=routes) for image in (1, 0) for routes in (TEXT_ROUTES, ("[DET]",), ())]
    together = write(loop, prefix, many)
    for writing, image in ((alone, 0), (together[0], 1), (together[3], 0)):
        assert writing.tokens == ids and writing.end == "stop"
        assert [link.route for link in writing.links] == ["[DET]", "[SEG]"]
        torch.testing.assert_close(link_embeddings(trunk, writing), expected[image], atol=1e-4, rtol=1e-4)
    # those behind whose tokens nothing is written end there
    assert [len(w.links) for w in together] == [2, 1, 0] * 2
    assert [w.end for w in together] == ["stop", "route", "route"] * 2


class Dictated(Sampler):
    """Chooses the tokens of `ANSWER`, whatever the LLM would write."""

    is_plain = False

    def choose(self, logits):
        return [*TOKENIZER.encode(ANSWER), TOKENIZER.ids[EOS]][len(self.tokens)]


def test_the_words_behind_a_link_have_read_its_queries():
    trunk = make_trunk()
    loop, prefix = DecodeLoop(trunk, TOKENIZER), trunk.encode(IMAGES)
    asked = prompt()
    (writing,) = write(loop, prefix, [replace(asked, sampler=Dictated(GREEDY, asked.sampler.prompt))])
    layout = build_layout([Branch(0, QUESTION, response=ANSWER, links=2)], 1, TOKENIZER)
    losses = trunk(plain_batch(IMAGES[:1], layout, tasks=["chat"])).lm_losses[0]
    supervised = layout.labels[0, 1:] >= 0
    written = torch.tensor(writing.prompt.sampler.log_probs)
    torch.testing.assert_close(-losses[supervised].detach(), written, atol=1e-4, rtol=1e-4)
    assert len(written) == len(writing.tokens) + 1  # with the end token, without queries


def test_an_answer_ends_at_its_limit_of_links_of_tokens_and_where_no_word_names_an_object(monkeypatch):
    trunk = make_trunk()
    prefix = trunk.encode(IMAGES)

    def written(text, limit=100):
        loop = DecodeLoop(trunk, TOKENIZER)
        ids = force(monkeypatch, loop, text)
        (writing,) = write(loop, prefix, [prompt(limit=limit)])
        return writing, ids

    writing, ids = written(" red[DET]" * (MAX_TEXT_LINKS + 2))
    assert len(writing.links) == MAX_TEXT_LINKS and writing.end == "route"
    assert not any(link.is_open for link in writing.links)
    first = len(TOKENIZER.encode(" red"))
    writing, ids = written(" red[DET] blue", first + 1)
    assert writing.end == "length" and len(writing.links[0].states) == NUM_QUERIES and len(writing.tokens) == first + 1
    for text, links in (("[DET] red", 0), (" red[DET][SEG]", 1), (" red[DET] blue[GEN]", 1), (" red[POSE]", 0)):
        writing, _ = written(text)
        assert (writing.end, len(writing.links)) == ("route", links)


def test_queries_count_as_memory(monkeypatch):
    assert Writing(prompt(limit=10)).need == Writing(prompt(limit=10, routes=())).need + 5 * NUM_QUERIES
    most = Writing(prompt(limit=400)).need - Writing(prompt(limit=400, routes=())).need
    assert most == MAX_TEXT_LINKS * NUM_QUERIES


def test_links_in_the_turns_of_a_published_llm(monkeypatch):
    template, bos, eos, others = FAMILIES["qwen2"]
    backend, special = gpt_tokenizer(), [token for token in (bos, eos, *others) if token]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    turns = read_template(renderer(template, bos, eos), special, eos)
    tokenizer, _ = LumenTokenizer.extend(backend, {"<eos>": eos}, ("perception",), turns=turns)
    trunk = scrambled(build_model(tiny_settings(llm=llm()), len(tokenizer)).trunk)
    branch = Branch(0, QUESTION, response="A cat [DET] and a dog [SEG] .", links=2)
    layout = build_layout([branch], 1, tokenizer)
    with torch.no_grad():
        expected = trunk(plain_batch(IMAGES[:1], layout, tasks=["chat"])).links["lumen"].embeddings
    loop, prefix = DecodeLoop(trunk, tokenizer), trunk.encode(IMAGES)
    learned = layout.labels[0][layout.labels[0] >= 0].tolist()  # what the LLM would write
    force_answers(monkeypatch, loop, learned)
    asked = Branch(0, QUESTION)
    ids = build_layout([asked], 1, tokenizer).input_ids[0].tolist()
    (writing,) = write(loop, prefix, [TextPrompt(asked, Sampler(GREEDY, ids), 60, routes=TEXT_ROUTES)])
    assert writing.end == "stop" and writing.tokens == learned[: len(writing.tokens)]
    torch.testing.assert_close(link_embeddings(trunk, writing), expected, atol=1e-4, rtol=1e-4)
