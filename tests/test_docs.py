"""The pages: commands parse, settings validate, Python blocks run or fit the real signatures, links and paths exist.

Blocks are told apart by the info string behind the fence:

    sh                     `lumen-ray`, `python jobs/*.py` and `curl` lines are parsed by the real parsers and schemas
    python run             executed, the blocks of a page in order, in a folder with a photo.jpg
    python ray             the same, in a test of its own that starts Ray
    python client          the same, of a client of other servers, if it is installed, against a fake model
    python                 compiled; imports and arguments of calls are checked against the real signatures
    yaml recipe|model|serve  validated, laid over `quickstart` or `nano` where it is a part
    yaml keys              read as the file of API keys
    yaml exemplars         read, with images in place of those that it names
    json MODEL             validated against that model of `lumen_ray.wire.schemas`
    text chat              a record for `prepare chat`, read in tests/data/sources/test_chat_images.py
    text batch             a line of a batch file, read in tests/label/batch/test_batch_lines.py
"""

import ast
import importlib
import inspect
import json
import re
import shlex
import tempfile
import tomllib
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, ImageDraw

import lumen_ray
from lumen_ray import cli, config
from lumen_ray.label.exporters.registry import check_formats
from lumen_ray.presets import find
from lumen_ray.tasks import TASKS, get_task

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
README_WORDS = 1500
INFO_STRINGS = {
    *("", "sh", "toml", "python", "python run", "python ray", "python client", "text chat", "text batch"),
    *("yaml recipe", "yaml model", "yaml serve", "yaml exemplars", "yaml keys"),
}
#: files that a command line names and its user has to write
OWN_FILES = (".yaml", ".yml", ".txt")
#: stands for an image in the body of a curl line
IMAGE_OF_SHELL = "$(base64 -w0 photo.jpg)"


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    info: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def blocks() -> tuple[Block, ...]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
            line = text[: match.start()].count("\n") + 1
            found.append(Block(page.relative_to(ROOT).as_posix(), line, match[1].strip(), match[2]))
    return tuple(found)


def blocks_of(*infos: str) -> list[Block]:
    return [block for block in blocks() if block.info in infos]


# Shell --------------------------------------------------------------------------------------------------------------


@cache
def commands() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(where, words) of every simple command in the shell blocks."""
    found = []
    for block in blocks_of("sh"):
        for words in simple_commands(block.text):
            found.append((str(block), words))
    return tuple(found)


def simple_commands(script: str) -> Iterator[tuple[str, ...]]:
    """The words of each simple command of a script: split at newlines outside quotes, `&&`, `;` and `|`."""
    lexer = shlex.shlex(script.replace("\\\n", " "), posix=True, punctuation_chars="&;|\n")
    lexer.whitespace, lexer.whitespace_split = " \t", True
    words: list[str] = []
    for word in lexer:
        if word.strip("&;|\n"):
            words.append(word)
        elif words:
            yield tuple(words)
            words = []
    if words:
        yield tuple(words)


def command_line(words: tuple[str, ...]) -> list[str] | None:
    """What the command gives to the parser of `lumen-ray`; None for other commands."""
    if words[:3] == ("ray", "job", "submit"):
        words = words[words.index("--") + 1 :]
    elif words[0] == "sbatch":
        script = next(n for n, word in enumerate(words) if word.endswith(".sbatch"))
        return list(words[script + 1 :])
    if words[0].rpartition("/")[2] == "lumen-ray":
        return list(words[1:])
    script = Path(words[1]) if len(words) > 1 and words[0] == "python" else None
    if script and script.parent.name == "jobs":
        assert (ROOT / script).is_file(), script
        return [script.stem, *words[2:]]
    return None


LINES = [(where, line) for where, words in commands() if (line := command_line(words)) is not None]
CURLS = [(where, words) for where, words in commands() if words[0] == "curl"]


def ids(pairs: list[tuple[str, Any]]) -> list[str]:
    return [f"{where}-{' '.join(line)[:40]}" for where, line in pairs]


def of_user(name: str) -> bool:
    """Whether a preset's name is a file that the page asks its reader to write."""
    return name.endswith(OWN_FILES) and not (ROOT / name).exists()


