"""`lumen-ray prepare SOURCE`: every registered source is built from the command line as its class is."""

import argparse
import dataclasses
import importlib
import json

import pytest
from support.source_fakes import coco_set, panoptic_set, voc_set, write, yolo_set

from lumen_ray import cli
from lumen_ray.data.shards import shards
from lumen_ray.data.sources.base import Source
from lumen_ray.data.sources.registry import SOURCES


@pytest.mark.parametrize("kind", SOURCES)
def test_arguments_are_the_fields_of_the_source(kind):
    entry = SOURCES[kind]
    module, _, name = entry.target.partition(":")
    cls = getattr(importlib.import_module(module), name)
    assert issubclass(cls, Source)
    assert cls.kind == kind
    fields = {field.name: field for field in dataclasses.fields(cls)}
    assert {argument.name for argument in entry.arguments} == set(fields)
    for argument in entry.arguments:
        default = fields[argument.name].default
        if default is not dataclasses.MISSING:
            assert argument.options.get("default", "required") == default


@pytest.mark.parametrize("kind", SOURCES)
def test_help_is_readable(kind, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["prepare", kind, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for argument in SOURCES[kind].arguments:
        assert "--" + argument.name.replace("_", "-") in text
        assert len(argument.help) > 5


@pytest.mark.parametrize(
    ("kind", "contents", "arguments", "rows"),
    [
        ("scenes", {}, ["--num", "3", "--side", "64"], 3),
        ("coco", coco_set(), ["--annotations", "{}/instances.json", "{}/captions.json", "--images", "{}/images"], 3),
        ("panoptic", panoptic_set(), ["--annotations", "{}/panoptic.json", "--segments", "{}/segments",
                                      "--images", "{}/images"], 2),
        ("voc", voc_set(), ["--annotations", "{}/xml", "--images", "{}/images", "--masks", "{}/masks",
                            "--split", "{}/split.txt"], 3),
        ("yolo", yolo_set("poses"), ["--data", "{}/data.yaml"], 3),
    ],
)  # fmt: skip
def test_prepare_and_export_from_the_command_line(kind, contents, arguments, rows, tmp_path, capsys):
    write(tmp_path / "in", contents)
    out = tmp_path / "shards"
    arguments = [argument.replace("{}", str(tmp_path / "in")) for argument in arguments]
    assert cli.main(["prepare", kind, *arguments, "--output", str(out), "--workers", "0", "--rows-per-file", "2"]) == 0
    assert f"{rows} rows in {-(-rows // 2)} files" in " ".join(capsys.readouterr().out.split())
    manifest = shards.read_manifest(out)
    assert (manifest["rows"], manifest["rejected"], manifest["origin"]["kind"]) == (rows, 0, kind)
    assert str(tmp_path) not in json.dumps(manifest["origin"])
    assert cli.main(["data", "export", str(out), "--output", str(tmp_path / "coco"), "--images"]) == 0
    data = json.loads((tmp_path / "coco" / "instances.json").read_text())
    assert len(data["images"]) == rows
    assert len(list((tmp_path / "coco" / "images").rglob("*.*"))) == rows


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["vok"], ["invalid choice: 'vok'", "voc", "yolo"]),
        (["voc", "--images", "x", "--output", "y"], ["--annotations"]),
        (["voc", "--annotations", "x", "--images", "x", "--output", "y"], ["folder", "x' does not exist"]),
        (["voc", "--annotations", "x", "--images", "x", "--output", "y", "--difficult", "z"], ["crowd", "object"]),
        (["yolo", "--output", "y"], ["either --data with a data.yaml, or --images and --classes"]),
        (["yolo", "--data", "s3:///x", "--output", "y"], ["names no bucket"]),
        (["panoptic", "--annotations", "x", "--segments", ".", "--images", ".", "--output", "y"], ["'x' does not"]),
    ],
)
def test_mistakes_are_one_sentence(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", *argv]) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    for word in words:
        assert word in message


def test_an_argument_without_default_is_required():
    parser = argparse.ArgumentParser()
    for argument in SOURCES["voc"].arguments:
        argument.add_to(parser)
    values = vars(parser.parse_args(["--annotations", "a", "--images", "b", "--first-pixel", "0"]))
    source = SOURCES["voc"].make(values | {"output": "ignored"})
    assert (source.first_pixel, source.difficult, source.masks) == (0, "crowd", None)
