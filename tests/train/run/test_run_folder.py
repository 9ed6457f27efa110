"""What a run folder remembers, and what a worker does with an error."""

import json
import shutil
import threading
import time
from dataclasses import FrozenInstanceError, asdict

import pytest
import yaml
from safetensors.torch import load_file, save_file
from support.tiny_models import EXPERTS, captioning_tokenizer, tiny_folder, tiny_settings
from support.train_fakes import make_job, make_recipe

from lumen_ray.errors import UserError
from lumen_ray.model.build import read_meta
from lumen_ray.train import launch
from lumen_ray.train.launch import prepare_job, train, train_local
from lumen_ray.train.metrics.metrics import MetricsWatcher, drop_from
from lumen_ray.train.run.folder import keep_record, sole_starter, sole_writer, start_record
from lumen_ray.trunk.tokenizer import CAPTIONS_FILE


def test_one_process_at_a_time_writes_to_a_run(tmp_path):
    entered = threading.Event()

    def second():
        with sole_writer(tmp_path, wait_s=30):
            entered.set()

    with sole_writer(tmp_path):
        with pytest.raises(UserError, match="another process trains into") as error, sole_writer(tmp_path, wait_s=0.1):
            pass
        assert error.value.reason == "run_busy"
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.5)
    assert entered.wait(30)
    thread.join()


def test_ctrl_c_raises_a_keyboard_interrupt(data, tmp_path, monkeypatch):
    """Ray ends the workers, and then the process with the status of a program that has done its work."""

    class Interrupted:
        def fit(self):
            raise SystemExit(0)

    monkeypatch.setattr("lumen_ray.ray_env.init_local", lambda: None)
    monkeypatch.setattr("lumen_ray.ray_env.cluster_resources", lambda: {"CPU": 2, "GPU": 0})
    monkeypatch.setattr(launch, "_ray_trainer", lambda *_: Interrupted())
    with pytest.raises(KeyboardInterrupt):
        train(data / "shards", make_recipe(data), tmp_path / "run")


def kept(run):
    return [(run / name).read_bytes() for name in ("recipe.json", "tokenizer.json")]


def test_a_busy_folder_is_refused_before_anything_is_written(data, tmp_path, monkeypatch):
    run, refused = tmp_path / "run", []

    def fit(prepared, waiting):
        before = kept(run)
        for start in (prepare_job, train):
            with pytest.raises(UserError, match="another process trains into") as error:
                start(data / "shards", make_recipe(data, seed=7), run)
            refused.append(error.value.reason)
        assert kept(run) == before

    monkeypatch.setattr(launch, "_train_on_ray", fit)
    monkeypatch.setattr(time, "sleep", lambda s: pytest.fail("it waited"))
    train(data / "shards", make_recipe(data), run)
    assert refused == ["run_busy", "run_busy"]
    make_job(data, run, seed=7)  # and free again


def test_a_try_that_is_not_quite_dead_is_waited_for(data, tmp_path):
    with sole_starter(tmp_path), sole_writer(tmp_path):
        pass
    thread = threading.Thread(target=make_job, args=(data, tmp_path))
    with sole_writer(tmp_path):
        thread.start()
        thread.join(1)
        assert thread.is_alive() and not (tmp_path / "recipe.json").exists()
    thread.join(30)
    assert all(kept(tmp_path))


@pytest.mark.parametrize("output", ["file", "file/x", "/proc/x", "/proc"])
def test_an_output_that_cannot_be_made_is_reported(data, tmp_path, output):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="'.*' cannot be (made|written to): ") as error:
        train(data / "shards", make_recipe(data), tmp_path / output)
    assert error.value.reason == "invalid_output" and "\n" not in str(error.value)


def test_another_spelling_of_the_model_is_the_same_run(data, tmp_path):
    manifest, settings = {"files": [{"sha256": "a"}], "categories": []}, tiny_settings()
    keep_record(tmp_path, start_record(make_recipe(data), settings, manifest, None), resumes=False)
    respelled = make_recipe(data, model=f"{data}/../{data.name}/tiny.yaml")
    keep_record(tmp_path, start_record(respelled, settings, manifest, None), resumes=True)


def test_how_a_run_is_carried_out_may_change(data, tmp_path):
    manifest, settings = {"files": [{"sha256": "a"}], "categories": []}, tiny_settings()
    keep_record(tmp_path, start_record(make_recipe(data), settings, manifest, None), resumes=False)
    changed = make_recipe(data, workers=2, min_workers=1, max_failures=9, keep_checkpoints=1, checkpoint_every=3)
    keep_record(tmp_path, start_record(changed, settings, manifest, None), resumes=True)
    assert json.loads((tmp_path / "recipe.json").read_text())["recipe"]["workers"] == 2


