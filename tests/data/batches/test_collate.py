"""Which prompts an image gets, and what each should find."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_models import (
    SIDE,
    captioning_tokenizer,
    clip_tokenizer,
    further_images,
    scene_batch,
    tiny_model,
    tiny_tokenizer,
)

from lumen_ray.data.batches.collate import BranchSettings, Collator
from lumen_ray.data.batches.prompts import PromptBatch, SamplePrompts
from lumen_ray.data.batches.transforms import Sample, fit, transform
from lumen_ray.data.images import decode
from lumen_ray.data.scenes import render as scenes
from lumen_ray.data.shards.schema import make_message, make_row
from lumen_ray.input_size import PictureSize
from lumen_ray.recipe import AugmentSettings
from lumen_ray.tasks import ROUTING_TOKENS
from lumen_ray.train.losses import StepLosses

TASKS = ("detect", "segment", "pose", "region_caption")
MANY = BranchSettings(negatives=50, max_poses=9, absent_poses=0, max_messages=9)


def sample_of(row, augment=AugmentSettings(), seed=0):  # noqa: B008  frozen
    return transform(row, decode(row["image"]), SIDE, augment, np.random.default_rng(seed), scenes.SKELETONS)


def moved(row, shift_x, shift_y=0.0):
    """The row's sample with the picture moved by pixels."""
    plain = sample_of(row)
    matrix = plain.matrix + [[0, 0, shift_x], [0, 0, shift_y]]
    return Sample(plain.image, plain.boxes, plain.crowd, plain.masks, plain.keypoints, plain.kept, matrix, plain.size)


def figure_row():
    return next(
        row
        for row in (scenes.scene_row(0, i, SIDE) for i in range(50))
        if any(i["keypoints"] for i in row["instances"])
    )


def test_every_prompt_finds_the_instances_of_its_class():
    rows = [scenes.scene_row(1, i, SIDE) for i in range(4)]
    batch = scene_batch(rows, ("detect",), MANY)
    targets = batch.targets["perception"]
    assert len(batch.tasks) == sum(len(row["classes"]) for row in rows)
    wanted = [sum(i["phrase"] in row["classes"] for i in row["instances"]) for row in rows]
    images = batch.layout.link_images["perception"]
    for image, count in enumerate(wanted):
        assert int(targets.valid[images == image].sum()) == count


def test_the_same_generator_gives_the_same_batch():
    one, two, other = (scene_batch(3, seed=s) for s in (5, 5, 6))
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.layout.input_ids, two.layout.input_ids)
    assert one.tasks == two.tasks
    assert not torch.equal(one.images, other.images)


def about(prompts, row, sample):
    return SamplePrompts(prompts, 0, row, sample, TASKS, MANY, np.random.default_rng(0), scenes.SKELETONS)


def test_only_exhaustive_classes_are_asked_for():
    """A class whose annotations were partly rejected is not in `classes`: what is missing would count as background."""
    row = figure_row()
    phrase = next(i["phrase"] for i in row["instances"] if i["keypoints"])
    sample = sample_of(row)
    for classes, asked in ((row["classes"], True), ([c for c in row["classes"] if c != phrase], False)):
        prompts = PromptBatch()
        changed = {**row, "classes": classes}
        for add in (SamplePrompts.add_classes, SamplePrompts.add_poses):
            add(about(prompts, changed, sample))
        assert any(phrase in branch.prompt for branch in prompts.branches) == asked
        assert ("pose" in prompts.tasks) == asked


def test_prompts_are_grouped_as_requests_are():
    row = next(
        row
        for row in (scenes.scene_row(1, i, SIDE) for i in range(50))
        if len(row["instances"]) > 2 and any(p["task"] == "refer" for p in row["phrases"])
    )
    tasks = ("detect", "segment", "refer", "ground", "region_segment", "pose")
    row["phrases"] = [p for p in row["phrases"] if p["task"] == "refer"][:1] * 2 + [
        {"task": "ground", "phrase": phrase, "instances": []} for phrase in ("one", "two")
    ]
    wide = BranchSettings(negatives=9, max_phrases=9, max_poses=9, absent_poses=9, max_regions=2)
    batch = scene_batch([row, row], tasks, wide)
    layout = batch.layout
    asked: dict[int, list] = {}
    links = zip(layout.link_branches["perception"].tolist(), layout.link_images["perception"].tolist(), strict=True)
    for (branch, image), group in zip(links, layout.link_groups["perception"].tolist(), strict=True):
        asked.setdefault(group, []).append((image, batch.tasks[branch]))
    assert all(len(set(members)) == 1 for members in asked.values())  # of one image and task
    requests = [members[0] for members in asked.values()]
    for image in range(2):
        alone = {task: requests.count((image, task)) for task in tasks}
        assert alone.pop("detect") + alone.pop("segment") == 1  # all classes are asked for at once
        assert alone == {"refer": 2, "ground": 1, "region_segment": 2, "pose": 1}


