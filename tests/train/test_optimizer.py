"""What learns, and how fast."""

import pytest
from support.tiny_models import tiny_model

from lumen_ray.decoders.registry import PARTS
from lumen_ray.errors import UserError
from lumen_ray.recipe import Stage
from lumen_ray.train.optimizer import build_optimizer, lr_factor, lr_factors, parts, set_lr, set_trainable


def stage(**changes):
    data = {"name": "s", "steps": 100, "warmup_steps": 10, "decay_from": 0.5, "final_lr": 0.1}
    return Stage.model_validate(data | changes)


def test_the_rate_rises_stays_and_falls():
    factors = [lr_factor(stage(), t) for t in range(100)]
    assert factors[:10] == pytest.approx([(t + 1) / 10 for t in range(10)])
    assert factors[10:50] == [1.0] * 40
    assert all(a > b for a, b in zip(factors[50:], factors[51:], strict=False))
    assert lr_factor(stage(), 75) == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1, abs=0.01)
    assert lr_factor(stage(warmup_steps=0), 0) == 1.0


def test_parts_have_their_own_rates():
    model, s = tiny_model(), stage(lr=0.01, lr_scale={"vision": 0.1})
    set_trainable(model, s)
    optimizer = build_optimizer(model, s)
    assert set_lr(optimizer, s, 4) == pytest.approx(0.005)
    vision = {id(p) for p in parts(model)["vision"].parameters()}
    for group in optimizer.param_groups:
        scale = 0.1 if id(group["params"][0]) in vision else 1.0
        assert group["lr"] == pytest.approx(0.005 * scale)
        assert group["weight_decay"] == (s.weight_decay if group["params"][0].ndim > 1 else 0)


@pytest.mark.parametrize("names", [("lumen",), ("vision", "llm"), PARTS])
def test_only_what_is_trainable_is_optimized(names):
    model, s = tiny_model(), stage(trainable=names)
    set_trainable(model, s)
    optimized = {id(p) for group in build_optimizer(model, s).param_groups for p in group["params"]}
    for name, part in parts(model).items():
        assert all((id(p) in optimized) == (name in names) == p.requires_grad for p in part.parameters())


def test_every_parameter_belongs_to_one_part():
    model = tiny_model()
    owned = [id(p) for part in parts(model).values() for p in part.parameters()]
    assert len(owned) == len(set(owned)) == len(list(model.parameters()))


def factors_by_name(model, s):
    set_trainable(model, s)
    found = lr_factors(model, s)
    return {name: found[p] for name, p in model.named_parameters() if p in found}


def test_rates_by_module_and_by_name_multiply():
    scales = {"vision": 0.5, "trunk.vision.clip": 0.1, "*layer_norm*": 2.0}
    found = factors_by_name(tiny_model(), stage(lr_scale=scales))
    for name, factor in found.items():
        wanted = (0.5 if name.startswith("trunk.vision.") else 1.0) * (0.1 if ".clip." in name else 1.0)
        assert factor == pytest.approx(wanted * (2.0 if "layer_norm" in name else 1.0)), name
    assert {1.0, 0.5, 0.05, 0.1} <= {round(factor, 6) for factor in found.values()}


def test_a_rate_of_zero_freezes():
    model, s = tiny_model(), stage(lr_scale={"trunk.vision.clip.model": 0, "lumen": 0})
    found = factors_by_name(model, s)
    assert not any(name.startswith(("trunk.vision.clip.model.", "decoders.lumen.")) for name in found)
    assert any(name.startswith("trunk.vision.clip.merge.") for name in found)
    groups = build_optimizer(model, s).param_groups
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_name_that_fits_nothing_is_reported():
    for pattern, stage_parts in (("trunk.visoin.clip", PARTS), ("*.nrm*", PARTS), ("trunk.llm.*", ("vision",))):
        with pytest.raises(UserError, match="fits nothing that the stage trains") as error:
            factors_by_name(tiny_model(), stage(lr_scale={pattern: 0.5}, trainable=stage_parts))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="did you mean 'trunk.vision.clip'"):
        factors_by_name(tiny_model(), stage(lr_scale={"trunk.visoin.clip": 0}))


def test_deeper_layers_learn_slower():
    found = factors_by_name(tiny_model(), stage(layer_decay={"vision": 0.5}))
    clip = "trunk.vision.clip.model."
    assert found[f"{clip}embeddings.patch_embedding.weight"] == 0.5**3
    assert found[f"{clip}encoder.layers.0.mlp.fc1.weight"] == 0.5**2
    assert found[f"{clip}encoder.layers.1.mlp.fc1.weight"] == 0.5
    assert found["trunk.vision.dinov2.model.embeddings.cls_token"] == 0.5**3
    others = [n for n in found if ".model." not in n or n.startswith("trunk.llm.")]
    assert {found[name] for name in others} == {1.0} and any("merge" in name for name in others)


def test_without_names_the_groups_are_those_of_parts_and_kinds():
    model, s = tiny_model(), stage()
    set_trainable(model, s)
    wanted = []
    for part in parts(model).values():
        matrices = {id(p) for p in part.parameters() if p.ndim > 1}
        vectors = {id(p) for p in part.parameters()} - matrices
        wanted += [(members, decay) for members, decay in ((matrices, s.weight_decay), (vectors, 0.0)) if members]
    groups = build_optimizer(model, s).param_groups
    assert [({id(p) for p in group["params"]}, group["weight_decay"]) for group in groups] == wanted
    assert len(parts(model)) < len(groups) and s.weight_decay > 0 and {group["lr"] for group in groups} == {s.lr}