def test_what_no_weight_depends_on_may_change(data, tmp_path):
    manifest = {"files": [{"sha256": "a"}], "categories": []}

    def start(name, **changes):
        settings = tiny_settings(**EXPERTS | {name: EXPERTS[name] | changes})
        return start_record(make_recipe(data), settings, manifest, None)

    keep_record(tmp_path, start("unipose"), resumes=False)
    for changes in ({"pixels_at_once": 5}, {"guidance": 2.0}, {"sampler": "EulerDiscreteScheduler"}):
        keep_record(tmp_path, start("unipose" if "pixels_at_once" in changes else "stable_diffusion", **changes), True)
    with pytest.raises(UserError, match="another model settings"):
        keep_record(tmp_path, start("unipose", box_weight=1.0), resumes=True)


def test_a_run_is_continued_with_what_it_was_started_with(data, tmp_path):
    manifest = {"files": [{"sha256": "a"}], "categories": []}
    settings = tiny_settings()
    start = start_record(make_recipe(data), settings, manifest, None)
    keep_record(tmp_path, start, resumes=False)
    keep_record(tmp_path, start, resumes=True)
    others = {
        "recipe": start_record(make_recipe(data, seed=1), settings, manifest, None),
        "model settings": start_record(make_recipe(data), tiny_settings(link_channels=64), manifest, None),
        "set of shards": start_record(make_recipe(data), settings, {**manifest, "files": [{"sha256": "b"}]}, None),
        "model to start from": start | {"init_from": "0" * 64},
    }
    for name, other in others.items():
        with pytest.raises(UserError, match=f"a run of another {name};") as error:
            keep_record(tmp_path, other, resumes=True)
        assert error.value.reason == "run_exists"
    keep_record(tmp_path, others["recipe"], resumes=False)


def test_the_weights_a_run_started_from_are_known_by_what_is_in_them(data, tmp_path):
    model = train_local(make_job(data, tmp_path / "first", stages=((1, None),)))
    recipe = make_recipe(data, stages=((2, None),))
    train_local(prepare_job(data / "shards", recipe, tmp_path / "run", str(model)))
    moved = shutil.copytree(model, tmp_path / "moved")
    prepare_job(data / "shards", recipe, tmp_path / "run", str(moved))
    other = load_file(model / "model.safetensors")
    next(iter(other.values())).add_(1)
    save_file(other, model / "model.safetensors")
    for changed in (str(model), None):
        with pytest.raises(UserError, match="a run of another model to start from;") as error:
            prepare_job(data / "shards", recipe, tmp_path / "run", changed)
        assert error.value.reason == "run_exists"


def test_a_recipe_says_where_it_starts_from(data, tmp_path):
    """By its content, and once: another spelling of the same start goes on, another start is one thing that differs."""
    start, other = tiny_folder(tmp_path / "start"), tiny_folder(tmp_path / "other", seed=1)
    recipe = make_recipe(data, init_from=str(start))
    prepared = prepare_job(data / "shards", recipe, tmp_path / "run")
    assert prepared.job.start.init_from == prepared.job.recipe.init_from == str(start)
    assert prepare_job(data / "shards", recipe, tmp_path / "second", str(other)).job.start.init_from == str(other)
    assert make_job(data, tmp_path / "third").job.start.init_from is None
    settings, manifest = prepared.job.start.settings, prepared.manifest
    moved = shutil.copytree(start, tmp_path / "moved")
    for respelled, folder in ((recipe, moved), (make_recipe(data, init_from=str(moved)), moved)):
        keep_record(tmp_path / "run", start_record(respelled, settings, manifest, str(folder)), resumes=True)
    changed = start_record(make_recipe(data, init_from=str(other)), settings, manifest, str(other))
    with pytest.raises(UserError, match="a run of another model to start from;"):
        keep_record(tmp_path / "run", changed, resumes=True)


def test_a_resumed_run_has_the_start_point_of_the_first_try(data, tmp_path):
    run, start = tmp_path / "run", tiny_folder(tmp_path / "start")
    for init_from in (None, str(start)):
        first = prepare_job(data / "shards", make_recipe(data, seed=3), run, init_from).job.start
        with pytest.raises(FrozenInstanceError):
            first.seed = 4
        checkpoint = run / "checkpoints" / "0000001-s0"  # complete as far as its names tell
        checkpoint.mkdir(parents=True)
        (checkpoint / "position.json").write_text(json.dumps({"step": 1, "stage": "s0", "preset": "tiny"}))
        (checkpoint / ".metadata").write_text("")
        again = prepare_job(data / "shards", make_recipe(data, seed=3), run, init_from).job.start
        assert (again.settings, again.seed, again.init_from, again.meta) == (
            first.settings, 3, init_from, read_meta(start) if init_from else None
        )  # fmt: skip
        assert again.tokenizer.backend.to_str() == first.tokenizer.backend.to_str()
        shutil.rmtree(run)


def test_a_preset_of_published_weights_needs_a_start(data, tmp_path):
    settings = tiny_settings(vocab_size=330, published_weights=True)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    recipe = make_recipe(data, model=str(tmp_path / "tiny.yaml"))
    with pytest.raises(UserError, match="'tiny' needs published weights to start from; .* --init-from") as error:
        prepare_job(data / "shards", recipe, tmp_path / "run")
    assert error.value.reason == "no_start" and "\n" not in str(error.value)
    assert "lumen-ray convert pretrained" in str(error.value) and not (tmp_path / "run").exists()
    start = tiny_folder(tmp_path / "start")
    assert prepare_job(data / "shards", recipe, tmp_path / "run", str(start)).job.start.init_from == str(start)


