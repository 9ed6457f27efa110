"""Links of words are computed once for all images, and depend on nothing but the words."""

import numpy as np
import pytest
import torch
from support.tiny_models import scrambled, tiny_loaded

from lumen_ray.inference import word_links
from lumen_ray.inference.branches import BranchPlanner
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import Request, make_request
from lumen_ray.inference.word_links import WordLinks
from lumen_ray.structures import Region
from lumen_ray.tasks import TASKS

CLASSES = ["red circle", "blue square", "green dot", "triangle"]


@pytest.fixture
def engine():
    loaded = tiny_loaded(links_see_image=False)
    scrambled(loaded.model)
    return Engine(loaded)


@pytest.fixture
def computed(engine, monkeypatch):
    """The prompts of every computation."""
    calls, compute = [], engine.trunk.word_links._compute

    def counted(branches, keypoints, examples):
        calls.append([branch.prompt for branch in branches])
        return compute(branches, keypoints, examples)

    monkeypatch.setattr(engine.trunk.word_links, "_compute", counted)
    return calls


def images(count, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(count)]


def links(engine, shown, requests):
    return engine.trunk.links(shown, requests).decoder_inputs["lumen"].link.embeddings


def test_a_class_list_is_computed_once(engine, computed):
    detect = make_request("detect", classes=CLASSES)
    both = links(engine, images(2), [[detect], [detect]])
    assert len(computed) == 1 and len(computed[0]) == len(CLASSES) == len(engine.trunk.word_links)
    torch.testing.assert_close(both[:4], both[4:], atol=0, rtol=0)
    again = links(engine, images(1, seed=5), [[make_request("detect", classes=CLASSES[::-1])]])
    assert len(computed) == 1
    assert torch.equal(again, both[:4].flip(0))
    links(engine, images(1), [[make_request("detect", classes=["red circle", "a new one"])]])
    assert len(computed) == 2 and len(computed[1]) == 1


def test_a_link_does_not_depend_on_those_computed_with_it(engine, monkeypatch):
    together = links(engine, images(1), [[make_request("detect", classes=CLASSES)]])
    monkeypatch.setattr(word_links, "AT_ONCE", 1)
    engine.trunk.word_links = WordLinks(engine.trunk.word_links._compute, engine.trunk.examples.of)
    alone = links(engine, images(1), [[make_request("detect", classes=CLASSES)]])
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=1e-4)


def test_poses_have_links_of_their_own_and_regions_look(engine, computed):
    pose = make_request("pose", classes=["figure"])
    links(engine, images(2), [[pose], [pose]])
    assert len(computed) == 1 and len(computed[0]) > 3
    box = make_request("region_segment", region=Region("box", (64, 64), [[8, 8], [40, 40]]))
    one, other = (links(engine, images(1, seed=seed), [[box]]) for seed in (0, 1))
    assert len(computed) == 1 and (one - other).abs().max() > 1e-4


def test_the_oldest_links_make_room(engine):
    calls = []

    def compute(branches, keypoints, examples):
        calls.append([branch.prompt for branch in branches])
        return {"lumen": torch.arange(len(branches))[:, None].float()}

    kept = WordLinks(compute, list, most=2)
    items = {n: _pending(engine, n) for n in "abc"}
    kept.embeddings([items["a"], items["b"], items["a"]])
    kept.embeddings([items["a"]])
    kept.embeddings([items["c"]])
    assert len(kept) == 2
    kept.embeddings([items["a"]])
    assert len(calls) == 2
    assert len(kept.embeddings([items["b"], items["c"], items["a"]])) == 3
    assert len(calls) == 3 and len(calls[2]) == 1


@pytest.mark.parametrize("text", ["where may that be", "detect a red circle", "pose of red figure"])
def test_a_route_chosen_in_chat_reads_the_image(text):
    trained = ("detect", "ground", "pose", "chat")
    planner = BranchPlanner(
        dict.fromkeys(trained, "lumen"), {"red figure": ("head", "left hand")}, trained, links_see_image=False
    )
    task = TASKS["pose" if "pose" in text else "detect"]
    items = planner.routed_branches(make_request("chat", text=text), task, 0, 0)
    assert len(items) == (3 if "pose" in text else 1)
    assert all(item.branch.reads_image for item in items)
    assert not any(item.branch.reads_image for item in planner.branches(Request("pose", ("red figure",)), 0, 0))


def _pending(engine, name):
    (item,) = engine.trunk.planner.branches(make_request("detect", classes=[name]), 0, 0)
    return item
