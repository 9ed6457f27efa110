"""Mistakes on the command line: one sentence, exit status 2, no traceback."""

import json

import pytest

from lumen_ray import cli, config
from lumen_ray.console import decoders_by_task, texts_by_task
from lumen_ray.data import command
from lumen_ray.label import command as label_command
from lumen_ray.label.pipeline import labelled_line


def fails(capsys, *argv: str) -> str:
    """The error message of a command that must exit with 2: one line on stderr."""
    assert cli.main(list(argv)) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("lumen-ray: ")
    assert "\n" not in err and "Traceback" not in err
    return err


@pytest.fixture
def labelling(monkeypatch):
    """The options of every call of `label`, which labels nothing."""
    calls = []

    def label(model, source, output, **options):
        calls.append(options)
        return {"images": 0, "labelled": 0, "errors": 0, "first_error": None}

    monkeypatch.setattr("lumen_ray.label.pipeline.label", label)
    return calls


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["evalate"], ["did you mean 'evaluate'", "verbs:"]),
        (["prepare"], ["sources: scenes, coco"]),
        (["train", "--shards", "x", "--output", "y"], ["--recipe"]),
        (["train", "--recipe", "quikstart", "--shards", "x", "--output", "y"], ["did you mean 'quickstart'"]),
        (["train", "--recipe", "quickstart", "--shards", "nowhere", "--output", "y"], ["nowhere", "lumen-ray prepare"]),
        (["evaluate", "--model", "nowhere", "--shards", "x", "--output", "y"], ["model folder", "does not exist"]),
        (["label", "nowhere", "--model", "nomodel", "--output", "y"], ["model folder", "does not exist"]),
        (["serve", "--model", "nowhere"], ["does not exist; ", "bundled weights: nano"]),
        (["serve", "--config", "nanoo"], ["did you mean 'nano'"]),
        (["label", "nowhere", "--output", "y", "--classes", ""], ["at least one class name"]),
        (["label", "nowhere", "--output", "y", "--classes", ","], ["at least one class name"]),
        (["label", "nowhere", "--output", "y", "--classes", "no.txt"], ["class file 'no.txt' does not exist"]),
        (["label", "nowhere", "--output", "y", "--classes", "no.csv"], ["class file 'no.csv' does not exist"]),
        (["label", "nowhere", "--output", "y", "--classes", "lists/no"], ["'lists/no' does not exist", "comma behind"]),
        (["label", "nowhere", "--output", "y", "--overlap", "0.2"], ["give --tile PIXELS with it"]),
        (
            ["label", "nowhere", "--output", "y", "--text", "detect=a dog"],
            ["no text", "chat, ground, refer, vqa"],
        ),
        (["label", "nowhere", "--output", "y", "--score-threshold", "3"], ["--score-threshold is 3.0; give a value"]),
        (["label", "nowhere", "--output", "y", "--batch-size", "0"], ["--batch-size is 0; give 1"]),
        (["label", "nowhere", "--output", "y", "--max-errors", "x"], ["--max-errors is 'x'"]),
        (
            ["evaluate", "--shards", "x", "--output", "y", "--decoders", "detect=unipose"],
            ["nano: decoders: 'unipose' cannot serve task 'detect'; this model's for it: lumen"],
        ),
        (
            ["label", "nowhere", "--output", "y", "--decoders", "detect=unipose"],
            ["nano: decoders: 'unipose' cannot serve task 'detect'; this model's for it: lumen"],
        ),
        (["evaluate", "--shards", "x", "--output", "y", "--device", "gpu"], ["'gpu'; devices: cpu, cuda, cuda:N"]),
        (["evaluate", "--shards", "x", "--output", "y", "--device", "cuda:99"], ["'cuda:99' is not available", "cpu"]),
        (
            ["label", "x", "--output", "y", "--actors", "0", "--device", "cuda:99"],
            ["'cuda:99' is not available", "cpu"],
        ),
        (["label", "x", "--output", "y", "--device", "cuda:1"], ["'cuda:1' cannot be chosen for Ray's actors"]),
        (["evaluate", "--shards", "x", "--output", "y", "--decoders", "unipose"], ["'unipose' must be TASK=DECODER"]),
    ],
)
def test_mistakes_are_one_sentence(capsys, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    message = fails(capsys, *argv)
    for word in words:
        assert word in message


def test_a_quickstart_is_not_written_to_a_url(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "output folder 's3://bucket/run' is a URL" in fails(capsys, "quickstart", "--output", "s3://bucket/run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["label", "a", "--scorethreshold=1"],
            "option '--scorethreshold'; did you mean '--score-threshold'? (see '{}')",
        ),
        (["train", "--recipe", "r", "--shard", "s", "--worker", "2", "-x"], "unknown option '-x' (see '{}')"),
        (["label", "a", "b"], "unexpected 'b'; label takes one input; put a glob in quotes, such as 'photos/*.jpg' ("),
        (["label", "a", *"bcdefg"], "unexpected 'b', 'c', 'd' and 3 more; label takes one input; put a glob in quotes"),
        (["serve", "nano"], "unexpected 'nano' (see '{}')"),
        (["serve", "--cheque"], "unknown option '--cheque'; did you mean '--check'? (see '{}')"),
    ],
)
def test_arguments_too_many_name_the_help_of_their_verb(capsys, argv, message):
    output = [] if argv[0] == "serve" else ["--output", "y"]
    assert message.format(f"lumen-ray {argv[0]} --help") in fails(capsys, *argv, *output)


