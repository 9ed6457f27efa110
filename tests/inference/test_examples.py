"""Classes by example at inference: links of training, kept for examples on images of their own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.tiny_models import SIDE, plain_batch, scrambled, tiny_loaded, tiny_tokenizer

from lumen_ray.errors import UserError
from lumen_ray.exemplars import ClassByExample, Example
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.examples import ExampleEmbeddings
from lumen_ray.inference.request import make_request
from lumen_ray.structures import Region
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import build_layout
from lumen_ray.trunk.regions import region_mask

BOXES = [(4, 6, 30, 40), (20, 10, 60, 50), (0, 0, 12, 12)]


def make_engine(links_see_image=False, **changes):
    loaded = tiny_loaded(links_see_image=links_see_image, **changes)
    loaded.meta.reads_exemplars = True
    scrambled(loaded.model)
    return Engine(loaded)


def images(count, seed=0, shape=(SIDE, SIDE)):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 256, (*shape, 3), dtype=np.uint8) for _ in range(count)]


def links(engine, shown, requests):
    return engine.trunk.links(shown, requests).decoder_inputs["lumen"].link.embeddings


def by_example(image, boxes=BOXES, name="bolt", **changes):
    examples = [Example(box, image, positive=n < 2) for n, box in enumerate(boxes)]
    return ClassByExample(name, examples, **changes)


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_links_are_those_of_training(looks, elsewhere):
    """Of examples on the prompted image and on another, as `data/batches` puts them into one batch."""
    engine = make_engine(links_see_image=looks)
    asked, other = images(2)
    prompt = "detect bolt like <region> <region> unlike <region>"
    branch = Branch(0, prompt, route="[DET]", regions=(0, 1, 2), reads_image=looks)
    pixels = torch.from_numpy(np.stack([asked, other])).permute(0, 3, 1, 2)
    batch = plain_batch(pixels, build_layout([branch], 2, tiny_tokenizer()))
    masks = [region_mask(Region("box", (SIDE, SIDE), np.reshape(box, (2, 2))), SIDE) for box in BOXES]
    owners = torch.full((3,), int(elsewhere))
    batch = replace(batch, region_masks=torch.from_numpy(np.stack(masks)), region_images=owners)
    with torch.no_grad():
        expected = engine.trunk.trunk(batch).links["lumen"].embeddings
    shown = by_example(other if elsewhere else None)
    found = links(engine, [asked], [[make_request("detect", classes=[shown])]])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_examples_on_images_of_their_own_are_computed_once():
    engine = make_engine()
    (reference,) = images(1, seed=3, shape=(90, 120))
    calls, compute = [], engine.trunk.trunk.example_embeddings

    def counted(pixels, masks, owners):
        calls.append((len(pixels), len(masks)))
        return compute(pixels, masks, owners)

    engine.trunk.trunk.example_embeddings = counted
    shown = by_example(reference)
    detect = make_request("detect", classes=[shown, "nut", by_example(reference, BOXES[:1], "other", named=False)])
    both = links(engine, images(2), [[detect], [detect]])
    assert calls == [(1, 3)] and len(engine.trunk.word_links) == 3
    torch.testing.assert_close(both[:3], both[3:], atol=0, rtol=0)
    again = make_request("detect", classes=[by_example(reference.copy())])
    assert torch.equal(links(engine, images(1, seed=9), [[again]])[0], both[0])
    assert calls == [(1, 3)]


def test_a_class_by_example_depends_on_its_boxes_and_its_name_and_on_nothing_else():
    engine = make_engine()
    one, two = images(2, seed=4)

    def link(*classes):
        return links(engine, images(1), [[make_request("detect", classes=list(classes))]])[0]

    plain = link(by_example(one))
    torch.testing.assert_close(link(by_example(one), "nut", by_example(two, name="other")), plain)
    for changed in (
        by_example(two), by_example(one, BOXES[:2]), by_example(one, BOXES[1:] + BOXES[:1]),
        by_example(one, name="nut"), by_example(one, named=False), "bolt",
    ):  # fmt: skip
        assert (link(changed) - plain).abs().max() > 1e-4


def test_boxes_on_the_image_asked_about_are_read_there():
    engine = make_engine()
    first, second = images(2, seed=5)
    request = make_request("detect", classes=[by_example(None), "nut"])
    both = links(engine, [first, second], [[request], [request]])
    assert (both[0] - both[2]).abs().max() > 1e-4
    torch.testing.assert_close(both[1], both[3])
    torch.testing.assert_close(links(engine, [second], [[request]]), both[2:], atol=1e-4, rtol=1e-4)
    assert len(engine.trunk.word_links) == 1  # of the class by name
    elsewhere = make_request("detect", classes=[by_example(first)])
    torch.testing.assert_close(links(engine, [second], [[elsewhere]])[0], both[0], atol=1e-4, rtol=1e-4)


def test_answers_have_the_names_of_their_classes():
    engine = make_engine()
    request = make_request("segment", classes=["nut", by_example(None, named=False)])
    ((answer,),) = engine.run(images(1), [[request]], score_threshold=0.0)
    assert [prediction.phrase for prediction in answer.predictions] == ["nut", "bolt"]


def test_a_model_that_was_not_trained_with_examples_takes_none():
    engine = make_engine()
    engine.trunk.reads_exemplars = False
    with pytest.raises(UserError, match="'bolt' is given by example, which this model was not trained with"):
        engine.run(images(1), [[make_request("detect", classes=[by_example(None)])]])


def test_the_latest_embeddings_are_kept():
    engine = make_engine()
    kept = ExampleEmbeddings(engine.trunk.trunk, engine.trunk.bucket, most=2)
    a, b, c = (Example(BOXES[0], image) for image in images(3))
    first = kept.of([a, b, a])
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    kept.of([c])
    assert len(kept) == 2
    assert len(kept.of([a, b, c])) == 3 and len(kept) == 2
