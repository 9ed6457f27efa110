"""Killed at any moment, a run of two ranks goes on with the same samples and ends with the same bits."""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.ranks import Moment, run_ranks
from support.tiny_models import CLIP, DINOV2, llm
from support.train_fakes import cut_after, make_job, make_shards

from lumen_ray.train.run import checkpoint

#: checkpoints after steps 2, 4, 5 (end of the first stage) and 6 (end); one stays, beside the newest of each stage
OPTIONS = {
    "stages": ((5, None), (1, ["lumen"])),
    "checkpoint_every": 2,
    "keep_checkpoints": 1,
    "log_samples": True,
    "workers": 2,
}
STEPS = range(6)
KILLED = -signal.SIGKILL

NAMED = {
    "before the first checkpoint": Moment(1, "samples"),
    "while saving, another rank's shard is missing": Moment(1, "__1_0.distcp", 2),
    "while saving, before the checkpoint counts": Moment(0, "/position.json", 2),
    "while an old checkpoint is removed": Moment(0, "os.remove", 2),
    "during the export, after the last checkpoint": Moment(0, "model/.partial/model.safetensors"),
}


ONE_LAYER = {"num_hidden_layers": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """With a preset of few tensors: most of a rank's time is DTensor's, once per process for each list of them."""
    vision = {"clip": CLIP | ONE_LAYER, "dinov2": DINOV2 | ONE_LAYER, "mlp_ratio": 2}
    return make_shards(tmp_path_factory.mktemp("resume"), vision=vision, llm=llm() | ONE_LAYER)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that was never killed, and how often each rank touched its folder."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_ranks(make_job(data, folder / "run", **OPTIONS), counts=folder) == [0, 0]
    return folder / "run", [int((folder / str(rank)).read_text()) for rank in (0, 1)]


def samples(run: Path) -> dict[tuple[int, int], list[list[str]]]:
    """(rank, step) -> the image ids it saw, each time it did that step."""
    seen: dict[tuple[int, int], list[list[str]]] = {}
    for path in (run / "samples").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            seen.setdefault((int(path.stem), entry["step"]), []).append(entry["image_ids"])
    return seen


def losses(run: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines]


def check_same(run: Path, whole: Path) -> None:
    """The same weights to the bit, the same losses, and the same samples in every try."""
    assert (run / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    assert losses(run) == losses(whole)
    ours, theirs = samples(run), samples(whole)
    assert ours.keys() == theirs.keys()
    assert all(again == theirs[key][0] for key, tries in ours.items() for again in tries)
    assert [Path(p).name for p in checkpoint.complete(run)] == [Path(p).name for p in checkpoint.complete(whole)]
    assert not [p for p in (run / "checkpoints").glob("*/*/..") if len(list(p.iterdir())) != 2]


def test_the_whole_run_kept_the_checkpoints_of_its_settings(whole):
    assert [Path(p).name for p in checkpoint.complete(whole[0])] == ["0000005-s0", "0000006-s1"]
    assert [step for step, _ in losses(whole[0])] == list(STEPS)
    assert {key: len(tries) for key, tries in samples(whole[0]).items()} == {
        (rank, step): 1 for rank in (0, 1) for step in STEPS
    }


def killed_and_resumed(data, run: Path, moment: Moment, together: bool) -> None:
    job = make_job(data, run, **OPTIONS)
    codes = run_ranks(job, moment=moment, together=together)
    assert codes[moment.rank] == KILLED, f"nothing was killed at {moment}"
    newest = checkpoint.latest(run)
    assert newest is None or checkpoint.position(newest)["step"] in (2, 4, 5, 6)
    assert run_ranks(make_job(data, run, **OPTIONS)) == [0, 0]


@pytest.mark.parametrize("name", NAMED)
def test_killed_at_a_critical_moment(data, whole, tmp_path, name):
    killed_and_resumed(data, tmp_path / "run", NAMED[name], together=True)
    check_same(tmp_path / "run", whole[0])


@pytest.mark.parametrize(("rank", "share"), [(0, 0.6), (1, 0.6)])
def test_killed_at_any_moment_one_rank_dies_and_the_other_does_not_hang(data, whole, tmp_path, rank, share):
    number = max(1, int((share + random.Random(f"{rank} {share}").uniform(-0.2, 0.2)) * whole[1][rank]))
    killed_and_resumed(data, tmp_path / "run", Moment(rank, "", number), together=False)
    check_same(tmp_path / "run", whole[0])


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_workers_goes_on_with_the_same_loss_curve(data, whole, tmp_path, before, after):
    """From the checkpoint at the end of the first stage; every step sees the same samples, however they are shared."""
    run = tmp_path / "run"
    if before == 2:
        shutil.copytree(whole[0], run)
    else:
        assert run_ranks(make_job(data, run, **OPTIONS | {"workers": 1}), 1) == [0]
    cut_after(run, 5)
    assert run_ranks(make_job(data, run, **OPTIONS | {"workers": after}), after) == [0] * after
    steps, values = zip(*losses(run), strict=True)
    assert steps == tuple(STEPS)
    assert values == pytest.approx([value for _, value in losses(whole[0])], rel=1e-4, abs=1e-4)
    ours, theirs = samples(run), samples(whole[0])
    for step in STEPS:
        ranks = before if step < 5 else after
        assert sum((ours[rank, step][-1] for rank in range(ranks)), []) == theirs[0, step][0] + theirs[1, step][0]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_workers_takes_over_in_mid_stage(data, tmp_path, before, after):
    """Moments of the optimizer and the average of the weights are shared out anew."""
    options = OPTIONS | {"keep_checkpoints": 0, "ema": {"decay": 0.5, "warmup": False}}
    run = tmp_path / "run"
    assert run_ranks(make_job(data, run, **options | {"workers": before}), before) == [0] * before
    expected, averaged = losses(run), load_file(run / "model" / "model.safetensors")
    cut_after(run, 4)
    assert run_ranks(make_job(data, run, **options | {"workers": after}), after) == [0] * after
    (steps, values), (_, wanted) = zip(*losses(run), strict=True), zip(*expected, strict=True)
    assert steps == tuple(STEPS) and values == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    for name, value in load_file(run / "model" / "model.safetensors").items():
        assert (value - averaged[name]).norm() <= 1e-3 * averaged[name].norm() + 1e-6, name
