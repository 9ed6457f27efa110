"""Pictures made for the rows of a split, scored by a perfect detector."""

import hashlib

import numpy as np
import pytest
from PIL import Image
from support.evaluate_fakes import FakeEngine, write_split

from lumen_ray.answer import Answer
from lumen_ray.data.images import decode
from lumen_ray.data.scenes import edits as scenes_edits
from lumen_ray.data.scenes import render as scenes
from lumen_ray.data.shards.schema import make_message
from lumen_ray.errors import UserError
from lumen_ray.evaluate.pictures import PicturesEvaluator, write_sheet
from lumen_ray.evaluate.run import evaluate
from lumen_ray.structures import Boxes, Prediction
from lumen_ray.tasks import TASKS, task_of_prompt

ROWS, SIDE = 8, 128


def key(picture):
    return hashlib.sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()


class Painter(FakeEngine):
    """Makes the pictures that were wanted, or with `listens` False those of other rows; finds what is in each."""

    tasks = tuple(TASKS)
    serving = {name: "painter" for name in TASKS if not TASKS[name].is_text}

    def __init__(self, rows, listens=True):
        super().__init__(rows)
        self.seen, self.captions, self.edits, self.settings = {}, {}, {}, []
        for number, row in enumerate(rows):
            other = rows[number if listens else (number + 1) % len(rows)]
            caption = next(m for m in row["messages"] if m["task"] == "caption")["turns"][-1]["content"]
            self.captions[caption] = decode(other["image"])
            self.see(decode(row["image"]), scenes.render(1, number, SIDE).objects)
            if row["target_image"] is not None:
                edit = scenes_edits.scene_edit(1, number, SIDE)
                self.see(decode(row["target_image"]), edit.after.objects)
                self.edits[key(decode(row["image"]))] = decode(row["target_image" if listens else "image"])

    def see(self, picture, objects):
        self.seen[key(picture)] = objects

    def run(self, images, requests, **settings):
        self.calls.append([[r.task for r in mine] for mine in requests])
        self.settings.append(settings)
        return [[self.reply(image, r) for r in mine] for image, mine in zip(images, requests, strict=True)]

    def reply(self, image, request):
        if request.task == "generate":
            assert image is None
            return Answer("generate", (SIDE, SIDE), images=[self.captions[request.text]])
        if request.task == "edit":
            return Answer("edit", (SIDE, SIDE), images=[self.edits[key(image)]])
        if request.task == "chat":
            task, phrase = task_of_prompt(request.text)
            assert phrase and (image is None) is (task == "generate")
            return Answer("chat", (SIDE, SIDE), route=TASKS[task].routing_token)
        assert request.task == "detect"
        found = []
        for name in request.phrases:
            boxes = [o.box for o in self.seen[key(image)] if o.name == name]
            found.append(Prediction(name, Boxes(np.array(boxes).reshape(-1, 4), (SIDE, SIDE)), [1.0] * len(boxes)))
        return Answer("detect", (SIDE, SIDE), found)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("split"), rows())


def rows():
    plain = [scenes.scene_row(1, n, SIDE) for n in range(ROWS)]
    return [scenes_edits.with_edit(row, scenes_edits.scene_edit(1, n, SIDE)) for n, row in enumerate(plain)]


def test_pictures_as_wanted_score_full_marks(split, tmp_path):
    report = evaluate(Painter(rows()), split, tmp_path, tasks=["generate", "edit"])
    metrics = report["metrics"]
    assert metrics["generate_objects"] == metrics["generate_exact"] == 1
    assert metrics["generate_objects_chance"] < 0.7
    assert metrics["edit_done"] == metrics["edit_exact"] == 1 and metrics["edit_judged"] > 0.9


def test_pictures_that_do_not_listen_score_what_chance_gives(split, tmp_path):
    metrics = evaluate(Painter(rows(), listens=False), split, tmp_path, tasks=["generate", "edit"])["metrics"]
    assert metrics["generate_objects"] < 0.7 and metrics["edit_done"] == 0 and metrics["edit_kept"] > 0.9


def test_the_pictures_are_saved(split, tmp_path):
    evaluate(Painter(rows()), split, tmp_path, tasks=["generate", "edit"])
    made, edited = (np.asarray(Image.open(tmp_path / name)) for name in ("generated.png", "edited.png"))
    assert made.shape[2] == edited.shape[2] == 3 and edited.size > made.size
    assert len(np.unique(made.reshape(-1, 3), axis=0)) > 100
    evaluate(Painter(rows()), split, tmp_path / "generate", tasks=["generate"])
    assert not (tmp_path / "generate" / "edited.png").exists()


