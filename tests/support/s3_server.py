"""An S3 server of the `moto` library in a process of its own."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from unittest import mock

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def s3_server(bucket):
    """Yields a function from a key to its URL in an empty bucket; the credentials are in the environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"127.0.0.1:{port}"
    try:
        ends = time.monotonic() + 60
        while not _answers(port):
            assert server.poll() is None and time.monotonic() < ends, "the S3 server does not start"
            time.sleep(0.05)
        urllib.request.urlopen(urllib.request.Request(f"http://{address}/{bucket}", method="PUT"))
        settings = f"region=us-east-1&endpoint_override={address}&scheme=http"
        with mock.patch.dict(os.environ, CREDENTIALS):
            yield lambda key: f"s3://{bucket}/{key}?{settings}"
    finally:
        server.kill()
        server.wait()


def _answers(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
