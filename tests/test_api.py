"""The public API: lazy, callable in any order of imports, and strict about what it is given."""

import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

import lumen_ray
from lumen_ray import api, config
from lumen_ray.errors import UserError
from lumen_ray.presets import recipe_path
from lumen_ray.recipe import Recipe

FUNCTIONS = ("prepare", "calibrate", "export_labels", "answer_batch", "train", "evaluate", "label", "serve")
PACKAGES = FUNCTIONS[4:]


def in_a_new_process(code: str):
    """What `code` prints last, as JSON, in a process that has imported nothing."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_importing_the_api_loads_neither_torch_nor_ray():
    code = (
        "import json, sys\nimport lumen_ray\nfrom lumen_ray import prepare, train, evaluate, label, serve\n"
        "print(json.dumps(sorted({'torch', 'ray', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules))))"
    )
    assert in_a_new_process(code) == []


@pytest.mark.parametrize("submodule_first", [False, True])
@pytest.mark.parametrize(
    ("name", "submodule", "member"),
    [
        ("train", "launch", "train"),
        ("evaluate", "run", "evaluate"),
        ("label", "pipeline", "label"),
        ("serve", "app", "run"),
    ],
)
def test_packages_are_functions_in_both_orders_of_import(name, submodule, member, submodule_first):
    imports = [f"from lumen_ray import {name} as function", f"from lumen_ray.{name}.{submodule} import {member} as job"]
    code = "\n".join(
        [
            "import json, inspect, unittest.mock",
            *(reversed(imports) if submodule_first else imports),
            f"import lumen_ray, lumen_ray.{name}.{submodule} as submodule",
            "from lumen_ray import api",
            f"assert function is lumen_ray.{name} and callable(function)",
            f"assert lumen_ray.{name}.{submodule} is submodule and submodule.{member} is job",
            f"assert inspect.signature(function) == inspect.signature(api.{name})",
            f"with unittest.mock.patch('lumen_ray.{name}.{submodule}.{member}') as patched:",
            f"    assert lumen_ray.{name}.{submodule}.{member} is patched",
            f"assert lumen_ray.{name}.{submodule}.{member} is job",
            "print(json.dumps(True))",
        ]
    )
    assert in_a_new_process(code)


def test_mock_patch_needs_no_import_before():
    code = (
        "import json, unittest.mock\n"
        "with unittest.mock.patch('lumen_ray.train.launch.train', return_value='model') as patched:\n"
        "    from lumen_ray import train\n"
        "    told = train('shards', 'run', workers=3)\n"
        "recipe = patched.call_args.args[1]\n"
        "print(json.dumps([told, recipe.name, recipe.workers]))"
    )
    assert in_a_new_process(code) == ["model", "quickstart", 3]


def test_the_environment_of_ray_is_set_before_ray_is_imported():
    code = (
        "import json, os, sys, unittest.mock\n"
        "import lumen_ray\n"
        "seen = []\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('ray', 'torch'):\n"
        "            seen.append([os.environ.get(k) for k in ('RAY_AUTH_MODE', 'RAY_USAGE_STATS_ENABLED',\n"
        "                         'RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S')])\n"
        "sys.meta_path.insert(0, Finder())\n"
        "for job in (lambda: lumen_ray.train('nowhere', 'run'), lambda: lumen_ray.label('nowhere', 'out')):\n"
        "    try:\n"
        "        job()\n"
        "    except ValueError as error:\n"
        "        pass\n"
        "print(json.dumps(seen))"
    )
    seen = in_a_new_process(code)
    assert seen and all(values == ["disabled", "0", "1"] for values in seen)


@pytest.mark.parametrize("name", PACKAGES)
def test_callable_packages_can_be_pickled_and_read_about(name):
    from ray import cloudpickle

    function = getattr(lumen_ray, name)
    for library in (pickle, cloudpickle):
        assert pickle.loads(library.dumps(function)) is function
    assert pickle.loads(cloudpickle.dumps(lambda: function))() is function
    assert function.__doc__ == inspect.getdoc(getattr(api, name)) and "Raises `UserError`" in function.__doc__
    assert inspect.signature(function) == inspect.signature(getattr(api, name))


def test_names_of_the_api_are_listed():
    assert set(lumen_ray.__all__) == {"ClassByExample", "Engine", "Example", "make_request", "draw", *FUNCTIONS}
    assert set(lumen_ray.__all__) <= set(dir(lumen_ray))
    namespace = {}
    exec("from lumen_ray import *", namespace)
    assert all(callable(namespace[name]) for name in lumen_ray.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        lumen_ray.trian  # noqa: B018


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_is_documented(name):
    function = getattr(api, name)
    documented = function.__doc__.replace("options:", "options: ")
    for parameter in inspect.signature(function).parameters:
        assert f"\n    {parameter}: " in documented, parameter
    assert ">>> " in function.__doc__


# -- prepare ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(monkeypatch):
    """The sources and the settings of every call of `prepare_source`, which writes nothing."""
    calls = []
    monkeypatch.setattr(
        "lumen_ray.data.shards.prepare.prepare_source",
        lambda output, source, **settings: calls.append((source, settings)) or {},
    )
    return calls


def test_options_of_a_source_are_keyword_arguments(sources, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    lumen_ray.prepare("scenes", "out", num=4, seed=1)
    lumen_ray.prepare("coco", "out", annotations=Path("a.json"), images=Path("photos"), workers=0)
    lumen_ray.prepare("pairs", "out", data=["a.csv", Path("b.csv")], header=False)
    lumen_ray.prepare("voc", "out", annotations="xml", images="photos", first_pixel=0, split=None)
    (scenes, settings), (coco, unparallel), (pairs, _), (voc, _) = sources
    assert (scenes.num, scenes.seed, scenes.side, scenes.edits) == (4, 1, 128, False) and settings["workers"] == 7
    assert [Path(p).name for p in (*coco.annotations, coco.images)] == ["a.json", "photos"]
    assert {type(p) for p in (*coco.annotations, coco.images)} == {str} and unparallel["workers"] == 0
    assert [Path(p).name for p in pairs.data] == ["a.csv", "b.csv"] and (pairs.header, pairs.images) == (False, None)
    assert (voc.first_pixel, voc.split, voc.difficult) == (0, None, "crowd")


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("scense", {}, "unknown source 'scense'; did you mean 'scenes'?"),
        ("scenes", {"nums": 4}, "unknown option 'nums' of source 'scenes'; did you mean 'num'? options: num, seed"),
        ("scenes", {}, "source 'scenes' needs 'num': number of scenes"),
        ("scenes", {"num": "4"}, "option 'num' must be a whole number, got '4'"),
        ("scenes", {"num": True}, "option 'num' must be a whole number, got True"),
        ("scenes", {"num": 4, "edits": "yes"}, "option 'edits' must be True or False, got 'yes'"),
        ("coco", {"annotations": [1], "images": "i"}, "option 'annotations' must be a text or a path, got 1"),
        (
            "panoptic",
            {"annotations": "a", "segments": "s", "images": "i", "stuff": "all"},
            "one of keep, skip; got",
        ),
        ("voc", {"annotations": "a", "images": "i", "first_pixel": 2}, "one of 0, 1; got 2"),
    ],
)
def test_options_that_a_source_does_not_take(sources, source, options, words):
    with pytest.raises(UserError) as caught:
        lumen_ray.prepare(source, "out", **options)
    assert words in str(caught.value) and not sources


# -- train ------------------------------------------------------------------------------------------------------------


def test_a_recipe_is_a_name_a_file_or_an_object(tmp_path):
    named = config.load(Recipe, recipe_path("quickstart"))
    for recipe in ("quickstart", recipe_path("quickstart"), str(recipe_path("quickstart")), named):
        assert api.load_recipe(recipe) == named
        assert api.load_recipe(recipe, 5).workers == 5
    assert named.workers != 5
    with pytest.raises(UserError, match="workers"):
        api.load_recipe(named, 0)
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        api.load_recipe("quikstart")


def test_train_hands_on_what_it_is_given():
    def progress(line): ...

    with mock.patch("lumen_ray.train.launch.train") as launch:
        lumen_ray.train(Path("s"), Path("r"), init_from=Path("m"), progress=progress, waiting=print)
    (shards, recipe, run), options = launch.call_args
    assert (shards, recipe.name, run) == ("s", "quickstart", "r")
    assert options == {"init_from": "m", "validator": None, "progress": progress, "waiting": print}


# -- evaluate, label, serve -------------------------------------------------------------------------------------------


class LoadedEngine:
    dtype = "bfloat16"


def test_evaluate_takes_an_engine_that_is_loaded():
    engine = LoadedEngine()
    with mock.patch("lumen_ray.evaluate.run.evaluate", return_value={"images": 1}) as score:
        assert lumen_ray.evaluate(engine, "s", "o", tasks="detect", limit=3, pictures=2) == {"images": 1}
        assert lumen_ray.evaluate(engine, "s", "o", dtype="bfloat16") == {"images": 1}
    first, second = score.call_args_list
    assert first.args == (engine, "s", "o") and second.kwargs["tasks"] is None
    assert first.kwargs == {
        "tasks": ["detect"], "limit": 3, "picture_limit": 2, "exemplars": [], "absent_classes": [], "progress": None,
    }  # fmt: skip
    for option in ({"decoders": {"pose": "lumen"}}, {"device": "cpu"}):
        with pytest.raises(UserError, match="give decoders, device and dtype to Engine.load"):
            lumen_ray.evaluate(engine, "s", "o", **option)


def test_label_takes_one_name_or_text_as_a_list_of_one():
    from lumen_ray.model.build import read_meta

    with mock.patch("lumen_ray.label.pipeline.label") as run:
        lumen_ray.label("photos", "o", tasks="caption", text={"vqa": "how many ?"})
        lumen_ray.label(Path("photos"), "o", model=Path(lumen_ray.__file__).parent / "weights" / "nano")
        lumen_ray.label("photos", "o", classes="red circle", actors=0, batch_size=2)
    texts, default, named = run.call_args_list
    assert texts.kwargs["tasks"] == ["caption", "vqa"] and texts.kwargs["classes"] is None
    assert texts.kwargs["prompts"] == {"vqa": ["how many ?"]}
    assert default.args[1] == "photos" and default.kwargs["tasks"] == ["detect"]
    assert default.kwargs["classes"] == read_meta("nano").classes
    assert named.kwargs["classes"] == ["red circle"]
    assert (named.kwargs["num_actors"], named.kwargs["batch_size"]) == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((["small"], "o"), {}, r"images is \['small'\]; give one path or URL"),
        (("small", None), {}, "output is None; give one path or URL"),
        (("small", "o"), {"classes": "red circle,blue square"}, "give a list of names, such as .'red circle', 'blue"),
        (("small", "o"), {"overlap": 0.2}, "give tile with it"),
        (("small", "o"), {"score_threshold": "a"}, "score_threshold is 'a'; give a value from 0 to 1"),
    ],
)
def test_wrong_arguments_of_label_are_one_sentence(tmp_path, monkeypatch, arguments, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        lumen_ray.label(*arguments, **options)
    assert not list(tmp_path.iterdir())


def test_serve_overrides_its_config():
    with mock.patch("lumen_ray.serve.app.run", return_value="server") as run:
        assert lumen_ray.serve(port=8123, decoders={"detect": "lumen"}, blocking=False) == "server"
        lumen_ray.serve("nano", host="0.0.0.0")
    (settings,), options = run.call_args_list[0]
    assert (settings.model, settings.http.port, settings.serving) == ("nano", 8123, {"detect": "lumen"})
    assert options == {"blocking": False} and run.call_args_list[1].kwargs == {"blocking": True}
    assert run.call_args_list[1].args[0].http.host == "0.0.0.0"


@pytest.mark.parametrize(
    "job",
    [
        lambda: lumen_ray.evaluate("nnao", "s", "o"),
        lambda: lumen_ray.label("photos", "o", model="nnao"),
        lambda: lumen_ray.serve("nnao"),
        lambda: lumen_ray.serve("nano", config="nnao"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(job):
    with pytest.raises(UserError, match="did you mean 'nano'"):
        job()


def test_the_example_of_the_package_runs():
    import doctest

    examples = doctest.DocTestFinder(recurse=False).find(lumen_ray, "lumen_ray", globs={})
    (example,) = [e for e in examples if e.examples]
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example).failed == 0
