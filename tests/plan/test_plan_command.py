"""`lumen-ray plan`: tables, JSON and errors in one sentence."""

import json

import pytest
from support.plan_fakes import recording

from lumen_ray import cli


@pytest.fixture
def recorded(tmp_path):
    path = tmp_path / "recording.json"
    recording().save(path)
    return str(path)


def plan(capsys, *words):
    status = cli.main(["plan", *words])
    out, err = capsys.readouterr()
    return status, " ".join(out.split()), err


def planned(capsys, *words):
    status, out, err = plan(capsys, *words, "--json")
    assert status == 0, err
    return json.loads(out)


def test_a_preset_on_gpus(capsys):
    status, out, _ = plan(
        capsys, "--preset", "7b", "--images", "100M", "--tasks", "detect", "--classes", "80", "--gpus", "64",
        "--usd-per-hour", "3",
    )  # fmt: skip
    assert status == 0
    assert out.startswith("label 100,000,000 images, '7b', detect, 80 classes, on 64 GPUs (h100)")
    for name in ("listing", "reading", "decoding", "model", "publishing", "driver", "worker", "start", "finishing"):
        assert f" {name} " in out
    assert "assumed: listing (a bucket)" in out and "decoding (8 ms per megapixel)" in out
    assert "computed: model (FLOPs of '7b' at 35% of the peak of a h100 in bfloat16)" in out
    assert "50.0 TB in all" in out and "USD" in out and "parts of the job, extrapolated" in out
    assert "Bottleneck: model (twice as fast would give" in out and "give more or faster GPUs" in out


def test_recorded_times_are_replayed_on_a_cluster(capsys, recorded):
    found = planned(capsys, "--recorded", recorded, "--images", "100M", "--gpus", "64", "--usd-per-hour", "2")
    assert {stage["source"] for stage in found["stages"].values()} == {"measured"}
    assert found["bottleneck"] in found["sentence"] and found["bottleneck"] == "model"
    assert found["images_per_second"] == pytest.approx(64 * 8 * 0.24 / 0.14 / 0.12, rel=0.1)
    assert found["usd"] == pytest.approx(found["gpu_hours"] * 2)
    assert set(found["memory_bytes"]) == {"driver", "lister", "actor", "GPU"}


@pytest.mark.parametrize(
    ("words", "name", "advice"),
    [
        (("--megapixels", "5"), "decoding", "each actor decodes with 4 threads"),
        (("--cpus-per-gpu", "1", "--megapixels", "0.2"), "decoding", "CPUs for each GPU"),
        (("--storage-gbps", "0.1"), "reading", "raise the store's bandwidth"),
        ((), "model", "give more or faster GPUs"),
    ],
)
def test_the_sentence_says_what_to_change(capsys, recorded, words, name, advice):
    found = planned(capsys, "--recorded", recorded, "--images", "10M", "--gpus", "16", *words)
    assert found["bottleneck"] == name and advice in found["sentence"]


def test_actors_on_the_cpus_of_the_recorded_machine(capsys, recorded):
    one, two = (
        planned(capsys, "--recorded", recorded, "--images", "4096", "--actors", number) for number in ("1", "2")
    )
    assert one["actors"] == 1 and two["actors"] == 2 and one["gpu_hours"] == 0
    assert one["images_per_second"] < two["images_per_second"] < 2 / 0.1 * 8
    assert one["simulated"] == "the whole job" and set(one["memory_bytes"]) == {"driver", "lister", "actor"}
    assert one["seconds"]["start"] == pytest.approx(9.0, abs=0.5)


def test_a_recording_with_another_model_keeps_all_but_the_model(capsys, recorded):
    found = planned(capsys, "--recorded", recorded, "--preset", "small", "--images", "1M", "--gpus", "8", "--gpu", "l4")
    sources = {name: stage["source"] for name, stage in found["stages"].items()}
    assert sources.pop("model") == "computed" and sources.pop("start") == "assumed"
    assert set(sources.values()) == {"measured"}


def test_lost_nodes_make_a_job_longer(capsys, recorded):
    words = ("--recorded", recorded, "--images", "20M", "--gpus", "64")
    calm, lossy = planned(capsys, *words), planned(capsys, *words, "--losses-per-hour", "4")
    assert lossy["seconds"]["label"] > 1.02 * calm["seconds"]["label"]


