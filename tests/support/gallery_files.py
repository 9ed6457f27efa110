"""The scripts of a gallery, read without a browser."""

import base64
import json


def call(path):
    """The arguments of the one call in a script."""
    code = path.read_text(encoding="utf-8")
    name, _, rest = code.partition("(")
    assert name in ("gallery.meta", "gallery.chunk", "gallery.index") and rest.endswith(")\n")
    return json.loads(f"[{rest[:-2]}]")


def read_gallery(folder):
    """(meta, cards, index entries) of the folder ``gallery``; an index entry: (failed, {key: scores or number})."""
    (meta,) = call(folder / "meta.js")
    cards, entries = [], []
    for number, path in enumerate(sorted(folder.glob("[0-9]*/*.js"))):
        given, chunk = call(path)
        assert given == number
        cards += chunk
    for number, path in enumerate(sorted(folder.glob("index/*.js"))):
        given, code = call(path)
        assert given == number
        entries += _entries(base64.b64decode(code), len(meta["tasks"]))
    assert meta["images"] == len(cards) == len(entries)
    return meta, cards, entries


def _entries(code, tasks):
    at = 0

    def number():
        nonlocal at
        value = shift = 0
        while True:
            byte = code[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(code):
        groups, failed = divmod(number(), 2)
        found = {}
        for _ in range(groups):
            key, size = number(), number()
            found[key] = size if key < tasks else list(code[at : at + size])
            at += 0 if key < tasks else size
        yield bool(failed), found
