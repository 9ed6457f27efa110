"""Label jobs in this process; `test_label_pipeline_ray.py` runs the same on Ray."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.label_fakes import FakeEngine, picture, write_images
from support.tiny_models import EXPERTS, tiny_folder

from lumen_ray.errors import UserError
from lumen_ray.inference.tiles import Tiles
from lumen_ray.label.listing import Listing
from lumen_ray.label.pipeline import label
from lumen_ray.label.requests import build_requests
from lumen_ray.label.workers import LabelActor, Labeller, WorkerSettings

OPTIONS = {"classes": ["square", "circle"], "num_actors": 0, "fragment_size": 4, "batch_size": 3, "exports": ()}


def read_labels(output):
    return [row for path in sorted((output / "labels").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_all_tasks_in_one_pass(tmp_path):
    photos = write_images(tmp_path / "photos", 10)
    engine = FakeEngine()
    seen = []
    summary = label(
        lambda: engine,
        photos,
        tmp_path / "out",
        tasks=["detect", "segment", "pose", "caption", "vqa"],
        prompts={"vqa": ["how bright ?", "what is it ?"]},
        progress=lambda status: seen.append((status.done, status.total)),
        **OPTIONS,
    )
    assert (summary["images"], summary["labelled"], summary["errors"]) == (10, 10, 0)
    assert summary["instances"] == {"detect": 20, "segment": 20, "pose": 10}  # a circle has no keypoints
    assert engine.images == 10 and seen == [(4, 10), (8, 10), (10, 10)]  # fragment by fragment
    rows = read_labels(tmp_path / "out")
    assert Counter(r["task"] for r in rows) == {"detect": 20, "segment": 20, "pose": 10, "caption": 10, "vqa": 20}
    first = next(r for r in rows if r["image_id"] == "image003.png" and r["task"] == "segment")
    ys, xs = np.nonzero(picture(3)[..., 0] > 128)
    assert first["box"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert (first["height"], first["width"], first["mask"]["size"]) == (48, 64, [48, 64])
    assert first["sha256"] == hashlib.sha256((photos / first["image_id"]).read_bytes()).hexdigest()
    assert first["labelled_at"] is not None and first["duplicate_of"] is None
    provenance = json.loads(first["provenance"])
    assert provenance["version"] == "v0" and provenance["settings"]["score_threshold"] == 0.3


def test_broken_images_are_set_aside_and_counts_add_up(tmp_path):
    photos = write_images(tmp_path / "photos", 6)
    (photos / "broken.png").write_bytes(b"\x89PNG nothing")
    (photos / "empty.jpg").write_bytes(b"")
    summary = label(FakeEngine, photos, tmp_path / "out", tasks=["detect"], **OPTIONS)
    assert (summary["images"], summary["labelled"], summary["errors"]) == (8, 6, 2)
    errors = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert {e["image_id"]: e["reason"] for e in errors} == {"broken.png": "broken_image", "empty.jpg": "broken_image"}
    assert len({r["image_id"] for r in read_labels(tmp_path / "out")}) == 6


def test_an_image_that_breaks_the_model_does_not_stop_its_batch(tmp_path):
    photos = write_images(tmp_path / "photos", 7)
    bad = picture(2)
    summary = label(
        lambda: FakeEngine(lambda image: np.array_equal(image, bad)),
        photos,
        tmp_path / "out",
        tasks=["detect"],
        **OPTIONS,
    )
    assert (summary["labelled"], summary["errors"]) == (6, 1)
    error = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()[0]
    assert error["image_id"] == "image002.png" and error["reason"] == "model_error"
    assert "no luck with this image" in error["message"]


@pytest.mark.parametrize("number", [2, 30])
def test_a_model_that_always_fails_stops_the_job_and_can_be_resumed(tmp_path, number):
    photos = write_images(tmp_path / "photos", number)
    with pytest.raises(UserError, match="the model failed on each of .* no luck"):
        label(make_failing, photos, tmp_path / "out", tasks=["detect"], **OPTIONS)
    assert not list((tmp_path / "out").glob("labels/*"))
    assert not list((tmp_path / "out" / "ledger").glob("0*.json"))


def make_failing():
    return FakeEngine(lambda image: True)


KILLED = """
import os
from support.label_fakes import FakeEngine
from lumen_ray.label.pipeline import label

class Engine(FakeEngine):
    def run(self, images, *args, **kwargs):
        if self.images >= 6:
            os._exit(9)  # as kill -9: nothing is flushed, nothing is cleaned up
        return super().run(images, *args, **kwargs)

def make_engine():
    return Engine()

label(make_engine, {photos!r}, {out!r}, tasks=["detect"], classes=["square"], num_actors=0, fragment_size=2,
      batch_size=3, exports=())