@pytest.mark.parametrize("command", ["label status x", "data inspect x", "prepare scenes --num 1 --output x"])
def test_commands_of_a_verb_name_their_own_help(capsys, command):
    verb, name, *rest = command.split()
    assert f"(see 'lumen-ray {verb} {name} --help')" in fails(capsys, verb, name, *rest, "--nothing-like-it")


def test_a_text_asks_for_its_task(labelling, tmp_path):
    texts = ["--text", "vqa=how many ?", "--text", "vqa=is it red ?"]
    assert cli.main(["label", "x", "--output", str(tmp_path), "--tasks", "caption", *texts]) == 0
    (options,) = labelling
    assert options["tasks"] == ["caption", "vqa"] and options["prompts"] == {"vqa": ["how many ?", "is it red ?"]}


@pytest.mark.parametrize(
    ("address", "arguments", "workers"),
    [("", [], 5), ("auto", [], None), ("auto", ["--workers", "3"], 3), ("", ["--workers", "0"], 0)],
)
def test_prepare_is_as_wide_as_the_cluster_or_this_machine(monkeypatch, tmp_path, address, arguments, workers):
    given = {}

    def prepare_source(output, source, **options):
        given.update(options)
        return {"rows": 1, "tasks": {}, "rejected": 0, "rules": [], "changed": {}, "untrained": 0, "notes": [],
                "files": 1, "output": str(output)}  # fmt: skip

    monkeypatch.setattr("lumen_ray.data.shards.prepare.prepare_source", prepare_source)
    monkeypatch.setattr("os.cpu_count", lambda: 5)
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cli.main(["prepare", "scenes", "--num", "1", "--output", str(tmp_path / "o"), *arguments]) == 0
    assert given["workers"] == workers


