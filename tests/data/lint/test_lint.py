"""`data lint`: shard folders and sources, exit status, options, report and page."""

import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from support.source_fakes import HEIGHT, WIDTH, coco_set, jpeg, png, write, yolo_set

from lumen_ray import cli
from lumen_ray.data.images import decode
from lumen_ray.data.lint.command import is_source, lint, print_report, rule_names
from lumen_ray.data.lint.findings import Finding, Report, Rule
from lumen_ray.data.lint.page import _window
from lumen_ray.data.shards import shards
from lumen_ray.data.shards.prepare import prepare_source
from lumen_ray.data.shards.schema import make_message, make_row
from lumen_ray.data.sources.coco import CocoSource
from lumen_ray.data.sources.registry import SOURCES
from lumen_ray.data.sources.scenes import ScenesSource
from lumen_ray.errors import UserError
from lumen_ray.structures import Masks

DOCS = Path(__file__).resolve().parents[3] / "docs" / "data.md"


def picture(number):
    return png(np.random.default_rng(number).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def thing(box, name="cell", **more):
    return {"phrase": name, "box": box, "mask": None, "keypoints": None, "crowd": False, "area": 1.0} | more


def write_shards(folder, rows, rejected=(), **manifest):
    with shards.ShardWriter(folder, "part-00000.parquet", rows_per_group=3) as writer:
        for row in rows:
            writer.write(row)
    shards.write_rejected(folder, list(rejected))
    shards.write_manifest(folder, shards.build_manifest([writer.entry]) | manifest)
    return folder


def detection_row(number, *instances, **columns):
    names = sorted({i["phrase"] for i in instances} | {"cell"})
    columns = {"tasks": ["detect"], "classes": names, "instances": list(instances)} | columns
    return make_row(f"{number}.png", picture(number), (HEIGHT, WIDTH), "test", **columns)


def clean_rows(first=0, number=8):
    return [detection_row(first + i, *[thing([5, 5, 25, 30])] * (i % 2)) for i in range(number)]


@pytest.fixture
def clean(tmp_path):
    return write_shards(tmp_path / "clean", clean_rows())


@pytest.mark.parametrize("place", [0, 1])
def test_an_image_of_several_leaks_too(tmp_path, place):
    """It may be the first or a further one, in the set or in the other folder."""
    images = [picture(100), picture(101)]
    images[place] = picture(3)
    further = [{"image": images[1], "height": HEIGHT, "width": WIDTH}]
    row = make_row("pair", images[0], (HEIGHT, WIDTH), "test", tasks=["chat"], further_images=further,
                   messages=[make_message("chat", "q", "a", image_turns=(0,))])  # fmt: skip
    folders = [write_shards(tmp_path / "pair", [row]), write_shards(tmp_path / "val", clean_rows())]
    for one, other in (folders, folders[::-1]):
        report, _ = lint(one, tmp_path / "out", against=[other])
        assert [f.number for f in report.findings if f.rule.name == "leak"] == [1]


@pytest.fixture
def faulty(tmp_path):
    """A folder with findings of all severities, and objects that are hard to draw."""
    mask = Masks.from_arrays(np.ones((1, 9, 9), bool)).rles[0]
    rows = clean_rows(number=4)
    rows += [
        detection_row(10, thing([5, 5, 6, 6]), thing([50, 30, 500, 31])),
        detection_row(11, thing([8, 8, 20, 20], mask=mask), thing([float("nan")] * 4), thing([30, 30, 20, 20])),
        detection_row(12, thing([8, 8, 20, 20], keypoints=[0.0, 0, 0] * 2), thing([8, 8, 20, 20])),
        detection_row(13, thing([5, 5, 25, 25], "<b>Cell</b>"), thing([5, 5, 25, 25], "<b>cell</b>")),
        make_row("broken", b"nonsense", (HEIGHT, WIDTH), "test", tasks=["detect"], classes=["cell"],
                 instances=[thing([1, 1, 2, 2])]),
        make_row("text", None, (0, 0), "chat", tasks=["chat"], messages=[make_message("chat", "hi", "")]),
        make_row("gone", None, (HEIGHT, WIDTH), "test"),
    ]  # fmt: skip
    rejected = [{"kind": "images", "image_id": "x.jpg", "origin": "a.json", "reason": "the image is missing"}]
    notes = ["class 'cells' left out"]
    return write_shards(tmp_path / "faulty", rows, rejected, notes=notes, changed={"boxes clipped": 2})


def run(*arguments):
    return cli.main(["data", "lint", *map(str, arguments)])


def report_of(folder):
    return json.loads((folder / "lint.json").read_text())


def checks_of(folder):
    return {finding["check"] for finding in report_of(folder)["findings"]}


def test_strict_says_by_the_exit_status_whether_there_is_something_to_mend(clean, faulty, tmp_path, capsys):
    assert run(clean, "--strict", "--output", tmp_path / "o") == 0
    assert "8 rows: no problems, no warnings, 1 note" in capsys.readouterr().out
    assert run(faulty, "--output", tmp_path / "o") == 0
    assert run(faulty, "--output", tmp_path / "o", "--strict") == 1
    assert run("--strict", "--output", tmp_path / "o", faulty) == 1
    out = capsys.readouterr().out
    assert "problem: box-invalid, 2 objects: boxes have no area" in out
    assert "    11.png: 'cell' at [nan, nan, nan, nan]" in out
    assert f"page -> {tmp_path / 'o' / 'index.html'}" in out


def test_the_report_has_what_was_found(faulty, tmp_path):
    report, page = lint(faulty, tmp_path / "o")
    data = report_of(tmp_path / "o")
    assert data == report.to_dict() and page == str(tmp_path / "o" / "index.html")
    assert data["rows"] == 11 and data["kind"] == "shards" and data["input"] == str(faulty)
    assert checks_of(tmp_path / "o") == {
        "box-tiny", "box-outside", "box-invalid", "mask-size", "keypoints-unlabelled", "repeated-object",
        "class-spelling", "image-missing", "no-task", "text-empty", "masks-missing", "rejected-images", "changed",
        "input", "class-rare",
    }  # fmt: skip
    order = [finding["severity"] for finding in data["findings"]]
    assert order == sorted(order, key=["problem", "warning", "note"].index)
    assert sum(data["severities"].values()) == len(order)


def test_the_page_needs_nothing_beside_it_and_shows_the_objects(faulty, tmp_path):
    lint(faulty, tmp_path / "o", samples=20)
    text = (tmp_path / "o" / "index.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', text) and "://" not in text
    assert text.count("<article>") == 4
    assert "<b>box-outside</b>" in text and "boxes clipped" in text and "left out" in text
    assert "<b>Cell</b>" not in text and "&lt;b&gt;Cell&lt;/b&gt;" in text
    assert "cannot be read" in text, "the broken image"
    assert text.count("<div class=pair>") >= 1, "a close-up of the tiny object"
    assert "prefers-color-scheme: dark" in text, "the style of `data inspect`"


def test_without_samples_the_page_has_no_pictures(faulty, tmp_path):
    report, _ = lint(faulty, tmp_path / "o", samples=0)
    text = (tmp_path / "o" / "index.html").read_text()
    assert "<article>" not in text and "Samples" not in text and "box-outside" in text
    assert not any(finding.samples for finding in report.findings)


def test_an_image_in_two_splits_is_found(clean, tmp_path):
    same = [make_row("other.png", picture(3), (HEIGHT, WIDTH), "test"), *clean_rows(first=50, number=2)]
    val = write_shards(tmp_path / "val", same)
    test = write_shards(tmp_path / "test", clean_rows(first=7, number=3))
    assert run(clean, "--output", tmp_path / "o", "--against", val, test, "--strict") == 1
    (leak,) = (f for f in report_of(tmp_path / "o")["findings"] if f["check"] == "leak")
    assert leak["number"] == 2 and leak["severity"] == "problem"
    assert leak["examples"] == [f"3.png: also in '{val}' as 'other.png'", f"7.png: also in '{test}'"]
    assert report_of(tmp_path / "o")["against"] == [str(val), str(test)]
    assert run(clean, "--output", tmp_path / "o", "--against", test, "--ignore", "leak", "--strict") == 0
    assert run("--against", test, "--strict", "--output", tmp_path / "o", clean) == 1, "options may come first"


def test_decode_finds_broken_images_and_wrong_sizes(faulty, tmp_path):
    assert run(faulty, "--output", tmp_path / "o", "--decode") == 0
    assert "image-broken" in checks_of(tmp_path / "o")


def test_the_smallest_side_can_be_chosen(clean, tmp_path):
    assert run(clean, "--output", tmp_path / "o", "--min-side", "21", "--strict") == 1
    assert checks_of(tmp_path / "o") >= {"box-tiny"}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("edits", [False, True])
def test_clean_scenes_have_nothing_to_mend(tmp_path, seed, edits):
    source = ScenesSource(num=80, seed=seed, side=(64, 96, 128)[seed], edits=edits)
    report, _ = lint(source, tmp_path / "a", samples=0)
    assert [f.rule.name for f in report.findings if f.rule.severity != "note"] == []
    prepare_source(tmp_path / "shards", source, workers=0)
    again, _ = lint(tmp_path / "shards", tmp_path / "b", samples=0, decode=True)
    assert [f.to_dict() for f in again.findings] == [f.to_dict() for f in report.findings]


# Sources ------------------------------------------------------------------------------------------------------------


def test_a_source_is_read_without_writing_shards(tmp_path, monkeypatch, capsys):
    files = coco_set()
    del files["images/1.jpg"]
    data = json.loads(files["instances.json"])
    data["annotations"].append({"id": 8, "image_id": 0, "category_id": 1, "bbox": [5, 5, 0, 4]})
    data["annotations"].append({"id": 9, "image_id": 0, "category_id": 1, "bbox": [5, 5, 1, 4]})
    folder = write(tmp_path / "set", files | {"instances.json": json.dumps(data)})
    monkeypatch.chdir(folder)
    monkeypatch.setattr(shards, "ShardWriter", lambda *_: pytest.fail("it wrote shards"))
    assert run("--strict", "coco", "--annotations", "instances.json", "captions.json", "--images", "images",
               "--samples", "3", "--output", "out") == 1  # fmt: skip
    found = {(f["check"], f["severity"]): f for f in report_of(folder / "out")["findings"]}
    assert found["rejected-images", "problem"]["examples"][0].startswith("1.jpg (")
    assert found["rejected-annotations", "warning"]["number"] == 1
    assert found["rejected-annotations", "note"]["number"] == 1, "lost with its image"
    assert found["box-tiny", "warning"]["number"] == 1
    assert ("masks-missing", "warning") in found
    assert report_of(folder / "out")["input"] == "coco instances.json captions.json"
    assert not list(folder.rglob("*.parquet"))
    assert "2 rows:" in capsys.readouterr().out


def test_a_source_and_its_shards_have_the_same_findings(tmp_path):
    folder = write(tmp_path / "set", coco_set())
    source = CocoSource([str(folder / "instances.json"), str(folder / "captions.json")], str(folder / "images"))
    prepare_source(tmp_path / "shards", source, workers=0)
    found = [lint(data, tmp_path / "o")[0].findings for data in (source, tmp_path / "shards")]
    numbers = [[(f.rule, f.number) for f in findings] for findings in found]  # not the examples: shards are shuffled
    assert numbers[0] == numbers[1] and len(numbers[0]) >= 3


@pytest.mark.parametrize("kind", ["boxes", "segments", "poses"])
def test_yolo_labels(tmp_path, kind):
    folder = write(tmp_path / "set", yolo_set(kind))
    assert run("yolo", "--data", folder / "data.yaml", "--output", tmp_path / "o") == 0
    assert report_of(tmp_path / "o")["rows"] == 3
    assert "copies" in checks_of(tmp_path / "o") or "copies-differ" in checks_of(tmp_path / "o")


def test_an_input_of_which_no_row_can_be_used_is_a_finding(tmp_path):
    folder = write(tmp_path / "set", {n: d for n, d in coco_set().items() if not n.endswith(".jpg")})
    (folder / "images").mkdir()
    arguments = ["coco", "--annotations", folder / "instances.json", "--images", folder / "images"]
    assert run(*arguments, "--output", tmp_path / "o", "--strict") == 1
    assert checks_of(tmp_path / "o") >= {"no-rows", "rejected-images"}


def test_a_folder_of_shards_comes_before_a_source_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "yolo").mkdir()
    assert is_source("coco") and is_source("yolo")
    write_shards(tmp_path / "coco", clean_rows())
    assert not is_source("coco") and is_source("yolo")
    assert is_source("coco", ["--strict", "--annotations=a.json"]) and not is_source("coco", ["--strict"])
    assert run("coco", "--output", "out") == 0
    assert report_of(tmp_path / "out")["kind"] == "shards"


def test_no_option_of_a_source_has_the_name_of_one_of_lint():
    parsed = vars(cli.build_parser().parse_args(["data", "lint", "x"]))
    assert {"against", "strict", "output", "samples", "min_side", "decode", "ignore"} <= set(parsed)
    for name, source in SOURCES.items():
        assert not {argument.name for argument in source.arguments} & set(parsed), name


# Mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["'nowhere' is neither a shard folder nor a source", "sources: scenes, coco"]),
        (["coca"], ["did you mean 'coco'"]),
        (["."], ["has no manifest.json"]),
        (["{}", "--samples", "-1"], ["samples is -1"]),
        (["{}", "--min-side", "nan"], ["min_side is nan"]),
        (["{}", "--min-side", "wide"], ["--min-side", "'wide'"]),
        (["{}", "--annotations", "a.json"], ["unknown option '--annotations'", "lint"]),
        (["{}", "{}"], ["unexpected '"]),
        (["--strictly", "{}"], ["unknown option '--strictly'; did you mean '--strict'?"]),
        (["{}", "--ignore", "box-tinny"], ["did you mean 'box-tiny'"]),
        (["{}", "--against", "nowhere"], ["'nowhere' does not exist"]),
        (["coco", "--images", "x"], ["--annotations", "data lint coco --help"]),
        (
            ["coco", "--annotations", "a.json", "--images", "x", "--classes", "y"],
            ["'--classes'", "lint coco --help"],
        ),
        (["coco", "--annotations", "a.json", "--images", "nowhere"], ["image folder", "does not exist"]),
        (["voc", "--annotations", "x", "--images", "y", "--difficult", "no"], ["invalid choice: 'no'"]),
        ([], ["INPUT"]),
    ],
)
def test_mistakes_are_one_sentence(arguments, words, clean, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*(a.format(clean) for a in arguments)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("lumen-ray: ") and "\n" not in error
    assert all(word in error for word in words), error


@pytest.mark.parametrize("output", ["file", "file/x", "/proc/x"])
def test_an_output_that_cannot_be_made_is_reported_first(clean, tmp_path, capsys, monkeypatch, output):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("lumen_ray.data.lint.command.examine", lambda *_, **__: pytest.fail("it examined"))
    assert run(clean, "--output", tmp_path / output) == 2
    error = capsys.readouterr().err.strip()
    assert " cannot be " in error and "\n" not in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["--strict", "problems", "notes"]),
        (["coco", "--help"], ["--annotations", "--strict", "--min-side"]),
    ],
)
def test_help_explains(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in words)


