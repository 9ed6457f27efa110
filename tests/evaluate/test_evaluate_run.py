"""The whole evaluation on rendered scenes, with engines whose scores are known beforehand."""

import io
import json

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from support.evaluate_fakes import POSED, FakeEngine, write_split

from lumen_ray.data import files
from lumen_ray.data.scenes.render import scene_row
from lumen_ray.data.shards.schema import make_message
from lumen_ray.errors import UserError
from lumen_ray.evaluate.report import print_report
from lumen_ray.evaluate.run import evaluate

NUMBER = 12


@pytest.fixture(scope="module")
def rows():
    return [scene_row(11, i, 96) for i in range(NUMBER)]


@pytest.fixture(scope="module")
def split(rows, tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("split"), rows)


def test_a_perfect_engine_scores_one_everywhere(split, rows, tmp_path):
    seen = []
    engine = FakeEngine(rows, skeletons=POSED)
    report = evaluate(engine, split, tmp_path, batch_size=5, progress=lambda *a: seen.append(a))
    metrics = report["metrics"]
    for name in ("box_AP", "mask_AP", "keypoint_AP", "refer_p50", "ground_f1", "count_accuracy", "vqa_accuracy",
                 "caption_attributes", "region_caption_accuracy", "routing_accuracy"):  # fmt: skip
        assert metrics[name] == pytest.approx(1.0), name
    assert metrics["count_error"] == 0 and 0 < metrics["vqa_chance"] < 0.6 and metrics["caption_chance"] < 0.5
    assert (report["images"], report["scored"], report["skipped"]) == (NUMBER, NUMBER, 0)
    assert seen == [(5, 12), (10, 12), (12, 12)]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert set(report["tables"]["routing_per_task"]) >= {"detect", "segment", "count", "pose", "caption", "vqa"}
    labels = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    boxes = [r for r in labels if r["task"] == "detect" and r["box"]]
    assert len(boxes) == sum(len(row["instances"]) for row in rows)


def test_tasks_scored_on_other_annotations_run_when_named(split, rows, tmp_path):
    tasks = ["region_segment", "semantic"]
    metrics = evaluate(FakeEngine(rows, skeletons=POSED), split, tmp_path, tasks=tasks)["metrics"]
    assert metrics["region_segment_iou"] == metrics["semantic_miou"] == pytest.approx(1.0)
    shifted = evaluate(FakeEngine(rows, skeletons=POSED, shift=3.0), split, tmp_path, tasks=tasks)["metrics"]
    assert shifted["region_segment_iou"] < 0.95 and shifted["semantic_miou"] < 0.95


def test_worse_engines_score_worse(split, rows, tmp_path):
    shifted = evaluate(FakeEngine(rows, skeletons=POSED, shift=3.0), split, tmp_path, limit=6)["metrics"]
    assert 0 < shifted["box_AP"] < 0.7 and shifted["mask_AP"] < 0.7 and shifted["keypoint_AP"] < 0.7
    wrong = FakeEngine(rows, text="purple", route="[GRD]", instances=False)
    metrics = evaluate(wrong, split, tmp_path)["metrics"]
    for name in ("box_AP", "mask_AP", "keypoint_AP", "refer_p50", "ground_p50", "vqa_accuracy", "count_accuracy"):
        assert metrics[name] == 0, name
    assert metrics["count_absent_accuracy"] == 1 and metrics["refer_target_accuracy"] == 0
    assert 0 < metrics["routing_accuracy"] < 0.5  # right for refer and ground only


def test_absent_classes_are_requested_too(split, rows, tmp_path):
    engine = FakeEngine(rows, skeletons=POSED)
    evaluate(engine, split, tmp_path, tasks=["detect"], limit=1)
    assert engine.calls == [[["detect"]]]  # and no free chat


def test_limits_and_what_was_not_measured(split, rows, tmp_path):
    engine = FakeEngine(rows, skeletons=POSED)
    report = evaluate(engine, split, tmp_path, tasks=["vqa", "chat"], limit=3, chat_limit=1, batch_size=3)
    assert report["images"] == 3 and report["metrics"]["box_AP"] is None
    assert report["metrics"]["routing_instructions"] == 1
    console = Console(record=True, width=120)
    print_report(report, console)
    lines = {line.split("│")[2].strip(): line for line in console.export_text().splitlines() if line.count("│") == 5}
    assert "box AP50" not in lines  # was not asked
    assert lines["answers, exact"].split("│")[3].strip() == "1.000"


def test_a_broken_image_is_reported_and_the_rest_scored(rows, tmp_path):
    broken = {**rows[0], "image": rows[0]["image"][:40], "image_id": "broken"}
    split = write_split(tmp_path / "split", [rows[1], broken, rows[2]])
    report = evaluate(FakeEngine(rows, skeletons=POSED), split, tmp_path / "out")
    assert (report["images"], report["scored"], report["skipped"]) == (3, 2, 1)
    assert report["errors"][0]["image_id"] == "broken" and report["errors"][0]["reason"] == "broken_image"
    assert report["metrics"]["box_AP"] == pytest.approx(1.0)


