"""File names of exported images: unique, without memory for the names themselves, and safe in any file system."""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections import Counter
from hashlib import blake2b

import numpy as np

from lumen_ray.data.pictures import SUFFIXES, identity

_LONGEST = 120  # bytes of a stem: file systems take 255 for a name, and suffixes and numbers follow
_NUMBERED = re.compile(r"(\.\w+)#(\d+)$")  # as `data.pictures.unique_id` numbers equal ids
_UNSAFE = re.compile(r"[\x00-\x20\x7f<>:\"|?*\\%#.\s/]+")


def name_hash(name: str) -> int:
    """64 bits that are equal for names of the same file, in file systems that ignore case too."""
    key = unicodedata.normalize("NFC", identity(name)).casefold()
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def file_stem(image_id: str) -> str:
    """A file name for an image id: folders joined by ``_``, the suffix removed, blanks and special characters replaced.

    ``train/a b.jpg -> train_a_b``. Dots are replaced as well: WebDataset ends a key at the first.
    """
    name = "_".join(part for part in identity(image_id).split("/") if part not in ("", ".", ".."))
    name = _NUMBERED.sub(r"_\2\1", name)
    stem, suffix = posixpath.splitext(name)
    name = stem if suffix.lower() in SUFFIXES else name
    name = _UNSAFE.sub("_", name.encode("utf-8", "replace").decode()).strip("_") or "image"
    if len(name.encode()) > _LONGEST:
        end = f"{name_hash(image_id):016x}"[:8]
        name = f"{name.encode()[: _LONGEST - 9].decode('utf-8', 'ignore')}_{end}"
    return name


class Names:
    """Hands out the stems of one pass over the images. `hashes`: `name_hash` of all stems of the corpus."""

    def __init__(self, hashes: np.ndarray) -> None:
        self._all, times = np.unique(hashes, return_counts=True)
        self._repeated = set(self._all[times > 1].tolist())
        self._times: Counter[int] = Counter()
        self._numbered: set[int] = set()

    def free(self, name: str) -> str:
        """`name`, or with ``_2``, ``_3``, ... behind it if an earlier image has it."""
        key = name_hash(name)
        if key not in self._repeated:
            return name
        self._times[key] += 1
        if self._times[key] == 1:
            return name
        while True:
            numbered = f"{name}_{self._times[key]}"
            other = name_hash(numbered)
            if not self._is_taken(other):
                self._numbered.add(other)
                return numbered
            self._times[key] += 1

    def _is_taken(self, key: int) -> bool:
        place = int(np.searchsorted(self._all, np.uint64(key)))
        return key in self._numbered or (place < len(self._all) and int(self._all[place]) == key)
