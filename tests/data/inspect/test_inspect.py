"""`data inspect`: even samples, tables that stay readable, and a page that shows what training sees."""

import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from lumen_ray import cli, console
from lumen_ray.data.batches.collate import Collator
from lumen_ray.data.batches.plan import row_rng
from lumen_ray.data.images import decode
from lumen_ray.data.inspect.command import inspect, load_recipe, print_sections, sections
from lumen_ray.data.inspect.prompts import Prompt, instruction, prompts_of
from lumen_ray.data.inspect.view import Sampler, sample_places
from lumen_ray.data.scenes import edits as scenes_edits
from lumen_ray.data.scenes import render as scenes
from lumen_ray.data.shards import shards
from lumen_ray.data.shards.schema import make_message, make_row
from lumen_ray.data.shards.statistics import Statistics
from lumen_ray.keypoints import FIGURE_EDGES, FIGURE_KEYPOINTS
from lumen_ray.tasks import TASKS

FILE = "part-00000.parquet"
BROKEN = "broken.jpg"


@pytest.fixture(scope="module")
def rows():
    texts = make_row("text", None, (0, 0), "chat", tasks=["chat"], messages=[make_message("chat", "hé 漢", "<b>ö</b>")])
    broken = make_row(BROKEN, b"nonsense", (64, 64), "scenes", tasks=["detect"], classes=["red circle"])
    return [scenes.scene_row(2, i, 64) for i in range(14)] + [texts, broken]


