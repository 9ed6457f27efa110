"""The objects bench: its images hold the objects, the engine finds them, and as many tokens are written as said."""

from argparse import Namespace

import numpy as np
import pytest

from lumen_ray.bench import command, objects
from lumen_ray.bench.timing import SidesDiffer
from lumen_ray.errors import UserError
from lumen_ray.structures import Boxes

SIDE = 128  # the bundled weights' own


@pytest.fixture(scope="module")
def sides():
    return objects.Sides.load("nano", SIDE)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(objects, "SECONDS", 0.01)


def test_images_hold_as_many_squares_as_asked():
    from scipy.ndimage import label

    for count in (1, 30, 300):
        image = objects.crowd(count)
        assert image.shape == (objects.SIDE, objects.SIDE, 3) and image.dtype == np.uint8
        red = (image[..., 0] > 180) & (image[..., 1] < 100)
        assert label(red)[1] == count
    assert np.array_equal(image, objects.crowd(300))


def test_the_engine_finds_three_hundred_objects():
    """At the size and number of the documented figures."""
    engine = objects.Sides.load("nano", objects.SIDE)
    boxes = engine.detect(objects.crowd(300))
    assert abs(len(boxes) - 300) <= 6
    assert engine.room >= 300 * objects.LOCATION_TOKENS


def test_every_number_of_objects_has_both_formats(short):
    *rows, growth, decoder = objects.bench(turns=2, counts=(1, 5), side=SIDE)
    assert [row.name for row in rows] == [
        "1 object, location tokens", "1 object, text", "5 objects, location tokens", "5 objects, text",
    ]  # fmt: skip
    assert [row.details["objects"] for row in rows] == [1, 1, 5, 5]
    assert [row.details["tokens"] for row in rows[::2]] == [4, 20]
    assert rows[3].details["tokens"] > 5 * 8 and rows[3].details["tokens_per_box"] > 8
    for row in rows:
        tokens, engine = row.rates
        assert tokens == f"{row.details['tokens']} tokens" and engine == "engine"
        assert len(row.ratios) == 2 and min(row.ratios) > 0 and row.aim is None
    assert rows[0].rates["engine"] == rows[1].rates["engine"] == growth.rates["1 object"]
    assert growth.rates["5 objects"] == rows[2].rates["engine"]
    assert list(decoder.rates) == ["1 object", "5 objects"] and decoder.aim is None
    assert growth.aim == pytest.approx(1 / objects.MOST_GROWTH)


def test_as_many_tokens_are_written_one_step_each(sides, monkeypatch):
    steps = []
    decode_step = sides.engine.trunk.trunk.decode_step

    def counted(step, tokens, queries):
        steps.append(len(tokens))
        return decode_step(step, tokens, queries)

    monkeypatch.setattr(sides.engine.trunk.trunk, "decode_step", counted)
    assert sides.write(objects.crowd(2, SIDE), 140) == 140
    assert steps == [1] * 139  # the first token comes from the question


def test_the_decoder_alone_gives_all_boxes(sides):
    for count in (1, 5):
        assert sides.decode(sides.trunk_output(objects.crowd(count, SIDE))) == count


def test_text_is_counted_in_the_models_tokens(sides):
    boxes = Boxes([[1.2, 2.6, 30, 40], [5, 6, 7, 8]], (SIDE, SIDE))
    assert objects.box_text(boxes) == "[1, 3, 30, 40], [5, 6, 7, 8]"
    encoded = sides.engine.trunk.tokenizer.encode(objects.box_text(boxes))
    assert sides.tokens(boxes, "text") == len(encoded) > 16
    assert sides.tokens(boxes, "location tokens") == 8


def test_the_most_that_fit_are_measured_on_an_image_of_as_many(sides, monkeypatch):
    monkeypatch.setattr(objects.Sides, "room", 50)
    location, text = objects.cases(sides, [5], SIDE)
    assert (location.count, location.tokens, location.is_most) == (5, 20, False)
    assert text.is_most and text.count == 2 and text.tokens <= 50
    assert text.name == "2 objects (most), text"
    assert len(sides.detect(text.image)) == 2


def test_objects_that_are_not_found_are_refused(sides, monkeypatch):
    monkeypatch.setattr(objects, "crowd", lambda count, side: np.full((side, side, 3), 200, np.uint8))
    with pytest.raises(SidesDiffer, match="finds 0 of 3 objects"):
        objects.cases(sides, [3], SIDE)


def test_fewer_tokens_are_refused(short, monkeypatch):
    monkeypatch.setattr(objects.Sides, "write", lambda sides, image, tokens: tokens - 1)
    with pytest.raises(SidesDiffer, match="writes 3 of 4 tokens"):
        list(objects.bench(turns=1, counts=(1,), side=SIDE))


def test_options_reach_the_bench(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(objects, "bench", lambda **options: given.update(options) or iter(()))
    arguments = ["objects", "--turns", "2", "--threads", "1", "--output", str(tmp_path / "out.json")]
    assert command.main([*arguments, "--model", "nano"]) == 0
    assert given == {"model": "nano", "threads": 1, "turns": 2}
    with pytest.raises(UserError, match="does not exist"):
        command.KINDS["objects"]["objects"].check(Namespace(model="absent"))
