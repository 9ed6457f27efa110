"""The engine and its fakes have the same interface."""

import inspect

import pytest
from support import evaluate_fakes, label_fakes
from support.tiny_models import tiny_loaded

from lumen_ray.inference.engine import Engine
from lumen_ray.inference.protocol import EngineProtocol


def parameters(function):
    """(name, kind, default) of each parameter; annotations are mypy's to check."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(
    "make",
    [lambda: Engine(tiny_loaded()), label_fakes.FakeEngine, lambda: evaluate_fakes.FakeEngine([])],
    ids=["engine", "label's fake", "evaluate's fake"],
)
def test_engines_implement_the_protocol(make):
    engine = make()
    assert isinstance(engine, EngineProtocol)
    wanted = parameters(EngineProtocol.run)
    own = parameters(type(engine).run)
    assert own[: len(wanted)] == wanted
    assert all(default is not inspect.Parameter.empty for _, _, default in own[len(wanted) :])
