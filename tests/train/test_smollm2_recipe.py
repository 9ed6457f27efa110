"""Recipe `smollm2` leaves what SmolLM2-135M-Instruct writes in text alone as it is, adapters included."""

import pytest
import torch
from support.smollm2 import smollm2_folder

from lumen_ray import api, config
from lumen_ray.evaluate.answers import ask, changed, main, read_answers, read_questions, write_answers
from lumen_ray.inference.engine import Engine
from lumen_ray.model.build import VOCABULARY, open_weights
from lumen_ray.model.convert.pretrained import Sources, assemble
from lumen_ray.model.settings import ModelSettings, read_settings
from lumen_ray.presets import model_path
from lumen_ray.train.launch import prepare_job, train_local


@pytest.mark.slow
def test_every_answer_and_every_published_weight_stay(test_data, tmp_path):
    preset = config.load(ModelSettings, model_path("smollm2"))
    assemble(preset, Sources(smollm2_folder(test_data), vision="nano"), tmp_path / "start")
    engine = Engine.load(tmp_path / "start")
    known = read_questions("knowledge")
    before = write_answers(tmp_path / "knowledge.jsonl", list(ask(engine, list(known))))
    assert [a.question for a in before if known[a.question].lower() in a.text.lower()] == list(known)
    del engine

    api.prepare("scenes", tmp_path / "shards", num=16, rows_per_group=4, workers=0)
    recipe = api.load_recipe("smollm2")
    align, joint = (s.model_copy(update={"steps": 3, "warmup_steps": 0}) for s in recipe.stages)
    recipe = recipe.model_copy(update={"stages": (align, joint)})
    model = train_local(prepare_job(tmp_path / "shards", recipe, tmp_path / "run", str(tmp_path / "start")))

    old, new = open_weights(tmp_path / "start"), open_weights(model)
    published = read_settings(model).published_tokens
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    for name in old:
        if name in VOCABULARY:
            assert torch.equal(old[name][:published], new[name][:published])
            assert name in moved
        elif name.startswith("trunk.llm."):
            assert (name in moved) == (".lora_" in name), name
    assert "trunk.vision.projector.weight" in moved
    assert changed(Engine.load(model), read_answers(tmp_path / "knowledge.jsonl")) == []
    assert main(["compare", "--model", str(model), "--answers", str(tmp_path / "knowledge.jsonl")]) == 0
