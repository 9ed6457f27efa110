"""Failed images that are asked again in the folder of their job."""

import json

import pyarrow.parquet as pq
import pytest
from support.label_fakes import FakeEngine, encode, picture, write_images

from lumen_ray import cli
from lumen_ray.errors import UserError
from lumen_ray.label.exporters.labels import open_labels
from lumen_ray.label.ledger import Ledger
from lumen_ray.label.pipeline import label
from lumen_ray.label.status import label_status, status_lines

OPTIONS = {"tasks": ["detect"], "classes": ["square"], "num_actors": 0, "fragment_size": 4, "exports": ["csv"]}
BROKEN = ("image002.png", "image003.png", "image009.png")


class Engine(FakeEngine):
    """Counts the images of all runs."""

    asked = 0

    def run(self, images, requests, **options):
        Engine.asked += len(images)
        return super().run(images, requests, **options)


@pytest.fixture
def photos(tmp_path):
    """Ten images of three fragments, three of them broken."""
    Engine.asked = 0
    folder = write_images(tmp_path / "in", 10)
    for name in BROKEN:
        (folder / name).write_bytes(b"nothing")
    return folder


def mend(photos, *names):
    for name in names:
        (photos / name).write_bytes(encode(picture(int(name[5:8]))))


def rows(output):
    return pq.read_table(output / "labels").drop_columns(["labelled_at"]).to_pylist()


def test_mended_images_replace_their_errors_and_no_other_image_is_asked(tmp_path, photos):
    out = tmp_path / "out"
    assert label(Engine, photos, out, **OPTIONS)["errors"] == 3 and Engine.asked == 7
    mend(photos, *BROKEN[1:])
    seen = []
    done = label(
        Engine, photos, out, retry_errors=True, progress=lambda s: seen.append((s.done, s.errors, s.total)), **OPTIONS
    )
    assert Engine.asked == 9 and seen[0] == (9, 1, 10) and seen[-1] == (10, 1, 10)
    assert (done["images"], done["labelled"], done["errors"], done["finished_before"]) == (10, 9, 1, 7)
    assert pq.read_table(out / "errors.parquet")["image_id"].to_pylist() == [BROKEN[0]]
    mend(photos, BROKEN[0])
    assert label(Engine, photos, out, retry_errors=True, **OPTIONS)["errors"] == 0 and Engine.asked == 10
    label(Engine, photos, tmp_path / "whole", **OPTIONS)
    assert rows(out) == rows(tmp_path / "whole")  # in the order of the input, each image once
    assert [image.image_id for image in open_labels(out).images()] == [f"image{n:03d}.png" for n in range(10)]
    assert (out / "csv" / "labels.csv").read_text().count("\n") == 11
    status = label_status(out)
    assert status["state"] == "finished" and status["errors"] == status["retrying"] == 0 and status["reasons"] == {}
    assert label(Engine, photos, out, retry_errors=True, **OPTIONS)["finished_before"] == 10  # nothing to ask


