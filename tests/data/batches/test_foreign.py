"""Names of things that are in no image of a data set."""

import numpy as np
import pytest

from lumen_ray.data.batches.foreign import NOUNS, foreign_names, is_foreign
from lumen_ray.data.scenes.text import CLASSES, SHAPES


def test_no_name_means_a_class_of_the_data_set():
    classes = ("red cat", "Dogs", "sheep", "guitar case")
    names = foreign_names(classes, 3000, np.random.default_rng(0))
    assert len(set(names)) == 3000
    assert not {"cat", "cats", "dog", "dogs", "sheep", "case", "guitar"} & {name.split()[-1] for name in names}
    assert any(name.startswith("red ") for name in names)
    joined = foreign_names(("t-shirt", "cup_(drinking)"), 3000, np.random.default_rng(0))
    assert not {"shirt", "cup"} & {name.split()[-1] for name in joined}
    assert foreign_names(classes, 0, None) == []


def test_names_are_nouns_some_described_some_spliced():
    names = foreign_names(CLASSES, 2000, np.random.default_rng(1))
    assert not set(SHAPES) & {name.split()[-1] for name in names}
    described = sum(" " in name for name in names) / len(names)
    unheard = sum(name.split()[-1] not in NOUNS for name in names) / len(names)
    assert 0.3 < described < 0.7 and 0.15 < unheard < 0.6
    assert names == foreign_names(CLASSES, 2000, np.random.default_rng(1))


@pytest.mark.parametrize(
    ("name", "words", "foreign"),
    [
        ("cat", {"cats"}, False),
        ("cats", {"cat"}, False),
        ("red cat", {"cat"}, False),
        ("cat tree", {"cat"}, True),
        ("red car", {"red", "cat"}, True),
        ("bus", {"buses"}, False),
        ("knife", {"knives"}, False),
        ("leaf", {"leaves"}, False),
        ("cherry", {"cherries"}, False),
    ],
)
def test_a_name_means_its_last_word(name, words, foreign):
    assert is_foreign(name, words) == foreign


def test_the_list_has_no_word_twice():
    assert len(NOUNS) == len(set(NOUNS))
