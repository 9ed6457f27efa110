"""Fixtures of the label tests."""

import pytest
from support import label_fakes


@pytest.fixture(scope="module")
def local_ray():
    from lumen_ray.ray_env import init_local, prepare_environment

    prepare_environment()
    import ray

    init_local()
    ray.cloudpickle.register_pickle_by_value(label_fakes)  # the workers cannot import this folder
    yield ray
    ray.cloudpickle.unregister_pickle_by_value(label_fakes)
    ray.shutdown()