def test_a_killed_retry_goes_on_and_asks_each_image_once(tmp_path, photos, monkeypatch):
    out = tmp_path / "out"
    label(Engine, photos, out, **OPTIONS)
    mend(photos, *BROKEN[:2])
    publish = Ledger.publish
    with monkeypatch.context() as patched:

        def killed(self, fragment, *arguments):
            if fragment == 2:
                raise KeyboardInterrupt
            publish(self, fragment, *arguments)

        patched.setattr(Ledger, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            label(Engine, photos, out, retry_errors=True, **OPTIONS)
    assert Engine.asked == 9
    status = label_status(out)
    assert (status["state"], status["errors"], status["retrying"], status["labelled"]) == ("stopped", 1, 1, 9)
    assert "1 of the errors wait to be asked again" in status_lines(out, status)
    mend(photos, BROKEN[2])
    assert label(Engine, photos, out, **OPTIONS)["errors"] == 0  # the option need not be given again
    assert Engine.asked == 10 and label_status(out)["state"] == "finished"


def test_an_image_that_fails_again_is_not_asked_a_third_time_by_the_killed_retry(tmp_path, photos, monkeypatch):
    out = tmp_path / "out"
    label(Engine, photos, out, **OPTIONS)
    publish, published = Ledger.publish, []
    for kill_at in (2, None):

        def counted(self, fragment, *arguments, kill_at=kill_at):
            if fragment == kill_at:
                raise KeyboardInterrupt
            published.append(fragment)
            publish(self, fragment, *arguments)

        monkeypatch.setattr(Ledger, "publish", counted)
        try:
            label(Engine, photos, out, retry_errors=True, **OPTIONS)
        except KeyboardInterrupt:
            assert kill_at == 2
    assert published == [0, 2] and Ledger(out).totals()["errors"] == 3
    label(Engine, photos, out, retry_errors=True, **OPTIONS)
    assert published == [0, 2, 0, 2]  # asked for once more


def test_a_retry_that_is_killed_in_its_exports_asks_nothing_again(tmp_path, photos, monkeypatch):
    out = tmp_path / "out"
    label(Engine, photos, out, **OPTIONS)
    mend(photos, *BROKEN[:2])

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("lumen_ray.label.exporters.export.export", killed)
        with pytest.raises(KeyboardInterrupt):
            label(Engine, photos, out, retry_errors=True, **OPTIONS)
    entries = {path: path.read_bytes() for path in (out / "ledger").glob("0*.json")}
    assert label(Engine, photos, out, retry_errors=True, **OPTIONS)["errors"] == 1 and Engine.asked == 9
    assert {path: path.read_bytes() for path in entries} == entries  # the one that failed again was not asked either


@pytest.mark.parametrize("killed_before", ["entry", "removal"])
def test_readers_see_the_old_labels_or_the_new_ones(tmp_path, photos, monkeypatch, killed_before):
    """Whatever a publishing process has written when it is killed."""
    out = tmp_path / "out"
    label(Engine, photos, out, **OPTIONS)
    before = Ledger(out).table(0)
    mend(photos, *BROKEN)
    with monkeypatch.context() as patched:

        def killed(*_):
            raise KeyboardInterrupt

        if killed_before == "entry":
            patched.setattr(Ledger, "_write_json", killed)
        else:
            patched.setattr("lumen_ray.label.ledger.files.remove", removes_no_labels(killed))
        with pytest.raises(KeyboardInterrupt):
            label(Engine, photos, out, retry_errors=True, **OPTIONS)
    assert len(list((out / "labels").glob("part-000000*"))) == 2
    ledger = Ledger(out)
    assert ledger.totals()["errors"] == (3 if killed_before == "entry" else 1)
    assert ledger.table(0) == before if killed_before == "entry" else ledger.table(0).num_rows == 4
    assert label(Engine, photos, out, **OPTIONS)["errors"] == 0
    assert len(rows(out)) == 10 and len(list((out / "labels").glob("part-*"))) == 3


def removes_no_labels(otherwise):
    from lumen_ray.data.files import remove

    return lambda path: otherwise() if "part-" in str(path) else remove(path)


def test_a_fragment_that_is_published_twice_has_its_rows_once(tmp_path, photos):
    """As by a worker that was thought dead."""
    out = tmp_path / "out"
    label(Engine, photos, out, **OPTIONS)
    ledger = Ledger(out, round=1)
    order = [f"image{n:03d}.png" for n in range(4)]
    found = {**ledger.table(0).to_pylist()[0], "image_id": BROKEN[0]}
    error = {"image_id": BROKEN[1], "path": "", "reason": "r", "message": "m"}
    for _ in range(2):
        ledger.publish(0, 2, [found], [error], order)
    assert ledger.table(0)["image_id"].to_pylist() == order[:3] and ledger.entry(0)["images"] == 4
    assert ledger.entry(0)["errors"] == [error] and not ledger.asks_again(ledger.entry(0))


def test_a_job_of_broken_images_only_can_be_mended(tmp_path):
    photos = tmp_path / "in"
    photos.mkdir()
    (photos / "image000.png").write_bytes(b"nothing")
    for _ in range(2):
        with pytest.raises(UserError, match="fix the images and run again with --retry-errors") as caught:
            label(FakeEngine, photos, tmp_path / "out", retry_errors=True, **OPTIONS)
        assert caught.value.reason == "nothing_labelled"
    assert "--retry-errors" in status_lines(tmp_path / "out", label_status(tmp_path / "out"))[-1]
    mend(photos, "image000.png")
    assert label(FakeEngine, photos, tmp_path / "out", retry_errors=True, **OPTIONS)["labelled"] == 1


def test_a_retry_labels_what_was_left_and_new_images(tmp_path, photos):
    out = tmp_path / "out"
    label(Engine, photos, out, **OPTIONS)
    (out / "ledger" / "000001.json").unlink()  # as of a job that was killed
    write_images(photos, 2, start=10)
    mend(photos, *BROKEN)
    summary = label(Engine, photos, out, retry_errors=True, refresh=True, dedup=True, **OPTIONS)
    assert (summary["images"], summary["errors"]) == (12, 0) and Engine.asked == 7 + 4 + 3 + 2
    assert len(rows(out)) == 12


def test_a_limit_of_errors_counts_those_of_the_retry(tmp_path, photos):
    label(Engine, photos, tmp_path / "out", **OPTIONS)
    mend(photos, *BROKEN)
    assert label(Engine, photos, tmp_path / "out", retry_errors=True, max_errors=0, **OPTIONS)["errors"] == 0


def test_the_command_names_and_takes_the_option(tmp_path, photos, capsys):
    command = ["label", str(photos), "--output", str(tmp_path / "out"), "--actors", "0", "--export", "none"]
    assert cli.main(command) == 0
    assert "once the images are mended, --retry-errors asks those that failed again" in capsys.readouterr().out
    mend(photos, *BROKEN)
    assert cli.main([*command, "--retry-errors"]) == 0
    assert "10 labelled, 0 errors" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["reasons"] == {}
