"""A batch file answered by actors on Ray."""

import pytest
from support import chat_fakes
from support.chat_fakes import ChatEngine, answers, errors, line

from lumen_ray.label.batch.job import answer_batch

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    from lumen_ray.ray_env import init_local, prepare_environment

    prepare_environment()
    import ray

    init_local()
    ray.cloudpickle.register_pickle_by_value(chat_fakes)  # the workers cannot import this folder
    yield
    ray.cloudpickle.unregister_pickle_by_value(chat_fakes)
    ray.shutdown()


def test_actors_answer_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join([*(line(f"{n}", "slow" if n % 7 == 0 else "hello") for n in range(40)), "{", line("3")]))
    summary = answer_batch(ChatEngine, path, tmp_path / "out", num_actors=2, fragment_size=3, batch_size=2)
    assert (summary["requests"], summary["answered"], summary["errors"]) == (42, 40, 2)
    assert list(answers(tmp_path / "out")) == [f"{n}" for n in range(40)]
    assert errors(tmp_path / "out") == [(None, "invalid_json"), ("3", "duplicate_custom_id")]
