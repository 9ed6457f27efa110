"""Scenes: every annotation and every answer is checked against the picture or recomputed from the instances."""

import hashlib
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from lumen_ray.data.images import decode
from lumen_ray.data.scenes import render as scenes
from lumen_ray.data.scenes import text as scenes_text
from lumen_ray.data.shards.schema import SCHEMA
from lumen_ray.keypoints import FIGURE_EDGES
from lumen_ray.structures import Boxes, Masks, Region
from lumen_ray.tasks import split_phrases

SIDE = 128
SEED = 7


@pytest.fixture(scope="module")
def rows():
    return [scenes.scene_row(SEED, index) for index in range(200)]


def texts(row, task):
    return [[turn["content"] for turn in m["turns"]] for m in row["messages"] if m["task"] == task]


def centre(instance):
    x1, y1, x2, y2 = instance["box"]
    return (x1 + x2) / 2, (y1 + y2) / 2


def test_a_scene_is_a_pure_function_of_seed_and_index(rows):
    assert scenes.scene_row(SEED, 5) == rows[5]
    assert scenes.scene_row(SEED + 1, 5)["image"] != rows[5]["image"]
    assert len({row["image"] for row in rows}) == len(rows)
    assert len({row["image_id"] for row in rows}) == len(rows)


def test_rows_survive_the_arrow_schema(rows):
    assert pa.Table.from_pylist(rows[:50], schema=SCHEMA).to_pylist() == rows[:50]


def test_scenes_have_one_to_five_objects_and_cover_all_classes(rows):
    assert {len(row["instances"]) for row in rows} == {1, 2, 3, 4, 5}
    assert {i["phrase"] for row in rows for i in row["instances"]} == set(scenes.CLASSES)
    assert len(scenes.CLASSES) == 12
    assert all(row["classes"] == list(scenes.CLASSES) for row in rows)


