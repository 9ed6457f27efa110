"""`lumen-ray label export`: choice of formats and tasks, what is refused, and that an export is whole or not there."""

import json
import os
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from support import export_labels as made

from lumen_ray import cli, export_labels
from lumen_ray.errors import UserError
from lumen_ray.inference.records import LABEL_SCHEMA
from lumen_ray.label.exporters import coco, registry
from lumen_ray.label.exporters.base import Exporter
from lumen_ray.label.exporters.labels import open_labels
from lumen_ray.label.exporters.registry import EXPORTERS


@pytest.fixture
def folder(tmp_path):
    """A new label folder."""
    photos = made.write_photos(tmp_path / "photos")
    return made.write_labels(tmp_path / "labels", photos=photos)


def fails(capsys, *argv):
    """What the command prints when it refuses the arguments."""
    assert cli.main(["label", "export", *map(str, argv)]) == cli.EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "Traceback" not in message
    return message


def test_the_command_writes_each_format_into_a_folder_of_its_name(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["label", "export", str(folder), "--format", "coco, csv,gallery", "--output", str(out)]) == 0
    assert sorted(os.listdir(out)) == ["coco", "csv", "gallery", "gallery.html"]
    printed = capsys.readouterr().out
    assert f"coco: 5 images, detect, segment, pose, caption, vqa -> {out}/coco" in printed
    assert cli.main(["label", "export", str(folder), "--format", "voc", "--tasks", "pose"]) == 0
    assert sorted(os.listdir(folder / "voc")) == [".lumen-ray-export", "pose"]
    assert cli.main(["label", "export", str(folder), "--format", "voc"]) == 0, "replaces an export"
    assert sorted(os.listdir(folder / "voc")) == [".lumen-ray-export", "detect", "pose", "segment"]
    assert "not caption, vqa, which it cannot hold" in capsys.readouterr().out


def test_a_folder_named_export_is_given_with_its_path():
    parse = cli.build_parser().parse_args
    assert parse(["label", "./export", "--output", "o"]).input == "./export"
    assert parse(["label", "export", "d", "--format", "voc"]).labels == "d"
    assert parse(["label", "x", "--output", "o"]).export is None
    assert parse(["label", "x", "--output", "o", "--export", "none"]).export == ["none"]


def test_label_hands_the_formats_on(monkeypatch, capsys):
    calls = []

    def label(*_, **options):
        calls.append(options["exports"])
        return {"images": 1, "labelled": 1, "errors": 0, "first_error": None, "exports": {"csv": "out/csv"}}

    monkeypatch.setattr("lumen_ray.label.pipeline.label", label)
    for options in ([], ["--export", "none"], ["--export", "csv,voc"]):
        assert cli.main(["label", "x", "--output", "out", "--classes", "a", *options]) == 0
    assert calls == [None, [], ["csv", "voc"]]
    assert "-> out (labels/*.parquet, csv)" in capsys.readouterr().out


def test_help_lists_every_format(capsys):
    with pytest.raises(SystemExit):
        cli.main(["label", "export", "--help"])
    printed = capsys.readouterr().out
    assert [f for f in EXPORTERS.values() if f"  {f.name} " not in printed or f.summary not in printed] == []


@pytest.mark.parametrize("form", EXPORTERS.values(), ids=lambda form: form.name)
def test_every_format_has_an_exporter(form):
    assert isinstance(form.load(), Exporter) and form.load().write.__doc__ is not False
    assert "\n" not in form.summary and len(form.summary) < 80


