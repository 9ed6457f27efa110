"""Scores of made pictures, with rendered scenes as pictures and their annotations as a detector that never errs."""

import numpy as np
import pytest
from PIL import Image

from lumen_ray.answer import Answer
from lumen_ray.data.scenes import edits as scenes_edits
from lumen_ray.data.scenes import render as scenes
from lumen_ray.data.scenes.text import caption, class_counts
from lumen_ray.evaluate import generation
from lumen_ray.evaluate.generation import Changes, score_described, score_edit, score_edits, score_generated
from lumen_ray.structures import Boxes, Prediction

SIDE = 64


class Oracle:
    """Returns exactly the objects of known scenes, at any size."""

    def __init__(self):
        self.known = {}

    def learn(self, scene, image=None):
        image = scene.image if image is None else image
        scale = np.array(image.shape[1::-1] * 2) / SIDE
        found = {}
        for obj in scene.objects:
            found.setdefault(obj.name, []).append(np.array(obj.box) * scale)
        self.known[image.tobytes()] = {name: Boxes(b, image.shape[:2]) for name, b in found.items()}
        return image

    def __call__(self, images):
        return [self.known[image.tobytes()] for image in images]


@pytest.fixture(scope="module")
def oracle():
    return Oracle()


@pytest.fixture(scope="module")
def drawn(oracle):
    made = [scenes.render(5, i, SIDE) for i in range(60)]
    return made, [oracle.learn(scene) for scene in made]


@pytest.fixture(scope="module")
def edits(oracle):
    found = [(scenes.render(6, i, SIDE), scenes_edits.scene_edit(6, i, SIDE)) for i in range(60)]
    pairs = [(before, edit.after) for before, edit in found if edit is not None]
    return [[oracle.learn(scene) for scene in group] for group in zip(*pairs, strict=True)]


def boxes(*xyxy):
    return Boxes(np.array(xyxy), (SIDE, SIDE))


def test_described_reads_captions(drawn):
    for scene in drawn[0]:
        assert generation.described(caption(scene.objects)) == class_counts(scene.objects)


def test_one_picture_is_scored_by_hand():
    wanted = {"red circle": 2, "blue square": 1}
    one, two = boxes([0, 0, 9, 9]), boxes([0, 0, 9, 9], [20, 20, 30, 30])
    assert score_described(wanted, {"red circle": two, "blue square": one}) == (1.0, True)
    assert score_described(wanted, {"red circle": one, "blue square": one}) == (2 / 3, False)
    assert score_described(wanted, {"red circle": one, "blue square": two}) == (2 / 3, False)
    assert score_described(wanted, {"red circle": two, "blue square": one, "green figure": one}) == (1.0, False)
    assert score_described(wanted, {}) == (0.0, False)
    assert score_described({}, {"red circle": boxes()}) == (1.0, True)


def test_perfect_pictures_score_one_and_unrelated_ones_chance(drawn, oracle):
    made, images = drawn
    prompts = [class_counts(scene.objects) for scene in made]
    perfect = score_generated(prompts, images, oracle)
    assert perfect["generate_objects"] == perfect["generate_exact"] == 1
    assert perfect["generate_objects_chance"] < 0.35
    assert perfect["generate_exact_chance"] < 0.1
    unrelated = score_generated(prompts, images[30:] + images[:30], oracle)
    assert abs(unrelated["generate_objects"] - perfect["generate_objects_chance"]) < 0.15
    assert unrelated["generate_exact"] < 0.1


def test_nothing_to_score_is_none(oracle):
    assert set(score_generated([], [], oracle).values()) == {None}
    assert set(score_edits([], [], [], oracle).values()) == {None}


def test_perfect_edits_score_one_and_doing_nothing_keeps_all(edits, oracle):
    before, after = edits
    perfect = score_edits(before, after, after, oracle)
    assert perfect["edit_done"] == perfect["edit_kept"] == perfect["edit_exact"] == perfect["edit_judged"] == 1
    assert perfect["edit_background"] < 0.005  # hidden parts stick out of the visible boxes
    idle = score_edits(before, after, before, oracle)
    assert idle["edit_done"] == idle["edit_exact"] == 0
    assert idle["edit_kept"] == 1
    assert idle["edit_background"] == 0
    unrelated = score_edits(before, after, [*after[7:], *after[:7]], oracle)
    assert unrelated["edit_exact"] < 0.1
    assert unrelated["edit_kept"] < 0.2
    assert unrelated["edit_background"] > 0.05


def test_pictures_of_another_size_are_scored_in_the_frame_before(edits, oracle):
    before, after = edits
    larger = []
    for image in after:
        big = np.asarray(Image.fromarray(image).resize((2 * SIDE, SIDE), Image.Resampling.BILINEAR))
        found = oracle.known[image.tobytes()]
        oracle.known[big.tobytes()] = {n: Boxes(b.xyxy * [2, 1, 2, 1], big.shape[:2]) for n, b in found.items()}
        larger.append(big)
    scores = score_edits(before, after, larger, oracle)
    assert scores["edit_exact"] == 1
    assert scores["edit_background"] < 0.01


def test_an_edit_is_scored_by_hand():
    black = np.zeros((SIDE, SIDE, 3), np.uint8)
    here, there = boxes([8, 8, 24, 24]), boxes([40, 40, 60, 60])
    before = {"red circle": here, "green square": there}
    asked = generation.changes(before, {"blue circle": here, "green square": there}, (SIDE, SIDE))
    assert [name for name, _ in asked.gone] == ["red circle"]
    assert [name for name, _ in asked.new] == ["blue circle"]
    assert [name for name, _ in asked.kept] == ["green square"]
    both = {"red circle": here, "blue circle": here}
    score = score_edit(asked, both, black, black)  # the new one is there, the old one too; the other is gone
    assert (score.done, score.kept, score.exact) == (0.5, 0.0, False)
    elsewhere = {"blue circle": there, "green square": there}
    assert score_edit(asked, elsewhere, black, black).done == 0.5
    right = {"blue circle": here, "green square": there}
    assert score_edit(asked, right, black, black).exact
    more = score_edit(asked, {**right, "green figure": there}, black, black)
    assert (more.done, more.kept, more.extra, more.exact) == (1, 1, 1, False)
    assert score_edit(asked, before, black, black).extra == 0  # what was to go counts as not done
    assert score_edit(Changes(kept=asked.kept), before, black, black) is None


def test_background_is_what_lies_outside_the_change():
    black = np.zeros((SIDE, SIDE, 3), np.uint8)
    asked = Changes(gone=[("red circle", boxes([0, 0, 32, 64]))])
    inside, outside = black.copy(), black.copy()
    inside[:, :32] = 255
    outside[:, 32:] = 51
    assert score_edit(asked, {}, black, inside).background == 0
    assert score_edit(asked, {}, black, outside).background == pytest.approx(0.2)
    assert score_edit(asked, {}, black, outside).kept is None
    everywhere = Changes(gone=[("red circle", boxes([0, 0, 64, 64]))])
    assert score_edit(everywhere, {}, black, outside).background == 0


def test_an_answer_claims_what_scores_above_the_threshold():
    answer = Answer(
        "detect", (SIDE, SIDE), [Prediction("red circle", boxes([0, 0, 9, 9], [20, 20, 30, 30]), [0.9, 0.1])]
    )
    found = generation.detections(answer)
    assert {name: len(b) for name, b in found.items()} == {"red circle": 1}
