"""The bench of predictions: what is compared with what, on recorded times and a run of the test's."""

import pytest
from support.plan_fakes import recording

from lumen_ray.bench import plan
from lumen_ray.bench.command import build_parser, check, chosen
from lumen_ray.errors import UserError


def test_predictions_are_compared_with_runs(tmp_path, monkeypatch):
    seen = []

    def run(folder, model, source, tasks, actors, turn):
        seen.append((model, tasks, actors, turn, len(list(source.iterdir()))))
        return {"images_per_second": 80.0 * actors, "job_seconds": 12.0, "cpu_images": 64, "all_cpu": 1.0}

    monkeypatch.setattr(plan, "calibrate", lambda source, model, tasks: recording(model=model, tasks=tasks))
    monkeypatch.setattr(plan, "_run", run)
    results = {result.name: result for result in plan.bench(tmp_path, turns=2, images=96)}
    assert seen == [("nano", "detect", actors, turn, 96) for turn in range(2) for actors in (1, 2)]
    assert list(results) == [
        f"{actors}{part}" for actors in ("1 actor", "2 actors") for part in ("", ", whole job", ", by CPU time")
    ]
    one, two = results["1 actor"], results["2 actors"]
    assert one.rates["run"] == [80.0, 80.0] and two.rates["run"] == [160.0, 160.0]
    assert one.ratios[0] == pytest.approx(8 * 0.24 / 0.14 / 0.12 / 80, rel=0.2)  # two threads at a time
    assert two.ratios[0] < 8 / 0.1 * 2 / 160  # the driver shares the cores
    assert results["1 actor, whole job"].rates["run"] == [8.0, 8.0]
    of_image = 0.12 / 8 + 0.003 + 1.5e-5 + (0.002 + 0.016) / 32
    assert results["1 actor, by CPU time"].ratios[0] == pytest.approx(1 / of_image / 64)


def test_options_are_checked_first():
    args = build_parser().parse_args(["plan", "--model", "nowhere"])
    with pytest.raises(UserError, match="model folder 'nowhere' does not exist"):
        check(args, chosen("plan", None))
