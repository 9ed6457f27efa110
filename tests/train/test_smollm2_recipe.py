"""Recipe `smollm2` leaves what SmolLM2-135M-Instruct knows as it is, until it trains adapters."""

import pytest
import torch
from support.smollm2 import smollm2_folder

from lumen_ray import api, config
from lumen_ray.data.shards.join import join
from lumen_ray.evaluate.answers import ask, changed, main, read_answers, read_questions, write_answers
from lumen_ray.inference.engine import Engine
from lumen_ray.model.build import VOCABULARY, open_weights
from lumen_ray.model.convert.pretrained import Sources, assemble
from lumen_ray.model.settings import ModelSettings, read_settings
from lumen_ray.presets import model_path
from lumen_ray.train.launch import prepare_job, train_local


@pytest.mark.slow
def test_align_keeps_every_answer_and_every_published_row(test_data, tmp_path):
    pytest.importorskip("peft", reason="LoRA needs peft (pip install 'lumen-ray[lora]')")
    preset = config.load(ModelSettings, model_path("smollm2"))
    assemble(preset, Sources(smollm2_folder(test_data), vision="nano"), tmp_path / "start")
    engine = Engine.load(tmp_path / "start")
    known = read_questions("knowledge")
    before = write_answers(tmp_path / "knowledge.jsonl", list(ask(engine, list(known))))
    assert [a.question for a in before if known[a.question].lower() in a.text.lower()] == list(known)

    write_answers(tmp_path / "text.jsonl", list(ask(engine, list(read_questions("text"))[16:24])))
    del engine
    api.prepare("chat", tmp_path / "text", conversations=[str(tmp_path / "text.jsonl")], rows_per_group=4, workers=0)
    api.prepare("scenes", tmp_path / "scenes", num=16, rows_per_group=4, workers=0)
    join([tmp_path / "scenes", tmp_path / "text"], tmp_path / "shards")
    recipe = api.load_recipe("smollm2")
    text_often = [group.model_copy(update={"weight": 1.0}) for group in recipe.stages[0].groups]
    align = recipe.stages[0].model_copy(update={"steps": 6, "warmup_steps": 0, "groups": tuple(text_often)})
    recipe = recipe.model_copy(update={"stages": (align,)})
    model = train_local(prepare_job(tmp_path / "shards", recipe, tmp_path / "run", str(tmp_path / "start")))

    old, new = open_weights(tmp_path / "start"), open_weights(model)
    published = read_settings(model).published_tokens
    for name in old:
        if name in VOCABULARY:
            assert torch.equal(old[name][:published], new[name][:published])
            assert not torch.equal(old[name][published:], new[name][published:])
        elif name.startswith("trunk.llm."):
            assert torch.equal(old[name], new[name]), name
    assert not torch.equal(old["trunk.vision.projector.weight"], new["trunk.vision.projector.weight"])
    assert changed(Engine.load(model), read_answers(tmp_path / "knowledge.jsonl")) == []
    assert main(["compare", "--model", str(model), "--answers", str(tmp_path / "knowledge.jsonl")]) == 0
