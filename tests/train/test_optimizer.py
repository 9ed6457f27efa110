"""What learns, and how fast."""

import pytest
from tiny_models import tiny_model

from lumen_ray.train.optimizer import build_optimizer, lr_factor, parts, set_lr, set_trainable
from lumen_ray.train.recipe import MODULES, Stage


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


@pytest.mark.parametrize("names", [("lumen",), ("vision", "llm"), MODULES])
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
