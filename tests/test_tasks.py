"""The registry of tasks and decoders agrees with itself and with the decoders' classes."""

import pytest

from lumen_ray.decoders.registry import DECODERS, decoders_for
from lumen_ray.tasks import TASKS, family_of, in_words, task_of_prompt


@pytest.mark.parametrize("task", [t for t in TASKS.values() if not t.is_text], ids=lambda t: t.name)
def test_a_tasks_decoders_read_the_queries_behind_its_routing_token(task):
    decoders = decoders_for(task.name)
    assert decoders and {DECODERS[name].family for name in decoders} == {family_of(task.routing_token).name}
    for template in task.templates:
        found = task_of_prompt(template.replace("{}", "a red circle"))
        assert "{}" not in template or found[1] == "a red circle"


def test_tasks_are_named_in_words():
    assert in_words(lambda task: task.result == "keypoints") == "pose"
    assert in_words(lambda task: task.result == "image") == "generate and edit"
    assert in_words(lambda task: task.needs == "classes") == "detect, segment, pose, semantic and count"
