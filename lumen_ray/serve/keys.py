"""API keys: how one is made, the file of their hashes, and whose key a request has.

A key is 32 random bytes, and the file holds its SHA-256. A slow hash protects passwords, which can be guessed; 256
random bits cannot, and a slow hash would cost every request its time, those with a wrong key too. So that no password
gets in, a key that was not made here is refused whatever the file says.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import time
from pathlib import Path

from pydantic import Field

from lumen_ray import config
from lumen_ray.config import Settings
from lumen_ray.errors import UserError
from lumen_ray.serve.http import logger

_KEY = re.compile(r"lumen-[\w-]{43}", re.ASCII)
_NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)
#: seconds between looks at the file
_LOOK_EVERY_S = 1.0


class Key(Settings):
    """An entry of the file, under the key's name. Limits left out are those of `settings.Auth`."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of the key, in hexadecimal")
    requests_per_minute: int | None = Field(None, ge=1, description="POST requests in a minute, and at once")
    max_concurrent_requests: int | None = Field(None, ge=1, description="POST requests at a time")


def new_key(name: str) -> tuple[str, str]:
    """A new key, and its line for the file. Raises `UserError` for a name that logs could not hold."""
    _check_name(name, "the name of a key")
    key = f"lumen-{secrets.token_urlsafe(32)}"
    return key, f'{name}: {{sha256: "{_hash(key)}"}}'


def read_keys(path: str | Path) -> dict[str, Key]:
    """The keys in a file by their names. Raises `UserError` if it is missing or invalid."""
    keys = {}
    for name, entry in config.load_yaml(path, "keys file").items():
        _check_name(str(name), f"keys file '{path}': a key's name")
        keys[str(name)] = config.validate(Key, entry, f"{path}: '{name}'")
    return keys


class Keyring:
    """The keys of a file, which is read again when it has changed. A file that is gone or invalid leaves the keys as
    they were, with a warning in the log."""

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self._looked = time.monotonic()
        self._version = self._stamp()
        self._keys = read_keys(path)

    def find(self, given: str) -> tuple[str, Key] | None:
        """Name and entry of a key; None for one that is not in the file.

        The time does not tell how much of a hash agrees, nor which key of the file it is.
        """
        self._refresh()
        if not _KEY.fullmatch(given):
            return None
        digest, found = _hash(given), None
        for name, key in self._keys.items():
            if hmac.compare_digest(digest, key.sha256):
                found = name, key
        return found

    def _refresh(self) -> None:
        if time.monotonic() - self._looked < _LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        if (version := self._stamp()) == self._version:
            return
        self._version = version
        try:
            self._keys = read_keys(self._path)
        except UserError as error:
            logger.warning("the API keys stay as they were: %s", error)
        else:
            logger.warning("read %d API keys from %s, which has changed", len(self._keys), self._path)

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _check_name(name: str, what: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(f"{what} has 1 to 64 letters, digits and . _ - @, not {name[:80]!r}", "invalid_key_name")
