"""The sides of the chat bench write the same answers, and the bench sees when they do not."""

import json
from argparse import Namespace

import pytest
import torch
from support.chat_templates import FAMILIES
from support.released_fakes import gpt_tokenizer
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from lumen_ray.bench import chat, command
from lumen_ray.bench.timing import SidesDiffer
from lumen_ray.errors import UserError


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """A tiny LLM with a chat template, as `transformers` saves it."""
    folder = tmp_path_factory.mktemp("llm")
    template, _, eos, others = FAMILIES["qwen2"]
    tokenizer = gpt_tokenizer()
    tokenizer.add_special_tokens([eos, *others[:1]])
    told = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=eos)
    told.chat_template = template
    told.save_pretrained(folder)
    torch.manual_seed(3)
    config = Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=2048, vocab_size=len(told), initializer_range=0.5, eos_token_id=told.eos_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(chat, "LENGTHS", (2, 9))
    monkeypatch.setattr(chat, "ROUNDS", 2)


@pytest.mark.parametrize("name", ["images", "single"])
def test_both_sides_write_the_same_answers(llm, tmp_path, short, name):
    result = chat.bench(name, tmp_path, str(llm), turns=1, users=3, threads=1)
    assert set(result.rates) == {"engine", "transformers generate"}
    users = 1 if name == "single" else 3
    assert result.details["users"] == users and result.equal == f"{2 * users} of {2 * users} answers"
    low, high = result.details["tokens"]
    assert 2 <= low <= high <= 9
    assert result.aim == chat.AIMS[name]


def test_text_alone_is_answered_alike_too(llm, tmp_path, short):
    engine = chat.make_model(llm, tmp_path)
    asked = chat.questions(4)
    assert chat.Ours(engine).write(asked, 2) == chat.Library(llm, engine).write(asked, 3)


def test_a_difference_is_refused(llm, tmp_path, short, monkeypatch):
    write = chat.Library.write
    monkeypatch.setattr(chat.Library, "write", lambda *args: [chat.Written("x", a.length) for a in write(*args)])
    with pytest.raises(SidesDiffer, match="only 0 of 4 answers are equal"):
        chat.bench("images", tmp_path, str(llm), turns=1, users=2, threads=1)


def test_the_memory_of_many_answers_is_that_of_one_image(llm, tmp_path):
    result = chat.bench("memory", tmp_path, str(llm), threads=1)
    assert result.details["image_tokens"] > 1024  # the template's text before a question is part of the prefix
    (one,), (many,) = result.rates.values()
    assert one < many and result.reached is (many <= chat.MEMORY_AIM * one)  # the tiny tokenizer makes long prompts


def test_questions_are_of_mixed_lengths_about_all_images():
    asked = chat.questions(48)
    assert {question.image for question in asked} == set(range(chat.IMAGES))
    assert min(q.limit for q in asked) < 30 and max(q.limit for q in asked) > 110
    assert asked == chat.questions(48)


def test_vllm_runs_with_its_own_python(llm, tmp_path, short):
    fake = tmp_path / "python"  # prints what the script with vLLM would
    printed = json.dumps([[10.0, 20.0], ["a", "b", "c", "d"]])
    fake.write_text(f"#!/bin/sh\ncat > $(dirname $0)/given\necho loading\necho 'RESULT {printed}'\necho done\n")
    fake.chmod(0o755)
    result = chat.bench("vllm", tmp_path / "model", str(llm), vllm=str(fake), turns=2, users=2, threads=1)
    assert result.rates["vllm"] == [10.0, 20.0] and len(result.rates["engine"]) == 2
    assert result.equal == "0 of 4 answers"
    folder, threads, users, turns = json.loads((tmp_path / "given").read_text())
    assert (folder, threads, users) == (str(llm.resolve()), 1, 2)
    assert turns == [[[q.text, q.limit] for q in chat.questions(4)]] * 2
    fake.write_text("#!/bin/sh\necho no such device >&2\nexit 1\n")
    failed = chat.bench("vllm", tmp_path / "model2", str(llm), vllm=str(fake), turns=1, users=1, threads=1)
    assert "no such device" in failed.skipped


def test_what_is_missing_is_named(llm, tmp_path, monkeypatch):
    assert "--llm" in chat.bench("images", tmp_path, None).skipped
    monkeypatch.setattr(chat.importlib.util, "find_spec", lambda name: None)
    assert "--vllm" in chat.bench("vllm", tmp_path, str(llm)).skipped
    assert "transformers[serving]" in chat.bench("serve", tmp_path, str(llm)).skipped
    with pytest.raises(UserError, match="no folder with a config.json"):
        command.KINDS["chat"]["images"].check(Namespace(llm=str(tmp_path)))