def test_an_unknown_check_is_reported_from_python_too(clean, tmp_path):
    with pytest.raises(UserError, match="unknown check 'boxes'"):
        lint(clean, tmp_path / "o", ignore=["boxes"])


# Output -------------------------------------------------------------------------------------------------------------


def test_a_terminal_gets_a_table_and_a_pipe_plain_lines():
    rule = Rule("box-tiny", "warning", "objects", "boxes are [red]tiny[/red]; draw them again")
    report = Report("x", "shards", 3, [], [Finding(rule, 1200, ["a.jpg: [b]"])])
    terminal, pipe = io.StringIO(), io.StringIO()
    print_report(report, Console(file=terminal, width=100, force_terminal=True))
    print_report(report, Console(file=pipe, width=30))
    assert "1,200 objects" in terminal.getvalue() and "│" in terminal.getvalue()
    assert "[red]tiny[/red]" in terminal.getvalue(), "nothing is read as markup"
    assert pipe.getvalue() == (
        "warning: box-tiny, 1,200 objects: boxes are [red]tiny[/red]; draw them again\n    a.jpg: [b]\n"
    )
    nothing = io.StringIO()
    print_report(Report("x", "shards", 3, [], []), Console(file=nothing, force_terminal=True))
    assert nothing.getvalue() == ""