def test_a_typo_in_a_recipe_names_the_nearest_key(capsys, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\nstages: [{name: a, step: 5, steps: 5}]\n")
    message = fails(
        capsys, "train", "--recipe", str(recipe), "--shards", str(tmp_path), "--output", str(tmp_path / "o")
    )
    assert "stages.0.step" in message and "did you mean 'steps'" in message


def test_an_unknown_task_in_a_recipe_lists_the_tasks(capsys, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\nstages: [{name: a, steps: 5, groups: [{tasks: [detct]}]}]\n")
    message = fails(
        capsys, "train", "--recipe", str(recipe), "--shards", str(tmp_path), "--output", str(tmp_path / "o")
    )
    assert "did you mean 'detect'" in message and "caption" in message


def test_text_pairs(capsys):
    assert texts_by_task(["vqa=how many ?", "vqa=what = this ?"]) == {"vqa": ["how many ?", "what = this ?"]}
    with pytest.raises(cli.UserError, match="TASK=TEXT"):
        texts_by_task(["how many"])


@pytest.mark.parametrize(
    ("arguments", "gpus", "used"), [([], 0, "cpu"), ([], 2, "cuda"), (["--device", "cuda:1"], 2, "cuda:1")]
)
def test_evaluate_runs_on_a_gpu_where_there_is_one(monkeypatch, arguments, gpus, used):
    class Loaded(Exception):
        pass

    def load(model, device, decoders, dtype):
        raise Loaded(f"{device} {dtype}")

    monkeypatch.setattr("lumen_ray.inference.engine.Engine.load", load)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(Loaded, match=f"^{used} bfloat16$"):
        cli.main(["evaluate", "--shards", "x", "--output", "y", "--dtype", "bfloat16", *arguments])


def test_label_hands_the_device_on(labelling):
    for options in ([], ["--device", "cuda", "--dtype", "bfloat16"]):
        assert cli.main(["label", "x", "--output", "y", "--classes", "a", *options]) == 0
    assert [(o["device"], o["dtype"]) for o in labelling] == [(None, "float32"), ("cuda", "bfloat16")]


@pytest.mark.parametrize("own", [False, True])
def test_label_says_what_the_bundled_weights_know(labelling, tmp_path, capsys, own):
    model = ["--model", str(tmp_path)] if own else []
    assert cli.main(["label", "x", "--output", "y", "--classes", "a", *model]) == 0
    assert ("trained on the drawn shapes" in capsys.readouterr().out) == (not own)


@pytest.mark.parametrize(("tasks", "own"), [("semantic", True), ("caption,count", True), ("caption", False)])
def test_classes_are_the_models_own_where_none_are_given(labelling, tasks, own):
    from lumen_ray.model.build import read_meta

    assert cli.main(["label", "x", "--output", "y", "--tasks", tasks]) == 0
    assert [options["classes"] for options in labelling] == [read_meta("nano").classes if own else None]


def test_decoders_by_task():
    assert decoders_by_task(["detect=lumen", "pose = unipose"]) == {"detect": "lumen", "pose": "unipose"}
    assert decoders_by_task([]) == {}
    common = ["evaluate", "--shards", "x", "--output", "y", "--decoders", "detect=lumen"]
    assert cli.build_parser().parse_args([*common, "--decoders", "pose=unipose"]).decoders == [
        "detect=lumen",
        "pose=unipose",
    ]
    assert cli.build_parser().parse_args(common).decoders == ["detect=lumen"]
    with pytest.raises(cli.UserError, match="task 'pose' twice"):
        decoders_by_task(["pose=lumen", "pose=unipose"])


def test_coco_json_that_is_not_json(capsys, tmp_path):
    (tmp_path / "a.json").write_text("{")
    message = fails(
        capsys, "prepare", "coco", "--annotations", str(tmp_path / "a.json"), "--images", str(tmp_path), "--output",
        str(tmp_path / "out"),
    )  # fmt: skip
    assert "a.json" in message
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["evaluate", "--model", "nowhere", "--shards", "x", "--output", "y"],
        ["label", "x", "--model", "nowhere", "--output", "y"],
        ["serve", "--model", "nowhere"],
    ],
    ids=lambda argv: argv[0],
)
def test_help_and_a_model_that_is_not_there_need_no_heavy_import(argv):
    import subprocess
    import sys

    code = (
        f"import sys, json\nfrom lumen_ray import cli\ntry:\n cli.main({argv})\nexcept SystemExit:\n pass\n"
        "print(json.dumps(sorted({'torch', 'ray', 'transformers'} & set(sys.modules))))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out.splitlines()[-1]) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- model\n- http\n", ["mapping", "list"]),
        (b"model: m\nhttp: abc\n", ["'http'", "abc"]),
        (b"model: m\nhttp: [8000]\n", ["'http'"]),
        (b"model: \xff\xfe\n", ["not UTF-8"]),
        (b"a: [\n", ["not valid YAML at line 2, column 1"]),
        (b"a: \x01\n", ["not valid YAML"]),
        (b"", ["'model' is required"]),
    ],
)
def test_a_serve_config_that_does_not_fit(capsys, tmp_path, content, words):
    path = tmp_path / "serve.yaml"
    path.write_bytes(content)
    message = fails(capsys, "serve", "--config", str(path), "--port", "8001")
    for word in words:
        assert word in message