@pytest.mark.parametrize(("where", "line"), LINES, ids=ids(LINES))
def test_command_lines_parse_and_name_what_exists(where, line):
    args = JOBS[line[0]](line[1:]) if line[0] in JOBS else cli.build_parser().parse_args(line)
    for kind, option in (("recipes", "recipe"), ("models", "preset"), ("serve", "config")):
        name = getattr(args, option, None)
        if name and not of_user(name):
            find(kind, name)
    tasks = getattr(args, "tasks", None) or ()
    for task in tasks:
        get_task(task)
    if hasattr(args, "decoders") and line[0] in ("evaluate", "label", "serve"):
        check_decoders(dict(pair.split("=") for pair in args.decoders))
    formats = getattr(args, "format", None) or getattr(args, "export", None)
    if line[0] == "label" and formats:
        check_formats(formats)
    for text in getattr(args, "text", None) or ():
        get_task(text.partition("=")[0])


def parse_bench(line: list[str]) -> Any:
    from lumen_ray.bench import command

    args = command.build_parser().parse_args([str(ROOT) if word == "CHECKOUT" else word for word in line])
    command.check(args, command.chosen(args.kind, args.only))
    if args.kind == "decoders" and args.decoders:
        assert set(args.decoders) <= set(preset(args.preset))
    return args


def parse_answers(line: list[str]) -> Any:
    from lumen_ray.evaluate.answers import build_parser

    args = build_parser().parse_args(line)
    if args.action == "write":
        find("questions", args.questions)
    return args


def parse_score(line: list[str]) -> Any:
    from lumen_ray.evaluate.labelled import build_parser

    return build_parser().parse_args(line)


#: jobs that are no verb of `lumen-ray`
JOBS = {"bench": parse_bench, "answers": parse_answers, "score": parse_score}


def check_decoders(chosen: dict[str, str]) -> None:
    """`nano-experts` has every decoder."""
    from lumen_ray.model.settings import ModelSettings

    config.validate(ModelSettings, preset("nano-experts") | {"decoders": chosen}, "--decoders")


def preset(name: str, kind: str = "models") -> dict[str, Any]:
    return config.load_yaml(find(kind, name))


def verbs(parser: Any) -> dict[str, Any]:
    return parser._subparsers._group_actions[0].choices


def test_pages_have_commands_of_every_verb_and_source():
    parser = cli.build_parser()
    assert {line[0] for _, line in LINES} - set(JOBS) == set(verbs(parser))
    sources = set(verbs(verbs(parser)["prepare"]))
    assert {line[1] for _, line in LINES if line[0] == "prepare"} == sources
    assert {line[1] for _, line in LINES if line[0] == "convert"} == set(verbs(verbs(parser)["convert"]))


def test_files_of_pytest_and_bash_lines_exist():
    named = [word for _, words in commands() for word in words if words[0] in ("pytest", "bash") and "/" in word]
    named += [word for _, words in commands() for word in words if word.startswith("cluster/")]
    assert named and [word for word in named if not (ROOT / word).exists()] == []


def test_the_readme_has_the_blocks_that_ci_runs():
    text = (ROOT / "README.md").read_text()
    for marker, command in (
        ("install-and-run", "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/lumen-ray quickstart"),
        ("test", '.venv/bin/pip install ".[test]" && .venv/bin/pytest -n 2 --dist loadfile'),
    ):
        assert f"<!-- {marker} -->\n```sh\n{command}\n```\n" in text


# HTTP ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "words"), CURLS, ids=ids(CURLS))
def test_curl_bodies_fit_the_api(where, words):
    path = re.fullmatch(r"http://127\.0\.0\.1:\d+(/.*)", next(w for w in words if w.startswith("http")))[1]
    given = list(zip(words, words[1:], strict=False))
    path = path.partition("?")[0]
    bodies = [value for option, value in given if option in ("-d", "--data")]
    fields = dict(value.split("=", 1) for option, value in given if option in ("-F", "--form"))
    if bodies:
        check_body(path, json.loads(bodies[0]))
    elif fields:
        check_form(path, fields)
    else:
        assert path in routes()