@pytest.mark.parametrize("task", ["detect", "pose"])
def test_the_place_of_a_prompt_does_not_tell_whether_its_class_is_present(task):
    """Expert decoders see the prompts of a request in their order, and would learn it."""
    rows = [scenes.scene_row(2, i, SIDE) for i in range(60)]
    batch = scene_batch(rows, (task,), BranchSettings(negatives=3, absent_poses=2))
    targets, images = batch.targets["perception"], batch.layout.link_images["perception"].tolist()
    first, last = [], []
    for image in set(images):
        present = [bool(targets.valid[i].any()) for i, of in enumerate(images) if of == image and targets.counted[i]]
        if len(set(present)) == 2:
            first.append(present[0])
            last.append(present[-1])
    assert 0.2 < sum(first) / len(first) < 0.8
    assert sum(last)


def test_poses_of_absent_classes_are_asked_for():
    row = next(
        row
        for row in (scenes.scene_row(0, i, SIDE) for i in range(50))
        if all(i["phrase"] not in scenes.SKELETONS for i in row["instances"])
    )
    for absent in (0, 1):
        batch = scene_batch([row], ("pose",), BranchSettings(absent_poses=absent))
        names = next(iter(scenes.SKELETONS.values()))
        assert batch.tasks == ["pose"] * (absent * (1 + len(names)))
        if absent:
            targets = batch.targets["perception"]
            assert not targets.valid.any() and targets.counted.tolist() == [True] + [False] * len(names)
            assert batch.layout.link_parents["perception"].tolist() == [-1] + [0] * len(names)


@pytest.mark.parametrize(
    ("region", "shift", "kept"),
    [
        ({"kind": "box", "points": [0.0, 0, 20, 20], "mask": None}, -10, True),
        ({"kind": "box", "points": [0.0, 0, 20, 20], "mask": None}, -15, False),
        ({"kind": "box", "points": [0.0, 0, 20, 20], "mask": None}, -30, False),
        ({"kind": "point", "points": [10.0, 10], "mask": None}, -9, True),
        ({"kind": "point", "points": [10.0, 10], "mask": None}, -11, False),
        ({"kind": "scribble", "points": [10.0, 10, 10, 30], "mask": None}, -5, True),
        ({"kind": "polygon", "points": [0.0, 0, 20, 0, 20, 20], "mask": None}, -18, False),
    ],
)
def test_messages_about_regions_cropped_away_are_left_out(region, shift, kept):
    row = scenes.scene_row(0, 0, SIDE)
    row["regions"] = [region]
    row["messages"] = [make_message("region_caption", "What is <region>?", "a thing", (0,))]
    prompts = PromptBatch()
    about(prompts, row, moved(row, shift)).add_messages()
    assert len(prompts.branches) == len(prompts.regions) == int(kept)
    if kept:
        assert prompts.regions[0].any()
        if region["kind"] == "box":
            assert prompts.regions[0].sum() == 10 * 20


def test_a_mask_region_follows_the_map_even_if_tiny():
    row = scenes.scene_row(0, 0, SIDE)
    from pycocotools import mask as coco_mask

    for side, area in ((20, 400), (1, None)):
        inside = np.zeros((SIDE, SIDE), np.uint8, order="F")
        inside[4 : 4 + side, 8 : 8 + side] = 1
        rle = coco_mask.encode(inside)
        region = {"kind": "mask", "points": None, "mask": {"size": rle["size"], "counts": rle["counts"].decode()}}
        row["regions"] = [region]
        row["messages"] = [make_message("region_caption", "What is <region>?", "a thing", (0,))]
        prompts, sample = PromptBatch(), moved(row, 3)
        if area is None:
            sample.matrix = sample.matrix * 0.3
        about(prompts, row, sample).add_messages()
        (mask,) = prompts.regions
        if area:
            ys, xs = np.nonzero(mask)
            assert (mask.sum(), xs.min(), ys.min()) == (area, 11, 4)
        else:
            assert mask.any()


