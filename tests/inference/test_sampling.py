"""Tokens drawn from logits: against plain implementations of each rule, and the same whatever the batch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lumen_ray.errors import UserError
from lumen_ray.inference.sampling import Sampler, Sampling, stop_at

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 3.0, 0.0])


def drawn(number=4000, **settings):
    """Relative frequency of each token over `number` seeds."""
    tokens = [Sampler(Sampling(seed=n, **settings)).choose(LOGITS) for n in range(number)]
    return np.bincount(tokens, minlength=len(LOGITS)) / number


def test_draws_follow_the_distribution_at_a_temperature():
    for temperature in (0.7, 1.5):
        expected = (LOGITS.double() / temperature).softmax(-1).numpy()
        assert np.abs(drawn(temperature=temperature) - expected).max() < 0.03


def test_top_k_and_top_p_leave_the_most_probable_tokens():
    probabilities = LOGITS.double().softmax(-1)
    assert set(np.flatnonzero(drawn(500, temperature=1.0, top_k=2))) == {4, 0}
    order = probabilities.argsort(descending=True)
    needed = int((probabilities[order].cumsum(0) < 0.9).sum()) + 1
    assert set(np.flatnonzero(drawn(1000, temperature=1.0, top_p=0.9))) == set(order[:needed].tolist())
    assert set(np.flatnonzero(drawn(100, temperature=1.0, top_p=0.0))) == {4}
    assert set(np.flatnonzero(drawn(20, temperature=5.0, top_k=1))) == {4}


def test_the_repetition_penalty_weakens_tokens_of_prompt_and_answer():
    sampler = Sampler(Sampling(repetition_penalty=2.0), prompt=[4])
    assert sampler.choose(LOGITS) == 0  # 3 / 2 < 2
    sampler.record(0, 0.0)
    assert sampler.choose(LOGITS) == 4  # 2 / 2 < 3 / 2
    negative = torch.tensor([-1.0, -1.5])
    assert Sampler(Sampling(repetition_penalty=2.0), prompt=[0]).choose(negative) == 1  # -1 * 2 < -1.5


@given(st.integers(0, 2**63 - 1))
def test_a_seed_gives_the_same_draws(seed):
    first, second = (Sampler(Sampling(temperature=1.0, seed=seed)) for _ in range(2))
    assert [first.choose(LOGITS) for _ in range(8)] == [second.choose(LOGITS) for _ in range(8)]


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1}, {"temperature": float("nan")}, {"temperature": "1"}, {"temperature": True}, {"top_p": 1.1},
     {"top_k": -1}, {"top_k": 1.0}, {"repetition_penalty": 0}, {"seed": -1}, {"stop": "x"}, {"stop": ("",)},
     {"stop": ("x",) * 17}, {"stop": (1,)}],
)  # fmt: skip
def test_values_out_of_range_are_named(values):
    with pytest.raises(UserError, match=f"'{next(iter(values))}' must be ") as error:
        Sampling(**values)
    assert error.value.reason == "invalid_sampling"


def test_the_first_stop_text_ends_an_answer():
    assert stop_at("one two three", ("three", "two")) == "one "
    assert stop_at("one", ("two",)) is None