def test_what_is_refused(folder, tmp_path, capsys):
    message = fails(capsys, folder, "--format", "voc,cooc")
    assert "unknown format 'cooc'; did you mean 'coco'?" in message and "yolo-detect" in message
    assert "is not an output folder of `lumen-ray label`" in fails(capsys, tmp_path, "--format", "coco")
    assert "no format is given" in fails(capsys, folder, "--format", ",")
    message = fails(capsys, folder, "--format", "yolo-pose", "--tasks", "pose,detect")
    assert "'yolo-pose' cannot hold the answers of detect, only those of pose" in message and "coco" in message
    assert not {"report", "review", "duplicates", "gallery"} & set(message.rpartition(": ")[2].strip().split(", "))
    assert "task 'ground' is not among the labels" in fails(capsys, folder, "--format", "coco", "--tasks", "ground")
    assert "unknown task 'poes'" in fails(capsys, folder, "--format", "coco", "--tasks", "poes")
    assert "give 1 or more" in fails(capsys, folder, "--format", "coco", "--max-images-per-file", "0")
    assert "needs" in fails(capsys, folder) or "--format" in fails(capsys, folder)
    for inside in ("labels", "ledger/x"):
        assert "holds the labels themselves" in fails(capsys, folder, "--format", "csv", "--output", folder / inside)
    message = fails(capsys, folder, "--format", "csv", "--output", tmp_path / "photos" / "out")
    assert "inside the folder of labelled images" in message
    assert not (tmp_path / "photos" / "out").exists() and sorted(os.listdir(folder)) == ["job.json", "labels", "ledger"]


def test_files_of_something_else_are_not_replaced(folder, tmp_path, capsys):
    (folder / "voc").mkdir()
    (folder / "voc" / "mine.txt").write_text("mine")
    message = fails(capsys, folder, "--format", "csv,voc")
    assert "voc' exists and is not an export" in message
    assert (folder / "voc" / "mine.txt").exists() and not (folder / "csv").exists(), (
        "nothing is written before the check"
    )
    (folder / "coco").mkdir()
    (folder / "coco" / "detect.json").write_text("{}")  # of a version that wrote no marker
    export_labels(folder, ["coco"])
    assert len(list((folder / "coco").glob("*.json"))) == 5


def test_no_labels_yet(tmp_path):
    labels = made.write_labels(tmp_path / "labels", photos=tmp_path, images=made.IMAGES[2:3])
    with pytest.raises(UserError, match="holds no labels yet"):
        export_labels(labels, ["coco"])


def test_a_failed_export_leaves_the_earlier_one(folder, monkeypatch):
    export_labels(folder, ["coco"])
    before = (folder / "coco" / "detect.json").read_bytes()

    def fail(*_):
        raise RuntimeError("stop")

    monkeypatch.setattr(coco.CocoFile, "close", fail)
    with pytest.raises(RuntimeError, match="stop"):
        export_labels(folder, ["coco"])
    assert (folder / "coco" / "detect.json").read_bytes() == before
    assert [name for name in os.listdir(folder) if name.startswith(".")] == []


