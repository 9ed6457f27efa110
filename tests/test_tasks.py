"""The registry of tasks and decoders agrees with itself and with the decoders' classes."""

import pytest

from lumen_ray.model.settings import ModelSettings
from lumen_ray.tasks import DECODERS, LINK_FAMILIES, TASKS, decoder_class, family_of, in_words, task_of_prompt


@pytest.mark.parametrize("name", DECODERS)
def test_the_registry_says_of_a_decoder_what_its_class_says(name):
    cls, info = decoder_class(name), DECODERS[name]
    assert (cls.name, cls.family, cls.loss_names) == (name, info.family, info.losses)
    assert info.family in LINK_FAMILIES and name in ModelSettings.model_fields


def test_losses_have_names_of_their_own():
    losses = [loss for info in DECODERS.values() for loss in info.losses]
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("task", [t for t in TASKS.values() if not t.is_text], ids=lambda t: t.name)
def test_a_tasks_decoders_read_the_queries_behind_its_routing_token(task):
    assert task.decoders
    assert {DECODERS[name].family for name in task.decoders} == {family_of(task.routing_token).name}
    for template in task.templates:
        found = task_of_prompt(template.replace("{}", "a red circle"))
        assert "{}" not in template or found[1] == "a red circle"


def test_tasks_are_named_in_words():
    assert in_words(lambda task: task.result == "keypoints") == "pose"
    assert in_words(lambda task: task.result == "image") == "generate and edit"
    assert in_words(lambda task: task.needs == "classes") == "detect, segment, pose, semantic and count"
