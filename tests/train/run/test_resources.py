"""A run that does not fit in the cluster is refused at once; Ray would wait forever."""

import pytest
from support.train_fakes import make_recipe

from lumen_ray.errors import UserError
from lumen_ray.train.run.resources import fitted, uses_gpus


def recipe(tmp_path, workers, min_workers=0):
    return make_recipe(tmp_path, workers=workers, min_workers=min_workers)


@pytest.mark.parametrize(
    ("resources", "workers", "min_workers", "used"),
    [
        ({"CPU": 2}, 2, 0, False),  # two workers fit on two cores
        ({"CPU": 8, "GPU": 0.0}, 2, 0, False),
        ({"CPU": 8, "GPU": 1.0}, 1, 0, True),
        ({"CPU": 8, "GPU": 4.0}, 2, 0, True),
        ({"CPU": 8, "GPU": 1.0}, 4, 1, True),  # goes on with as few as one
        ({"CPU": 8, "GPU": 0.5}, 2, 0, False),  # no worker can have half a GPU
    ],
)
def test_gpus_are_used_where_there_are_enough(tmp_path, resources, workers, min_workers, used):
    chosen = recipe(tmp_path, workers, min_workers)
    assert uses_gpus(resources, chosen) is used
    assert fitted(resources, chosen) is chosen


@pytest.mark.parametrize(
    ("resources", "workers", "min_workers", "words"),
    [
        ({"CPU": 8, "GPU": 1.0}, 2, 0, ["has 1 GPU but", "needs 2 workers", "give --workers 1,"]),
        ({"CPU": 8, "GPU": 2.0}, 4, 3, ["has 2 GPUs but", "needs 3 workers", "lower 'min_workers' to 2,"]),
        ({"CPU": 1}, 2, 0, ["has 1 CPUs but 2 workers need 2;"]),
        ({}, 1, 0, ["has 0 CPUs but 1 worker need"]),
    ],
)
def test_too_few_are_reported_in_one_sentence(tmp_path, resources, workers, min_workers, words):
    with pytest.raises(UserError) as error:
        uses_gpus(resources, recipe(tmp_path, workers, min_workers))
    assert error.value.reason == ("too_few_gpus" if "GPU" in resources else "too_few_cpus")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(("min_workers", "left"), [(0, 0), (3, 1)])
def test_fewer_workers_are_taken_where_there_are_fewer_gpus(tmp_path, min_workers, left):
    resources = {"CPU": 8, "GPU": 1.0}
    smaller = fitted(resources, recipe(tmp_path, 4, min_workers))
    assert (smaller.workers, smaller.min_workers) == (1, left)
    assert uses_gpus(resources, smaller)
