"""The profile of some steps: a Chrome trace and a table per rank, and nothing where none is asked for."""

import gzip
import json

import pytest
from support.train_fakes import cut_after, job_of, on_two_ranks

from lumen_ray.errors import UserError
from lumen_ray.run_settings import parse_profile
from lumen_ray.train.launch import train_local
from lumen_ray.train.metrics import profiler

STAGE = {"steps": 4, "groups": [{"tasks": ["caption"]}]}


def steps_in(trace):
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert {"data", "forward", "backward", "optimizer"} <= {*names}
    return sorted({name for name in names if name.startswith("step ")})


def test_each_rank_profiles_the_steps(data, tmp_path):
    run = tmp_path / "run"
    on_two_ranks(train_local, job_of(data, run, STAGE, workers=2, profile="1:3"))
    assert {path.name for path in (run / "profile").iterdir()} == {
        f"rank{rank}.{ending}" for rank in (0, 1) for ending in ("json.gz", "txt")
    }
    for rank in (0, 1):
        assert steps_in(run / "profile" / f"rank{rank}.json.gz") == ["step 1", "step 2"]
        title, heads, *rows = (run / "profile" / f"rank{rank}.txt").read_text().splitlines()
        assert title == f"steps 1 to 2 of rank {rank}" and heads.split()[:2] == ["operation", "calls"]
        shares = [float(row.split()[-2].rstrip("%")) for row in rows]
        assert len(rows) == 20 and shares == sorted(shares, reverse=True)
        assert any(row.startswith("aten::") for row in rows)


def test_without_steps_the_profiler_is_not_started(data, tmp_path, monkeypatch):
    monkeypatch.setattr(profiler, "profile", None)
    train_local(job_of(data, tmp_path / "run", STAGE))
    assert not (tmp_path / "run" / "profile").exists()


def test_a_range_that_reaches_over_the_end_or_was_begun_before(data, tmp_path):
    run = tmp_path / "run"
    train_local(job_of(data, run, STAGE, checkpoint_every=2, profile=[3, 9]))
    assert steps_in(run / "profile" / "rank0.json.gz") == ["step 3"]
    cut_after(run, 2)
    train_local(job_of(data, run, STAGE, checkpoint_every=2, profile=[1, 3]))
    assert (run / "profile" / "rank0.txt").read_text().startswith("steps 2 to 2 of rank 0")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("10", "give the first step and the one to end before, as 10:20, got '10'"),
        ("a:b", "got 'a:b'"),
        ("1:2:3", "got '1:2:3'"),
        ([1], r"got \[1\]"),
        (7, "got 7"),
        ("20:10", "20:10 has no steps"),
        ("-1:5", "a first step from 0 on"),
        ("0:500", "500 steps, whose trace would fill the memory; profile at most 100"),
    ],
)
def test_what_is_no_range(given, message):
    with pytest.raises(UserError, match=message) as error:
        parse_profile(given)
    assert error.value.reason == "invalid_profile"


def test_a_range_without_steps_of_the_run(data, tmp_path):
    with pytest.raises(UserError, match="profile 4:9 begins behind the run's last step, 3"):
        job_of(data, tmp_path / "run", STAGE, profile="4:9")
    train_local(job_of(data, tmp_path / "run", STAGE, checkpoint_every=2))
    cut_after(tmp_path / "run", 2)
    with pytest.warns(UserWarning, match="nothing is profiled: the run resumes at step 2, behind 0:2"):
        job_of(data, tmp_path / "run", STAGE, checkpoint_every=2, profile="0:2")