@cache
def routes() -> set[str]:
    from lumen_ray.serve.api import create_api
    from lumen_ray.serve.settings import Batches, ServeSettings

    with tempfile.TemporaryDirectory() as folder:
        api = create_api(None, ServeSettings(model="nano", batches=Batches(folder=folder)))
    return set(api.openapi()["paths"]) | {"/", "/docs", "/openapi.json"}


def check_body(path: str, body: dict[str, Any]) -> None:
    from lumen_ray.serve import openai_images
    from lumen_ray.wire import chat, responses, schemas

    if not path.startswith("/v1/"):
        check_other_api(path, body)
        return
    assert path in routes()
    if path == "/v1/chat/completions":
        asked = chat.parse_chat(body, takes_sampling=True, takes_stream=True)
        assert [part.type for part in asked.messages[0].content].count("image_url") == 1
    elif path == "/v1/responses":
        (item,) = schemas.parse(responses.ResponsesRequest, body).input
        assert [part.type for part in item.content].count("input_image") == 1
    elif path == "/v1/images/generations":
        schemas.parse(openai_images.ImageRequest, body)
    elif path == "/v1/infer":
        for entry in schemas.parse(schemas.InferRequest, body).requests:
            check_fields(entry.task, entry)
    else:
        asked = schemas.parse(schemas.TaskRequest, body)
        task = path.removeprefix("/v1/")
        shown = asked.image is not None or asked.image_id is not None
        assert shown == get_task(task).sees_image
        check_fields(task, asked)


def check_other_api(path: str, body: dict[str, Any]) -> None:
    """A fake model answers the body, whose images are of the shell."""
    from fastapi.testclient import TestClient
    from support.serve_fakes import FakeBackend, base64_png

    from lumen_ray.serve.api import create_api
    from lumen_ray.serve.settings import ServeSettings

    text = json.dumps(body).replace(IMAGE_OF_SHELL, base64_png())
    client = TestClient(create_api(FakeBackend(), ServeSettings(model="nano")))
    response = client.post(path, content=text, headers={"content-type": "application/json"})
    assert response.status_code == 200, response.text


def check_form(path: str, form: dict[str, str]) -> None:
    from lumen_ray.serve import openai_images
    from lumen_ray.wire import schemas

    assert path in routes()
    fields: dict[str, Any] = dict(form)
    assert fields.pop("image").startswith("@")
    if path == "/v1/images/edits":
        schemas.parse(openai_images.ImageEditForm, fields)
        return
    for name in {"classes", "keypoints"} & set(fields):
        fields[name] = fields[name].split(",")
    check_fields(path.removeprefix("/v1/"), schemas.parse(schemas.TaskFields, fields))


def check_fields(task: str, fields: Any) -> None:
    """The task takes what is given and has what it needs."""
    from lumen_ray.wire.requests import parse_request
    from lumen_ray.wire.settings import Defaults, Limits

    parse_request(task, fields, (128, 128), Limits(), Defaults())


def json_blocks() -> list[Block]:
    return [block for block in blocks() if block.info.startswith("json")]


@pytest.mark.parametrize("block", json_blocks(), ids=str)
def test_json_blocks_fit_their_schema(block):
    from lumen_ray.wire import schemas

    model = getattr(schemas, block.info.split()[1])
    data = json.loads(block.text)
    assert set(data) <= set(model.model_fields)
    model.model_validate(data)


def test_the_page_about_serving_names_every_route_and_setting():
    from lumen_ray.serve.settings import ServeSettings

    text = (ROOT / "docs" / "serving.md").read_text()
    assert [r for r in routes() if r.removeprefix("/v1/") not in TASKS and r not in text] == []
    assert [name for name in (*TASKS, *ServeSettings.model_fields) if f"`{name}`" not in text] == []


# Settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks_of("yaml recipe", "yaml model", "yaml serve"), ids=str)
def test_yaml_blocks_validate(block):
    from lumen_ray.model.settings import ModelSettings
    from lumen_ray.recipe import Recipe
    from lumen_ray.serve.settings import ServeSettings

    given = yaml.safe_load(block.text)
    kind, base, settings = {
        "yaml recipe": ("recipes", "quickstart", Recipe),
        "yaml model": ("models", "nano", ModelSettings),
        "yaml serve": ("serve", "nano", ServeSettings),
    }[block.info]
    base_settings = preset(base, kind)
    if kind == "serve":
        base_settings = base_settings["applications"][0]["args"]
    config.validate(settings, base_settings | given, str(block))