def test_a_batch_of_nothing_can_be_stepped():
    """All pictures of a rank's share are broken: its losses are zero, and every parameter still has a gradient."""
    rows = [make_row(f"broken-{i}", None, (SIDE, SIDE), "test") for i in range(2)]
    rngs = [np.random.default_rng(i) for i in range(2)]
    batch = Collator(tiny_tokenizer(), SIDE, TASKS, {}, BranchSettings(), AugmentSettings())(rows, [None, None], rngs)
    assert (batch.tasks, batch.has_image.tolist()) == ([], [False, False])
    model = tiny_model()
    losses = model(batch)
    step = StepLosses(model.loss_names, {}, [batch], torch.device("cpu"))
    step.add_batch(batch, losses).backward()
    assert step.totals().means == {} and step.totals().tasks == {}
    decoder = [p.grad for p in model.decoders.parameters()]
    assert all(g is not None and not g.any() for g in decoder)


def test_prompts_are_laid_out_as_the_model_wants_them():
    row = scenes.scene_row(5, 0, SIDE)
    texts = {}
    for layout in ("branches", "sequential"):
        collator = Collator(tiny_tokenizer(), SIDE, ("detect",), {}, prompt_layout=layout)
        batch = collator([row], [decode(row["image"])], rngs(1))
        texts[layout] = tiny_tokenizer().decode(batch.layout.input_ids[0].tolist())
    assert "Can you analyze the image" in texts["sequential"] and "analyze" not in texts["branches"]


def test_a_share_of_the_requests_looks_where_links_are_made_of_words():
    """All prompts of a request alike; the routing tokens of those that look are supervised."""
    row, tokenizer = scenes.scene_row(5, 0, SIDE), tiny_tokenizer()
    tasks = ("detect", "ground", "refer", "pose", "caption")
    routes = [tokenizer.ids[token] for token in ROUTING_TOKENS if token in tokenizer.ids]
    looked = {}
    for share in (0.0, 0.5, 1.0):
        settings = BranchSettings(looking_share=share, max_phrases=9)
        collator = Collator(tokenizer, SIDE, tasks, scenes.SKELETONS, settings, links_see_image=False)
        for seed in range(8):
            layout, names = _batch_of(collator, row, seed)
            requests = {}
            linked = layout.link_branches["perception"].tolist()
            for link, index in enumerate(linked):
                here = layout.branch_ids == index
                looks = bool(layout.seen[here].all())
                assert looks == bool(layout.seen[here].any())
                supervised = [label for label in layout.labels[here].tolist() if label in routes]
                assert len(supervised) == looks
                looked.setdefault((share, names[index] == "refer"), []).append(looks)
                if names[index] in ("detect", "pose"):
                    requests.setdefault((names[index], int(layout.link_groups["perception"][link])), set()).add(looks)
            assert all(len(found) == 1 for (name, _), found in requests.items() if name == "detect")
            parents = layout.link_parents["perception"].tolist()
            for link, parent in enumerate(parents):
                if parent >= 0:
                    own, above = (layout.seen[layout.branch_ids == linked[i]].all() for i in (link, parent))
                    assert own == above
    assert all(all(found) for (_, is_refer), found in looked.items() if is_refer)
    assert [set(looked[share, False]) for share in (0.0, 0.5, 1.0)] == [{False}, {True, False}, {True}]
    unchanged = Collator(tokenizer, SIDE, tasks, scenes.SKELETONS, BranchSettings(looking_share=0))
    layout, _ = _batch_of(unchanged, row, 1)
    assert layout.seen[layout.branch_ids >= 0].all()


def _batch_of(collator, row, seed):
    batch = collator([row], [decode(row["image"])], [np.random.default_rng(seed)])
    return batch.layout, batch.tasks


def test_foreign_names_are_asked_for_as_absent():
    row = scenes.scene_row(5, 0, SIDE)
    settings = BranchSettings(negatives=1, foreign_negatives=3)
    collator = Collator(tiny_tokenizer(), SIDE, ("detect",), {}, settings)
    without = Collator(tiny_tokenizer(), SIDE, ("detect",), {}, BranchSettings(negatives=1))
    (batch, before) = (c([row], [decode(row["image"])], rngs(1)) for c in (collator, without))
    assert len(batch.tasks) == len(before.tasks) + 3
    targets = batch.targets["perception"]
    assert int((~targets.valid.any(1)).sum()) == 4 and targets.counted.all()
    assert len(set(batch.layout.link_groups["perception"].tolist())) == 1
    text = tiny_tokenizer().decode(batch.layout.input_ids[0].tolist())
    assert all(text.count(name) <= 1 for name in row["classes"])


# -- pictures as answers ----------------------------------------------------------------------------------------------


def rngs(number):
    return [np.random.default_rng(i) for i in range(number)]


