"""A run that cannot go on says where, on what, and what to change; its last checkpoint stays as it was."""

import errno

import pytest
import torch
from tiny_models import scene_batch, tiny_model
from train_fakes import job_of, on_two_ranks

from lumen_ray.data.feed import local_batches
from lumen_ray.data.mixture import Plan
from lumen_ray.errors import UserError
from lumen_ray.train import checkpoint, parallel
from lumen_ray.train.failures import DivergedError, explained, find_module, full_disk, where
from lumen_ray.train.loop import Trainer
from lumen_ray.train.run_folder import told

CPU = torch.device("cpu")


class Doomed(torch.autograd.Function):
    """Passes values on; its gradient is not a number."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def started(data, run, **stage):
    """A trainer and its batches, checkpoints every step."""
    prepared = job_of(data, run, {"steps": 3} | stage, checkpoint_every=1)
    trainer = Trainer(prepared.job, CPU)
    return trainer, local_batches(prepared.reader, Plan(prepared.manifest, prepared.job.recipe))


def at_step(step, trainer, module, hook):
    """Registers `hook` on the module's forward, to act from that step on."""
    module.register_forward_hook(lambda m, args, out: hook(out) if trainer.step >= step else None)


def raised(error, trainer, batches):
    """The message of the error that ends the run at step 2, after which the checkpoint of step 2 is whole."""
    with pytest.raises(error) as found:
        trainer.fit(batches)
    message = str(found.value)
    assert "\n" not in message and "checkpoint is intact" in message and "(stage s0)" in message
    newest = checkpoint.latest(trainer.run)
    assert checkpoint.position(newest)["step"] == 2
    checkpoint.load_weights(newest, tiny_of(trainer))
    return message


def tiny_of(trainer):
    from lumen_ray.model.build import build_model

    return build_model(trainer.job.settings, len(trainer.job.tokenizer))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_output_that_is_not_finite(data, tmp_path, accumulate):
    trainer, batches = started(data, tmp_path / "run", accumulate=accumulate)
    layer = trainer.model.trunk.llm.model.layers[1].mlp.up_proj
    at_step(2, trainer, layer, lambda out: out * float("inf"))
    message = raised(DivergedError, trainer, batches)
    assert message.startswith("step 2 (stage s0), images scene-")
    assert "loss lm" in message and "the output of trunk.llm.model.layers.1.mlp.up_proj;" in message
    assert "lower the learning rate" in message


def test_a_gradient_that_is_not_finite(data, tmp_path):
    trainer, batches = started(data, tmp_path / "run")
    at_step(2, trainer, trainer.model.trunk.vision.clip, Doomed.apply)
    message = raised(DivergedError, trainer, batches)
    assert "the gradient is not finite" in message
    assert "the gradient of the output of trunk.vision.clip" in message
    weights = trainer.model.state_dict()
    assert all(torch.isfinite(value).all() for value in weights.values())  # the step was not taken


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory(data, tmp_path, error):
    def fail(out):
        raise error

    trainer, batches = started(data, tmp_path / "run")
    at_step(2, trainer, trainer.model.trunk.dense, fail)
    message = raised(UserError, trainer, batches)
    assert message.startswith("step 2 (stage s0), images scene-") and "rank 0 ran out of memory" in message
    assert "'accumulate'" in message and "'activation_checkpointing'" in message and "'batch_size'" in message


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device", "/disk/file")


def test_a_full_disk_during_a_log(data, tmp_path, monkeypatch):
    trainer, batches = started(data, tmp_path / "run")
    write = trainer.log.write
    trainer.log.write = lambda step, *rest: no_space() if step == 2 else write(step, *rest)
    message = raised(UserError, trainer, batches)
    assert message.startswith("step 2") and "disk of the run folder is full at '/disk/file'; free space" in message


def test_a_full_disk_during_a_save(data, tmp_path, monkeypatch):
    trainer, batches = started(data, tmp_path / "run")
    at_step(2, trainer, trainer.model, lambda out: monkeypatch.setattr(torch, "save", no_space))
    message = raised(UserError, trainer, batches)
    assert message.startswith("saving the checkpoint of step 3 (stage s0): the disk")


def test_a_device_that_is_full_behind_other_errors():
    error = RuntimeError("writing failed")
    error.__context__ = OSError(errno.EDQUOT, "quota")
    assert full_disk(error).errno == errno.EDQUOT
    assert full_disk(RuntimeError()) is None and full_disk(OSError(errno.EACCES, "no")) is None


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), OSError(errno.EACCES, "no"), ValueError("x")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error), match=str(error).replace("[", "\\[")), explained("step 0", CPU):
        raise error


def test_a_worker_that_ray_ended_for_its_memory_is_told():
    from ray.exceptions import OutOfMemoryError

    error = RuntimeError("worker group failed")
    error.worker_failures = {0: OutOfMemoryError("node running low on memory")}
    cause = told(error)
    assert isinstance(cause, UserError) and cause.reason == "out_of_memory"
    assert "Ray ended it; raise 'accumulate'" in str(cause) and "\n" not in str(cause)


def test_many_samples_are_cut_short():
    assert where(3, "joint", list("abc")) == "step 3 (stage joint), images a, b, c"
    assert where(3, "joint", [str(i) for i in range(20)]).endswith("6, 7 and 12 more")


def _one_bad_rank():
    """Only the second rank's samples break: both must name the module and those samples."""
    model = tiny_model().train()
    parallel.shard(model, CPU)
    batch = scene_batch(1, ("caption",))
    if parallel.rank() == 1:
        model.trunk.llm.model.layers[0].register_forward_hook(lambda m, a, out: out * float("nan"))

    def run():
        sum(term.total for term in model(batch).values()).backward()

    module, image_ids = find_module(model, [(run, [f"image-{parallel.rank()}"])])
    assert module == "the output of trunk.llm.model.layers.0"
    assert image_ids == ["image-1"]


def test_the_rank_that_broke_is_the_one_named():
    on_two_ranks(_one_bad_rank)