@pytest.mark.parametrize("tasks", [("caption", "pose"), ("caption",)])
def test_poses_that_the_start_knows_stay_known(data, tmp_path, tasks):
    """Where its task is kept; of a class that the new shards have too, their skeleton counts. Classes are theirs."""
    start = tiny_folder(tmp_path / "start")
    before = read_meta(start)
    before.tasks, before.classes = list(tasks), ["hand"]
    before.skeletons = {"hand": ["thumb", "wrist"], "red figure": ["head"]}
    before.edges = {"hand": [[0, 1]], "red figure": []}
    (start / "meta.json").write_text(json.dumps(asdict(before)))
    fresh = make_job(data, tmp_path / "fresh").job.meta
    meta = prepare_job(data / "shards", make_recipe(data), tmp_path / "run", str(start)).job.meta
    known = "pose" in tasks
    assert meta.skeletons == fresh.skeletons | ({"hand": ["thumb", "wrist"]} if known else {})
    assert meta.edges == fresh.edges | ({"hand": [[0, 1]]} if known else {})
    assert len(meta.skeletons["red figure"]) == 5 and meta.classes == fresh.classes and "hand" not in meta.classes


def test_the_tokenizer_of_captions_goes_from_model_to_model(data, tmp_path):
    """And it decides what is learned, so a run does not go on with another."""
    start = train_local(make_job(data, tmp_path / "first", stages=((1, None),)))
    assert not (start / CAPTIONS_FILE).exists()
    captioning_tokenizer(6).captions.save(str(start / CAPTIONS_FILE))
    recipe, run = make_recipe(data, stages=((1, None),)), tmp_path / "run"
    model = train_local(prepare_job(data / "shards", recipe, run, str(start)))
    before = (start / CAPTIONS_FILE).read_text()
    assert [(folder / CAPTIONS_FILE).read_text() for folder in (run, model)] == [before] * 2
    captioning_tokenizer(7).captions.save(str(start / CAPTIONS_FILE))
    with pytest.raises(UserError, match="a run of another model to start from;"):
        prepare_job(data / "shards", recipe, run, str(start))


def test_a_run_of_an_earlier_version_goes_on(data, tmp_path):
    """Its recipe and its model's settings have no word of what came later, and its recipe has one task more."""
    manifest = {"files": [{"sha256": "a"}], "categories": []}
    start = start_record(make_recipe(data), tiny_settings(), manifest, None)
    old = {key: value for key, value in start["recipe"].items() if key not in ("precision", "lora", "ema", "compile")}
    model = {key: value for key, value in start["model"].items() if key not in ("decoders", "unipose", "pose_queries")}
    old["stages"] = json.loads(json.dumps(old["stages"]))
    old["stages"][0]["groups"][0]["tasks"].append("semantic")  # which was taken, and trained nothing
    keep_record(tmp_path, start | {"recipe": old, "model": model}, resumes=False)
    keep_record(tmp_path, start, resumes=True)
    keep_record(tmp_path, start | {"recipe": old}, resumes=False)
    with pytest.raises(UserError, match="a run of another recipe;"):
        keep_record(tmp_path, start | {"recipe": start["recipe"] | {"precision": "bf16"}}, resumes=True)


def test_a_run_killed_before_its_export_needs_no_ray(data, tmp_path, monkeypatch):
    model = train_local(make_job(data, tmp_path / "run", stages=((2, None),)))
    before = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").unlink()
    monkeypatch.setattr(launch, "_train_on_ray", lambda *_: pytest.fail("Ray was started"))
    recipe = make_recipe(data, stages=((2, None),))
    assert train(data / "shards", recipe, tmp_path / "run") == model
    assert (model / "model.safetensors").read_bytes() == before
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def line(step):
    return json.dumps({"step": step}) + "\n"


def test_lines_that_are_written_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    drop_from(path, 0)
    path.write_text("".join(map(line, range(5))) + '{"step": 5, "lo')
    drop_from(path, 3)
    assert path.read_text() == "".join(map(line, range(3)))
    inode = path.stat().st_ino
    drop_from(path, 3)
    assert path.stat().st_ino == inode


def test_the_watcher_passes_on_each_step_once(tmp_path):
    path, steps = tmp_path / "metrics.jsonl", []
    path.write_text(line(0) + line(1))
    with MetricsWatcher(path, 2, lambda entry: steps.append(entry["step"])):
        with open(path, "a") as file:
            file.write(line(2) + line(3))
        deadline = time.monotonic() + 20
        while len(steps) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        drop_from(path, 2)  # the workers start again from the checkpoint at step 2
        with open(path, "a") as file:
            file.write(line(2) + line(3) + line(4))
    assert steps == [2, 3, 4]
