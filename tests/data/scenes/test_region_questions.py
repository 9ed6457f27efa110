"""Questions whether a box shows a class: their answers are true, and nothing else of the row changes."""

import numpy as np
import pytest

from lumen_ray.data.scenes.region_questions import MOST_IOU
from lumen_ray.data.scenes.render import scene_row
from lumen_ray.structures import Boxes
from lumen_ray.tasks import region_question

SIZE = (128, 128)


@pytest.fixture(scope="module")
def rows():
    return [(scene_row(5, n), scene_row(5, n, region_questions=True)) for n in range(40)]


def test_the_rest_of_a_row_is_the_same(rows):
    for plain, asked in rows:
        number, regions = len(plain["messages"]), len(plain["regions"])
        assert asked["messages"][:number] == plain["messages"] and asked["regions"][:regions] == plain["regions"]
        assert asked["image"] == plain["image"] and "chat" in asked["tasks"]
        assert {k: v for k, v in asked.items() if k not in ("messages", "regions", "tasks")} == {
            k: v for k, v in plain.items() if k not in ("messages", "regions", "tasks")
        }


def test_answers_are_true_and_half_of_them_no(rows):
    answers, alike, beside = [], 0, 0
    for plain, asked in rows:
        for message in asked["messages"][len(plain["messages"]) :]:
            question, answer = (turn["content"] for turn in message["turns"])
            (number,) = message["regions"]
            assert message["task"] == "chat" and number >= len(plain["regions"])
            box = Boxes([asked["regions"][number]["points"]], SIZE)
            name = question.removeprefix(region_question("X").split("X")[0]).removesuffix(" ?")
            iou = {
                i["phrase"]: max(float(box.iou(Boxes([o["box"]], SIZE))[0, 0]) for o in asked["instances"]
                                 if o["phrase"] == i["phrase"])
                for i in asked["instances"]
            }  # fmt: skip
            answers.append(answer)
            if answer == "yes":
                assert iou[name] > 0.7
            elif max(iou.values()) > 0.7:
                best = max(iou, key=iou.get)
                assert name != best
                alike += bool(set(name.split()) & set(best.split()))
            else:
                assert iou[name] < MOST_IOU
                beside += 1
    assert np.mean([answer == "no" for answer in answers]) == 0.5
    assert alike > 20 and beside > 20
