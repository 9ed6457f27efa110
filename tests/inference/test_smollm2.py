"""SmolLM2-135M-Instruct behind small random encoders answers text as by itself."""

import numpy as np
import pytest
import torch
from support.released_fakes import CLIP
from support.smollm2 import smollm2_folder
from support.tiny_models import DINOV2, tiny_settings
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
)

from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request
from lumen_ray.inference.sampling import Sampling
from lumen_ray.model.convert.pretrained import Sources, assemble

PIRATE = "You answer like a pirate."
#: (question, history, system)
PROMPTS = [
    ("What is the capital of France?", (), ""),
    ("Write one sentence about cats.", (), ""),
    ("Complete this Python function:\ndef fib(n):", (), ""),
    ("计算 17 + 25 等于多少？", (), ""),
    ("And of Spain?", (("What is the capital of France?", "Paris."), ("And of Italy?", "Rome.")), ""),
    ("Who are you?", (), PIRATE),
    ("List three primary colours.", (), ""),
    ("What is 12 * 12?", (), ""),
    ("Translate 'good morning' to Spanish.", (), ""),
    ("用一句话介绍北京。", (), ""),
    ("Write a haiku about rain.", (), ""),
    ("Explain recursion to a child.", (), ""),
    ("What is the boiling point of water in Celsius?", (), ""),
    ("SELECT the names of all users older than 30: write the SQL.", (), ""),
    ("Name a mammal that lays eggs.", (), ""),
    ("Write 3.14159 with two decimals.", (), ""),
    ("Sort these numbers: 9, 4, 7, 1", (), ""),
    ("What day comes after Monday?", (), PIRATE),
    ("Tell me a joke.", (), "You are a serious judge."),
    ("And its population?", (("What is the largest city of Japan?", "Tokyo."),), ""),
    ("Why?", (("Is the sky blue?", "Yes."), ("Is grass green?", "Yes.")), "Answer in one sentence."),
    ("Wie heißt die Hauptstadt von Österreich?", (), ""),
    ("Write the JSON of a person named Ada, aged 36.", (), ""),
    ("  What is HTML?  ", (), ""),
]


@pytest.fixture(scope="module")
def source(test_data):
    """The published model's folder."""
    return smollm2_folder(test_data)


@pytest.fixture(scope="module")
def engine(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**CLIP)).save_pretrained(folder / "clip")
    Dinov2Model(Dinov2Config(**DINOV2 | {"patch_size": 14, "image_size": 56})).save_pretrained(folder / "dinov2")
    vision = {"clip": CLIP, "dinov2": DINOV2 | {"patch_size": 14}, "mlp_ratio": 2}
    preset = tiny_settings(image_size=56, vision=vision, prefix_attention="full")
    assemble(preset, Sources(source, folder / "clip", folder / "dinov2"), folder / "model")
    return Engine.load(folder / "model")


@pytest.fixture(scope="module")
def expected(source):
    """Answers of `transformers` generate: (prompts, most new tokens) -> token ids without the end token, greedy."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

    def answers(prompts, new_tokens):
        found = []
        for question, history, system in prompts:
            messages = [{"role": "system", "content": system}] if system else []
            for asked, answered in history:
                messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            messages.append({"role": "user", "content": question.strip()})
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0].tolist()
            answer = ids[inputs["input_ids"].shape[1] :]
            found.append([token for token in answer if token not in tokenizer.all_special_ids])
        return found

    return answers


def requests(prompts):
    return [[make_request("chat", text=text, history=history, system=system)] for text, history, system in prompts]


def written(engine, images, rows, new_tokens):
    """The token ids of all answers in text, and the numbers of answers that shared a step."""
    loop, writings, shared = engine.trunk.loop, [], set()
    submit, advance = loop.submit, loop._next_tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "submit", lambda *args: writings.extend(new := submit(*args)) or new)
        patch.setattr(loop, "_next_tokens", lambda: shared.add(len(loop._active)) or advance())
        engine.run(images, rows, max_new_tokens=new_tokens)
    return [writing.tokens for writing in writings], shared


def check(engine, expected, prompts, new_tokens):
    wanted = expected(prompts, new_tokens)
    for row, ids in zip(requests(prompts), wanted, strict=True):
        assert written(engine, [None], [row], new_tokens)[0] == [ids]
    # four together, and in the same steps as prompts about images
    others = [[make_request("detect", classes=["cat"]), make_request("chat", text="What is it?")]] * 2
    for start in range(0, len(prompts), 4):
        members = prompts[start : start + 4]
        images = [None] * len(members) + [np.full((56, 56, 3), 120, np.uint8)] * 2
        found, shared = written(engine, engine.encode(images), [*requests(members), *others], new_tokens)
        assert found[: len(members)] == wanted[start : start + 4]
        assert len(members) + 2 in shared


def test_text_is_answered_as_by_the_llm_alone(engine, expected):
    check(engine, expected, PROMPTS[2:6], 24)


@pytest.mark.slow
def test_all_prompts_are_answered_as_by_the_llm_alone(engine, expected):
    check(engine, expected, PROMPTS, 64)


def test_the_parameters_are_counted_and_stored_once(engine, source):
    llm = engine.trunk.trunk.llm
    rows = len(engine.loaded.tokenizer)
    known = AutoTokenizer.from_pretrained(source).vocab_size
    assert sum(p.numel() for p in llm.parameters()) == 134_515_008 + (rows - known) * 576


def test_a_seed_gives_the_same_answer_whatever_the_batch(engine):
    request = make_request("chat", text="Write a poem.", sampling=Sampling(temperature=0.8, top_p=0.9, seed=3))
    alone = engine.run([None], [[request]], max_new_tokens=24)[0][0]
    other = make_request("chat", text="A longer question that is not asked alone, is it?")
    beside = engine.run([None, None], [[other], [request]], max_new_tokens=24)[1][0]
    assert alone.text == beside.text
    assert beside.log_probs == pytest.approx(alone.log_probs, abs=1e-3)
    greedy = engine.run([None], [[make_request("chat", text="Write a poem.")]], max_new_tokens=24)[0][0]
    assert greedy.text != alone.text and all(value <= 0 for value in greedy.log_probs)


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(engine):
    plain = engine.run([None], [[make_request("chat", text="What is the capital of France?")]])[0][0].text
    request = make_request("chat", text="What is the capital of France?", sampling=Sampling(stop=("France",)))
    assert engine.run([None], [[request]])[0][0].text == plain.partition("France")[0]
