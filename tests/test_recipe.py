"""Mistakes in a recipe are reported with the valid choices."""

import pytest
import torch
from support.tiny_models import EXPERTS, tiny_model

from lumen_ray import config
from lumen_ray.data.batches.plan import check_micro_steps
from lumen_ray.errors import UserError
from lumen_ray.model.build import build_model, count_parameters
from lumen_ray.model.settings import ModelSettings
from lumen_ray.presets import model_path, recipe_path
from lumen_ray.recipe import BLOCK_PARTS, LOSSES, Recipe
from lumen_ray.tasks import TASKS
from lumen_ray.train.checks import check_recipe
from lumen_ray.train.optimizer import lr_factors, set_trainable


def recipe(*stages, **changes):
    stages = stages or ({},)
    named = [{"name": f"s{i}", "steps": 3 + i} | stage for i, stage in enumerate(stages)]
    return config.validate(Recipe, {"name": "r", "stages": named} | changes, "r.yaml")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"loss_weights": {"heatmaps": 1}}, "unknown loss 'heatmaps'; did you mean 'heatmap'.*losses: box, edit"),
        ({"trainable": ["lumens"]}, "unknown part 'lumens'; did you mean 'lumen'"),
        ({"lr_scale": {"visoin": 1}}, "did you mean 'vision'"),
        ({"trainable": []}, "stage 's0' trains nothing"),
        ({"groups": []}, "needs at least one task group"),
        ({"groups": [{"tasks": []}]}, "needs at least one task"),
        ({"groups": [{"tasks": ["detekt"]}]}, "detect"),
        (
            {"groups": [{"tasks": ["detect", "semantic"]}]},
            "'semantic' cannot be trained: .*; train 'segment'",
        ),
        ({"augment": {"scale": [0, 1]}}, "0 < smallest <= largest"),
        ({"lerning_rate": 1}, "unknown key"),
        ({"steps": 0}, "steps"),
        ({"accumulate": 0}, "accumulate"),
        ({"lr_scale": {"vision": -1}}, "lr_scale of 'vision' must not be negative"),
        ({"layer_decay": {"dense": 0.9}}, "unknown part with layers 'dense'; parts with layers: llm, vision"),
        ({"layer_decay": {"llm": 1.5}}, r"layer_decay of 'llm' must be in \(0, 1\], got 1.5"),
        ({"groups": [{"tasks": ["chat", "detect"], "text_only": True}]}, "'detect' is not about text alone"),
    ],
)
def test_a_mistake_in_a_stage_is_reported(stage, message):
    with pytest.raises(UserError, match=message) as error:
        recipe(stage)
    assert "\n" not in str(error.value)


def test_stages_are_needed_and_have_their_own_names():
    with pytest.raises(UserError, match="at least one stage"):
        recipe(stages=[])
    with pytest.raises(UserError, match="different names, got x, x"):
        recipe({"name": "x"}, {"name": "x"})


def test_the_losses_that_can_be_weighed_are_those_of_the_model():
    assert tiny_model(**EXPERTS).loss_names == LOSSES
    assert set(tiny_model().loss_names) < set(LOSSES)


def test_a_stage_trains_by_default_what_can_be_trained():
    assert {"segment", "region_segment", "vqa"} < set(recipe().tasks)
    assert not {"semantic", "generate", "edit"} & set(recipe().tasks)


def test_steps_belong_to_stages():
    made = recipe({}, {})
    assert made.total_steps == 7
    assert [made.at(t) for t in (0, 2, 3, 6, 7)] == [(0, 0), (0, 2), (1, 0), (1, 3), (2, 0)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp16"}, "'precision' is invalid.*'fp32' or 'bf16'"),
        ({"compile": ["lmu"]}, "unknown part with blocks 'lmu'; .*parts with blocks: .*llm, lumen, .*, vision"),
        ({"activation_checkpointing": ["dense"]}, "unknown part with blocks 'dense'"),
        ({"lora": {"rank": 0}}, "lora.rank"),
        ({"lora": {"ranks": 4}}, "unknown key 'lora.ranks'; did you mean 'rank'"),
        ({"ema": {"decay": 1.0}}, "ema.decay"),
        ({"mlflow": {"uri": "x"}}, "unknown key 'mlflow.uri'"),
    ],
)
def test_a_mistake_in_a_recipe_is_reported(changes, message):
    with pytest.raises(UserError, match=message) as error:
        recipe(**changes)
    assert "\n" not in str(error.value)


