"""The numbers of a job on its way: errors, cost over several runs, and the share of time of the model."""

import json
import queue
import time
from types import SimpleNamespace

import pytest
from support.label_fakes import FakeEngine, slow_engine, write_images

from lumen_ray import cli
from lumen_ray.errors import UserError
from lumen_ray.label import progress, progress_lines
from lumen_ray.label import spent as spending
from lumen_ray.label.ledger import Ledger
from lumen_ray.label.pipeline import label
from lumen_ray.label.progress import Status
from lumen_ray.label.spent import Spent, cost_text, read_spent
from lumen_ray.label.status import label_status, status_lines
from lumen_ray.label.workers import Outcome

OPTIONS = {"tasks": ["detect"], "classes": ["square"], "num_actors": 0, "fragment_size": 4, "exports": ()}


@pytest.fixture
def clock(monkeypatch):
    """The time of `Spent`, moved by hand."""
    now = [100.0]
    monkeypatch.setattr(spending.time, "monotonic", lambda: now[0])
    return now


def test_time_and_cost_add_up_over_runs(tmp_path, clock):
    first = Spent(str(tmp_path))
    clock[0] += 1800
    assert (first.seconds, first.usd, first.usd_expected(3600)) == (1800, None, None)
    first.save()
    second = Spent(str(tmp_path), 4.0)  # of which the first run costs as much an hour
    clock[0] += 900
    assert (second.seconds, second.usd) == (2700, pytest.approx(3.0))
    assert second.usd_expected(1800) == pytest.approx(5.0) and second.usd_expected(None) is None
    second.save()
    third = Spent(str(tmp_path), 8.0)
    clock[0] += 3600
    assert third.usd == pytest.approx(11.0)
    third.save()
    fourth = Spent(str(tmp_path))  # at the price of the run before
    clock[0] += 3600
    assert fourth.usd == pytest.approx(19.0) and fourth.seconds == 2700 + 7200


def test_what_was_spent_is_saved_every_ten_seconds(tmp_path, clock):
    spent = Spent(str(tmp_path), 3600)
    for seconds, saved in ((5, 0.0), (6, 11.0), (4, 11.0), (7, 22.0)):
        clock[0] += seconds
        spent.save()
        assert read_spent(str(tmp_path))["seconds"] == saved
    clock[0] += 1
    spent.save(now=True)
    assert read_spent(str(tmp_path)) == {"seconds": 23.0, "usd": 23.0, "usd_per_hour": 3600}
    (tmp_path / "spent.json").write_text("{")
    assert read_spent(str(tmp_path)) == {"seconds": 0.0, "usd": None, "usd_per_hour": None}


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_a_price_that_is_none(tmp_path, price):
    with pytest.raises(UserError, match="usd_per_hour is .*give the price of the whole cluster"):
        label(FakeEngine, tmp_path, tmp_path / "out", usd_per_hour=price, **OPTIONS)


def test_words_of_a_cost():
    assert (
        cost_text(None) == ""
        and cost_text(0.0) == "$0.00"
        and cost_text(0.0004, 0.02) == "under $0.01 of about $0.02"
        and cost_text(1234.5, 2000) == "$1,234.50 of about $2,000.00"
    )


def test_the_share_of_the_model_is_that_of_all_outcomes():
    status = Status(100, num_fragments=10)
    assert status.model_busy is None and status.notes() == []
    status.add(Outcome(done=8, fragments=2, seconds=4.0, busy_seconds=3.0))
    status.add(Outcome(done=4, copied=3, fragments=1, seconds=4.0, busy_seconds=1.0))
    facts = status.facts()
    assert (facts["model_busy"], facts["fragments_left"], facts["copied"]) == (0.5, 7, 3)
    assert status.notes() == ["3 copied", "model busy 50%"]