def test_masks_are_disjoint_and_boxes_tight_around_them(rows):
    for row in rows:
        masks = Masks([i["mask"] for i in row["instances"]], (SIDE, SIDE)).to_arrays()
        assert masks.sum(0).max() == 1
        for mask, instance in zip(masks, row["instances"], strict=True):
            ys, xs = np.nonzero(mask)
            assert instance["box"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert instance["area"] == mask.sum()


def test_at_most_a_quarter_of_an_object_is_hidden():
    hidden = 0
    for index in range(150):
        for obj in scenes.render(SEED, index).objects:
            assert obj.area >= scenes.MIN_VISIBLE * obj.full_area
            hidden += obj.area < obj.full_area
    assert hidden > 5  # there is some occlusion


def test_pixels_under_a_mask_have_the_colour_of_the_class(rows):
    channel = {"red": 0, "green": 1, "blue": 2}
    for row in rows:
        image = decode(row["image"])
        assert image.shape == (SIDE, SIDE, 3) == (row["height"], row["width"], 3)
        masks = Masks([i["mask"] for i in row["instances"]], (SIDE, SIDE)).to_arrays()
        for mask, instance in zip(masks, row["instances"], strict=True):
            assert image[mask].mean(0).argmax() == channel[instance["phrase"].split()[0]]
        free = image[~masks.any(0)].astype(float)
        assert (free.max(1) - free.min(1)).mean() < 40  # grey


def test_keypoints_of_figures_lie_on_them_and_know_when_they_are_hidden(rows):
    seen = Counter()
    for row in rows:
        for instance in row["instances"]:
            figure = instance["phrase"].endswith("figure")
            assert (instance["keypoints"] is not None) == figure
            if not figure:
                continue
            mask = Masks([instance["mask"]], (SIDE, SIDE)).to_arrays()[0]
            points = np.reshape(instance["keypoints"], (-1, 3))
            assert len(points) == len(scenes.SKELETONS[instance["phrase"]]) == 5
            for x, y, v in points:
                assert mask[int(y), int(x)] == (v == 2)
            seen.update(points[:, 2])
            head, left_hand, right_hand, left_foot, right_foot = points[:, :2]
            assert left_hand[0] < head[0] < right_hand[0]
            assert left_foot[0] < right_foot[0]
            assert head[1] < min(left_foot[1], right_foot[1])
        assert ("pose" in row["tasks"]) == any(i["keypoints"] for i in row["instances"])
    assert set(seen) == {1.0, 2.0}
    assert all(max(edge) < 5 for edge in FIGURE_EDGES)


def test_captions_count_objects_and_contain_the_ground_phrases(rows):
    words = {"a": 1, "two": 2, "three": 3, "four": 4, "five": 5}
    for row in rows:
        ((prompt, caption),) = texts(row, "caption")
        assert prompt in ("describe the image .", "what is in the image ?")
        groups = caption.removesuffix(" .").replace(" and ", " , ").split(" , ")
        said = {}
        for group in groups:
            number, name = group.split(" ", 1)
            said[name if number == "a" else name.removesuffix("s")] = words[number]
        assert said == Counter(i["phrase"] for i in row["instances"])
        assert list(said) == sorted(said, key=scenes.CLASSES.index)
        ground = [p for p in row["phrases"] if p["task"] == "ground"]
        assert [p["phrase"] for p in ground] == split_phrases(caption)
        for phrase in ground:
            name = phrase["phrase"] if len(phrase["instances"]) == 1 else phrase["phrase"].removesuffix("s")
            assert phrase["instances"] == [k for k, i in enumerate(row["instances"]) if i["phrase"] == name]


def pick(instances, word):
    """Index of the instance that `word` selects, computed from boxes and areas."""
    keys = {
        "left": lambda i: centre(i)[0],
        "right": lambda i: -centre(i)[0],
        "top": lambda i: centre(i)[1],
        "bottom": lambda i: -centre(i)[1],
        "largest": lambda i: -i["area"],
        "smallest": lambda i: i["area"],
    }
    return min(range(len(instances)), key=lambda k: keys[word](instances[k]))


def test_referring_expressions_mean_exactly_one_object_or_none(rows):
    kinds = Counter()
    for row in rows:
        for phrase in (p for p in row["phrases"] if p["task"] == "refer"):
            words = phrase["phrase"].split()
            assert words[0] == "the"
            special = words[1] if words[1] not in (*scenes.COLOURS, *scenes.SHAPES) else None
            name = " ".join(words[2 if special else 1 :])
            members = [k for k, i in enumerate(row["instances"]) if i["phrase"] == name or i["phrase"].endswith(name)]
            if not phrase["instances"]:
                assert members == []
                kinds["none"] += 1
            elif special is None:
                assert phrase["instances"] == members
                kinds["unique"] += 1
            else:
                assert len(members) > 1
                chosen = members[pick([row["instances"][k] for k in members], special)]
                assert phrase["instances"] == [chosen]
                kinds[special] += 1
    assert kinds["unique"] > 100
    assert kinds["none"] > 5
    assert set(kinds) == {"unique", "none", "left", "right", "top", "bottom", "largest", "smallest"}


def expected_answer(question, instances):
    words = question.split()
    names = [i["phrase"] for i in instances]
    if question.startswith("what color is the"):
        (name,) = [n for n in names if n.endswith(words[4])]
        return name.split()[0]
    if question.startswith("what shape is"):
        return names[pick(instances, words[5])].split()[1]
    if question.startswith("how many objects are there in total"):
        return scenes_text.NUMBERS[len(names)]
    if question.startswith("how many"):
        subject = words[2].removesuffix("s")
        return scenes_text.NUMBERS[sum(subject in name.split() for name in names)]
    assert question.startswith("is there a "), question
    return "yes" if " ".join(words[3:5]) in names else "no"


def test_answers_are_right_and_few_are_yes_or_no(rows):
    answers = Counter()
    for row in rows:
        asked = texts(row, "vqa")
        assert 1 <= len(asked) <= 3
        assert len({question for question, _ in asked}) == len(asked)
        for question, answer in asked:
            assert answer == expected_answer(question, row["instances"]), question
            answers[answer] += 1
    assert 0 < answers["yes"] + answers["no"] <= 0.1 * answers.total()
    assert set(answers) == {*scenes.COLOURS, *scenes.SHAPES, *scenes_text.COUNT_ANSWERS, "yes", "no"}


def test_chat_is_occasional_and_its_answers_about_the_image_are_right(rows):
    chats = [(row, turns) for row in rows for turns in texts(row, "chat")]
    assert 0.15 * len(rows) < len(chats) < 0.5 * len(rows)
    for row, turns in chats:
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            if question.startswith("how many"):
                assert answer == expected_answer(question, row["instances"])
            elif question.startswith("which colors"):
                assert {c for c in scenes.COLOURS if c in answer.split()} == {
                    i["phrase"].split()[0] for i in row["instances"]
                }


def test_region_captions_name_the_object_their_region_shows(rows):
    kinds = Counter()
    for row in rows:
        messages = [m for m in row["messages"] if m["task"] == "region_caption"]
        assert 1 <= len(messages) <= 2
        assert [m["regions"] for m in messages] == [[k] for k in range(len(row["regions"]))]
        boxes = Boxes(np.array([i["box"] for i in row["instances"]]), (SIDE, SIDE))
        for message, stored in zip(messages, row["regions"], strict=True):
            prompt, answer = (turn["content"] for turn in message["turns"])
            assert prompt.count("<region>") == 1
            region = Region(stored["kind"], (SIDE, SIDE), stored["points"], stored["mask"])  # refuses invalid ones
            kinds[region.kind] += 1
            if region.kind == "mask":
                found = [i["mask"] for i in row["instances"]].index(region.rle)
            elif region.kind in ("point", "scribble"):
                masks = Masks([i["mask"] for i in row["instances"]], (SIDE, SIDE)).to_arrays()
                x, y = region.points.astype(int).T
                found = int(masks[:, y, x].all(1).argmax())
                assert masks[found, y, x].all()
            else:
                hull = Boxes(np.concatenate([region.points.min(0), region.points.max(0)])[None], (SIDE, SIDE))
                found = int(hull.iou(boxes)[0].argmax())
                assert hull.iou(boxes)[0, found] > 0.65
            assert answer == row["instances"][found]["phrase"]
    assert kinds["box"] > kinds.total() / 2
    assert set(kinds) == {"box", "point", "scribble", "polygon", "mask"}


def test_tasks_are_those_the_row_can_train(rows):
    for row in rows:
        assert {"detect", "segment", "count", "ground", "refer", "caption", "vqa", "region_caption"} <= set(
            row["tasks"]
        )
        assert len(set(row["tasks"])) == len(row["tasks"])
        assert ("chat" in row["tasks"]) == bool(texts(row, "chat"))


@pytest.mark.parametrize("side", [64, 96, 256])
def test_other_sizes(side):
    for index in range(20):
        row = scenes.scene_row(SEED, index, side)
        assert decode(row["image"]).shape == (side, side, 3)
        boxes = np.array([i["box"] for i in row["instances"]])
        assert boxes.min() >= 0
        assert boxes.max() <= side
        longest = (boxes[:, 2:] - boxes[:, :2]).max(1) / side
        assert longest.min() > 0.12
        assert longest.max() < 0.55


def test_the_vocabulary_is_small(rows):
    words = Counter(
        word
        for row in rows
        for content in [t["content"] for m in row["messages"] for t in m["turns"]]
        + [p["phrase"] for p in row["phrases"]]
        for word in content.split()
    )
    assert len(words) < 100
    assert all(word == word.lower() for word in words)


def test_indistinguishable_objects_get_no_expression():
    twin = SimpleNamespace(colour="red", shape="circle", area=100.0, centre=(40.0, 40.0))
    other = SimpleNamespace(colour="red", shape="circle", area=100.0, centre=(44.0, 44.0))
    assert scenes_text.refer_phrases([twin, other], 128, np.random.default_rng(1)) == []


def test_the_same_number_is_the_same_scene_in_every_version():
    """The bundled weights, the quickstart and every figure in the README rest on these scenes."""
    told = []
    for index in range(16):
        row = scenes.scene_row(0, index)
        objects = [(i["phrase"], [round(c) for c in i["box"]]) for i in row["instances"]]
        messages = [{key: m[key] for key in ("task", "turns", "regions")} for m in row["messages"]]
        told.append([objects, row["phrases"], messages])
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    assert digest == "d0e4176281da1cd60df67b9dfc28cf9c715eabb3111f98140aa0a7272db3aaa4"