@pytest.mark.parametrize("block", blocks_of("yaml keys"), ids=str)
def test_files_of_keys_can_be_read(block, tmp_path):
    from lumen_ray.serve.keys import read_keys

    (tmp_path / "keys.yaml").write_text(block.text)
    assert read_keys(tmp_path / "keys.yaml")


@pytest.mark.parametrize("block", blocks_of("yaml exemplars"), ids=str)
def test_files_of_exemplars_can_be_read(block, tmp_path):
    from lumen_ray.exemplar_file import read_exemplars

    (tmp_path / "exemplars.yaml").write_text(block.text)
    for name in {e["image"] for given in yaml.safe_load(block.text)["classes"] for e in given["examples"]}:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (128, 128)).save(tmp_path / name)
    assert read_exemplars(tmp_path / "exemplars.yaml")


def test_the_page_about_training_names_every_recipe_and_key():
    from lumen_ray.recipe import BranchSettings, EmaSettings, LoraSettings, MlflowSettings, Recipe, Stage, TaskGroup

    text = (ROOT / "docs" / "training.md").read_text()
    keys = {key for settings in (Recipe, Stage, BranchSettings) for key in settings.model_fields}
    keys |= {key for settings in (EmaSettings, LoraSettings, MlflowSettings) for key in settings.model_fields}
    recipes = {path.stem for path in (ROOT / "configs" / "recipes").glob("*.yaml")}
    assert [name for name in sorted(keys | recipes) if f"`{name}`" not in text] == []
    assert [name for name in TaskGroup.model_fields if name not in text] == []


def test_the_page_about_decoders_names_every_decoder_and_the_one_about_labelling_every_task():
    decoders = {"lumen", "grounding_dino", "unipose", "stable_diffusion", "instruct_pix2pix"}
    text = (ROOT / "docs" / "decoders.md").read_text()
    assert [name for name in decoders if f"| `{name}` |" not in text] == []
    text = (ROOT / "docs" / "labelling.md").read_text()
    assert [name for name in TASKS if f"`{name}`" not in text] == []


def test_the_page_about_labelling_has_a_row_for_every_format():
    from lumen_ray.label.exporters.registry import EXPORTERS

    text = (ROOT / "docs" / "labelling.md").read_text()
    table = text[text.index("## Exports") : text.index("| option | meaning |", text.index("## Exports"))]
    assert re.findall(r"^\| `([a-z-]+)` \|", table, flags=re.MULTILINE) == sorted(EXPORTERS)
    every = [task.name for task in TASKS.values() if task.result != "image" and task.needs != "region"]
    for name, form in EXPORTERS.items():
        held = [task for task in every if form.load().holds(get_task(task))]
        written = re.search(rf"^\| `{name}` \|[^|]*\| ([^|]*) \|", table, flags=re.MULTILINE)[1]
        if written.startswith("all with boxes"):
            wanted = [task for task in every if not get_task(task).is_text]
        elif written.startswith("all but"):
            wanted = [task for task in every if f"`{task}`" not in written]
        elif written.startswith("all"):
            wanted = every
        else:
            wanted = re.findall("`([a-z]+)`", written)
        assert held == wanted, name


def test_toml_blocks_parse():
    for block in blocks_of("toml"):
        tomllib.loads(block.text)


def test_every_block_says_how_it_is_checked():
    assert [str(b) for b in blocks() if b.info not in INFO_STRINGS and not b.info.startswith("json ")] == []
    bare = [str(b) for b in blocks() if b.info == "" and b.page != "ARCHITECTURE.md"]
    assert bare == []  # only diagrams are neither commands nor code


# Python -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks_of("python", "python run", "python ray", "python client"), ids=str)
def test_python_blocks_fit_the_real_signatures(block):
    check_python(block.text, str(block))


def check_python(source: str, name: str) -> None:
    """Imports of this package exist, and calls of what they import take the arguments given."""
    tree = ast.parse(source, name)
    compile(tree, name, "exec")
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lumen_ray":
            module = importlib.import_module(node.module)
            for alias in node.names:
                known[alias.asname or alias.name] = getattr(module, alias.name)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            target, made = node.targets[0], result_of(node.value, known)
            if isinstance(target, ast.Name) and made is not None:
                known[target.id] = made
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (called := callee(node.func, known)) is not None:
            check_call(node, called, known)


