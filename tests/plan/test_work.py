"""What a job asks of a GPU, beside what PyTorch counts in the engine and arithmetic on the presets."""

from functools import cache

import numpy as np
import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lumen_ray import config
from lumen_ray.errors import UserError
from lumen_ray.inference.engine import Engine
from lumen_ray.model.settings import ModelSettings, read_settings
from lumen_ray.plan.gpus import GPUS, find_gpu
from lumen_ray.plan.work import LAUNCH_S, RECORDS_S, count_work, plan_requests
from lumen_ray.presets import model_path
from lumen_ray.train.metrics.flops import PEAKS


@cache
def counted(preset, *tasks, classes=3):
    return count_work(config.load(ModelSettings, model_path(preset)), tasks, classes)


@pytest.mark.parametrize(("tasks", "classes"), [(["detect"], 1), (["detect"], 12), (["detect", "count"], 5)])
def test_flops_are_those_that_pytorch_counts_in_the_engine(tasks, classes):
    engine = Engine.load("nano")
    image = np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)
    requests = plan_requests(tasks, classes)
    engine.run([image], [requests])  # links are made once
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        engine.run([image], [requests])
    work = count_work(read_settings("nano"), tasks, classes)
    # classes that are not in the image are left out by the engine, and not by the count
    assert counter.get_total_flops() <= 1.05 * sum(work.flops.values())
    alone = count_work(read_settings("nano"), tasks[:1], 1)
    assert counter.get_total_flops() >= 0.7 * sum(alone.flops.values())


def test_links_that_see_the_image_are_made_for_every_image():
    seen, kept = (counted(preset, "detect", classes=80) for preset in ("smollm2", "nano"))
    assert kept.links_kept and not seen.links_kept
    fewer = counted("smollm2", "detect", classes=8)
    assert seen.flops["llm"] > 3 * fewer.flops["llm"] and seen.passes == 3 and fewer.passes == 2
    assert counted("nano", "detect", classes=8).flops["llm"] == kept.flops["llm"]


def test_texts_are_written_token_by_token():
    gpu = GPUS["h100"]
    boxes, both = counted("7b", "detect"), counted("7b", "detect", "caption")
    assert boxes.texts == 0 and both.texts == 1 and both.token_flops == pytest.approx(2 * 6.6e9, rel=0.02)
    longer = both.seconds(8, gpu, "bfloat16", 0.35) - boxes.seconds(8, gpu, "bfloat16", 0.35)
    assert longer > 24 * both.llm_parameters * 2 / gpu.bandwidth  # each token reads the weights of the LLM
    assert boxes.decoders == ("grounding_dino",)


def test_time_goes_down_with_the_peak_and_memory_with_the_dtype():
    work = counted("7b", "detect")
    slow, fast = (work.seconds(8, GPUS[name], "bfloat16", 0.35) for name in ("a100", "h100"))
    assert (slow - 8 * RECORDS_S) / (fast - 8 * RECORDS_S) == pytest.approx(989 / 312)
    assert work.memory(8, "float32")["weights"] == 2 * work.memory(8, "bfloat16")["weights"] == 4 * work.parameters
    assert work.memory(16, "float32")["keys and values"] == 2 * work.memory(8, "float32")["keys and values"]


def test_a_small_model_waits_for_its_kernels_to_be_launched():
    work = counted("nano", "detect")
    assert work.seconds(8, GPUS["h100"], "bfloat16", 0.35) == pytest.approx((3 + 6 + 12) * LAUNCH_S + 8 * RECORDS_S)


@pytest.mark.parametrize("task", ["pose", "ground", "refer", "vqa", "semantic", "segment", "count"])
def test_every_task_can_be_counted(task):
    assert sum(counted("nano", task).flops.values()) > 0


@pytest.mark.parametrize(
    ("tasks", "said"),
    [(["detct"], "did you mean 'detect'"), (["generate"], "makes pictures"), (["region_segment"], "needs a region")],
)
def test_tasks_that_cannot_be_planned(tasks, said):
    with pytest.raises(UserError, match=said):
        plan_requests(tasks, 3)


def test_gpus():
    assert {gpu.peak_name for gpu in GPUS.values()} == set(PEAKS)
    assert find_gpu("H100").peak("bfloat16") == 989e12 and find_gpu("l4").peak("float32") == 30.3e12
    with pytest.raises(UserError, match="unknown gpu 'h10'; did you mean 'h100'"):
        find_gpu("h10")
