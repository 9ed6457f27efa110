"""The examples in the docstrings of the public API, run one after the other in one folder on a local Ray."""

import doctest

import pytest
import yaml
from support.serve_fakes import free_port

from lumen_ray import api, presets, ray_env

pytestmark = pytest.mark.ray

RECIPE = {"name": "quickstart", "batch_size": 16, "workers": 2, "stages": [{"name": "joint", "steps": 2}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Training shards, and a recipe `quickstart` of a few steps, where the examples run."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "quickstart.yaml").write_text(yaml.safe_dump(RECIPE))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(presets, "ROOTS", (folder, *presets.ROOTS))
        api.prepare("scenes", "shards/train", num=32)
        yield folder
    ray_env.shutdown()


@pytest.mark.parametrize("name", ["prepare", "train", "evaluate", "label", "export_labels", "serve"])
def test_the_example_of_a_docstring_gives_what_it_says(folder, name):
    (example,) = doctest.DocTestFinder().find(getattr(api, name), name, globs={})
    for line in example.examples:  # a port that no other process of this machine may take
        line.source = line.source.replace("port=8123", f"port={free_port()}")
    report = []
    result = doctest.DocTestRunner().run(example, out=report.append)
    assert result.attempted >= 3 and result.failed == 0, "".join(report)