def test_a_sheet_has_all_pictures_in_their_places(tmp_path):
    colours = [[(250, 0, 0), (0, 250, 0)], [(0, 0, 250), (250, 250, 0)], [(0, 250, 250), (250, 0, 250)]]
    pictures = [[np.full((8, 8, 3), colour, np.uint8) for colour in row] for row in colours]
    write_sheet(tmp_path / "sheet.png", pictures, ["one", "two words", "x" * 500])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    where = [[np.argwhere((sheet == colour).all(-1)).mean(0) for colour in row] for row in colours]
    for left, right in where:
        assert left[0] == right[0] and left[1] < right[1]
    assert where[0][1][1] < where[1][0][1] or where[0][0][0] < where[1][0][0]


def test_a_limit_bounds_what_is_made(split, tmp_path):
    engine = Painter(rows())
    evaluate(engine, split, tmp_path, tasks=["generate"], picture_limit=3)
    assert sum(asked == ["generate"] for call in engine.calls for asked in call) == 3


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("generate", lambda n: {**rows()[n], "messages": [make_message("caption", "what is it ?", "a photo .")]}),
        ("edit", lambda n: {**rows()[n], "target_image": None}),
    ],
)
def test_what_made_no_picture_has_no_value(tmp_path, task, row):
    split = write_split(tmp_path / "split", [row(0), row(1)])
    metrics = evaluate(Painter(rows()), split, tmp_path, tasks=[task])["metrics"]
    found = {name: value for name, value in metrics.items() if name.startswith(f"{task}_")}
    assert len(found) >= 4 and set(found.values()) == {None}
    assert not any(name.startswith("edit_" if task == "generate" else "generate_") for name in metrics)


@pytest.mark.parametrize(
    ("served", "task", "words"),
    [
        (["detect"], "generate", "no decoder for task 'generate'; it serves: detect"),
        (["detect"], "pose", "no decoder for task 'pose'"),
        (
            ["generate", "edit"],
            "edit",
            "scored by detecting objects in the pictures, but the model has no",
        ),
    ],
)
def test_what_the_model_has_no_decoder_for_is_refused_before_the_run(split, tmp_path, served, task, words):
    engine = Painter(rows())
    engine.tasks, engine.serving = served, dict.fromkeys(served, "one")
    with pytest.raises(UserError, match=words) as caught:
        evaluate(engine, split, tmp_path / "out", tasks=[task])
    assert caught.value.reason == "no_decoder" and not engine.calls and not (tmp_path / "out").exists()


def test_pictures_that_nothing_can_judge_are_left_out_by_default(split, tmp_path):
    engine = Painter(rows())
    engine.tasks, engine.serving = ["caption", "edit"], {"edit": "one"}
    engine.reply = lambda image, request: Answer(request.task, (SIDE, SIDE), text="")
    assert evaluate(engine, split, tmp_path, limit=1)["tasks"] == ["chat", "caption"]


def test_routing_to_pictures_is_scored_without_drawing(split, tmp_path):
    engine = Painter(rows())
    report = evaluate(engine, split, tmp_path, tasks=["generate", "edit", "chat"], picture_limit=0, chat_limit=4)
    assert report["tables"]["routing_per_task"] == {"generate": 1, "edit": 1}
    chats = [s for tasks, s in zip(engine.calls, engine.settings, strict=True) if tasks[0] == ["chat"]]
    assert len(chats) == 2 and all(settings["route_only"] for settings in chats)


def test_by_default_routing_to_pictures_is_scored_for_models_that_draw(split, tmp_path):
    engine = Painter(rows())
    engine.tasks, engine.serving = ["edit", "generate", "caption"], {"edit": "one", "generate": "other"}
    reply = engine.reply

    def write_captions(image, request):
        asked = task_of_prompt(request.text) if request.task == "chat" else None
        return reply(image, request) if asked else Answer(request.task, (SIDE, SIDE), text="")

    engine.reply = write_captions
    report = evaluate(engine, split, tmp_path, limit=4, chat_limit=4)
    assert report["tasks"] == ["chat", "caption"]  # no picture is made
    assert report["tables"]["routing_per_task"] == {"caption": 1, "generate": 1, "edit": 1}


def test_a_caption_of_several_images_is_not_drawn():
    text = "a red circle and two blue squares"
    row = {"messages": [make_message("caption", "differ ?", text, image_turns=(0,))]}
    assert PicturesEvaluator().generate_requests(row, 0) == []
    row["messages"].append(make_message("caption", "what ?", text))
    assert len(PicturesEvaluator().generate_requests(row, 0)) == 1
