"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

# Before anything imports torch. Two workers of pytest, and what they start, would take each other's cores; tests of
# threads set their number themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray gives its GCS 30 s to start, which a machine whose disk is busy with other tests does not always keep.
os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "60")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real test data: `$LUMEN_TEST_DATA`, else `../shared/data` beside the repository."""
    path = Path(os.environ.get("LUMEN_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no test data at {path}; set LUMEN_TEST_DATA to its folder")
    return path