PICTURES = {name: PictureSize(SIDE, 2 * SIDE, 8) for name in ("stable_diffusion", "instruct_pix2pix")}
MOVED = AugmentSettings(flip_x=True, scale=(0.8, 1.2), shift=0.1, color=0.4)


def edit_row(number=0):
    """A row whose edited picture is its own, upside down and twice as large."""
    row = scenes.scene_row(5, number, SIDE)
    large = Image.fromarray(decode(row["image"])[::-1].copy()).resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST)
    messages = [*row["messages"], make_message("edit", "turn it over", "")]
    messages[-1]["turns"] = messages[-1]["turns"][:1]
    return {**row, "messages": messages}, np.asarray(large)


def test_a_description_asks_for_the_picture_that_it_does_not_see():
    """As it is, whatever augmentation the other tasks of the stage get."""
    rows = [scenes.scene_row(5, n, SIDE) for n in range(2)]
    collate = Collator(tiny_tokenizer(), SIDE, ("generate",), {}, augment=MOVED, input_rules=PICTURES)
    batch = collate(rows, [decode(r["image"]) for r in rows], rngs(2))
    assert batch.tasks == ["generate"] * 2 and not batch.has_image.any()
    targets = batch.targets["generation"]
    for number, row in enumerate(rows):
        assert np.array_equal(targets.images[number].permute(1, 2, 0).numpy(), decode(row["image"]))
    assert targets.extents.tolist() == [[SIDE, SIDE]] * 2
    assert batch.layout.query_slots["generation"].shape == (2, 64, 2)


def test_rows_without_a_caption_or_a_picture_ask_for_none():
    row = scenes.scene_row(5, 0, SIDE)
    silent = {**row, "messages": [m for m in row["messages"] if m["task"] != "caption"]}
    batch = Collator(tiny_tokenizer(), SIDE, ("generate",), {})([silent, row], [decode(row["image"]), None], rngs(2))
    assert batch.tasks == [] and "generation" not in batch.targets


@pytest.mark.parametrize(("task", "family"), [("generate", "generation"), ("edit", "editing")])
def test_captions_are_read_as_the_text_encoder_reads_them(task, family):
    """The description or the instruction itself, whatever prompt is around it; long ones are cut."""
    said = ["a red one", "turn it over , and then over once more", "Red"]
    rows = []
    for number, text in enumerate(said):
        message = make_message("caption" if task == "generate" else "edit", "describe the image .", text)
        if task == "edit":
            message["turns"] = [{"role": "user", "content": text}]
        rows.append({**scenes.scene_row(5, number, SIDE), "messages": [message]})
    images = [decode(row["image"]) for row in rows]
    targets = {}
    for tokenizer in (captioning_tokenizer(9), tiny_tokenizer()):
        batch = Collator(tokenizer, SIDE, (task,), {}, input_rules=PICTURES)(rows, images, rngs(3), images)
        targets[tokenizer.captions is None] = batch.targets[family]
    ids = clip_tokenizer()(said, padding="max_length", truncation=True, max_length=9, return_tensors="pt").input_ids
    assert targets[False].caption_ids.dtype == torch.int64 and torch.equal(targets[False].caption_ids, ids)
    assert targets[True].caption_ids is None


@pytest.mark.parametrize("augment", [AugmentSettings(), MOVED])
def test_an_edited_picture_lies_where_the_picture_does(augment):
    """Whatever augmentation does to both."""
    row, edited = edit_row()
    seen = {}
    for name, target in (("edited", edited), ("own", decode(row["image"]))):
        collator = Collator(tiny_tokenizer(), SIDE, ("edit", "caption"), {}, augment=augment, input_rules=PICTURES)
        seen[name] = collator([row], [decode(row["image"])], rngs(1), [target])
    batch = seen["own"]
    assert batch.has_image.all() and batch.tasks.count("edit") == 1
    target = batch.targets["editing"].images[0].float()
    assert torch.equal(target, batch.pixels["instruct_pix2pix"].images[0].float())
    if augment == AugmentSettings():
        assert (target - batch.images[0].float()).abs().mean() < 1
    other = seen["edited"].targets["editing"].images[0].float()
    assert torch.equal(seen["edited"].images, batch.images) and (other - target).abs().mean() > 5
    without = Collator(tiny_tokenizer(), SIDE, ("edit",), {})([row], [decode(row["image"])], rngs(1))
    assert without.tasks == []


