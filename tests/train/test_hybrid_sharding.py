"""Groups of ranks with a copy of the weights each (HSDP) train what one group does."""

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from support.train_fakes import cut_after, job_of, log_of, weights_of

from lumen_ray.run_settings import ranks_per_copy
from lumen_ray.train import parallel
from lumen_ray.train.launch import train_local

STAGE = {"steps": 4, "lr": 3e-4, "groups": [{"tasks": ["detect", "segment", "caption", "vqa"]}]}


def job(data, run, **changes):
    return job_of(data, run, STAGE, batch_size=16, workers=4, checkpoint_every=2, ema={"decay": 0.8}, **changes)


@pytest.mark.parametrize(
    ("ranks", "group", "sharing"), [(8, 0, 8), (8, 4, 4), (8, 8, 8), (8, 16, 8), (6, 4, 6), (1, 4, 1), (4, 1, 1)]
)
def test_ranks_that_share_a_copy(ranks, group, sharing):
    assert ranks_per_copy(ranks, group) == sharing


pytestmark = pytest.mark.slow  # eight processes


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """The same steps in four ranks: sharded over all, and over two pairs."""
    folder = tmp_path_factory.mktemp("hsdp")
    assert run_ranks(job(data, folder / "all"), 4) == [0] * 4
    assert run_ranks(job(data, folder / "pairs", shard_group=2), 4) == [0] * 4
    return folder / "all", folder / "pairs"


def test_each_step_is_that_of_one_group(runs):
    one, two = map(log_of, runs)
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", *(name for name in a if name.startswith("loss/"))):
            assert b[name] == pytest.approx(a[name], abs=1e-5, rel=1e-5)


def test_the_weights_are_those_of_one_group(runs):
    one, two = map(weights_of, runs)
    apart = max(float((one[name] - two[name]).abs().max()) for name in one)
    assert 0 < apart < 1e-4  # Adam turns the rounding of a gradient near zero into a step of its own


def test_one_process_goes_on_from_the_checkpoint_of_the_pairs(data, runs):
    cut_after(runs[1], 2)
    before = log_of(runs[0])
    train_local(job(data, runs[1]))
    assert [line["loss"] for line in log_of(runs[1])] == pytest.approx([line["loss"] for line in before], rel=1e-4)


def test_the_mesh_of_four_ranks(tmp_path):
    from support.ranks import CONTEXT

    group = [CONTEXT.Process(target=_check_mesh, args=(rank, str(tmp_path / "store"))) for rank in range(4)]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
    assert [process.exitcode for process in group] == [0] * 4


def _check_mesh(rank, store):
    from datetime import timedelta

    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=60), 4, rank)
    mesh = parallel.mesh_of_ranks(torch.device("cpu"), 2)
    assert mesh.mesh.tolist() == [[0, 1], [2, 3]] and mesh.mesh_dim_names == ("replicate", "shard")
    assert parallel.mesh_of_ranks(torch.device("cpu"), 3).mesh.tolist() == [0, 1, 2, 3]
    dist.destroy_process_group()
