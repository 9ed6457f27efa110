"""Runs after the first one: what is listed again, what is refused, and what two jobs do to each other."""

import json
import threading
import time

import pyarrow.parquet as pq
import pytest
from support.gallery_files import read_gallery
from support.label_fakes import FakeEngine, write_images

from lumen_ray import cli
from lumen_ray.data import claim as claims
from lumen_ray.data import files
from lumen_ray.data.claim import Claim, read_claim
from lumen_ray.errors import UserError
from lumen_ray.label import pipeline
from lumen_ray.label.ledger import Ledger
from lumen_ray.label.pipeline import label
from lumen_ray.label.plan import Plan
from lumen_ray.label.status import label_status, status_lines

OPTIONS = {"tasks": ["detect"], "classes": ["square"], "num_actors": 0, "fragment_size": 4, "exports": ()}


def test_a_refresh_finds_new_images_however_long_the_old_plan_takes_to_read(tmp_path, monkeypatch):
    photos = write_images(tmp_path / "in", 6)
    label(FakeEngine, photos, tmp_path / "out", **OPTIONS)
    write_images(photos, 3, start=6)
    monkeypatch.setattr(pipeline, "LIST_AHEAD_S", 0.0)
    seen = []
    done = label(
        FakeEngine, photos, tmp_path / "out", refresh=True, progress=lambda s: seen.append((s.done, s.total)), **OPTIONS
    )
    assert done["images"] == 9 and seen[-1] == (9, 9)


def test_the_last_progress_has_the_total_of_an_input_that_was_listed_meanwhile(tmp_path, monkeypatch):
    photos = write_images(tmp_path / "in", 5)
    monkeypatch.setattr(pipeline, "LIST_AHEAD_S", -1.0)  # the listing is not over before the work begins
    seen = []
    monkeypatch.setattr(
        pipeline, "_told", lambda status, *_: lambda: seen.append((status.done, status.total, status.is_listed))
    )
    label(FakeEngine, photos, tmp_path / "out", **OPTIONS)
    assert seen[0][2] is False and seen[-1] == (5, 5, True)
    assert (tmp_path / "out" / "summary.json").read_text().endswith("}\n")