def callee(node: ast.expr, known: dict[str, Any]) -> Any:
    """The object that an expression such as `Engine.load` or `engine.run` names; None for what is not ours."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := callee(node.value, known)) is not None:
        found = getattr(owner, node.attr, None)
        if found is None and inspect.isclass(owner):
            assert node.attr in getattr(owner, "__annotations__", {}), f"{owner.__name__} has no {node.attr}"
        return found
    return None


def result_of(call: ast.Call, known: dict[str, Any]) -> Any:
    """The class of what a call gives, where it is one of ours."""
    called = callee(call.func, known)
    if inspect.isclass(called):
        return called
    if inspect.ismethod(called) and inspect.isclass(called.__self__):
        return called.__self__  # a constructor such as `Engine.load`
    if not inspect.isroutine(called):
        return None
    returned = typing.get_type_hints(called).get("return")
    return returned if inspect.isclass(returned) and returned.__module__.startswith("lumen_ray") else None


def check_call(node: ast.Call, called: Callable[..., Any], known: dict[str, Any]) -> None:
    signature = signature_of(called)
    name = ast.unparse(node.func)
    values = [None] * len(node.args)
    if inspect.isfunction(called) and next(iter(signature.parameters), "") == "self":
        values = [None, *values]
    named = {keyword.arg: None for keyword in node.keywords if keyword.arg}
    signature.bind(*values, **named)
    if name == "prepare":
        from lumen_ray.data.sources.registry import SOURCES

        options = {argument.name for argument in SOURCES[ast.literal_eval(node.args[0])].arguments}
        assert set(named) <= options | set(signature.parameters)
    if name == "make_request":
        arguments = {keyword.arg: keyword.value for keyword in node.keywords}
        called(ast.literal_eval(node.args[0]), **{key: built(value, known) for key, value in arguments.items()})
    if name == "train":
        recipe = next((keyword.value for keyword in node.keywords if keyword.arg == "recipe"), None)
        if isinstance(recipe, ast.Constant) and not of_user(recipe.value):
            find("recipes", recipe.value)


def signature_of(called: Callable[..., Any]) -> inspect.Signature:
    """`inspect.signature`, which takes the first argument of a static `__call__` for `self`."""
    static = inspect.getattr_static(type(called), "__call__", None)
    return inspect.signature(static.__func__ if isinstance(static, staticmethod) else called)


def built(node: ast.expr, known: dict[str, Any]) -> Any:
    """The value of a literal, or of a call of one of our classes with literals, or a list of them."""
    if isinstance(node, ast.List):
        return [built(item, known) for item in node.elts]
    if isinstance(node, ast.Call) and inspect.isclass(called := callee(node.func, known)):
        return called(**{keyword.arg: built(keyword.value, known) for keyword in node.keywords if keyword.arg})
    try:
        return ast.literal_eval(node)
    except ValueError:
        pytest.fail(f"requests in the pages are made of literals, not of {ast.unparse(node)}")


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    """A folder like a reader's, with a photo.jpg."""
    image = Image.new("RGB", (128, 128), (128, 128, 128))
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 24, 60, 64), fill=(220, 40, 40))
    draw.rectangle((76, 70, 110, 104), fill=(40, 60, 220))
    image.save(tmp_path / "photo.jpg", quality=95)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_blocks(page: str, info: str) -> None:
    """The blocks of a page one after the other in one namespace, with a free port for servers."""
    from support.serve_fakes import free_port

    port = str(free_port())
    namespace: dict[str, Any] = {}
    for block in blocks_of(info):
        if block.page == page:
            exec(compile(block.text.replace("8123", port), str(block), "exec"), namespace)


def pages_with(info: str) -> list[str]:
    return list(dict.fromkeys(block.page for block in blocks_of(info)))