def test_a_config_that_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "a.yaml"
    path.write_text("a: 1\n")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(cli.UserError, match="cannot be read: Permission denied"):
        config.load_yaml(path)


@pytest.mark.parametrize(
    ("argv", "resumes"),
    [
        (["train", "--recipe", "r", "--shards", "s", "--output", "o"], True),
        (["label", "i", "--model", "m", "--output", "o"], True),
        (["quickstart"], True),
        (["serve"], False),
        (["evaluate", "--model", "m", "--shards", "s", "--output", "o"], False),
        (["prepare", "scenes", "--num", "1", "--output", "o"], False),
    ],
)
def test_only_what_resumes_says_so(capsys, monkeypatch, argv, resumes):
    def interrupted(args):
        raise KeyboardInterrupt

    module = {"prepare": command, "label": label_command}.get(argv[0], cli)
    monkeypatch.setattr(module, f"_{argv[0]}", interrupted)
    assert cli.main(argv) == 130
    err = capsys.readouterr().err.strip()
    assert err == "lumen-ray: stopped" + ("; run the same command again to continue" if resumes else "")


def test_the_line_about_labels_names_the_first_error():
    summary = {"images": 3, "labelled": 2, "errors": 1, "first_error": {"image_id": "a.png", "message": "it is broken"}}
    assert "1 errors (e.g. a.png: it is broken; see errors.parquet)" in labelled_line(summary, "out")
    assert "; once the images are mended, --retry-errors asks those that failed again" in labelled_line(summary, "out")
    assert labelled_line(summary | {"finished_before": 3}, "out").startswith("nothing was left to do: 3 images")
    assert labelled_line(summary | {"finished_before": 2}, "out").startswith("3 images")
    assert "3 labelled, 0 errors -> out" in labelled_line(
        {"images": 3, "labelled": 3, "errors": 0, "first_error": None}, "out"
    )


def test_classes_are_names_or_a_file_of_names(labelling, capsys, tmp_path):
    names, file = [f"class number {i}" for i in range(80)], tmp_path / "names.txt"
    file.write_text("\n".join(names) + "\n\n")
    for given in (",".join(names), "a" * 300, str(file)):  # longer than a file's name may be
        assert cli.main(["label", "photos", "--output", "o", "--classes", given]) == 0
    assert [options["classes"] for options in labelling] == [names, ["a" * 300], names]
    file.write_bytes(b"\xff\xfe")
    assert "cannot be read; give a UTF-8 text file" in fails(
        capsys, "label", "x", "--output", "o", "--classes", str(file)
    )


@pytest.mark.parametrize("verb", ["evaluate", "label"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(capsys, monkeypatch, tmp_path, verb):
    monkeypatch.setattr("lumen_ray.inference.engine.Engine.run", lambda *a, **k: pytest.fail("it worked first"))
    shards = str(tmp_path / "shards")
    assert cli.main(["prepare", "scenes", "--num", "4", "--workers", "0", "--output", shards]) == 0
    (tmp_path / "file").write_text("")
    argv = {"evaluate": ["evaluate", "--shards", shards], "label": ["label", shards, "--actors", "0"]}[verb]
    capsys.readouterr()
    for output, words in (
        (tmp_path / "file", "cannot be made: it is a file"),
        (tmp_path / "file" / "x", "cannot be made"),
    ):
        assert cli.main([*argv, "--output", str(output)]) == 2
        message = capsys.readouterr().err
        assert words in message and str(output) in message and message.count("\n") == 1