def test_an_interrupted_refresh_goes_on_without_being_asked_for(tmp_path, monkeypatch):
    photos = write_images(tmp_path / "in", 4)
    label(FakeEngine, photos, tmp_path / "out", **OPTIONS)
    write_images(photos, 8, start=4)
    with monkeypatch.context() as patched:

        def interrupted(self, part, fragments):
            raise KeyboardInterrupt

        patched.setattr(Plan, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            label(FakeEngine, photos, tmp_path / "out", refresh=True, **OPTIONS)
    assert label_status(tmp_path / "out")["state"] == "stopped"
    assert label(FakeEngine, photos, tmp_path / "out", **OPTIONS)["images"] == 12
    assert label_status(tmp_path / "out")["state"] == "finished"


def test_a_job_that_was_only_just_begun_is_one(tmp_path):
    (tmp_path / "out" / "ledger").mkdir(parents=True)
    with pytest.raises(UserError, match="wait for it if it is still starting, else run its command again"):
        label_status(tmp_path / "out")
    with pytest.raises(UserError, match="a job that is still starting, or was stopped before it began, has no output"):
        label_status(tmp_path / "none")


def test_status_says_how_to_get_over_a_limit_of_errors(tmp_path):
    photos, out = write_images(tmp_path / "in", 8), tmp_path / "out"
    (photos / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="run again with a higher limit"):
        label(FakeEngine, photos, out, max_errors=0, **OPTIONS)
    assert "with a higher --max-errors if that stopped it" in status_lines(out, label_status(out))[-1]


def test_of_jobs_that_start_together_one_is_refused(tmp_path, monkeypatch):
    """Both look before either has made its claim; the one that is refused leaves the other's claim alone."""
    barrier = threading.Barrier(2)

    def look(*place):
        found = read_claim(*place)
        barrier.wait(timeout=20)
        return found

    monkeypatch.setattr(claims, "read_claim", look)
    entered, refused = [], []

    def start():
        try:
            with Claim(str(tmp_path)) as held:
                entered.append(held)
                time.sleep(0.5)
                held.check()
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(entered) == len(refused) == 1 and refused[0].reason == "output_in_use"
    assert read_claim(str(tmp_path)) is None


def test_a_job_that_loses_its_claim_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RENEW_S", 0.02)
    with Claim(str(tmp_path)) as held:
        other = json.loads((tmp_path / "running.json").read_text()) | {"token": "another", "host": "elsewhere"}
        (tmp_path / "running.json").write_text(json.dumps(other))
        ends = time.monotonic() + 10
        while not held.is_lost and time.monotonic() < ends:
            time.sleep(0.01)
        with pytest.raises(UserError, match="being written by process .* on elsewhere"):
            held.check()
    assert read_claim(str(tmp_path))["token"] == "another"


@pytest.mark.parametrize("content", ["5", "{}", '{"host": "a"}', "nothing"])
def test_a_damaged_claim_is_nobodys(tmp_path, content):
    (tmp_path / "running.json").write_text(content)
    assert read_claim(str(tmp_path)) is None
    with Claim(str(tmp_path)):
        assert read_claim(str(tmp_path)) is not None


def test_a_limit_of_errors_holds_until_it_is_raised(tmp_path):
    photos = write_images(tmp_path / "in", 6)
    (photos / "broken.png").write_bytes(b"nothing")
    for _ in range(4):
        with pytest.raises(UserError, match="with 1 errors, more than the limit of 0"):
            label(FakeEngine, photos, tmp_path / "out", max_errors=0, **OPTIONS)
    assert label(FakeEngine, photos, tmp_path / "out", max_errors="50%", **OPTIONS)["errors"] == 1
    with pytest.raises(UserError, match="limit of 5%"):
        label(FakeEngine, photos, tmp_path / "out", max_errors="5%", **OPTIONS)
    for wrong in ("many", "-1", "3x%", "nan", "150%", "inf%"):
        with pytest.raises(UserError, match="give a number such as 50, or a share up to 100%"):
            label(FakeEngine, photos, tmp_path / "out", max_errors=wrong, **OPTIONS)


def test_label_files_of_a_killed_fragment_do_not_stay(tmp_path):
    photos = write_images(tmp_path / "in", 8)
    label(FakeEngine, photos, tmp_path / "out", **OPTIONS)
    for entry in (tmp_path / "out" / "ledger").glob("0*.json"):
        entry.unlink()  # as if killed between the labels and their entry
    write_images(tmp_path / "other", 1)
    label(FakeEngine, tmp_path / "other", tmp_path / "out", **{**OPTIONS, "classes": ["circle"]})
    assert {row["path"] for row in pq.read_table(tmp_path / "out" / "labels").to_pylist()} == {
        str(tmp_path / "other" / "image000.png")
    }


def test_an_input_is_the_same_from_every_folder(tmp_path, monkeypatch):
    write_images(tmp_path / "a" / "photos", 2)
    write_images(tmp_path / "b" / "photos", 3)
    monkeypatch.chdir(tmp_path / "a")
    label(FakeEngine, "photos", tmp_path / "out", **OPTIONS)
    assert label(FakeEngine, "photos/", tmp_path / "out", **OPTIONS)["finished_before"] == 2
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(UserError, match="made with other settings .input was"):
        label(FakeEngine, "photos", tmp_path / "out", **OPTIONS)
    again = label(FakeEngine, "../a/photos", tmp_path / "out2", **OPTIONS)
    assert again["images"] == 2


def test_a_missing_input_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        label(FakeEngine, tmp_path / "nowhere", tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_states_of_a_job(tmp_path):
    photos = write_images(tmp_path / "in", 5)
    with pytest.raises(UserError, match="not an output folder"):
        label_status(photos)
    seen = []
    label(
        FakeEngine, photos, tmp_path / "out", progress=lambda s: seen.append(label_status(tmp_path / "out")), **OPTIONS
    )
    assert seen[0]["state"] == "running" and seen[0]["done"] == 4 and seen[0]["images"] == 5
    done = label_status(tmp_path / "out")
    assert (done["state"], done["done"], done["errors"]) == ("finished", 5, 0) and done["instances"] == {"detect": 5}
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of 1 images"):
        label(FakeEngine, tmp_path / "bad", tmp_path / "out2", **OPTIONS)
    assert label_status(tmp_path / "out2")["state"] == "failed"
    assert label_status(tmp_path / "out2")["reasons"] == {"broken_image": 1}


def test_the_command_writes_to_a_bucket_with_its_defaults(tmp_path, capsys):
    photos = write_images(tmp_path / "in", 2)
    url = "memory://resuming/out"
    assert cli.main(["label", str(photos), "--output", url, "--actors", "0"]) == 0
    assert Ledger(url).totals()["images"] == 2 and files.is_file(f"{url}/summary.json")
    assert cli.main(["label", "status", url]) == 0
    assert "finished, 2 of 2 images (100%), 0 errors" in capsys.readouterr().out
    assert cli.main(["label", str(photos), "--output", url, "--actors", "0", "--export", "coco"]) == 2
    assert "is a URL, where coco cannot be written" in capsys.readouterr().err


def test_exit_status_and_json_progress(tmp_path, capsys):
    photos = write_images(tmp_path / "in", 2)
    (photos / "broken.png").write_bytes(b"")
    argv = ["label", str(photos), "--output", str(tmp_path / "out"), "--actors", "0", "--export", "none"]
    assert cli.main([*argv, "--progress", "json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0].keys() == {"state", "seconds"} and lines[0]["state"] == "starting"
    assert lines[-1]["state"] == "finished" and lines[-1]["errors"] == 1
    assert lines[-2]["state"] == "finishing" and lines[-2]["done"] == 3
    assert cli.main([*argv, "--strict"]) == 3
    for wrong in ("x", "3:1", "1:", "0:4"):
        assert cli.main(["label", str(photos), "--output", str(tmp_path / "o"), "--actors", wrong]) == 2
        assert "give a number such as 4, a range such as 1:32, or auto" in capsys.readouterr().err


def test_an_image_that_changed_is_no_picture_of_the_gallery(tmp_path):
    photos = write_images(tmp_path / "in", 3)
    label(FakeEngine, photos, tmp_path / "out", **{**OPTIONS, "tasks": ["segment"]})
    (photos / "image000.png").write_bytes((photos / "image000.png").read_bytes()[:60])
    from PIL import Image

    Image.new("RGB", (10, 10)).save(photos / "image001.png")
    label(FakeEngine, photos, tmp_path / "out", **{**OPTIONS, "tasks": ["segment"], "exports": ["gallery"]})
    _, cards, _ = read_gallery(tmp_path / "out" / "gallery")
    assert ["e" in card for card in cards] == [True, True, False] and cards[2]["i"] == "image002.png"