def test_a_killed_export_leaves_nothing_under_its_name(folder):
    code = (
        "import os, sys\nfrom lumen_ray import export_labels\nfrom lumen_ray.label.exporters import coco\n"
        f"coco.CocoFile.close = lambda *_: os._exit(9)\nexport_labels({str(folder)!r}, ['coco'])"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert not (folder / "coco").exists()
    (left,) = [name for name in os.listdir(folder) if name.startswith(".coco.")]
    for path in [folder / left, *(folder / left).rglob("*")]:
        os.utime(path, (0, 0))
    export_labels(folder, ["coco"])
    assert [name for name in os.listdir(folder) if name.startswith(".coco")] == []


def test_missing_pictures_are_counted_and_all_missing_is_an_error(folder, tmp_path, capsys):
    (tmp_path / "photos" / "a" / "x y.png").unlink()
    assert cli.main(["label", "export", str(folder), "--format", "voc,coco"]) == 0
    printed = capsys.readouterr().out
    assert "voc: 4 images" in printed and "1 images could not be read any more" in printed and "coco: 5" in printed
    for path in (tmp_path / "photos").rglob("*.*"):
        path.unlink()
    assert "none of the 5 images can be read" in fails(capsys, folder, "--format", "voc")


def test_large_corpora_are_split_into_files(folder):
    options = {"max_images_per_file": 2}
    written = export_labels(folder, ["coco", "coco-results", "labelstudio", "cvat", "csv", "webdataset"], **options)
    parts = [f"detect-0000{k}.json" for k in (1, 2, 3)]
    assert [p.name for p in sorted((folder / "coco").glob("detect*"))] == parts
    files = [json.loads((folder / "coco" / name).read_text()) for name in parts]
    assert [len(f["images"]) for f in files] == [2, 2, 1] and written["coco"]["files"] == 15
    assert [a["id"] for f in files for a in f["annotations"]] == list(range(1, 9))
    assert [i["id"] for f in files for i in f["images"]] == [1, 2, 3, 4, 5]
    assert files[0]["categories"] == files[2]["categories"]
    assert len(list((folder / "webdataset").glob("*.tar"))) == 3
    assert sum(len(json.loads(p.read_text())) for p in (folder / "labelstudio").glob("*.json")) == 5


def test_boxes_and_names_that_go_beyond(tmp_path):
    """Boxes across and outside the borders; an id that leads out of the folder."""
    photos = made.write_photos(tmp_path / "photos")
    base = dict.fromkeys(LABEL_SCHEMA.names) | {"task": "detect", "phrase": "a\x02 & b", "score": 0.5}
    boxes = [[-5.0, -5.0, 4.0, 4.0], [60.9, 47.9, 80.0, 50.0], [100.0, 100.0, 120.0, 130.0], [0.2, 0.2, 0.4, 0.4]]

    def rows(image_id, path, size):
        own = {"image_id": "../../x y.png", "path": path, "height": size[0], "width": size[1]}
        return [base | own | {"box": box} for box in boxes]

    folder = made.write_labels(tmp_path / "labels", photos=photos, images=made.IMAGES[:1], rows=rows)
    export_labels(folder, list(set(EXPORTERS) - {"coco-panoptic", "yolo-pose", "yolo-segment", "duplicates"}))
    lines = (folder / "yolo-detect" / "detect" / "labels" / "x_y.txt").read_text().splitlines()
    values = np.array([line.split()[1:] for line in lines], float)
    assert len(lines) == 3 and (values > 0).all() and (values <= 1).all()
    root = ElementTree.parse(folder / "voc" / "detect" / "Annotations" / "x_y.xml").getroot()
    found = [[int(node.text) for node in box] for box in root.iter("bndbox")]
    assert found == [[1, 1, 4, 4], [62, 48, 64, 48], [1, 1, 1, 1]]
    assert root.findtext("object/name") == "a\ufffd & b"
    ElementTree.parse(folder / "cvat" / "annotations.xml")
    assert sorted(os.listdir(tmp_path)) == ["labels", "photos"]


def test_images_are_streamed(folder, monkeypatch):
    """One table is in memory at a time: the next is not read before the images of the last are used up."""
    labels = open_labels(folder)
    read = []
    tables = labels.ledger.tables

    def counted():
        for table in tables():
            read.append(len(read))
            yield table

    monkeypatch.setattr(labels.ledger, "tables", counted)
    seen = [len(read) for _ in labels.images()]
    assert seen == [1, 1, 2, 3, 3] and read == [0, 1, 2]


def test_tasks_of_a_run_are_checked_before_it_starts(tmp_path):
    from lumen_ray.label.pipeline import label

    with pytest.raises(UserError, match="cannot hold the answers of caption, only those of pose"):
        label(lambda: None, "nowhere", tmp_path / "out", tasks=["caption"], exports=["yolo-pose"])
    with pytest.raises(
        UserError, match="unknown format 'yolo'; did you mean one of yolo-detect, yolo-pose, yolo-segment"
    ):
        label(lambda: None, "nowhere", tmp_path / "out", tasks=["caption"], exports=["yolo"])
    assert registry.choose_tasks("voc", ["detect", "caption"]) == ("detect",)