def test_a_close_up_shows_small_objects():
    small = [{"box": [10.0, 10, 14, 14]}]
    left, top, right, bottom = _window(small, (400, 300))
    assert left <= 10 and top <= 10 and right >= 14 and bottom >= 14 and right - left <= 30
    assert _window([{"box": [10.0, 10, 200, 200]}], (400, 300)) is None
    assert _window([*small, {"box": [280.0, 380, 290, 390]}], (400, 300)) == (left, top, right, bottom)
    assert _window([{"box": [900.0, 900, 901, 901]}], (40, 30))[2:] == (30, 40), "outside: the nearest corner"


def test_pictures_decode_as_the_tests_assume():
    assert decode(picture(1)).shape == decode(jpeg()).shape == (HEIGHT, WIDTH, 3)


def test_the_commands_in_the_docs_parse_completely(monkeypatch):
    found = []
    monkeypatch.setattr("lumen_ray.data.lint.command.lint", lambda data, *_, **options: found.append((data, options)))
    monkeypatch.setattr("lumen_ray.data.lint.command.is_source", lambda name, words: name in SOURCES)
    text = DOCS.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("lumen-ray data lint")]
    for line in lines:
        with pytest.raises(TypeError):  # the fake returns nothing to print
            args = cli.build_parser().parse_args(line)
            args.run(args)
    assert len(found) == len(lines) >= 2


def test_the_page_about_data_names_every_check():
    text = DOCS.read_text(encoding="utf-8")
    assert [name for name in rule_names() if f"`{name}`" not in text] == []