@pytest.mark.parametrize("page", pages_with("python run"))
def test_python_blocks_run(page, user_folder, capsys):
    run_blocks(page, "python run")
    assert (user_folder / "drawn.png").is_file()
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("block", blocks_of("python client"), ids=str)
def test_python_blocks_of_other_clients_run(block, user_folder, capsys, monkeypatch):
    from support.live_server import live_server
    from support.serve_fakes import FakeBackend

    from lumen_ray.serve.api import create_api
    from lumen_ray.serve.settings import ServeSettings

    pytest.importorskip(
        re.search(r"^from (huggingface_hub|inference_sdk|openai|tritonclient)", block.text, re.MULTILINE)[1]
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # which CI sets
    with live_server(create_api(FakeBackend(), ServeSettings(model="nano"))) as base:
        text = block.text.replace("127.0.0.1:8000", base.removeprefix("http://"))
        exec(compile(text, str(block), "exec"), {})
    assert "red circle" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.parametrize("page", pages_with("python ray"))
def test_python_blocks_with_ray_run(page, user_folder, capsys):
    from lumen_ray.serve.app import prepare_serve_environment

    prepare_serve_environment()
    run_blocks(page, "python ray")
    assert "detect" in capsys.readouterr().out


def test_the_public_names_are_documented():
    import lumen_ray

    text = (ROOT / "docs" / "python.md").read_text()
    public = [name for name in lumen_ray.__all__ if not name.startswith("_")]
    assert [name for name in public if f"`{name}" not in text] == []


# Links, paths and length --------------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@cache
def anchors(page: Path) -> frozenset[str]:
    """What GitHub makes of the headings."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return frozenset(found)


LINKS = [
    (page.relative_to(ROOT).as_posix(), target)
    for page in PAGES
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page))
    if not target.startswith(("http://", "https://"))
]


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_links_point_at_files_and_headings(page, target):
    path, _, anchor = target.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    assert file.exists()
    assert file.resolve().is_relative_to(ROOT)
    if anchor:
        assert anchor in anchors(file.resolve())


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_paths_in_the_text_exist(page):
    """What stands in backticks and looks like a path of the repository. The changelog names files that are gone."""
    roots = ("lumen_ray/", "configs/", "jobs/", "tests/", "docs/", ".ci/", "findings/")
    named = {path for path in re.findall(r"`([\w./-]+)`", prose(page)) if path.startswith(roots)}
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def tree_paths(tree: str) -> Iterator[Path]:
    """The files and folders in the left column of a tree."""
    parents = {0: ROOT}
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        if indent in parents:  # else a description that goes on
            for name in re.split(r"\s{2,}", line.strip())[0].split():
                path = parents[indent] / name
                parents[indent + 2] = path
                yield path


def test_the_tree_in_the_architecture_page_is_the_package():
    paths = set(tree_paths(next(block.text for block in blocks_of("") if block.text.startswith("lumen_ray/"))))
    assert [path.relative_to(ROOT).as_posix() for path in sorted(paths) if not path.exists()] == []
    packages = {path.parent for folder in ("*", "decoders/*") for path in ROOT.glob(f"lumen_ray/{folder}/__init__.py")}
    assert sorted(packages - paths) == []


def test_pages_are_reachable_from_the_readme():
    linked = {target.partition("#")[0] for page, target in LINKS if page == "README.md"}
    assert {page.relative_to(ROOT).as_posix() for page in PAGES if page.name != "README.md"} <= linked


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS


def test_the_changelog_has_the_version_of_the_package():
    from lumen_ray import __version__

    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## \[(.*?)\]", text, flags=re.MULTILINE)[:2] == ["Unreleased", __version__]


def test_signatures_in_the_text_are_the_real_ones():
    """`train(shards, output, *, ...)` in docs/python.md has the parameters of the function, in order, with defaults."""
    text = " ".join((ROOT / "docs" / "python.md").read_text().split())
    found = re.findall(r"`(prepare|train|evaluate|label|export_labels|serve)\(([^`]*)\)`", text)
    written = {name: arguments for name, arguments in found if "*, " in arguments}
    assert set(written) == {"prepare", "train", "evaluate", "label", "export_labels", "serve"}
    for name, arguments in written.items():
        parameters = inspect.signature(getattr(lumen_ray, name)).parameters.values()
        real = [str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters]
        shown = [str(p) for p in inspect.signature(eval(f"lambda {arguments}: None")).parameters.values()]  # noqa: S307
        assert shown == real, name
