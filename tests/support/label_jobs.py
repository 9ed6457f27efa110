"""Label jobs on a Ray of their own, in processes that can be killed with all they have started."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from lumen_ray.label.ledger import Ledger
from support.clusters import wait_for

TESTS = Path(__file__).resolve().parents[1]
_DRIVER = """
import json, sys
from support import label_fakes
from support.label_fakes import slow_engine
from lumen_ray.label.pipeline import label
from lumen_ray.ray_env import init_local, prepare_environment

prepare_environment()
import ray

init_local()
ray.cloudpickle.register_pickle_by_value(label_fakes)
source, output, options = sys.argv[1:]
summary = label(slow_engine, source, output, num_actors=2, **json.loads(options))
print(json.dumps(summary))
"""


class LabelJob:
    """A job with `slow_engine` and two actors. `paths`: further folders to import from, in all its processes."""

    def __init__(self, source, output, options, paths=()):
        self.ledger = Ledger(output)
        self._command = [sys.executable, "-c", _DRIVER, str(source), str(output), json.dumps(options)]
        path = os.pathsep.join(filter(None, [*map(str, paths), str(TESTS), os.environ.get("PYTHONPATH")]))
        kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self._environment = kept | {"PYTHONPATH": path}

    def kill_after(self, fragments):
        """Starts it and kills driver and workers at once when it has published so many fragments."""
        with tempfile.TemporaryFile("w+") as errors:
            job = self._start(stderr=errors)

            def published():
                if job.poll() is not None:
                    errors.seek(0)
                    raise AssertionError(f"the job ended before fragment {fragments}: {errors.read()[-2000:]}")
                return len(self.ledger.done()) >= fragments

            wait_for(published, f"fragment {fragments}", 120)
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()

    def run(self):
        """Runs it to its end; returns the summary."""
        job = self._start(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        output, errors = job.communicate(timeout=240)
        assert job.returncode == 0, errors[-2000:]
        return json.loads(output.splitlines()[-1])

    def _start(self, **streams):
        streams = {"stdout": subprocess.DEVNULL, **streams}
        return subprocess.Popen(self._command, env=self._environment, start_new_session=True, **streams)
