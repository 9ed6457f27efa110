"""Steps with a save and without come from one trainer."""

import pytest

from lumen_ray.bench import checkpoint
from lumen_ray.errors import UserError


def test_both_kinds_of_saves_are_measured(tmp_path):
    background, waiting = checkpoint.bench(tmp_path, "nano", turns=1)
    assert background.aim == pytest.approx(1 / 1.2) and waiting.aim is None
    for result in (background, waiting):
        assert len(result.ratios) == 1 and result.details["checkpoint_bytes"] > 8 * result.details["parameters"]


def test_batches_that_cannot_be_made_are_refused():
    with pytest.raises(UserError, match="batch_size 4 must be a multiple of 8"):
        checkpoint.check("small", 4)
    with pytest.raises(UserError, match="unknown model 'smal'; did you mean 'small'"):
        checkpoint.check("smal")
