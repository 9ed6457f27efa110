"""Checkpoints appear complete or not at all."""

import errno
import json
from pathlib import Path

import pytest
import torch
from support.tiny_models import scrambled, tiny_model
from support.train_fakes import on_two_ranks

from lumen_ray.errors import UserError
from lumen_ray.train import parallel
from lumen_ray.train.run import checkpoint


def save(run, step, stage="s0", model=None, keep=0):
    model = model or torch.nn.Linear(2, 2)
    state = checkpoint.state_of(model, torch.optim.AdamW(model.parameters()))
    return Path(checkpoint.save(run, {"step": step, "stage": stage, "preset": "tiny"}, state, keep))


def latest(run):
    return Path(checkpoint.latest(run))


def names(run):
    return [Path(path).name for path in checkpoint.complete(run)]


def test_the_weights_come_back(tmp_path):
    model, other = scrambled(tiny_model()), tiny_model(seed=3)
    path = save(tmp_path, 4, model=model)
    assert path.name == "0000004-s0"
    checkpoint.load_weights(path, other)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_the_newest_complete_one_is_taken(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    old, new = save(tmp_path, 9), save(tmp_path, 10, "s1")
    assert latest(tmp_path) == new
    (new / "position.json").unlink()  # a kill before it, or while it is removed
    assert latest(tmp_path) == old
    torn = tmp_path / "checkpoints" / "0000011-s1"
    (torn / "0" / "__0_0.distcp").parent.mkdir(parents=True)
    (torn / "0" / "__0_0.distcp").write_bytes(b"half")
    assert latest(tmp_path) == old
    assert {"step": 9, "stage": "s0", "preset": "tiny"}.items() <= checkpoint.position(old).items()
    assert save(tmp_path, 11, "s1") == latest(tmp_path)  # what the kills left is no obstacle
    assert len(list(torn.iterdir())) == 2  # its shards and position
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["0000009-s0", "0000011-s1"]


@pytest.mark.parametrize("change", [lambda file: file.unlink(), lambda file: file.write_bytes(b"")])
def test_one_whose_shards_are_not_whole_does_not_count(tmp_path, change):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    change(next(new.glob("*/*.distcp")))
    assert latest(tmp_path) == old
    checkpoint.clean(tmp_path)
    assert not new.exists()


def test_those_of_earlier_versions_go_on(tmp_path):
    """Their shards lie beside `position.json`, which does not name them."""
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    path = save(tmp_path, 3, model=model)
    for file in next(path.glob("*/.metadata")).parent.iterdir():
        file.rename(path / file.name)
    (path / "position.json").write_text(json.dumps({"step": 3, "stage": "s0", "preset": "tiny"}))
    (path.parent / "0000004-s0.1234.partial").mkdir()
    checkpoint.clean(tmp_path)
    checkpoint.load_weights(checkpoint.latest(tmp_path), other)
    assert torch.equal(other.weight, model.weight)


def test_the_newest_and_the_ends_of_stages_are_kept(tmp_path):
    for step, stage in ((2, "a"), (4, "a"), (5, "a"), (6, "b"), (8, "b"), (10, "b")):
        save(tmp_path, step, stage, keep=2)
    assert names(tmp_path) == ["0000005-a", "0000008-b", "0000010-b"]
    save(tmp_path, 11, "c", keep=1)
    assert names(tmp_path) == ["0000005-a", "0000010-b", "0000011-c"]
    save(tmp_path, 12, "c", keep=0)
    assert len(names(tmp_path)) == 4


def test_the_only_complete_one_outlives_a_failed_save(tmp_path, monkeypatch):
    save(tmp_path, 2, keep=1)

    def full(*args, **kwargs):
        failure = OSError(errno.ENOSPC, "No space left on device", "x.distcp")
        raise checkpoint.CheckpointException("save", {0: (failure, None)})

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["0000002-s0"]


def test_a_parameter_without_gradients_so_far_resumes_without_state(tmp_path):
    """Else its first gradient after a resume would count as its second."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    path = checkpoint.save(tmp_path, {"step": 1, "stage": "s"}, checkpoint.state_of(model, optimizer))
    other = torch.optim.AdamW(model.parameters())
    checkpoint.load_optimizer(path, model, other)
    assert {len(other.state[p]) for p in model[0].parameters()} == {3}
    assert not any(other.state.get(p) for p in model[1].parameters())
    before = {id(p): s["exp_avg"] for p, s in optimizer.state.items()}
    assert before and all(torch.equal(other.state[p]["exp_avg"], before[id(p)]) for p in model[0].parameters())


def test_another_preset_is_refused(tmp_path):
    path = save(tmp_path, 1)
    checkpoint.check_preset(path, "tiny")
    with pytest.raises(UserError, match="of preset 'tiny', not 'nano'") as error:
        checkpoint.check_preset(path, "nano")
    assert error.value.reason == "wrong_preset"
    assert json.loads((path / "position.json").read_text())["preset"] == "tiny"


def _full_on_the_first_rank(run: Path):
    model = torch.nn.Linear(2, 2)
    state = checkpoint.state_of(model, torch.optim.AdamW(model.parameters()))
    if parallel.rank() == 0:
        checkpoint._publish = lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left", "position.json"))
    with pytest.raises(OSError, match="No space left") as error:
        checkpoint.save(run, {"step": 1, "stage": "s"}, state)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, "position.json")


def test_what_fails_on_the_first_rank_is_raised_by_all(tmp_path):
    on_two_ranks(_full_on_the_first_rank, tmp_path)
    assert names(tmp_path) == []
