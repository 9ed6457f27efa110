"""Ctrl-C of the commands that label."""

import os
import signal
import subprocess
import sys

import pytest

from lumen_ray.label.interrupts import stopped_in_two_steps

#: work whose end after the first Ctrl-C never comes
JOB = """
import signal
import threading
from lumen_ray.label.interrupts import stopped_in_two_steps

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background commands ignore it
with stopped_in_two_steps():
    try:
        print("at work", flush=True)
        threading.Event().wait()
    finally:
        print("finishing", flush=True)
        threading.Event().wait()
"""


def test_the_second_one_does_not_wait_for_the_workers():
    job = subprocess.Popen([sys.executable, "-c", JOB], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert job.stdout.readline() == "at work\n"
        job.send_signal(signal.SIGINT)
        assert "Ctrl-C again to stop at once" in job.stderr.readline()
        assert job.stdout.readline() == "finishing\n"
        job.send_signal(signal.SIGINT)
        assert "run the same command again to continue" in job.communicate(timeout=60)[1] and job.returncode == 130
    finally:
        job.kill()


def test_a_handler_of_the_program_is_left_alone():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append("mine"))
    try:
        with stopped_in_two_steps():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == ["mine"]


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_ctrl_c_is_as_before_after_a_job(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with stopped_in_two_steps():
            inside = signal.getsignal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is handler
        assert (inside is handler) == (handler is signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGINT, before)