@pytest.fixture(scope="module")
def folder(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    with shards.ShardWriter(folder, FILE, rows_per_group=4) as writer:
        for row in rows:
            writer.write(row)
    categories = [
        {"name": name, "keypoints": list(scenes.SKELETONS.get(name, ())),
         "skeleton": [list(e) for e in FIGURE_EDGES] if name in scenes.SKELETONS else []}
        for name in scenes.CLASSES
    ]  # fmt: skip
    shards.write_rejected(folder, [{"kind": "images", "image_id": "x", "origin": "here", "reason": "because of 'it'"}])
    counts = {"images": {"in": 17, "written": 16, "rejected": 1}}
    shards.write_manifest(folder, shards.build_manifest([writer.entry], categories=categories, counts=counts))
    return folder


@pytest.fixture(scope="module")
def sampler(folder):
    return Sampler(folder, shards.read_manifest(folder), load_recipe(None))


@pytest.fixture(scope="module", params=["bccd", "nano"])
def samplers(folder, request):
    """Of a recipe whose links see the image, and of one whose links do not."""
    recipe = load_recipe(request.param)
    joint = next(stage for stage in recipe.stages if "detect" in stage.groups[0].tasks)
    return Sampler(folder, shards.read_manifest(folder), recipe.model_copy(update={"stages": (joint,)}))


def view_of(sampler, number):
    return sampler.view(FILE, number // 4, number % 4, np.random.default_rng(0))


@pytest.mark.parametrize("number", [0, 1, 5, 16, 40])
def test_samples_are_different_rows_from_all_over_the_folder(folder, number):
    manifest = shards.read_manifest(folder)
    places = [4 * group + row for _, group, row in sample_places(manifest, number, seed=3)]
    count = min(number, 16)
    assert len(set(places)) == count
    for i, place in enumerate(places):
        assert i * 16 // count <= place < (i + 1) * 16 // count
    if number == 5:
        assert places != [4 * g + r for _, g, r in sample_places(manifest, number, seed=4)]


def test_prompts_and_targets_are_those_of_the_collator(samplers, rows):
    sampler = samplers
    reader, stage, looking = sampler.reader, sampler.recipe.stages[0], set()
    by_example = 0
    for number in range(8):
        collator = Collator(
            reader.tokenizer, reader.input_size, stage.groups[0].tasks, reader.skeletons, stage.branches,
            stage.augment, reader.frequencies, links_see_image=reader.links_see_image,
        )  # fmt: skip
        rng = row_rng(sampler.recipe.seed, 0, FILE, number // 4, number % 4)
        batch = collator([rows[number]], [decode(rows[number]["image"])], [rng])
        view = view_of(sampler, number)
        assert (view.batch.layout.input_ids == batch.layout.input_ids).all()
        prompts = prompts_of(view, sampler.tokenizer, {})
        assert [p.task for p in prompts] == batch.tasks
        assert sum(p.num_tokens for p in prompts) == int((batch.layout.branch_ids >= 0).sum())
        present = [i["phrase"] for i in rows[number]["instances"]]
        for prompt in prompts:
            if prompt.task in ("detect", "segment", "count"):
                by_example += (shown := bool(prompt.regions))
                assert shown == (" like <region>" in prompt.phrase)
                assert shown or len(prompt.boxes) == present.count(prompt.phrase)
                assert shown or prompt.negative == (prompt.phrase not in present)
                assert prompt.tokens[-5][0] in ("[DET]", "[SEG]") and prompt.tokens[-5][2] == prompt.reads_image
                assert prompt.note.endswith("without the image") != prompt.reads_image
                looking.add(prompt.reads_image)
                assert [kind for _, kind, _ in prompt.tokens[-4:]] == ["query"] * 4
        told = {" ".join(t["content"] for t in m["turns"][1::2]) for m in rows[number]["messages"]}
        for prompt in prompts:
            learned = "".join(text for text, kind, is_learned in prompt.tokens if is_learned and kind == "text")
            assert not TASKS[prompt.task].is_text or learned.strip() in told
    assert looking == ({True} if reader.links_see_image else {True, False})
    assert (by_example > 0) == (stage.branches.exemplars > 0)


def test_a_pose_brings_its_keypoints_together(sampler, rows):
    number = next(n for n, row in enumerate(rows) if any(i["keypoints"] for i in row["instances"]))
    prompts = prompts_of(view_of(sampler, number), sampler.tokenizer, {})
    pose = next(p for p in prompts if p.task == "pose" and p.parent < 0)
    assert pose.keypoint_names == FIGURE_KEYPOINTS
    assert [p.parent for p in prompts].count(pose.index) == len(FIGURE_KEYPOINTS)
    stored = [i["keypoints"] for i in rows[number]["instances"] if i["phrase"] == pose.phrase]
    scale = sampler.settings.image_size / 64
    wanted = np.array(stored).reshape(len(stored), -1, 3) * [scale, scale, 1]
    np.testing.assert_allclose(pose.keypoints, wanted, atol=1e-3)


def test_text_is_complete_although_tokens_split_characters(sampler):
    (prompt,) = prompts_of(view_of(sampler, 14), sampler.tokenizer, {})
    assert instruction(prompt) == "hé 漢"
    assert not any("\ufffd" in text for text, _, _ in prompt.tokens)


def test_the_page_needs_nothing_beside_it(folder, tmp_path):
    statistics, page = inspect(folder, tmp_path / "out", samples=16, recipe="quickstart")
    text = (tmp_path / "out" / "index.html").read_text()
    assert page == str(tmp_path / "out" / "index.html")
    assert not re.search(r'(src|href)="(?!data:)', text) and "://" not in text
    assert text.count("<article>") == 16
    assert "cannot be read" in text and BROKEN in text and "&lt;b&gt;ö&lt;/b&gt;" in text
    assert "negatives_by_frequency" in text and "because of" in text
    counts = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert counts["rows"] == statistics.rows == 16
    assert counts["class_instances"] == dict(statistics.class_instances)


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    """Rows of scenes with an edit, and their shard folder."""
    folder = tmp_path_factory.mktemp("edits")
    rows = [scenes_edits.with_edit(scenes.scene_row(2, i, 64), scenes_edits.scene_edit(2, i, 64)) for i in range(6)]
    rows = [row for row in rows if row["target_image"] is not None]
    with shards.ShardWriter(folder, FILE, rows_per_group=4) as writer:
        for row in rows:
            writer.write(row)
    categories = [{"name": name, "keypoints": [], "skeleton": []} for name in scenes.CLASSES]
    shards.write_manifest(folder, shards.build_manifest([writer.entry], categories=categories))
    return rows, folder


@pytest.mark.parametrize("recipe", [None, "edit", "generate"])
def test_target_images_are_shown_beside_their_sources(edits, tmp_path, recipe):
    rows, folder = edits
    name = recipe and tmp_path / "recipe.yaml"
    if recipe:
        name.write_text(
            f"name: one\nmodel: nano-experts\nstages: [{{name: a, steps: 1, groups: [{{tasks: [{recipe}]}}]}}]\n"
        )
    sampler = Sampler(folder, shards.read_manifest(folder), load_recipe(recipe and str(name), edits=True))
    prompts = prompts_of(view_of(sampler, 0), sampler.tokenizer, {})
    (drawn,) = (p for p in prompts if p.picture is not None)
    source, task = ("image", "generate") if recipe == "generate" else ("target_image", "edit")
    text = next(m for m in rows[0]["messages"] if m["task"] == ("caption" if recipe == "generate" else "edit"))
    assert drawn.task == task and text["turns"][-1]["content"].lower() in instruction(drawn)
    side = sampler.settings.stable_diffusion.image_size
    assert drawn.note.startswith(f"to make: a picture of {side}×{side}") and not drawn.negative
    wanted = Image.fromarray(decode(rows[0][source])).resize(drawn.picture.shape[1::-1], Image.Resampling.BILINEAR)
    assert np.abs(drawn.picture.astype(int) - np.asarray(wanted)).mean() < 6
    inspect(folder, tmp_path / "out", samples=len(rows), recipe=recipe and str(name))
    page = (tmp_path / "out" / "index.html").read_text()
    queries = re.findall(r">(q\d+|…)</s>", page[page.index("<em>" + task) :])
    assert queries[:3] == ["q1", "…", "q64"]
    assert page.count('alt="stored picture after the edit"') == page.count('alt="to make"') == len(rows)


def test_without_edits_the_page_has_no_pairs(folder, tmp_path):
    inspect(folder, tmp_path / "out", samples=4)
    assert "<div class=pair>" not in (tmp_path / "out" / "index.html").read_text()


def several_images_row(broken=False):
    images = [scenes.scene_row(3, i, 64)["image"] for i in range(3)]
    further = [{"image": image[:200] if broken else image, "height": 64, "width": 64} for image in images[1:]]
    message = make_message("chat", "what ?", "this", image_turns=(0, 1))
    message["turns"] += make_message("chat", "and this ?", "that")["turns"]
    return make_row("three", images[0], (64, 64), "chat", tasks=["chat"], messages=[message], further_images=further)


def test_rows_of_several_images_are_shown_with_their_numbers(tmp_path):
    folder = tmp_path / "shards"
    with shards.ShardWriter(folder, FILE) as writer:
        writer.write(several_images_row())
        writer.write({**several_images_row(broken=True), "image_id": "broken"})
    shards.write_manifest(folder, shards.build_manifest([writer.entry]))
    statistics, _ = inspect(folder, tmp_path / "out", samples=2)
    assert statistics.items["further images"] == 4 and statistics.image_sides.total() == 6
    text = (tmp_path / "out" / "index.html").read_text()
    whole, broken = sorted(re.findall("<article>.*?</article>", text, re.DOTALL), key=lambda card: "broken" in card)
    assert whole.count('alt="further stored image"') == whole.count('alt="further model input"') == 2
    assert re.findall(r"<small>(image \d)</small>", whole) == ["image 2", "image 3"] * 2
    assert "<code>image 2</code> what ? → this → <code>image 3</code> and this ? → that" in whole
    assert "as stored, 3 images" in whole
    assert "image 2: the image cannot be read" in broken and broken.count("further") == 0
    sampler = Sampler(folder, shards.read_manifest(folder), load_recipe(None))
    view = sampler.view(FILE, 0, 0, np.random.default_rng(0))
    side = sampler.settings.image_size
    assert view.image_tokens == 3 * sampler.settings.image_tokens((side, side))


def test_long_lists_end_in_one_line_and_a_pipe_gets_plain_lines():
    s = Statistics(rows=5)
    for i in range(1200):
        s.class_instances[f"class {i:04}"] = 1200 - i
        s.class_images[f"class {i:04}"] = 1
    s.class_absent["never seen"] = 5
    s.reasons["a reason [red] " + "of many words " * 20] = 3
    s.examples = dict.fromkeys(s.reasons, "a.jpg")
    out = io.StringIO()
    print_sections(sections(s, top=10), Console(file=out, width=60))
    text = out.getvalue()
    assert "classes: 1,201, 1 of them without an object" in text
    assert re.search(r"class 0009 +1,191 +1 +0\n +1,191 others +\d", text)
    assert "a reason [red] " + "of many words " * 20 in text, "nothing is cut off, nothing is read as markup"
    assert "\x1b" not in text and "│" not in text
    terminal = io.StringIO()
    print_sections(sections(s, top=10), Console(file=terminal, width=100, force_terminal=True))
    assert "1,191 others" in terminal.getvalue() and "│" in terminal.getvalue()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["'nowhere' does not exist", "lumen-ray prepare"]),
        ([".", "--recipe", "quickstart"], ["has no manifest.json"]),
        (["{}", "--recipe", "quikstart"], ["did you mean 'quickstart'"]),
        (["{}", "--recipe", "quickstart", "--stage", "jiont"], ["did you mean 'joint'", "align"]),
        (["{}", "--samples", "-1"], ["samples is -1"]),
        (["{}", "--top", "0"], ["top is 0"]),
    ],
)
def test_mistakes_are_one_sentence(arguments, words, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "inspect", *(a.format(folder) for a in arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("lumen-ray: ") and "\n" not in error
    assert all(word in error for word in words)
    assert not (tmp_path / "inspect").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [("pack_tokens: 10", "pack_tokens 10 leaves no room"), ("buckets: [[64, 72]]", "bucket [64, 72] does not fit")],
)
def test_a_recipe_that_does_not_fit_its_model_is_reported(folder, tmp_path, capsys, setting, words):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"name: r\n{setting}\nstages: [{{name: a, steps: 1}}]\n")
    output = tmp_path / "o"
    assert cli.main(["data", "inspect", str(folder), "--recipe", str(recipe), "--output", str(output)]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error
    assert not output.exists()


def test_another_schema_version_is_reported(folder, tmp_path, capsys):
    (tmp_path / "manifest.json").write_text(json.dumps(shards.read_manifest(folder) | {"schema_version": 9}))
    assert cli.main(["data", "inspect", str(tmp_path)]) == 2
    assert "schema version 9" in capsys.readouterr().err


def test_the_command_prints_tables_and_where_the_page_is(folder, tmp_path, capsys):
    assert cli.main(["data", "inspect", str(folder), "--output", str(tmp_path / "o"), "--samples", "1"]) == 0
    out = capsys.readouterr().out
    assert "classes: 12" in out and f"page -> {tmp_path / 'o' / 'index.html'}" in out


@pytest.mark.parametrize("output", ["file", "file/x", "/proc/x", "/proc"])
def test_an_output_that_cannot_be_made_is_reported_first(folder, tmp_path, capsys, monkeypatch, output):
    (tmp_path / "file").write_text("x")
    if output != "/proc":
        monkeypatch.setattr("lumen_ray.data.inspect.command.gather", lambda *_: pytest.fail("it counted"))
    assert cli.main(["data", "inspect", str(folder), "--output", str(tmp_path / output), "--samples", "0"]) == 2
    error = capsys.readouterr().err.strip()
    assert " cannot be " in error and "\n" not in error


def test_a_damaged_file_is_named(folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "copy")
    data = bytearray((copy / FILE).read_bytes())
    data[len(data) // 3] ^= 1  # in a picture, which counting does not read
    (copy / FILE).write_bytes(data)
    arguments = ["data", "inspect", str(copy), "--output", str(tmp_path / "o"), "--samples", "0"]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert f"are damaged: {FILE} does not match its checksum; run `lumen-ray prepare` again" in error
    assert "\n" not in error
    assert cli.main([*arguments, "--no-verify"]) == 0


def test_classes_may_stand_in_a_file(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("red circle\n\n  bow, ribbon \n")
    assert console.class_names(str(path)) == ["red circle", "bow, ribbon"]
    assert console.class_names("a, b") == ["a", "b"]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(cli.UserError, match="UTF-8"):
        console.class_names(str(path))


def test_a_crowd_is_ignored_not_found():
    boxes = [[0.0, 0, 1, 1]] * 3
    prompt = Prompt(0, "detect", [], 9, boxes=boxes, crowd=[False, True, False])
    assert prompt.note == "2 to find, 1 crowds ignored, 9 tokens" and not prompt.negative
    assert Prompt(0, "detect", [], 9).note == "nothing to find, 9 tokens"


def test_a_text_with_links_shows_all_their_objects(tmp_path):
    row = scenes.scene_row(0, 13, 64, grounded_captions=True)
    row["messages"] = row["messages"][-1:]
    with shards.ShardWriter(tmp_path, FILE) as writer:
        writer.write(row)
    shards.write_manifest(tmp_path, shards.build_manifest([writer.entry]))
    sampler = Sampler(tmp_path, shards.read_manifest(tmp_path), load_recipe(None))
    prompts = prompts_of(view_of(sampler, 0), sampler.tokenizer, {})
    (prompt,) = (p for p in prompts if p.task == "chat")
    number = len(row["instances"])
    assert len(prompt.boxes) == len(prompt.masks) == number and prompt.note.startswith(f"{number} to find, ")
    assert sum(kind == "query" for _, kind, _ in prompt.tokens) == 4 * len(row["messages"][0]["links"])
    assert [text for text, _, learned in prompt.tokens if learned and text == "[DET]"] == ["[DET]"] * 4
