"""The HTTP API on a port, in a thread, for clients that bring their own connections."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from support.serve_fakes import free_port


@contextlib.contextmanager
def live_server(api: Any) -> Iterator[str]:
    """Yields the address of an ASGI application, such as ``http://127.0.0.1:40123``."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(api, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    ends = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive() and time.monotonic() < ends, "the server does not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
