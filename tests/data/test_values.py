"""Ids, flags and numbers by value."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumen_ray.data import values
from lumen_ray.errors import UserError


@given(st.integers(-(10**15), 10**15))
def test_an_id_is_the_same_in_every_type(number):
    assert {values.id_key(v) for v in (number, float(number), str(number), f" {number} ", f"{number}.0")} == {
        str(number)
    }


@given(st.one_of(st.integers(), st.floats(), st.text(), st.booleans(), st.none(), st.lists(st.integers())))
def test_an_id_key_is_a_text_or_none(value):
    key = values.id_key(value)
    assert key is None or (isinstance(key, str) and key and values.id_key(key) == key)


@pytest.mark.parametrize("value", [None, True, False, "", "  ", 1.5, float("nan"), float("inf"), [1], {}, 10**41])
def test_values_that_are_no_ids(value):
    assert values.id_key(value) is None


def test_leading_zeros_make_another_id():
    assert len({values.id_key(v) for v in (7, "07", "007")}) == 3


@pytest.mark.parametrize(
    ("flag", "texts"),
    [(True, [1, 1.0, True, "1", "true", " True", "YES"]), (False, [0, 0.0, None, "", "0", "false", "No"])],
)
def test_flags(flag, texts):
    assert [values.flag(text, "it") for text in texts] == [flag] * len(texts)


@pytest.mark.parametrize("value", [2, -1, 0.5, "2", "x", [0], {}, float("nan")])
def test_values_that_are_no_flags_are_named(value):
    with pytest.raises(UserError, match="^iscrowd must be 0, 1, true or false, got ") as error:
        values.flag(value, "iscrowd")
    assert error.value.reason == "invalid_flag"


@given(st.one_of(st.integers(-(10**8), 10**8), st.floats(-1e8, 1e8)))
def test_numbers_may_be_texts(number):
    assert values.number(number) == values.number(repr(number)) == values.number(f" {number!r} ") == number


@pytest.mark.parametrize(
    "value", [True, None, "", "x", "1,5", "1_0", "nan", "inf", "1e999", float("nan"), 1e300, 10**400, [1]]
)
def test_values_that_are_no_numbers(value):
    assert values.number(value) is None and values.whole(value) is None
    assert values.numbers([1, value]) is None


def test_whole_numbers_and_sizes():
    assert [values.whole(v) for v in (64, 64.0, "64", "64.0", 64.5, "64.5")] == [64, 64, 64, 64, None, None]
    assert values.declared_size("48", 64.0) == [48, 64]
    for height, width in ((None, 64), (0, 64), (-1, 64), ("x", 64), (48.5, 64)):
        assert values.declared_size(height, width) == [0, 0]