def test_a_region_on_an_instance_asks_for_its_mask():
    rows = [scenes.scene_row(5, n, SIDE) for n in range(4)]
    branches = BranchSettings(max_regions=2)
    collator = Collator(tiny_tokenizer(), SIDE, ("region_segment",), {}, branches)
    seen = set()
    for seed in range(6):
        generators = [np.random.default_rng((seed, n)) for n in range(4)]
        batch = collator(rows, [decode(row["image"]) for row in rows], generators)
        targets, masks = batch.targets["perception"], batch.region_masks
        assert len(masks) == len(batch.tasks) == len(targets.boxes) == sum(min(2, len(r["instances"])) for r in rows)
        for link, branch in enumerate(batch.layout.link_branches["perception"].tolist()):
            wanted = targets.masks[targets.mask_index[link, 0]].bool()
            region = torch.nn.functional.max_pool2d(masks[branch][None].float(), 4)[0].bool()
            assert targets.valid[link].sum() == 1 and (region & wanted).any()
            seen.add(int(region.sum() > wanted.sum()))
    assert seen == {0, 1}  # boxes are more than the instance, points and scribbles less


# -- conversations about several images -------------------------------------------------------------------------------


def several(task="chat", image_turns=(0, 1)):
    """A conversation about three images of different shapes, the first of which is a scene."""
    row = scenes.scene_row(5, 0, SIDE)
    pictures = [Image.fromarray(decode(scenes.scene_row(6, n, SIDE)["image"])) for n in range(2)]
    pictures = [pictures[0].crop((0, 0, SIDE // 2, SIDE)), pictures[1].resize((2 * SIDE, SIDE))]
    further = []
    for picture in pictures:
        picture.save(buffer := io.BytesIO(), "PNG")
        further.append({"image": buffer.getvalue(), "height": picture.height, "width": picture.width})
    message = make_message(task, "is image 2 like it ?", "no", image_turns=image_turns)
    message["turns"] += make_message(task, "and this ?", "yes")["turns"]
    return {**row, "messages": [message], "further_images": further}


def collate_several(row, tasks, augment=AugmentSettings(), further=True, size=SIDE):  # noqa: B008  frozen
    collator = Collator(tiny_tokenizer(), size, tasks, {}, augment=augment, input_rules=PICTURES)
    pictures = [further_images(row)] if further else None
    return collator([row], [decode(row["image"])], rngs(1), further=pictures)


@pytest.mark.parametrize("size", [SIDE, (48, 96)])
def test_further_images_are_fitted_like_the_first_and_never_augmented(size):
    """Texts compare them by side, size and colour."""
    row = several()
    augment = AugmentSettings(flip_x=True, turn=True, scale=(0.5, 2.0), shift=0.3, color=0.9)
    batch = collate_several(row, ("chat",), augment, size=size)
    images = [batch.images[0], *batch.further_images]
    encoded = [row["image"], *(image["image"] for image in row["further_images"])]
    for found, image in zip(images, encoded, strict=True):
        np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), fit(decode(image), size)[0])
    assert batch.further_rows.tolist() == [0, 0] and batch.further_rows.dtype == torch.int64
    alone = {**row, "further_images": [], "messages": [make_message("chat", "q", "a")]}
    assert not torch.equal(collate_several(alone, ("chat",), augment, size=size).images, batch.images)


def test_a_branch_knows_when_each_image_is_seen():
    row, prompts = several(), PromptBatch()
    drawn = SamplePrompts(prompts, 0, row, sample_of(row), ("chat",), MANY, np.random.default_rng(0), further=2)
    drawn.add_messages()
    (branch,) = prompts.branches
    assert branch.image_turns == (0, 1) and len(branch.history) == 1
    row["messages"] = [make_message("chat", "q", "a")]
    drawn.add_messages()
    assert prompts.branches[1].image_turns == ()


@pytest.mark.parametrize(("tasks", "further"), [(("detect",), True), (("chat",), False)])
def test_images_that_no_prompt_sees_are_not_in_the_batch(tasks, further):
    batch = collate_several(several(), tasks, further=further)
    assert batch.further_images.shape == (0, 3, SIDE, SIDE) and batch.further_rows.tolist() == []
    assert "chat" not in batch.tasks, "nor is a message asked whose images are missing"


def test_a_caption_of_several_images_is_not_generated():
    row = several("caption")
    assert collate_several(row, ("generate",)).tasks == []
    row["messages"].append(make_message("caption", "what ?", "a red circle"))
    batch = collate_several(row, ("generate", "caption"))
    assert sorted(batch.tasks) == ["caption", "generate"] and len(batch.further_images) == 0
    assert not batch.has_image.any(), "prompts of a step that generates see no image"


def test_a_batch_moves_with_its_further_images():
    batch = collate_several(several(), ("chat",)).to("meta")
    assert batch.further_images.is_meta and batch.further_rows.is_meta
