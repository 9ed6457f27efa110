"""One pass and a pass per prompt give the same answers, and the bench sees when they do not."""

import dataclasses

import pytest
from support.tiny_models import tiny_loaded

from lumen_ray.bench import prompts
from lumen_ray.bench.timing import SidesDiffer
from lumen_ray.inference.engine import Engine


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_loaded())


def test_both_sides_answer_every_prompt_the_same(engine):
    result = prompts.bench(engine, classes=5, turns=1, max_new_tokens=4, threads=1)
    assert set(result.rates) == {"one pass", "a pass per prompt"}
    assert result.details["prompts"] == 5 + 1 + 3
    assert [len(rates) for rates in result.rates.values()] == [1, 1]
    assert result.aim == prompts.AIM
    assert "texts, counts" in result.equal


def test_the_prompts_are_the_same_on_both_sides():
    single = prompts.prompts(80)
    assert len({request.phrases for request in single if request.phrases}) == 80
    detect, *texts = prompts.together(single)
    assert detect.phrases == tuple(request.phrases[0] for request in single if request.phrases)
    assert texts == single[80:]


@pytest.mark.parametrize("what", ["links", "texts"])
def test_a_difference_is_refused(engine, monkeypatch, what):
    links = engine.trunk.links

    def other_when_packed(images, requests, **options):
        """As if a prompt's result depended on the prompts beside it."""
        out = links(images, requests, **options)
        if len(requests[0]) > 1 and what == "links":
            link = out.decoder_inputs["lumen"].link
            link.embeddings = link.embeddings * 1.01
        if len(requests[0]) > 1 and what == "texts":
            out.plans[0] = [p if p.text is None else dataclasses.replace(p, text=p.text + "?") for p in out.plans[0]]
        return out

    monkeypatch.setattr(engine.trunk, "links", other_when_packed)
    with pytest.raises(SidesDiffer, match="differ by"):
        prompts.bench(engine, classes=3, turns=1, max_new_tokens=4, threads=1)


def test_numbers_that_are_none_are_a_difference(engine, monkeypatch):
    raw = prompts.raw_outputs

    def broken_when_packed(engine, image, requests, limit):
        values = raw(engine, image, requests, limit)
        return [values[0], values[1] * float("nan"), values[2]] if len(requests) > 1 else values

    monkeypatch.setattr(prompts, "raw_outputs", broken_when_packed)
    with pytest.raises(SidesDiffer, match="differ by nan"):
        prompts.bench(engine, classes=3, turns=1, max_new_tokens=4, threads=1)


def test_the_slow_side_makes_one_pass_per_prompt_and_both_write_as_much(engine, monkeypatch):
    encoded, limits = [], []
    encode, submit = engine.trunk.trunk.encode, engine.trunk.loop.submit
    single = prompts.prompts(3)
    image = prompts.decode(prompts.scenes.scene_row(0, 0, engine.image_size)["image"])

    def counted(images, *rest):
        encoded.append(len(images))
        return encode(images, *rest)

    def limited(prefix, asked):
        limits.append([prompt.limit for prompt in asked])
        return submit(prefix, asked)

    monkeypatch.setattr(engine.trunk.trunk, "encode", counted)
    monkeypatch.setattr(engine.trunk.loop, "submit", limited)
    prompts.one_pass(engine, image, single, 4)
    assert encoded == [1] and limits == [[4] * 4]
    prompts.pass_per_prompt(engine, image, single, 4)
    assert encoded == [1] + [1] * len(single) and sum(limits[1:], []) == [4] * (1 + 3)
