"""The parts of the GPU bench that a CPU can run: same batch, same work, nothing but torch."""

import subprocess
import sys

import pytest
import torch
import yaml
from support.tiny_models import EXPERTS, tiny_settings

from lumen_ray.bench import gpu
from lumen_ray.bench.timing import SidesDiffer
from lumen_ray.errors import UserError

LOAD = gpu.Load(images=2, classes=2, captions=1, objects=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def worker():
    settings = tiny_settings()
    tokenizer = gpu.make_tokenizer(settings)
    return gpu.TimedModel(settings, len(tokenizer), gpu.make_batch(settings, tokenizer, LOAD), CPU, compiled=False)


@pytest.mark.parametrize(("part", "learns"), [("trunk", "trunk."), ("decoders", "decoders."), ("step", "")])
def test_a_part_computes_the_gradients_of_its_own_weights(worker, part, learns):
    before = {name: p.detach().clone() for name, p in worker.model.named_parameters()}
    assert torch.isfinite(worker.run(part))
    touched = {name for name, p in worker.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched and all(name.startswith(learns) for name in touched)
    if part == "step":
        assert any(name.startswith("trunk.") for name in touched)
        assert any(name.startswith("decoders.") for name in touched)
    for name, p in worker.model.named_parameters():  # the learning rate is 0: every run does the same work
        assert torch.equal(p, before[name])


def test_the_result_of_every_part(worker, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "compiled_parts", lambda settings: ())  # compiling takes minutes
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_settings().model_dump(mode="json")))
    results = list(gpu.bench(str(tmp_path / "tiny.yaml"), device="cpu", load=LOAD, repeats=1, warm=1, turns=1))
    assert [r.name for r in results] == ["gpu/trunk", "gpu/decoders", "gpu/step"]
    for result in results:
        assert set(result.rates) == {"compiled", "eager"}
        top = result.details["top"]["eager"]
        assert len(top) == gpu.TOP
        assert top == sorted(top, key=lambda op: -op["ms"])
        assert result.details["mfu"] == {"compiled": None, "eager": None}  # no peak is known of a CPU
        assert result.details["tokens"] == worker.tokens()
    flops = {r.name: r.details["tflops"] for r in results}
    assert flops["gpu/step"] == pytest.approx(flops["gpu/trunk"] + flops["gpu/decoders"])


def test_sides_that_differ_are_refused(worker):
    class Other(gpu.TimedModel):
        def run(self, part):
            return super().run(part) * 1.2

    settings = tiny_settings()
    tokenizer = gpu.make_tokenizer(settings)
    other = Other(settings, len(tokenizer), gpu.make_batch(settings, tokenizer, LOAD), CPU, compiled=False)
    with pytest.raises(SidesDiffer, match="differ by 20"):
        gpu._warm_up({"compiled": other, "eager": worker}, "trunk", 1)
    assert gpu._warm_up({"compiled": worker, "eager": worker}, "trunk", 1) == 0


def test_a_preset_without_a_light_decoder_is_refused(tmp_path):
    settings = tiny_settings(lumen=None, unipose=EXPERTS["unipose"])
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    with pytest.raises(UserError, match="no decoder that reads the trunk's dense features") as error:
        list(gpu.bench(str(tmp_path / "tiny.yaml"), device="cpu"))
    assert error.value.reason == "no_decoder"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    (result,) = gpu.bench()
    assert "no CUDA device" in result.to_json()["skipped"]


def test_it_needs_neither_ray_nor_pycocotools_nor_diffusers():
    code = """
import sys
from importlib.abc import MetaPathFinder
class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "pycocotools", "diffusers"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from lumen_ray.bench import command, gpu
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
