"""What the quickstart asks and checks, without the minutes it takes; `end_to_end` runs it whole."""

import io
import json
import socket
import urllib.error

import pytest

from lumen_ray import config, quickstart
from lumen_ray.errors import UserError
from lumen_ray.presets import recipe_path
from lumen_ray.recipe import Recipe

ROW = {
    "instances": [{"phrase": "red circle", "box": [1, 2, 3, 4]}, {"phrase": "figure", "box": [1, 2, 3, 4]}],
    "messages": [],
    "phrases": [],
}


def test_poses_are_asked_of_classes_with_keypoints():
    assert quickstart._requests(ROW, {"figure": []})["pose"] == {"classes": ["figure"]}
    assert quickstart._requests(ROW, {"person": [], "dog": []})["pose"] == {"classes": ["dog"]}
    assert "pose" not in quickstart._requests(ROW, {})


def test_a_taken_port_is_reported_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(quickstart, "_prepare", lambda *args: pytest.fail("step 1 began"))
    monkeypatch.setattr("lumen_ray.ray_env.init_local", lambda *args: pytest.fail("Ray was started"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match="cannot listen") as caught:
            quickstart.quickstart(tmp_path / "out", port=other.getsockname()[1])
    assert caught.value.reason == "port_taken"
    with pytest.raises(UserError, match="port"):
        quickstart.quickstart(tmp_path / "out", port=70_000)
    assert not (tmp_path / "out").exists()


def test_training_takes_no_more_workers_than_there_are_gpus(tmp_path, monkeypatch):
    from lumen_ray import ray_env
    from lumen_ray.train import launch as trainer

    recipes = []
    monkeypatch.setattr(ray_env, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    monkeypatch.setattr(trainer, "train", lambda shards, recipe, *args, **kwargs: recipes.append(recipe) or tmp_path)
    quickstart._train(tmp_path, config.load(Recipe, recipe_path("quickstart")))
    assert [recipe.workers for recipe in recipes] == [1]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (json.dumps({"error": {"reason": "r", "message": "give a class"}}), "400: give a class"),
        ("<html>\nno</html>", "400: <html> no</html>"),
        ("[]", r"400: \[\]"),
    ],
)
def test_what_the_server_refuses_is_in_its_words(monkeypatch, body, message):
    def refuse(request, timeout):
        raise urllib.error.HTTPError(request.full_url, 400, "Bad Request", {}, io.BytesIO(body.encode()))

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(UserError, match=message):
        quickstart.post("http://127.0.0.1:1/v1/pose", {})
