"""Accumulated micro-steps make the step of the undivided batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.tiny_models import EXPERTS, SIDE, scene_batch, tiny_model, tiny_tokenizer
from support.train_fakes import cut_after, job_of, log_of, on_two_ranks, weights_of

from lumen_ray.data.batches.collate import BranchSettings, Collator
from lumen_ray.data.batches.plan import Plan
from lumen_ray.data.images import decode
from lumen_ray.data.scenes import render as scenes
from lumen_ray.decoders.base import LossTerm
from lumen_ray.decoders.registry import DECODERS
from lumen_ray.errors import UserError
from lumen_ray.recipe import AugmentSettings
from lumen_ray.tasks import TASKS
from lumen_ray.train import parallel
from lumen_ray.train.launch import train_local
from lumen_ray.train.losses import TASK_NAMES, StepLosses, expected_counts, per_task

TEXT = ["caption", "vqa", "region_caption", "chat"]
CPU = torch.device("cpu")


def text_stage(**changes):
    return {"steps": 6, "groups": [{"tasks": TEXT}]} | changes


@pytest.fixture(scope="module")
def text(data, tmp_path_factory):
    """Six steps of text alone, whose normaliser is known beforehand: undivided, and in two micro-steps."""
    folder = tmp_path_factory.mktemp("text")
    train_local(job_of(data, folder / "one", text_stage(), batch_size=16))
    train_local(job_of(data, folder / "two", text_stage(accumulate=2), batch_size=16, checkpoint_every=2))
    return folder / "one", folder / "two"


def test_losses_are_those_of_the_undivided_batch(text):
    one, two = map(log_of, text)
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        tasks = {name: value for name, value in a.items() if name.startswith("task/")}
        assert tasks == pytest.approx({name: b[name] for name in tasks}, rel=1e-3)
    assert one[0]["loss"] != pytest.approx(one[1]["loss"], rel=1e-4)


def test_an_accumulating_run_resumes_to_the_same_bits(data, text):
    whole, losses = weights_of(text[1]), [line["loss"] for line in log_of(text[1])]
    cut_after(text[1], 4)
    train_local(job_of(data, text[1], text_stage(accumulate=2), batch_size=16, checkpoint_every=2))
    again = weights_of(text[1])
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert [line["loss"] for line in log_of(text[1])] == losses


def test_on_two_ranks_as_well(data, text, tmp_path):
    prepared = job_of(data, tmp_path / "run", text_stage(accumulate=2), workers=2, batch_size=16)
    on_two_ranks(train_local, prepared)
    for a, b in zip(log_of(text[0]), log_of(tmp_path / "run"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def gradients(model, batches):
    model.zero_grad()
    losses = StepLosses(model.loss_names, {}, batches, CPU)
    for batch in batches:
        losses.add_batch(batch, model(batch)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), losses.totals()


def test_perception_gradients_point_the_same_way():
    """Their normalisers are projected; how far that is off is measured here."""
    model = tiny_model().train()
    tasks = ("detect", "segment", "pose")
    rows = scene_batch_of(range(6), tasks)
    parts = [scene_batch_of(range(first, first + 3), tasks) for first in (0, 3)]
    (whole, sums), (split, added) = gradients(model, [rows]), gradients(model, parts)
    assert added.means == pytest.approx(sums.means, rel=1e-4)
    assert torch.nn.functional.cosine_similarity(whole, split, dim=0) > 0.99
    assert float(split.norm() / whole.norm()) == pytest.approx(1, abs=0.1)


def scene_batch_of(indices, tasks):
    """Scenes whose prompts are drawn as by their number, in whatever batch."""
    rows = [scenes.scene_row(0, i, SIDE) for i in indices]
    collator = Collator(tiny_tokenizer(), SIDE, tasks, scenes.SKELETONS, BranchSettings(), AugmentSettings())
    return collator(rows, [decode(row["image"]) for row in rows], [np.random.default_rng(i) for i in indices])


def test_what_is_known_beforehand_is_what_the_losses_count():
    model, batch = tiny_model(), scene_batch(4)
    losses = model(batch)
    expected = dict(zip(model.loss_names, expected_counts(batch, model.loss_names).tolist(), strict=True))
    assert expected["lm"] == float(losses["lm"].count)
    assert expected["keypoint"] == float(losses["keypoint"].count) > 0
    assert expected["heatmap"] == expected["box"] >= expected["mask"] > 0
    text_only = expected_counts(scene_batch(2, tuple(TEXT)), (*model.loss_names, "other"))
    assert text_only[1:].tolist() == [0] * (len(model.loss_names) - 1) + [1]


def test_prompts_without_a_text_to_learn_are_not_in_the_mean_of_their_task():
    """Those of words alone: their routing token follows from the task, not from what is seen."""
    tasks, settings = ("detect", "pose", "caption"), BranchSettings(looking_share=0)
    collator = Collator(tiny_tokenizer(), SIDE, tasks, scenes.SKELETONS, settings, links_see_image=False)
    row = scenes.scene_row(0, 3, SIDE)
    batch = collator([row], [decode(row["image"])], [np.random.default_rng(0)])
    losses = tiny_model(links_see_image=False)(batch)
    sums, counts = per_task(batch, losses, ("lm",), CPU)[0]
    texts = [batch.tasks[i] for i in range(len(batch.tasks)) if losses["lm"].each[i] > 0]
    assert len(texts) < len(batch.tasks) - 3
    assert counts.tolist() == [texts.count(name) for name in TASK_NAMES]
    assert float(sums.sum()) == pytest.approx(float(losses["lm"].each.sum()))


@pytest.mark.parametrize("decoder", ["grounding_dino", "unipose"])
def test_experts_count_the_objects_of_the_prompts_they_serve(decoder):
    """Among prompts that other decoders serve; of objects without keypoints, and of those that the batch lacks."""
    model = tiny_model(**EXPERTS)
    for batch in (scene_batch(4, ("detect", "pose", "region_caption")), scene_batch(4, ("detect",))):
        names = DECODERS[decoder].losses
        expected = dict(zip(names, expected_counts(batch, names).tolist(), strict=True))
        losses = model(replace(batch, decoders=[decoder]))
        counts = {name: float(losses[name].count) if name in losses else 0.0 for name in names}
        if decoder == "unipose":
            assert expected == counts
        else:  # which counts an object once, however many prompts of a group name it
            assert all(expected[name] >= counts[name] > 0 for name in names)


def test_micro_steps_weigh_every_object_alike():
    """Of one scene and of six: an object of either adds as much to the step."""
    batches = [
        scene_batch([scenes.scene_row(0, i, SIDE) for i in rows], ("detect", "pose")) for rows in ([0], range(1, 7))
    ]
    names = ("lm", "box", "gdino_box", *DECODERS["unipose"].losses)
    step, weights = StepLosses(names, {}, batches, CPU), []
    for batch in batches:
        counts = expected_counts(batch, names)
        share = torch.zeros(len(names), requires_grad=True)  # what is added for each object or token
        step.add_batch(
            batch, {n: LossTerm((share[i] + 1) * counts[i], counts[i]) for i, n in enumerate(names)}
        ).backward()
        weights.append(share.grad / counts)
    one, other = weights
    assert torch.allclose(one, other) and bool((one < 1).all())


def test_losses_by_task_are_means_over_branches():
    model, batch = tiny_model(), scene_batch(4)
    losses = model(batch)
    step = StepLosses(model.loss_names, {}, [batch], CPU)
    step.add_batch(batch, losses)
    sums = step.totals()
    each = losses["lm"].each.tolist()
    for task in TASKS:
        mine = [value for name, value in zip(batch.tasks, each, strict=True) if name == task]
        assert (f"lm/{task}" in sums.tasks) == bool(mine)
        if mine:
            assert sums.tasks[f"lm/{task}"] == pytest.approx(sum(mine) / len(mine), rel=1e-5)
    assert set(TASK_NAMES) == set(TASKS)
    assert "heatmap/detect" in sums.tasks and "heatmap/caption" not in sums.tasks


@pytest.fixture(scope="module")
def experts():
    return tiny_model(**EXPERTS)


def sums_of(model, batch):
    losses = model(batch)
    step = StepLosses(model.loss_names, {}, [batch], CPU)
    step.add_batch(batch, losses)
    return losses, step.totals()


def test_losses_that_a_step_does_not_train_are_left_out(experts):
    """A zero would pull down every average, and every curve in each step of another group."""
    _, text = sums_of(experts, scene_batch(2, tuple(TEXT)))
    assert set(text.means) == {"lm"}
    batch = replace(scene_batch(4, ("detect",)), decoders=["grounding_dino"])
    batch.targets["perception"].mask_index[:] = -1  # images that are annotated with boxes alone
    _, boxes = sums_of(experts, batch)
    assert set(boxes.means) == {"lm", "gdino_class", "gdino_box"}
    assert all(value > 0 for value in boxes.means.values())


def test_a_class_loss_without_objects_is_reported(experts):
    batch = replace(scene_batch(2, ("detect",)), decoders=["grounding_dino"])
    batch.targets["perception"].valid[:] = False
    losses, sums = sums_of(experts, batch)
    assert float(losses["gdino_class"].count) == 0
    assert sums.means["gdino_class"] == pytest.approx(float(losses["gdino_class"].total.detach())) != 0


def test_the_losses_of_experts_are_reported_by_task(experts):
    """Of each object prompt; keypoint prompts are part of it, and prompts of tasks that it does not serve are none."""
    batch = scene_batch(4, ("detect", "segment", "refer", "pose"))
    losses, sums = sums_of(experts, batch)
    layout = batch.layout
    tasks = [batch.tasks[i] for i in layout.link_branches["perception"].tolist()]
    objects = [parent < 0 for parent in layout.link_parents["perception"].tolist()]
    assert not all(objects)
    for loss, served in (("gdino_class", {"detect", "segment", "refer"}), ("unipose_class", {"pose"})):
        tasks_of_loss = {name.partition("/")[2] for name in sums.tasks if name.startswith(f"{loss}/")}
        assert tasks_of_loss == served
        kept = [is_object for is_object, task in zip(objects, tasks, strict=True) if task in served]
        names = [task for task in tasks if task in served]
        for task in served:
            each = zip(losses[loss].each.tolist(), names, kept, strict=True)
            mine = [value for value, name, is_object in each if name == task and is_object]
            assert sums.tasks[f"{loss}/{task}"] == pytest.approx(sum(mine) / len(mine), rel=1e-4)
    _, pictures = sums_of(experts, scene_batch(2, ("generate",)))
    assert pictures.tasks["generate/generate"] == pytest.approx(pictures.means["generate"], rel=1e-4)


def _rank_with_its_own_losses():
    """One rank has objects, the other text only: both tell of the objects, and neither of keypoints."""
    mine = ("detect",) if parallel.rank() == 0 else ("caption",)
    _, sums = sums_of(tiny_model(), scene_batch(2, mine))
    assert set(sums.means) == {"lm", "heatmap", "match", "box", "mask"}
    assert {"lm/detect", "lm/caption", "heatmap/detect"} == set(sums.tasks)


def test_losses_are_those_that_any_rank_gave():
    on_two_ranks(_rank_with_its_own_losses)


def _rank_with_its_own_task():
    """Each rank's batch has a task that the other's lacks: both must still see both."""
    mine = ("caption",) if parallel.rank() == 0 else ("vqa",)
    model, batch = tiny_model(), scene_batch(2, mine)
    step = StepLosses(model.loss_names, {}, [batch], CPU)
    step.add_batch(batch, model(batch), 16)
    sums = step.totals()
    assert {"lm/caption", "lm/vqa"} == set(sums.tasks)
    alone = int((batch.layout.branch_ids >= 0).sum()) + 2 * 16
    assert sums.tokens > alone
    assert sums.images == 4


def test_tasks_and_tokens_are_those_of_all_ranks():
    on_two_ranks(_rank_with_its_own_task)


def test_micro_steps_must_divide_the_batch(data, tmp_path):
    prepared = job_of(data, tmp_path / "run", text_stage(accumulate=3))
    with pytest.raises(UserError, match="accumulate 3 times 1 workers must divide the 2 parts"):
        Plan(prepared.manifest, prepared.job.recipe)