def test_the_fewest_gpus_for_a_time(capsys, recorded):
    words = ("--recorded", recorded, "--images", "2M")
    found = planned(capsys, *words, "--within", "0.5")
    hours = found["seconds"]["all"] / 3600
    assert 0.4 < hours <= 0.5
    fewer = planned(capsys, *words, "--gpus", str(round(found["actors"] * 0.9)))
    assert fewer["seconds"]["all"] / 3600 > 0.5
    status, _, err = plan(capsys, *words, "--within", "0.01", "--storage-gbps", "0.1")
    assert status == cli.EXIT_USER_ERROR and "no number of GPUs labels 2,000,000 images within 0.01 hours" in err


def test_a_calibration_is_written_and_planned_with(tmp_path, capsys, monkeypatch):
    given = []

    def calibrate(source, **options):
        given.append((source, options["model"], options["tasks"], options["classes"]))
        return recording()

    monkeypatch.setattr("lumen_ray.plan.calibrate.calibrate", calibrate)
    path = tmp_path / "new.json"
    words = ("--calibrate", "photos", "--tasks", "detect", "--classes", "12", "--output", str(path))
    status, out, _ = plan(capsys, *words)
    assert status == 0 and f"recording -> {path}" in out and "Bottleneck" not in out
    assert given == [("photos", "nano", ["detect"], [f"object {n}" for n in range(12)])]
    status, out, _ = plan(capsys, *words, "--images", "1000", "--actors", "2")
    assert status == 0 and "on 2 actors" in out and "Bottleneck: " in out
    status, _, err = plan(capsys, "--calibrate", "photos", "--output", str(tmp_path / "no" / "r.json"))
    assert status == cli.EXIT_USER_ERROR and "cannot be written; give a file in a folder that exists" in err
    assert len(given) == 2


PRESET = ("--preset", "7b", "--images", "1M")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpus", "8"), "nothing to plan: give --images N"),
        (("--images", "1M", "--gpus", "8"), "no model is given"),
        (
            (*PRESET, "--gpus", "0"),
            "--gpus is 0; give 1 or more, --within HOURS, or --actors N with",
        ),
        (PRESET, "--gpus is not given; give 1 or more"),
        ((*PRESET, "--actors", "2"), "--actors plans for CPUs, whose rate cannot be computed from a preset"),
        ((*PRESET, "--actors", "2", "--gpus", "8"), "give one of --gpus, --within, which finds"),
        (("--preset", "nanno", "--images", "1M", "--gpus", "8"), "did you mean 'nano'?"),
        ((*PRESET, "--gpus", "8", "--gpu", "h1000"), "unknown gpu 'h1000'; did you mean 'h100'?"),
        ((*PRESET, "--gpus", "8", "--tasks", "detct"), "unknown task 'detct'; did you mean 'detect'?"),
        ((*PRESET, "--gpus", "8", "--gpu", "l4", "--dtype", "float32"), "and a l4 has 24 GB; give"),
        ((*PRESET, "--gpus", "8", "--dtype", "int8"), "unknown dtype 'int8'"),
        ((*PRESET, "--gpus", "8", "--mfu", "1.5"), "--mfu is 1.5; give a share"),
        ((*PRESET, "--gpus", "8", "--batch-size", "0"), "--batch-size is 0; give 1 or more"),
        ((*PRESET, "--gpus", "8", "--storage-gbps", "0"), "--storage-gbps is 0; give more than 0"),
        (("--preset", "7b", "--images", "many", "--gpus", "8"), "--images is 'many'; give a number such as"),
        (("--model", "nowhere", "--images", "1M", "--gpus", "8"), "model folder 'nowhere' does not exist"),
        (("--recorded", "nowhere.json", "--images", "1M", "--gpus", "8"), "recording 'nowhere.json' does not exist"),
    ],
)
def test_errors_are_one_sentence(capsys, words, said):
    status, _, err = plan(capsys, *words)
    assert status == cli.EXIT_USER_ERROR
    assert said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tasks", "segment"), "ran with --tasks detect; leave --tasks out"),
        (("--classes", "3"), "ran with --classes 12"),
        (("--batch-size", "4"), "ran with --batch-size 8"),
        (("--dtype", "bfloat16"), "ran with --dtype float32"),
    ],
)
def test_a_recorded_model_has_no_other_settings(capsys, recorded, words, said):
    status, _, err = plan(capsys, "--recorded", recorded, "--images", "1M", "--gpus", "8", *words)
    assert status == cli.EXIT_USER_ERROR and said in err
