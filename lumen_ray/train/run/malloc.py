"""Keeps the C library from returning freed tensors to the system after every step.

By default glibc maps every large block and unmaps it when freed; a training step on a CPU then spends up to half its
time in page faults. Kept blocks are reused by the next step, which needs the same sizes.

Running threads keep their arenas, which are too small for large blocks. Ray Train runs a worker's function in a thread,
so its processes need the settings from their start: `ENVIRONMENT`.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # malloc.h
_TOP_PAD = 64 << 20
#: environment variables for processes yet to be started; other C libraries ignore them
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "-1",
    "MALLOC_TOP_PAD_": str(_TOP_PAD),
}


def keep_freed_memory() -> bool:
    """Tunes malloc for the main thread and threads it starts; False where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD), (_M_ARENA_MAX, 1))
    accepted = [mallopt(name, value) == 1 for name, value in settings]  # applies all, even if one is refused
    return all(accepted)
