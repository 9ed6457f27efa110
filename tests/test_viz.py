import numpy as np
import pytest

from lumen_ray.answer import Answer
from lumen_ray.keypoints import known_edges
from lumen_ray.structures import Boxes, Keypoints, Masks, Prediction
from lumen_ray.viz import draw, palette, upscale_factor

SIZE = (60, 80)
GREY = np.full((*SIZE, 3), 128, np.uint8)


def prediction(phrase="cat", box=(10, 20, 50, 50), score=0.9, **parts):
    return Prediction(phrase, Boxes([box], SIZE), [score], **parts)


def test_small_images_are_enlarged_and_the_input_is_untouched():
    assert upscale_factor((60, 80)) == 6 and upscale_factor((480, 640)) == 1 and upscale_factor((100, 319)) == 2
    image = GREY.copy()
    out = draw(image, [prediction()])
    assert out.dtype == np.uint8 and out.shape == (360, 480, 3)
    assert (image == GREY).all() and (out != 128).any()
    assert (draw(image, []) == 128).all()


def test_boxes_masks_and_keypoints_are_drawn_in_place():
    mask = np.zeros((1, *SIZE), bool)
    mask[0, 25:45, 15:45] = True
    colour = (255, 0, 0)
    box = draw(GREY, prediction(), colours={"cat": colour}, labels=False)
    assert tuple(box[20 * 6, 30 * 6]) == colour and tuple(box[35 * 6, 30 * 6]) == (128, 128, 128)
    masked = draw(GREY, prediction(masks=Masks.from_arrays(mask)), colours={"cat": colour}, labels=False)
    red, green, _ = masked[35 * 6, 30 * 6].astype(int)
    assert red > 150 and 60 < green < 110  # translucent
    assert tuple(masked[55 * 6, 70 * 6]) == (128, 128, 128)
    points = Keypoints([[20, 30, 0.9], [40, 30, 0.9], [30, 45, 0.1]], ("a", "b", "c"), SIZE)
    edges = {"cat": [(0, 1), (1, 2)]}
    posed = draw(GREY, prediction(keypoints=points), edges=edges, colours={"cat": colour}, labels=False)
    assert tuple(posed[30 * 6, 20 * 6]) == colour and tuple(posed[30 * 6, 30 * 6]) == colour
    assert tuple(posed[45 * 6, 30 * 6]) == (128, 128, 128)  # too unsure to draw


def test_a_box_over_the_border_and_one_of_no_size_do_not_fail():
    out = draw(GREY, [prediction(box=(-5, -5, 200, 200)), prediction(box=(79, 59, 79, 59))])
    assert out.shape == (360, 480, 3)


def test_score_threshold_and_text_strip():
    answers = [Answer("detect", SIZE, [prediction(score=0.2)]), Answer("caption", SIZE, text="a cat " * 60)]
    out = draw(GREY, answers, score_threshold=0.5)
    assert (out[:360] == 128).all() and out.shape[0] > 360 + 40 and (out[360:] > 200).any()


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        draw(np.zeros((400, 400, 3), np.uint8), prediction(masks=Masks.from_arrays(np.ones((1, *SIZE), bool))))


def test_colours_are_distinct_and_follow_colour_words():
    names = [f"{c} {s}" for c in ("red", "green", "blue") for s in ("circle", "square", "triangle", "figure")]
    names += [f"class {i}" for i in range(8)]
    colours = palette(names)
    assert len(set(colours.values())) == len(names)
    assert np.argmax(colours["red circle"]) == 0 and np.argmax(colours["blue figure"]) == 2


def test_known_edges():
    assert len(known_edges(("head", "left hand", "right hand", "left foot", "right foot"))) == 4
    assert known_edges(("a", "b")) == ()
