import pytest
from support.train_fakes import job_of

from lumen_ray.errors import UserError


def test_names_are_checked_before_a_worker_starts(data, tmp_path):
    with pytest.raises(UserError, match="stage 's0': lr_scale 'trunk.nothing' fits nothing"):
        job_of(data, tmp_path / "run", {"steps": 1, "lr_scale": {"trunk.nothing": 0.1}})
