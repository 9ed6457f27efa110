import pytest
from support.train_fakes import make_shards


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with shards and a preset, see `train_fakes`."""
    return make_shards(tmp_path_factory.mktemp("train"))
