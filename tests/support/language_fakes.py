"""What the tests of sources of texts share: folders of photos, and records damaged at random."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from lumen_ray.data.sources.base import Source
from support import source_fakes
from support.source_fakes import HEIGHT, WIDTH, jpeg

JUNK = [
    None, "", " ", 0, -1, 3.5, 1e300, float("nan"), float("inf"), 10**400, True, [], {}, [[]], [1, 2, 3, 4], [None],
    "\ud800", "<region>", "<image>", "[DET]", "<eos>", "https://example.org/a.jpg", "a\0b.jpg", "..", "/", "x" * 5000,
    {"size": [HEIGHT, WIDTH], "counts": "zz"}, [1e300, 0, 5, 5], ["a.jpg", "b.jpg"],
]  # fmt: skip


def write_photos(folder: Path, names: list[str], broken: tuple[str, ...] = ()) -> Path:
    """The named photos below `folder`, those in `broken` cut off."""
    return source_fakes.write(folder, {name: jpeg()[: 300 if name in broken else None] for name in names})


def prepared(source: Source, **settings: Any) -> tuple[list[dict], list[dict], dict]:
    """(rows in order of their ids, rejected records, counts) of a source, written aside and read back."""
    with tempfile.TemporaryDirectory() as folder:
        rows, rejected, counts = source_fakes.prepared(source, f"{folder}/out", **settings)
    assert all(r["reason"] and r["origin"] for r in rejected)
    return [rows[name] for name in sorted(rows)], rejected, counts


def _places(value: Any, place: tuple = ()) -> list[tuple]:
    """The paths of everything inside a json value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for key, inner in items for p in ((*place, key), *_places(inner, (*place, key)))]


@st.composite
def damaged(draw: Any, value: Any) -> Any:
    """The json value with one to three parts replaced by junk or taken out."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(value)
        if not places:
            return value
        *path, last = draw(st.sampled_from(places))
        holder = value
        for key in path:
            holder = holder[key]
        if draw(st.integers(0, 4)) == 0:
            del holder[last]
        else:
            holder[last] = copy.deepcopy(draw(st.sampled_from(JUNK)))
    return value
