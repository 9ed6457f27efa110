"""Conversations with several images: the training pass, the cached path and packed rows agree."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.tiny_models import llm, plain_batch, random_images, scrambled, tiny_model, tiny_tokenizer

from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import IGNORE, build_layout

TOKENIZER = tiny_tokenizer()
HISTORY = (("how many circles are there ?", "two"), ("and here ?", "one"))
#: images of the rows: 3, 1 and 2
FIRSTS, FURTHER = random_images(3), random_images(3, seed=5)
FURTHER_ROWS = torch.tensor([0, 0, 2])
BRANCHES = [
    Branch(0, "which one is red ?", response="the circle", history=HISTORY, image_turns=(1, 2)),
    Branch(1, "which one is blue ?", response="the square", history=HISTORY),
    Branch(1, "detect red circle", route="[DET]"),
    Branch(2, "what differs ?", response="the circle", image_turns=(0,)),
    Branch(2, "detect blue square", route="[DET]"),
]


def make_trunk(mode="full", **changes):
    return scrambled(tiny_model(llm=llm("llama"), prefix_attention=mode, **changes).trunk)


def batch_of(branches=BRANCHES, **fields):
    fields = {"further_images": FURTHER, "further_rows": FURTHER_ROWS} | fields
    return plain_batch(FIRSTS, build_layout(branches, 3, TOKENIZER), **fields)


@torch.no_grad()
def losses_of(trunk, batch):
    """The losses of the supervised tokens of each branch."""
    out, layout = trunk(batch), batch.layout
    here = layout.labels[:, 1:] != IGNORE
    return [
        out.lm_losses[here & (layout.branch_ids[:, 1:] == index)] for index in range(int(layout.branch_ids.max()) + 1)
    ]


@pytest.mark.parametrize("mode", ["causal", "full"])
@pytest.mark.parametrize("lead", [(), (3, 4)])
@torch.no_grad()
def test_the_cached_path_equals_the_training_pass(mode, lead):
    trunk = make_trunk(mode, lead_tokens=lead)
    batch = batch_of()
    expected = losses_of(trunk, batch)
    together = trunk.encode(torch.cat([FIRSTS, FURTHER]), places=torch.tensor([0, 0, 0, 1, 2, 1]))
    for row, members in ((0, [0, 3, 4]), (1, [1]), (2, [2, 5])):
        prefix = together.joined(members)
        assert prefix.length == len(lead) + 16 * len(members) == int(prefix.ends[0])
        torch.testing.assert_close(prefix.dense[0], together.dense[members[-1]])
        number, branch = next((i, b) for i, b in enumerate(BRANCHES) if b.image == row)
        layout = build_layout([replace(branch, image=0)], 1, TOKENIZER)
        hidden, _ = trunk.run_branches(prefix, layout)
        logits = trunk.llm.lm_head(hidden[:, :-1])
        losses = F.cross_entropy(logits[0], layout.labels[0, 1:], reduction="none", ignore_index=IGNORE)
        torch.testing.assert_close(losses[layout.labels[0, 1:] != IGNORE], expected[number], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["causal", "full"])
def test_an_image_elsewhere_in_a_conversation_has_the_same_features_and_links(mode):
    trunk = make_trunk(mode)
    later = trunk.encode(FIRSTS, places=torch.tensor([2, 0, 1]))
    alone = trunk.encode(FIRSTS)
    torch.testing.assert_close(later.dense, alone.dense, atol=1e-4, rtol=1e-4)
    layout = build_layout([Branch(0, "detect red circle", route="[DET]")], 3, TOKENIZER)
    links = [trunk.branch_links(p, layout)["lumen"].embeddings for p in (later, alone)]
    torch.testing.assert_close(*links, atol=1e-4, rtol=1e-4)


def test_rows_with_fewer_images_are_as_by_themselves():
    trunk = make_trunk()
    together = losses_of(trunk, batch_of())
    for row in range(3):
        numbers = [i for i, b in enumerate(BRANCHES) if b.image == row]
        branches = [replace(BRANCHES[i], image=0) for i in numbers]
        further = FURTHER[row == FURTHER_ROWS]
        batch = plain_batch(
            FIRSTS[row : row + 1],
            build_layout(branches, 1, TOKENIZER),
            further_images=further,
            further_rows=torch.zeros(len(further), dtype=torch.int64),
        )
        for found, number in zip(losses_of(trunk, batch), numbers, strict=True):
            torch.testing.assert_close(found, together[number], atol=1e-5, rtol=1e-5)


def test_links_do_not_depend_on_further_images():
    trunk = make_trunk()
    with torch.no_grad():
        with_further = trunk(batch_of())
        single = [replace(branch, image_turns=()) for branch in BRANCHES]
        without = trunk(batch_of(single, further_images=FURTHER[:0], further_rows=FURTHER_ROWS[:0]))
    torch.testing.assert_close(with_further.dense, without.dense, atol=1e-5, rtol=1e-5)
    links = (out.links["lumen"].embeddings for out in (with_further, without))
    torch.testing.assert_close(*links, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_an_answer_depends_on_the_images_that_its_question_has_seen(changed):
    trunk = make_trunk()
    firsts, further = FIRSTS.clone(), FURTHER.clone()
    (firsts[:1] if changed == 0 else further[changed - 1 : changed])[:] = random_images(1, seed=8)
    before = losses_of(trunk, batch_of())
    after = losses_of(trunk, replace(batch_of(), images=firsts, further_images=further))
    answers = [len(TOKENIZER.encode(text)) + 1 for text in ("two", "one", "the circle")]
    parts = zip(before[0].split(answers), after[0].split(answers), strict=True)
    moved = [bool((a - b).abs().max() > 1e-4) for a, b in parts]
    assert moved == [changed <= question for question in range(3)]
    for a, b in zip(before[1:], after[1:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", ["causal", "full"])
def test_packed_rows_give_the_same(mode):
    trunk = make_trunk(mode)
    batch = batch_of()
    expected = losses_of(trunk, batch)
    width = 3 * 16 + batch.layout.input_ids.shape[1]
    samples = []
    for row, images in ((0, 3), (1, 1), (2, 2)):
        tokens = torch.nonzero(batch.layout.branch_ids[row] >= 0).flatten() + 48
        samples.append(row * width + torch.cat([torch.arange(16 * images), tokens]))
    packed = torch.cat([samples[1], samples[2]])
    batch.layout.pack = torch.full((2, max(len(packed), len(samples[0]))), -1)
    batch.layout.pack[0, : len(samples[0])] = samples[0]
    batch.layout.pack[1, : len(packed)] = packed
    for found, wanted in zip(losses_of(trunk, batch), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_all_images_get_gradients():
    trunk = make_trunk()
    batch = batch_of()
    seen = {}

    def keep(module, inputs, output):
        seen["tokens"] = output[0]
        output[0].retain_grad()

    handle = trunk.vision.register_forward_hook(keep)
    trunk(batch).lm_losses.sum().backward()
    handle.remove()
    assert seen["tokens"].shape[0] == 6
    assert (seen["tokens"].grad.flatten(1).abs().amax(1) > 0).all()
