"""Where the log lines of Ray go: to a file, while Python's own stay on the terminal. No Ray runs here."""

import logging
import os
import subprocess
import sys

import pytest

from lumen_ray import ray_log

NESTED = """
import os, sys
from lumen_ray import ray_log
os.write(2, b"native before\\n")
with ray_log.native_lines_in_file():
    with ray_log.native_lines_in_file():
        os.write(2, b"native inside\\n")
        print("python inside", file=sys.stderr)
    os.write(2, b"native outer\\n")
os.write(2, b"native after\\n")
print("python after", file=sys.stderr)
print(ray_log.log_file())
"""


@pytest.mark.parametrize("shown", ["0", "1"])
def test_native_lines_go_to_the_log_unless_they_are_wanted(tmp_path, shown):
    env = os.environ | {"TMPDIR": str(tmp_path), "LUMEN_RAY_WORKER_LOGS": shown}
    done = subprocess.run([sys.executable, "-c", NESTED], env=env, capture_output=True, text=True, check=True)
    inside = ["native inside", "python inside", "native outer"]
    if shown == "0":
        with open(done.stdout.strip()) as file:
            assert file.read().splitlines() == ["native inside", "native outer"]
        inside = ["python inside"]
    assert done.stderr.splitlines() == ["native before", *inside, "native after", "python after"]


def test_serves_lines_go_to_the_log_and_its_errors_to_the_terminal_too(monkeypatch, tmp_path):
    logger = logging.getLogger("ray.serve")
    terminal = logging.StreamHandler()
    monkeypatch.setattr(logger, "handlers", [terminal])
    monkeypatch.setattr(ray_log, "log_file", lambda: tmp_path / "ray.log")
    monkeypatch.delenv("LUMEN_RAY_WORKER_LOGS", raising=False)
    ray_log.quiet_loggers()
    ray_log.quiet_loggers()
    _, file = logger.handlers
    assert terminal.level == logging.ERROR
    file.handle(logger.makeRecord("ray.serve", logging.INFO, "f", 1, "Started Serve", (), None))
    file.close()
    assert (tmp_path / "ray.log").read_text() == "Started Serve\n"
