"""A run that cannot go on says where, on what, and what to change; its last checkpoint stays as it was."""

import errno
from pathlib import Path

import pytest
import torch
from support.tiny_models import scene_batch, tiny_model
from support.train_fakes import job_of, on_two_ranks

from lumen_ray.checkpoints.safetensors_file import write_weights
from lumen_ray.data.batches.feed import local_batches
from lumen_ray.data.batches.plan import Plan
from lumen_ray.errors import UserError
from lumen_ray.model import build
from lumen_ray.train import parallel
from lumen_ray.train.launch import train_local
from lumen_ray.train.run import checkpoint
from lumen_ray.train.run.failures import DivergedError, as_user_error, explained, find_module, module_of, where
from lumen_ray.train.trainer import Trainer

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
    assert "\n" not in message and "the last checkpoint, '0000002-s0', is intact" in message and "(stage s0)" in message
    newest = checkpoint.latest(trainer.run)
    assert checkpoint.position(newest)["step"] == 2
    checkpoint.load_weights(newest, tiny_of(trainer))
    return message


def tiny_of(trainer):
    from lumen_ray.model.build import build_model

    return build_model(trainer.job.start.settings, len(trainer.job.start.tokenizer))


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
    assert message.startswith("step 2 (stage s0), images scene-")
    assert "rank 0 ran out of memory in trunk.dense;" in message
    assert "'accumulate'" in message and "'activation_checkpointing'" in message and "'batch_size'" in message


def test_out_of_memory_before_the_first_checkpoint(data, tmp_path):
    trainer, batches = started(data, tmp_path / "run")
    trainer.model.trunk.dense.register_forward_hook(no_memory)
    with pytest.raises(UserError, match="in trunk.dense; .*; there is no checkpoint yet$"):
        trainer.fit(batches)


def no_memory(*args):
    raise torch.OutOfMemoryError("CUDA out of memory")


class Greedy(torch.autograd.Function):
    """Passes values on, and has no memory for its gradient."""

    forward = Doomed.forward
    backward = staticmethod(no_memory)


def test_the_module_that_had_no_memory_is_named():
    inner = torch.nn.Linear(2, 2)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(inner))
    optimizer = torch.optim.SGD(model.parameters())

    def place(run):
        with pytest.raises(torch.OutOfMemoryError) as found:
            run()
        return module_of(found.value, model)

    assert place(lambda: Greedy.apply(model(torch.ones(2))).sum().backward()) == " in the backward pass"
    handle = inner.register_forward_hook(no_memory)
    assert place(lambda: model(torch.ones(2))) == " in 1.0"
    handle.remove()
    again = torch.utils.checkpoint.checkpoint(model, torch.ones(2), use_reentrant=False)
    inner.register_forward_pre_hook(no_memory)
    assert place(lambda: again.sum().backward()) == " in 1.0"  # its activations are computed again
    optimizer.register_step_pre_hook(no_memory)
    assert place(optimizer.step) == " in the optimizer"
    assert place(no_memory) == ""


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device", "/disk/file")


def test_a_full_disk_during_a_log(data, tmp_path, monkeypatch):
    trainer, batches = started(data, tmp_path / "run")
    write = trainer.log.write
    trainer.log.write = lambda step, *rest: no_space() if step == 2 else write(step, *rest)
    message = raised(UserError, trainer, batches)
    assert message.startswith("step 2") and "disk of the run folder is full at '/disk/file'; free space" in message


def test_a_full_disk_during_the_export(data, tmp_path, monkeypatch):
    trainer, batches = started(data, tmp_path / "run")
    monkeypatch.setattr(build, "write_weights", lambda path, state: write_weights(Path("/dev/full"), state))
    with pytest.raises(UserError, match="^writing the model: the disk of the run folder is full") as error:
        trainer.fit(batches)
    assert error.value.reason == "disk_full" and "'0000003-s0', is intact" in str(error.value)


def test_a_full_disk_during_a_save(data, tmp_path, monkeypatch):
    trainer, batches = started(data, tmp_path / "run")

    def fill(out):
        trainer.saver.wait()
        monkeypatch.setattr(torch, "save", no_space)

    at_step(2, trainer, trainer.model, fill)
    message = raised(UserError, trainer, batches)
    assert message.startswith("saving the checkpoint of step 3 (stage s0): the disk")


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), OSError(errno.EACCES, "no"), ValueError("x")])
def test_other_errors_stay_what_they_are(error, tmp_path):
    with pytest.raises(type(error)) as found, explained("step 0", tmp_path, torch.nn.Identity(), CPU):
        raise error
    assert found.value is error


class Wrapped(Exception):
    """As Ray wraps what went wrong in a worker."""

    def __init__(self, worker_failures):
        super().__init__("a worker failed")
        self.worker_failures = worker_failures


@pytest.mark.parametrize("error", [UserError("mend this", "broken_shards"), DivergedError("loss lm is not finite")])
def test_what_the_user_must_mend_is_found_in_its_wrappers(error, tmp_path):
    middle = RuntimeError("wrapped by a task")
    middle.__cause__ = error
    found = as_user_error(Wrapped({0: RuntimeError("connection closed by peer"), 1: middle}), tmp_path)
    assert isinstance(found, UserError) and str(found) == str(error)
    assert found.reason == getattr(error, "reason", "training_diverged")


def test_an_error_of_a_reading_task_is_reported_without_its_traceback(tmp_path):
    from ray.exceptions import RayTaskError

    wrapped = RayTaskError("read", "Traceback:\n", UserError("mend this", "broken_shards")).as_instanceof_cause()
    found = as_user_error(wrapped, tmp_path)
    assert (str(found), found.reason) == ("mend this", "broken_shards")


def test_a_full_disk_is_said_in_one_sentence_and_other_errors_stay(tmp_path):
    full = RuntimeError("writing failed")
    full.__context__ = OSError(errno.EDQUOT, "quota", "/run/x")
    found = as_user_error(Wrapped({0: full}), tmp_path)
    assert isinstance(found, UserError) and found.reason == "disk_full"
    assert str(found).startswith("the disk of the run folder is full at '/run/x'; free space")
    assert str(found).endswith("; there is no checkpoint yet")
    other = OSError(errno.EIO, "input/output error")
    assert as_user_error(other, tmp_path) is other


def ended_by_ray():
    """As Ray Train tells of a worker that the memory monitor ended."""
    from ray.exceptions import OutOfMemoryError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    return Wrapped({0: WorkerHealthCheckFailedError("polling failed", OutOfMemoryError("node running low on memory"))})


def test_a_worker_that_ray_ended_for_its_memory_is_reported(data, tmp_path):
    cause = as_user_error(ended_by_ray(), tmp_path)
    assert isinstance(cause, UserError) and cause.reason == "out_of_memory" and "\n" not in str(cause)
    assert "before the first step was complete, and Ray ended the worker; raise 'accumulate'" in str(cause)
    assert str(cause).endswith("; there is no checkpoint yet")
    train_local(job_of(data, tmp_path, {"steps": 3}, checkpoint_every=2))
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 3, "lo')  # cut short by the kill
    cause = as_user_error(ended_by_ray(), tmp_path)
    assert "ran out of memory after step 2, and Ray" in str(cause)
    assert str(cause).endswith("; the last checkpoint, '0000003-s0', is intact")


def test_memory_that_torch_lacks_is_not_a_kill_of_ray(tmp_path):
    found = as_user_error(torch.OutOfMemoryError("CUDA out of memory"), tmp_path)
    assert found.reason == "out_of_memory" and str(found).startswith("rank 0 ran out of memory; raise")


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