def test_the_time_until_a_worker_is_ready_is_no_labelling_time(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    status = Status(132, done=32, finished_before=32)
    now[0] += 300  # models load
    assert (status.rate, status.facts()["seconds_left"]) == (0.0, None)
    status.add(Outcome(done=20, seconds=10.0))
    assert (status.rate, status.facts()["seconds_left"]) == (2.0, 40)
    now[0] += 10
    status.add(Outcome(done=60, seconds=15.0))  # of a worker that was ready later
    assert (status.rate, status.facts()["seconds_left"]) == (4.0, 5)


def test_lines_of_json_come_every_second_also_before_the_first_result(monkeypatch):
    lines = queue.Queue()
    monkeypatch.setattr(progress_lines, "EVERY_S", 0.001)
    monkeypatch.setattr(progress_lines.sys, "stdout", SimpleNamespace(write=lines.put, flush=lambda: None))

    def state():
        """Of the next line that has another one."""
        while (found := json.loads(lines.get(timeout=60))["state"]) == seen[-1]:
            pass
        return found

    seen = [""]
    status = Status(10, is_listed=False)
    with progress_lines.ProgressLines() as shown:
        assert [json.loads(lines.get(timeout=60))["state"] for _ in range(3)] == ["starting"] * 3
        seen.append("starting")
        shown.update(status)
        seen.append(state())
        status.is_listed = True
        seen.append(state())
        status.done = 10
        seen.append(state())
    assert seen[2:] == ["listing", "labelling", "finishing"]


def test_a_slow_model_is_busy_and_a_slow_disk_is_not(tmp_path, monkeypatch):
    photos = write_images(tmp_path / "in", 8)
    assert label(slow_engine, photos, tmp_path / "model", **OPTIONS)["model_busy"] > 0.8
    from lumen_ray.label.inputs import Reader

    read = Reader.read

    def slowly(self, item):
        time.sleep(0.1)
        return read(self, item)

    monkeypatch.setattr(Reader, "read", slowly)
    assert label(FakeEngine, photos, tmp_path / "disk", **OPTIONS)["model_busy"] < 0.2


def test_a_stopped_job_remembers_its_cost(tmp_path):
    photos, out = write_images(tmp_path / "in", 12), tmp_path / "out"
    seen = []

    def stop(status):
        seen.append(status.facts())
        time.sleep(0.05)
        if status.done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label(FakeEngine, photos, out, usd_per_hour=3600.0, progress=stop, **OPTIONS)
    assert [(f["fragments_left"], f["done"]) for f in seen] == [(2, 4), (1, 8)]
    assert 0 < seen[0]["usd"] < seen[1]["usd"] <= seen[1]["usd_expected"]
    stopped = label_status(out)
    assert stopped["state"] == "stopped" and stopped["usd"] >= seen[1]["usd"]
    assert stopped["usd"] == pytest.approx(stopped["spent_seconds"], abs=0.1)
    assert any(line.startswith("$") and "in all runs" in line for line in status_lines(out, stopped))
    summary = label(FakeEngine, photos, out, **OPTIONS)
    assert summary["usd"] > stopped["usd"] and "usd_expected" not in summary
    assert json.loads((out / "summary.json").read_text())["usd"] == summary["usd"]
    assert label(FakeEngine, photos, out, **OPTIONS)["usd"] == summary["usd"]  # nothing to do costs nothing
    assert Ledger(out).totals()["images"] == 12


def test_a_finished_job_at_another_price(tmp_path):
    """All its time costs what is given now; without a price it stays as it was."""
    photos, out = write_images(tmp_path / "in", 8), tmp_path / "out"
    first = label(FakeEngine, photos, out, **OPTIONS)
    assert first["usd"] is None and label_status(out)["usd_per_hour"] is None
    for price in (3600.0, 7200.0):
        again = label(FakeEngine, photos, out, usd_per_hour=price, **OPTIONS)
        assert again["usd"] == pytest.approx(first["spent_seconds"] * price / 3600)
        assert json.loads((out / "summary.json").read_text())["usd"] == again["usd"]
        status = label_status(out)
        assert status["usd_per_hour"] == price and status["usd"] == pytest.approx(again["usd"], abs=0.2)
        assert f"in all runs, the last one at ${price:,.2f} an hour" in status_lines(out, status)[-1]
    assert label(FakeEngine, photos, out, **OPTIONS)["usd"] == again["usd"]


def test_a_running_job_says_what_it_costs(tmp_path):
    photos = write_images(tmp_path / "in", 8)
    seen = []
    label(
        FakeEngine, photos, tmp_path / "out", usd_per_hour=1.0,
        progress=lambda status: seen.append(label_status(tmp_path / "out")), **OPTIONS,
    )  # fmt: skip
    assert seen[0]["state"] == "running" and seen[0]["usd"] is None  # saved after ten seconds
    running = {
        **seen[0],
        "usd": 1.5,
        "usd_per_hour": 1.0,
        "usd_expected": 3.0,
        "model_busy": 0.871,
        "fragments_left": 1200,
    }
    lines = status_lines("out", {**running, "spent_seconds": 60, "images_per_second": 2.0})
    assert "model busy 87%, 1,200 fragments waiting or in work" in lines
    assert any(line.startswith("$1.50 of about $3.00 for") for line in lines)


def test_the_command_shows_cost_and_model(tmp_path, capsys):
    photos = write_images(tmp_path / "in", 2)
    argv = ["label", str(photos), "--output", str(tmp_path / "out"), "--actors", "0", "--export", "none"]
    assert cli.main([*argv, "--usd-per-hour", "3600"]) == 0
    shown = capsys.readouterr().out
    assert "model busy " in shown and " of about $" in shown and shown.strip().rpartition("; ")[2].startswith("$")
    assert cli.main(["label", "status", str(tmp_path / "out")]) == 0
    assert "in all runs" in capsys.readouterr().out