def test_a_report_in_a_store_is_that_of_a_folder(split, rows, tmp_path):
    report = evaluate(FakeEngine(rows), split, "memory://evaluations/one")
    evaluate(FakeEngine(rows), split, tmp_path)
    written = json.loads(files.read_text("memory://evaluations/one/report.json"))
    assert written["metrics"] == json.loads((tmp_path / "report.json").read_text())["metrics"] == report["metrics"]
    assert sorted(files.sizes("memory://evaluations/one")) == sorted(files.sizes(tmp_path))


def test_user_mistakes_are_one_sentence(split, rows, tmp_path):
    engine = FakeEngine(rows)
    with pytest.raises(UserError, match="did you mean 'detect'"):
        evaluate(engine, split, tmp_path, tasks=["detct"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made: it is a file"):
        evaluate(engine, split, tmp_path / "file")
    with pytest.raises(UserError, match="lumen-ray prepare"):
        evaluate(engine, tmp_path / "nowhere", tmp_path)
    only_text = write_split(tmp_path / "text", [{**rows[0], "tasks": ["vqa"]}])
    with pytest.raises(UserError, match="not annotated for pose; its tasks: vqa"):
        evaluate(engine, only_text, tmp_path, tasks=["pose"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "no task given"),
        ({"tasks": ["vqa", "pose", "detect"]}, "not annotated for pose, detect; its tasks: vqa"),
        ({"tasks": ["chat"]}, "free chat; name some of them too, its tasks: vqa"),
        ({"limit": 0}, "limit is 0; give 1 or more"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"chat_limit": -1}, "chat_limit is -1"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(rows, tmp_path, options, message):
    split = write_split(tmp_path / "text", [{**rows[0], "tasks": ["vqa"]}])
    with pytest.raises(UserError, match=message):
        evaluate(FakeEngine(rows), split, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_report_holds_its_settings(split, rows, tmp_path):
    evaluate(FakeEngine(rows, skeletons=POSED), split, tmp_path, tasks=["vqa"], limit=2, batch_size=3, chat_limit=1)
    assert json.loads((tmp_path / "report.json").read_text())["settings"] == {
        "score_threshold": 0.01, "max_per_phrase": 500, "max_per_image": 500, "limit": 2, "chat_limit": 1,
        "picture_limit": 32,        "batch_size": 3,
    }  # fmt: skip


def test_the_report_names_chosen_decoders(split, rows, tmp_path):
    engine = FakeEngine(rows, skeletons=POSED)
    engine.chosen_decoders = {"detect": "grounding_dino"}
    report = evaluate(engine, split, tmp_path, tasks=["vqa"], limit=1)
    assert report["settings"]["decoders"] == {"detect": "grounding_dino"}


def test_an_invalid_text_is_reported_and_the_rest_scored(rows, tmp_path):
    turns = [{"role": "user", "content": "what is <region> ?"}, {"role": "assistant", "content": "x"}]
    template = next(m for m in rows[0]["messages"] if m["task"] == "vqa")
    bad = {**rows[0], "image_id": "bad", "messages": [{**template, "turns": turns}]}
    split = write_split(tmp_path / "split", [bad, rows[1]])
    report = evaluate(FakeEngine(rows, skeletons=POSED), split, tmp_path / "out")
    assert (report["scored"], report["skipped"]) == (1, 1)
    assert report["errors"][0]["image_id"] == "bad" and report["errors"][0]["reason"] == "reserved_text"


def test_texts_about_several_images_are_not_scored_on_the_first_alone(rows, tmp_path):
    """They are counted in a note; texts about one image of the same row are scored."""
    other = {"image": rows[2]["image"], "height": 96, "width": 96}
    wrong = [
        make_message("vqa", "which is red ?", "the second", image_turns=(0,)),
        make_message("caption", "how do they differ ?", "a red circle left of a blue square", image_turns=(0,)),
    ]
    pair = {**rows[0], "messages": [*wrong, *rows[0]["messages"]], "further_images": [other]}
    split = write_split(tmp_path / "split", [pair, rows[1]])
    report = evaluate(FakeEngine(rows, skeletons=POSED), split, tmp_path / "out")
    questions = [m for row in rows[:2] for m in row["messages"] if m["task"] == "vqa"]
    assert report["metrics"]["vqa_questions"] == len(questions) and report["metrics"]["captions"] == 2
    assert report["metrics"]["vqa_accuracy"] == report["metrics"]["caption_attributes"] == 1
    (note,) = report["notes"]
    assert note.startswith("2 questions and captions about several images are not scored")
    print_report(report, Console(file=(out := io.StringIO()), width=200))
    assert note in out.getvalue()
    chat = evaluate(FakeEngine(rows), write_split(tmp_path / "one", [{**pair, "messages": wrong}]), tmp_path / "o2")
    assert chat["metrics"]["vqa_questions"] == 0 and "vqa" not in chat["tables"]["routing_per_task"]
    assert evaluate(FakeEngine(rows), write_split(tmp_path / "two", rows[:1]), tmp_path / "o3")["notes"] == []