def test_true_is_all_blocks():
    made = recipe(compile=True, activation_checkpointing=False)
    assert (made.compile, made.activation_checkpointing) == (BLOCK_PARTS, ())


#: parameters in millions: of both encoders with their merges, of the LLM, and of all, roughly
SIZES = {"small": (12.3, 15.7, 32), "7b": (656.2, 6738.5, 9738)}
#: of the shards they are made for: the default of `prepare`, and what the recipe asks for
ROWS_PER_GROUP = {"small": 8, "7b": 2}


@pytest.mark.parametrize("name", SIZES)
def test_the_large_recipes_fit_their_models(name):
    """Built without memory: every name in them is one of the model's, and the model is as large as it says."""
    if name == "7b":
        pytest.importorskip("peft", reason="LoRA needs peft (pip install 'lumen-ray[lora]')")
    made = config.load(Recipe, recipe_path(name))
    settings = config.load(ModelSettings, model_path(made.model))
    check_recipe(made, settings, settings.vocab_size)
    with torch.device("meta"):
        model = build_model(settings, settings.vocab_size)
    vision, llm, whole = SIZES[name]
    assert count_parameters(model.trunk.vision) / 1e6 == pytest.approx(vision, abs=0.1)
    assert count_parameters(model.trunk.llm) / 1e6 == pytest.approx(llm, abs=0.1)
    assert count_parameters(model) / 1e6 == pytest.approx(whole, rel=0.05)
    assert [stage.name for stage in made.stages] == ["align", "instruct", "joint", "decoders"]
    for stage in made.stages:
        check_micro_steps(stage, made.batch_size // ROWS_PER_GROUP[name], made.workers)
    joint = next(stage for stage in made.stages if stage.name == "joint")
    with_decoders = [group for group in joint.groups if any(not TASKS[task].is_text for task in group.tasks)]
    assert {name for group in with_decoders for name in group.decoders or model.decoders} == {*model.decoders}
    text = sum(group.weight for group in joint.groups if all(TASKS[task].is_text for task in group.tasks))
    assert text / sum(group.weight for group in joint.groups) == pytest.approx(1 / 3)


def test_the_smollm2_recipe_freezes_the_llm_and_then_trains_its_image_adapters():
    made = config.load(Recipe, recipe_path("smollm2"))
    settings = config.load(ModelSettings, model_path(made.model))
    with pytest.raises(UserError, match="has image_adapters but no published LLM"):
        check_recipe(made, settings, settings.vocab_size)
    settings = settings.model_copy(update={"published_tokens": settings.vocab_size - 6})
    check_recipe(made, settings, settings.vocab_size)
    align, joint = made.stages
    assert "llm" not in align.trainable and "queries" in align.trainable and joint.trainable is None
    assert settings.image_adapters and made.lora is None
    with torch.device("meta"):
        model = build_model(settings, settings.vocab_size)
    for stage, learns in ((align, False), (joint, True)):
        set_trainable(model, stage)
        trained = {name for name, p in model.trunk.llm.named_parameters() if p.requires_grad}
        assert any(".lora_" in name for name in trained) == learns
        assert all(".lora_" in name or "embed_tokens" in name for name in trained)
        check_micro_steps(stage, made.batch_size // 4, made.workers)


def without_lora(stage):
    """Of a model that has no adapters."""
    kept = {name: factor for name, factor in stage.lr_scale.items() if "lora" not in name}
    return stage.model_copy(update={"lr_scale": kept})


def test_the_7b_recipe_trains_published_decoders_slowly_and_keeps_what_they_keep():
    made, settings = config.load(Recipe, recipe_path("7b")), config.load(ModelSettings, model_path("7b"))
    with torch.device("meta"):
        model = build_model(settings, settings.vocab_size)
    for stage in made.stages:
        learns_decoders = stage.trainable is None or "grounding_dino" in stage.trainable
        set_trainable(model, stage)
        factors = lr_factors(model, without_lora(stage))
        named = model.named_parameters()
        decoders = {name: factors[p] for name, p in named if p in factors and name.startswith("decoders.")}
        assert bool(decoders) == learns_decoders
        for name, factor in decoders.items():
            part = name.split(".", 2)[2]
            slow = not name.startswith(("decoders.lumen.", "decoders.unipose."))
            assert factor == (0.1 if slow and part.startswith(("trunk.", "bbox_embed.", "unet.")) else 1.0), name
            assert not name.startswith("decoders.stable_diffusion.") and not part.startswith(("vae.", "text_encoder."))
