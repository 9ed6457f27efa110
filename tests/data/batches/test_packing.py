"""Rows shared by images and texts: little padding, nothing lost in silence, the losses of rows of one's own."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import SIDE, further_images, scrambled, tiny_model, tiny_tokenizer

from lumen_ray.data.batches.collate import BranchSettings, Collator
from lumen_ray.data.batches.packing import Packing, fit_branches, pack, pack_lengths
from lumen_ray.data.images import decode
from lumen_ray.data.scenes import render as scenes
from lumen_ray.data.shards.schema import make_message, make_row
from lumen_ray.recipe import AugmentSettings
from lumen_ray.tasks import UNDERSTANDING
from lumen_ray.train.losses import StepLosses, count_tokens
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import IGNORE, branch_tokens, build_layout

TOKENIZER = tiny_tokenizer()
FEW = BranchSettings(negatives=1, max_phrases=1, max_messages=1)
IMAGE_TOKENS = (SIDE // 16) ** 2


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 100), max_size=40), st.integers(100, 400))
def test_rows_hold_every_sample_once_and_are_about_equally_full(lengths, most):
    rows = pack_lengths(lengths, most)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert max(sums) <= most
    assert len(rows) * max(sums) <= sum(lengths) + (len(rows) - 1) * max(lengths, default=0)
    assert len(rows) <= max(1, 2 * -(-sum(lengths) // most))


def test_a_length_that_fits_no_row_is_refused():
    with pytest.raises(ValueError, match="a sample of 101 tokens fits no row of 100"):
        pack_lengths([3, 101, 7], 100)


# -- samples that are too long ----------------------------------------------------------------------------------------


def length(branch):
    return len(branch_tokens(branch, TOKENIZER)[0])


DETECT = [Branch(0, f"detect {colour} circle", route="[DET]") for colour in ("red", "green", "blue")]
POSE = [Branch(0, "pose of figure", route="[POSE]")] + [
    Branch(0, f"{name} of figure", route="[POSE]", parent=0) for name in ("head", "left hand")
]
SHORT, LONG = Branch(0, "hello", response="yes"), Branch(0, "hello", response="a red circle and a blue square " * 30)


def test_a_sample_that_fits_keeps_all():
    branches = [*POSE, *DETECT, LONG]
    kept, lost = fit_branches(branches, [16], 16 + sum(map(length, branches)), TOKENIZER)
    assert kept == branches and lost == {"branches": 0, "tokens": 0}


def test_branches_are_kept_in_their_order_while_they_fit():
    most = 16 + length(DETECT[0]) + length(SHORT)
    kept, lost = fit_branches([DETECT[0], LONG, SHORT], [16], most, TOKENIZER)
    assert kept == [DETECT[0], None, SHORT] and lost == {"branches": 1, "tokens": 0}
    kept, lost = fit_branches([*DETECT, SHORT], [16], most - 1, TOKENIZER)
    assert kept[0] == DETECT[0] and lost["branches"] == sum(b is None for b in kept) > 0


def test_a_pose_keeps_all_its_keypoints_or_goes_with_them():
    whole = sum(map(length, POSE))
    assert fit_branches(POSE, [16], 16 + whole, TOKENIZER)[0] == POSE
    kept, lost = fit_branches([*POSE, SHORT], [16], 16 + whole - 1, TOKENIZER)
    assert kept == [None, None, None, SHORT] and lost["branches"] == 3


def test_a_text_alone_is_cut_and_others_are_left_alone():
    other = Branch(1, "hello", response="a red circle")
    kept, lost = fit_branches([LONG, other], [0, 16], 40, TOKENIZER)
    assert kept == [dataclasses.replace(LONG, limit=40), other]
    assert lost == {"branches": 0, "tokens": length(LONG) - 40}
    tokens, labels, _ = branch_tokens(kept[0], TOKENIZER)
    whole = branch_tokens(LONG, TOKENIZER)
    assert (tokens, labels) == (whole[0][:40], whole[1][:40]) and labels[-1] != IGNORE
    question = Branch(0, "a red circle " * 30, response="yes")
    assert fit_branches([question], [0], 40, TOKENIZER) == ([None], {"branches": 1, "tokens": 0})


# -- batches ----------------------------------------------------------------------------------------------------------


def chat_row(number, words):
    message = make_message("chat", "hello " * (1 + number), "a red circle and " * words)
    return make_row(f"text-{number}", None, (0, 0), "test", tasks=["chat"], messages=[message])


def collate(rows, packing=None, input_size=SIDE, order=None):
    collator = Collator(TOKENIZER, input_size, UNDERSTANDING, scenes.SKELETONS, FEW, AugmentSettings(), packing=packing)
    order = list(order or range(len(rows)))
    images = [None if rows[i]["image"] is None else decode(rows[i]["image"]) for i in order]
    return collator([rows[i] for i in order], images, [np.random.default_rng((0, i)) for i in order])


SCENES = [scenes.scene_row(0, i, SIDE) for i in range(5)]
ROWS = [chat_row(0, 3), *SCENES[:3], chat_row(1, 20), chat_row(2, 1), *SCENES[3:]]


@torch.no_grad()
def by_prompt(model, batch):
    """LM and heatmap loss, and the highest score, of every prompt by image and text; and the sums of all losses."""
    out = model.trunk(batch)
    layout = batch.layout
    found = {}
    each = model(batch)
    images = {}
    for row, name in enumerate(batch.image_ids):
        for branch in set(layout.branch_ids[row].tolist()) - {-1}:
            images[branch] = name
    for branch, loss in enumerate(each["lm"].each.tolist()):
        tokens = layout.input_ids[layout.branch_ids == branch].tolist()
        found[images[branch], tuple(tokens), len(found)] = [loss]
    keys = list(found)
    if "lumen" in out.links:
        link = out.links["lumen"]
        raw = model.decoders["lumen"](link, out.dense)
        scores = torch.zeros(len(link)).scatter(0, raw.objects, raw.logits.amax(1))
        for i, branch in enumerate(layout.link_branches["perception"].tolist()):
            found[keys[branch]] += [float(each["heatmap"].each[i]), float(scores[i]), *link.embeddings[i].tolist()]
    values = sorted((key[:2], value) for key, value in found.items())
    return values, {name: float(term.total) / max(float(term.count), 1) for name, term in each.items()}


def same(one, other):
    assert [key for key, _ in one[0]] == [key for key, _ in other[0]]
    for (key, a), (_, b) in zip(one[0], other[0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4, err_msg=str(key))
    assert one[1] == pytest.approx(other[1], abs=1e-4, rel=1e-4)


@pytest.fixture(scope="module", params=["full", "causal"])
def model(request):
    return scrambled(tiny_model(prefix_attention=request.param), 0.05)


@pytest.mark.parametrize("size", [SIDE, (48, 80), (96, 32)])
def test_packed_batches_give_the_losses_of_unpacked_ones(model, size):
    height, width = (size, size) if isinstance(size, int) else size
    tokens = (height // 16) * (width // 16)
    plain = by_prompt(model, collate(ROWS, None, size))
    for most in (2000, 700, 450):
        batch = collate(ROWS, Packing(most, tokens), size, order=[3, 0, 7, 4, 1, 2, 6, 5])
        rows, long = batch.layout.pack.shape
        assert long <= most and rows < len(ROWS) and not batch.truncated
        assert len(batch.images) == 5 and batch.has_image.tolist() == [True] * 5 + [False] * 3
        real, computed = count_tokens(batch, tokens)
        assert computed == rows * long and real < count_tokens(collate(ROWS, None, size), tokens)[1]
        same(plain, by_prompt(model, batch))


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_a_sample_is_the_same_in_any_company_at_any_budget(data):
    """Alone and unpacked, or packed with others."""
    model = scrambled(tiny_model(), 0.05)
    order = data.draw(st.permutations(range(len(ROWS))))[: data.draw(st.integers(2, len(ROWS)))]
    size = data.draw(st.sampled_from([(64, 64), (32, 96), (80, 48)]))
    tokens = (size[0] // 16) * (size[1] // 16)
    together = by_prompt(model, collate(ROWS, Packing(data.draw(st.integers(440, 1500)), tokens), size, order))[0]
    alone = [entry for i in order for entry in by_prompt(model, collate(ROWS, None, size, [i]))[0]]
    same((together, {}), (sorted(alone), {}))


def test_gradients_are_those_of_the_unpacked_batch():
    model = tiny_model()
    grads = []
    for packing in (None, Packing(600, IMAGE_TOKENS)):
        model.zero_grad()
        batch = collate(ROWS, packing)
        losses = StepLosses(model.loss_names, {}, [batch], torch.device("cpu"))
        losses.add_batch(batch, model(batch), IMAGE_TOKENS).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], atol=1e-4, rtol=1e-3, msg=name)


def test_what_is_cut_is_counted_and_still_trains():
    rows = [*SCENES[:2], chat_row(3, 200)]
    batch = collate(rows, Packing(IMAGE_TOKENS + 64, IMAGE_TOKENS))
    assert batch.truncated["branches"] > 0 and batch.truncated["tokens"] > 0
    assert batch.layout.pack.shape[1] <= IMAGE_TOKENS + 64
    targets = batch.targets["perception"]
    assert len(targets.boxes) == len(batch.layout.link_branches["perception"])
    whole = collate(rows, Packing(5000, IMAGE_TOKENS))
    assert len(batch.tasks) + batch.truncated["branches"] == len(whole.tasks)
    total = sum(term.total for term in tiny_model()(batch).values())
    assert torch.isfinite(total)


def test_keypoint_prompts_find_their_object_after_a_cut():
    """The indices of the branches that stay are counted anew."""
    row = next(
        row
        for row in (scenes.scene_row(0, i, SIDE) for i in range(50))
        if any(i["keypoints"] for i in row["instances"])
    )
    long = make_message("caption", "what is there ?", "a red circle and " * 200)
    row, first = {**row, "messages": []}, {**SCENES[0], "phrases": [], "messages": [long]}
    batch = collate([first, row], Packing(450, IMAGE_TOKENS))
    assert batch.truncated == {"branches": 1, "tokens": 0}  # the caption of the first image
    whole = collate([{**first, "messages": []}, row], None)
    ours, theirs = batch.layout, whole.layout
    assert (theirs.link_parents["perception"] >= 0).any()
    assert torch.equal(ours.link_parents["perception"], theirs.link_parents["perception"])
    for name, value in vars(whole.targets["perception"]).items():
        assert torch.equal(value, getattr(batch.targets["perception"], name)), name


@pytest.mark.parametrize("rows", [[chat_row(0, 3), chat_row(1, 5)], [make_row("broken", None, (SIDE, SIDE), "test")]])
def test_batches_without_images_reach_every_parameter(rows):
    batch = collate(rows, Packing(200, IMAGE_TOKENS))
    assert len(batch.images) == 1 and not batch.has_image.any() and len(batch.layout.pack) == 1
    model = tiny_model()
    sum(term.total for term in model(batch).values()).backward()
    unpacked = tiny_model()
    sum(term.total for term in unpacked(collate(rows)).values()).backward()
    with_grad = [{n for n, p in m.named_parameters() if p.grad is not None} for m in (model, unpacked)]
    assert with_grad[0] == with_grad[1]


def test_the_layout_says_what_the_llm_computes():
    layout = build_layout([Branch(0, "hello", response="yes")], 2, TOKENIZER)
    assert layout.llm_shape(16) == (2, 16 + layout.input_ids.shape[1])
    layout.pack = torch.zeros(3, 7, dtype=torch.int64)
    assert layout.llm_shape(16) == (3, 7) == layout.to("cpu").llm_shape(16)


# -- rows of several images -------------------------------------------------------------------------------------------


def several(number, images, words=2):
    """A row whose conversation is about that many scenes, and a text of so many words."""
    message = make_message("chat", "hello " * words, "a red circle", image_turns=(0,) * (images - 1))
    further = [
        {"image": scenes.scene_row(7, i, SIDE)["image"], "height": SIDE, "width": SIDE} for i in range(1, images)
    ]
    image = scenes.scene_row(7, 0, SIDE)["image"]
    return make_row(f"several-{number}", image, (SIDE, SIDE), "test", tasks=["chat"], messages=[message],
                    further_images=further)  # fmt: skip


def collate_several(rows, packing=None):
    collator = Collator(TOKENIZER, SIDE, UNDERSTANDING, scenes.SKELETONS, FEW, AugmentSettings(), packing=packing)
    images = [None if row["image"] is None else decode(row["image"]) for row in rows]
    further = [further_images(row) for row in rows]
    return collator(rows, images, [np.random.default_rng((0, i)) for i in range(len(rows))], further=further)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_packed_row_holds_the_images_and_branches_of_its_samples(data):
    """Of each sample: the first columns of the prefix, as many as its images have tokens, then its branches."""
    image_tokens = data.draw(st.integers(1, 5))
    count = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6)
    samples = data.draw(count)
    branches = [Branch(i, "hello", response="yes " * n) for i, (_, words) in enumerate(samples) for n in range(words)]
    layout = build_layout(branches, len(samples), TOKENIZER)
    images = torch.tensor([number for number, _ in samples])
    lengths = images * image_tokens + (layout.branch_ids >= 0).sum(1)
    most = max(1, int(lengths.max())) + data.draw(st.integers(0, 40))
    slots = pack(layout, images, Packing(most, image_tokens))
    assert slots.shape[1] <= most
    prefix = image_tokens * max(1, int(images.max()))
    width = prefix + layout.branch_ids.shape[1]
    placed = {}
    for row in slots.tolist():
        row = row[: row.index(-1)] if -1 in row else row
        for slot in row:
            placed.setdefault(slot // width, []).append(slot % width)
        assert [s // width for s in row] == sorted([s // width for s in row], key=[s // width for s in row].index)
    for sample, (number, _) in enumerate(samples):
        tokens = int((layout.branch_ids[sample] >= 0).sum())
        wanted = [*range(number * image_tokens), *range(prefix, prefix + tokens)]
        assert placed.get(sample, []) == wanted


def test_further_images_follow_their_rows_into_a_packed_batch():
    rows = [chat_row(0, 3), several(0, 3), SCENES[0], chat_row(1, 2), several(1, 2), several(2, 4)]
    batch = collate_several(rows, Packing(2000, IMAGE_TOKENS))
    assert batch.image_ids == ["several-0", SCENES[0]["image_id"], "several-1", "several-2", "text-0", "text-1"]
    assert batch.has_image.tolist() == [True] * 4 + [False] * 2 and len(batch.images) == 4
    assert batch.further_rows.tolist() == [0, 0, 2, 3, 3, 3]
    for row, image in zip(batch.further_rows.tolist(), batch.further_images, strict=True):
        assert not torch.equal(image, batch.images[row])
    assert torch.equal(batch.further_images[0], batch.further_images[2])
    assert torch.equal(batch.further_images[1], batch.further_images[4])
    real, computed = count_tokens(batch, IMAGE_TOKENS)
    assert real == 10 * IMAGE_TOKENS + int((batch.layout.branch_ids >= 0).sum())
    assert computed == batch.layout.pack.numel() and int((batch.layout.pack >= 0).sum()) == real
    unpacked = collate_several(rows)
    assert unpacked.further_rows.tolist() == [1, 1, 4, 5, 5, 5]
    width = 4 * IMAGE_TOKENS + unpacked.layout.input_ids.shape[1]
    assert count_tokens(unpacked, IMAGE_TOKENS) == (real, 6 * width)


@pytest.mark.parametrize("room", [0, 1, 5])
def test_a_row_whose_images_leave_no_room_is_dropped_and_counted(room):
    rows = [several(0, 4), several(1, 2), chat_row(0, 2)]
    batch = collate_several(rows, Packing(4 * IMAGE_TOKENS + room, IMAGE_TOKENS))
    fits = room > 0
    assert batch.truncated == {"branches": 1, "tokens": 0}
    order = ["several-0", "several-1", "text-0"] if fits else ["several-1", "several-0", "text-0"]
    assert batch.image_ids == order and batch.has_image.tolist() == [True, fits, False]
    assert batch.further_rows.tolist() == ([1] if fits else [0]), "images that no prompt sees are left out"
    assert batch.tasks == ["chat", "chat"] and batch.layout.pack.shape[1] <= 4 * IMAGE_TOKENS + room


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 150)), min_size=1, max_size=5), st.integers(70, 400))
def test_no_mix_of_images_and_texts_stops_the_run(kinds, most):
    rows = [several(i, n, words) if n else chat_row(i, words) for i, (n, words) in enumerate(kinds)]
    batch = collate_several(rows, Packing(most, IMAGE_TOKENS))
    assert batch.layout.pack.shape[1] <= most
    assert batch.has_image.tolist() == sorted(batch.has_image.tolist(), reverse=True)
    assert len(batch.images) == max(1, int(batch.has_image.sum()))
    assert batch.further_rows.tolist() == sorted(batch.further_rows.tolist())
    assert len(batch.tasks) + batch.truncated.get("branches", 0) == len(rows)
    wanted = {row["image_id"]: len(row["further_images"]) for row in rows}
    for row, number in enumerate(torch.bincount(batch.further_rows, minlength=len(rows)).tolist()):
        asked = bool((batch.layout.branch_ids[row] >= 0).any())
        assert number == (wanted[batch.image_ids[row]] if asked else 0)