"""


def make_engine():
    return FakeEngine()


def test_a_killed_job_resumes_without_duplicate_or_gap(tmp_path):
    photos, out = write_images(tmp_path / "photos", 11), tmp_path / "out"
    script = KILLED.format(photos=str(photos), out=str(out))
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    killed = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == 9, killed.stderr
    done = sorted(path.stem for path in (out / "ledger").glob("0*.json"))
    assert done == ["000000", "000001", "000002"]
    stamps = {path: path.stat().st_mtime_ns for path in (out / "labels").glob("*.parquet")}

    options = {"tasks": ["detect"], "classes": ["square"], "num_actors": 0, "fragment_size": 2, "exports": ()}
    summary = label(make_engine, photos, out, **options)
    assert summary["finished_before"] == 6 and summary["images"] == summary["labelled"] == 11
    assert Counter(r["image_id"] for r in read_labels(out)) == {f"image{i:03d}.png": 1 for i in range(11)}
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())  # nothing was done twice

    again = label(make_engine, photos, out, **options)
    assert again["finished_before"] == 11 and again["images"] == 11
    write_images(photos, 2, start=11)
    assert label(make_engine, photos, out, **options)["images"] == 11  # the input is not listed again
    assert label(make_engine, photos, out, refresh=True, **options)["images"] == 13
    with pytest.raises(UserError, match="score_threshold was 0.3, now 0.6"):
        label(make_engine, photos, out, **options, score_threshold=0.6)


def test_the_input_is_listed_once(tmp_path, monkeypatch):
    listed = []
    iterate = Listing.__iter__
    monkeypatch.setattr(Listing, "__iter__", lambda listing: listed.append(listing) or iterate(listing))
    options = {"tasks": ["detect"], "classes": ["square"], "num_actors": 0, "exports": ()}
    assert label(FakeEngine, write_images(tmp_path / "in", 3), tmp_path / "out", **options)["labelled"] == 3
    assert len(listed) == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"tasks": ["detct"]}, "did you mean 'detect'"),
        ({"tasks": []}, "no task given"),
        ({"classes": []}, "at least one class name"),
        ({"tasks": ["region_caption"]}, "cannot label a corpus"),
        ({"prompts": {"vqa": ["x ?"]}}, "not among the tasks"),
        ({"score_threshold": 3}, "from 0 to 1"),
        ({"tasks": ["vqa"]}, r'give one, such as --text "vqa=how many dogs are there \?"'),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": "8"}, "batch_size is '8'; give 1 or more"),
        ({"score_threshold": "a"}, "score_threshold is 'a'; give a value from 0 to 1"),
        ({"num_actors": -1}, "actors is -1; give 0 or more, or a range"),
        ({"num_actors": 1.5}, "actors is 1.5"),
        ({"gpus_per_actor": True}, "gpus_per_actor is True"),
        ({"prompts": {"detect": ["a dog"]}}, "task 'detect' takes no text; .* one: chat, ground, refer, vqa"),
        ({"exports": ["vocs"]}, "unknown format .vocs.; did you mean .voc."),
        ({"tasks": ["pose"], "classes": ["circle"]}, "no class with keypoints"),
        ({"model": "nowhere"}, "model folder 'nowhere' does not exist"),
        ({"model": "nowhere", "decoders": {"detect": "lumen"}}, "model folder 'nowhere' does not exist"),
        ({"decoders": {"detect": "lumen"}}, "chosen for a model folder only"),
    ],
)
def test_user_mistakes_are_one_sentence(tmp_path, changes, text):
    photos = write_images(tmp_path / "photos", 1)
    options = {"model": make_engine, "tasks": ["detect"], **OPTIONS, **changes}
    with pytest.raises(UserError, match=text):
        label(input=photos, output=tmp_path / "out", **options)
    assert not (tmp_path / "out" / "labels").exists()


def test_labels_name_the_chosen_decoder_and_are_not_mixed_with_anothers(tmp_path):
    photos = write_images(tmp_path / "photos", 2)
    model = tiny_folder(tmp_path / "model", grounding_dino=EXPERTS["grounding_dino"])
    chosen = {"detect": "grounding_dino"}

    def run(name, decoders):
        options = {"tasks": ["detect"], "decoders": decoders, "score_threshold": 0, "refresh": True, **OPTIONS}
        label(model, photos, tmp_path / name, **options)
        rows = read_labels(tmp_path / name)
        return rows, json.loads(rows[0]["provenance"])["settings"]

    plain, settings = run("plain", None)
    assert "decoders" not in settings and run("plain", {"detect": "lumen"})[0] == plain  # who serves it anyway
    expert, settings = run("expert", chosen)
    assert settings["decoders"] == chosen and [r["score"] for r in expert] != [r["score"] for r in plain]
    write_images(photos, 1, start=2)
    for name, decoders in (("plain", chosen), ("expert", None)):
        with pytest.raises(UserError, match="made with other settings .decoders was") as caught:
            run(name, decoders)
        assert caught.value.reason == "other_settings"
    assert len({r["image_id"] for r in run("expert", chosen)[0]}) == 3
    with pytest.raises(UserError, match="'unipose' cannot serve task 'detect'; this model's for it: lumen, ground"):
        run("third", {"detect": "unipose"})
    assert not (tmp_path / "third").exists()


def test_labels_name_their_dtype_and_are_not_mixed_with_anothers(tmp_path):
    photos, model = write_images(tmp_path / "photos", 2), tiny_folder(tmp_path / "model")

    def run(name, **options):
        label(model, photos, tmp_path / name, tasks=["detect"], score_threshold=0, **OPTIONS, **options)
        rows = read_labels(tmp_path / name)
        return [r["score"] for r in rows], json.loads(rows[0]["provenance"])["settings"]

    (exact, told), (low, settings) = run("exact"), run("low", dtype="bfloat16")
    assert "dtype" not in told and settings["dtype"] == "bfloat16" and low != exact
    write_images(photos, 1, start=2)
    with pytest.raises(UserError, match="made with other settings .dtype was"):
        run("low")
    with pytest.raises(UserError, match="unknown dtype 'half'"):
        run("third", dtype="half")


def test_large_images_are_labelled_in_tiles(tmp_path):
    """The fake engine puts one box around everything bright: two squares far apart are two objects only in tiles."""
    photos = write_images(tmp_path / "photos", 2)
    image = np.full((64, 200, 3), 40, np.uint8)
    image[10:30, 10:30] = image[10:30, 150:170] = 250
    Image.fromarray(image).save(photos / "large.png")

    def boxes(name, **options):
        label(make_engine, photos, tmp_path / name, tasks=["segment"], **OPTIONS, **options)
        rows = read_labels(tmp_path / name)
        large = [r for r in rows if r["image_id"] == "large.png" and r["phrase"] == "square"]
        return sorted(row["box"] for row in large), len(rows), json.loads(rows[0]["provenance"])["settings"]

    whole, tiled = boxes("whole"), boxes("tiled", tiles=Tiles(80, 0.2))
    assert whole[0] == [[10, 10, 170, 30]] and "tiles" not in whole[2]
    assert [10, 10, 30, 30] in tiled[0] and [150, 10, 170, 30] in tiled[0]
    assert tiled[2]["tiles"] == {"side": 80, "overlap": 0.2}
    write_images(photos, 1, start=2)
    with pytest.raises(UserError, match="made with other settings .tiles was"):
        boxes("tiled", tiles=Tiles(80, 0.3))


def test_a_folder_from_before_decoders_could_be_chosen_is_resumed(tmp_path):
    photos, out = write_images(tmp_path / "photos", 2), tmp_path / "out"
    label(make_engine, photos, out, tasks=["detect"], **OPTIONS)
    job = json.loads((out / "job.json").read_text())
    (out / "job.json").write_text(
        json.dumps({key: value for key, value in job.items() if key not in ("decoders", "dtype")})
    )
    assert label(make_engine, photos, out, tasks=["detect"], **OPTIONS)["finished_before"] == 2


def test_one_request_per_text():
    requests = build_requests(["ground", "vqa"], prompts={"ground": "a cat and a dog", "vqa": ["a ?", "b ?"]})
    assert [(r.task, r.text) for r in requests] == [("ground", "a cat and a dog"), ("vqa", "a ?"), ("vqa", "b ?")]


def test_nothing_labelled_is_an_error(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "b.png"):
        (photos / name).write_bytes(b"\x89PNG nothing")
    with pytest.raises(UserError, match=r"none of 2 images could be labelled, the first, 'a.png', because") as caught:
        label(FakeEngine, photos, tmp_path / "out", tasks=["detect"], **OPTIONS)
    assert caught.value.reason == "nothing_labelled"
    errors = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert [e["image_id"] for e in errors] == ["a.png", "b.png"]
    assert errors[0]["message"] in str(caught.value)


def test_the_summary_names_the_first_error(tmp_path):
    photos = write_images(tmp_path / "photos", 2)
    assert label(FakeEngine, photos, tmp_path / "good", tasks=["detect"], **OPTIONS)["first_error"] is None
    (photos / "a_broken.png").write_bytes(b"")
    first = label(FakeEngine, photos, tmp_path / "bad", tasks=["detect"], **OPTIONS)["first_error"]
    assert first["image_id"] == "a_broken.png" and first["reason"] == "broken_image" and first["message"]


def test_only_actors_take_one_thread(monkeypatch):
    import torch

    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    settings = WorkerSettings(make_engine, tuple(build_requests(["caption"])))
    Labeller(settings)
    assert taken == []
    LabelActor(settings)
    assert taken == [1]


def test_the_driver_loads_no_library_of_models_or_tiffs():
    """They would be most of its memory; actors load what they use."""
    code = (
        "import sys, lumen_ray.label.pipeline, lumen_ray.label.batch.job\n"
        "print(sorted({'transformers', 'tifffile', 'imagecodecs'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
