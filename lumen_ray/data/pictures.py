"""Which files are pictures, and which file is the picture that annotations name.

A name is looked up below the image folder as it is written. If there is no such file, annotations often come from
another machine: the name is then tried in other spellings (``/`` for a backslash, ``%20`` decoded, both Unicode forms,
its suffix in another case), then without its folders. Each step is taken only if no other listed name could mean the
same file by it, and if exactly one file fits; otherwise annotations of one picture would land on another one's pixels.
"""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from urllib.parse import unquote

from lumen_ray.data import files, urls
from lumen_ray.errors import UserError

#: suffixes of the formats that `data.images` decodes, as Pillow registers them
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif",
    ".avifs", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".ico", ".psd",
)  # fmt: skip
#: what a listing leaves out beside files of other suffixes, and how several of it are called
PLURALS = {
    "broken link": "broken links",
    "link to a folder": "links to folders",
    "folder of labels": "folders of labels",
    "folder without permission": "folders without permission",
    "name that is not UTF-8": "names that are not UTF-8",
    "listed again": "listed again",
}
_HIDDEN_FOLDERS = ("__MACOSX",)


def is_hidden(name: str) -> bool:
    """Whether a relative name is a hidden file or below a hidden folder, such as the ``._name`` files of macOS."""
    return any(
        (part.startswith(".") and part not in (".", "..")) or part in _HIDDEN_FOLDERS for part in name.split("/")
    )


def is_picture(name: str) -> bool:
    """Whether the suffix is one of `SUFFIXES`, in any case."""
    return posixpath.splitext(name)[1].lower() in SUFFIXES


def kind_of(name: str) -> str:
    """The suffix in lower case, by which files that are no pictures are counted."""
    return posixpath.splitext(name)[1].lower() or "no suffix"


def list_pictures(folder: urls.Location) -> tuple[list[str], Counter[str]]:
    """Names of the pictures below `folder`, relative to it and sorted, and the number of files left out, by suffix.

    Hidden files are neither listed nor counted. Raises `UserError` (`missing_folder`) if there is no such folder.
    """
    return split_pictures(files.list_files(folder, recursive=True))


def split_pictures(names: Iterable[str]) -> tuple[list[str], Counter[str]]:
    """Those of `names` that are pictures, and the number of others by suffix; hidden ones are neither."""
    visible = [name for name in names if not is_hidden(name)]
    others = Counter(kind_of(name) for name in visible if not is_picture(name))
    return [name for name in visible if is_picture(name)], others


def left_out_note(others: Counter[str], place: str = "") -> str:
    """A sentence about what a listing left out, empty without any: files that are no pictures by suffix, as
    `split_pictures` counts them, and other kinds by their name (see `PLURALS`)."""
    if not others:
        return ""
    kinds = [
        f"{number} {PLURALS[kind] if number > 1 else kind}" for kind, number in others.most_common() if kind in PLURALS
    ]
    suffixes = [(suffix, number) for suffix, number in others.most_common() if suffix not in PLURALS]
    if suffixes:
        total, rest = sum(number for _, number in suffixes), len(suffixes) - 8
        shown = ", ".join(f"{suffix} {number}" for suffix, number in suffixes[:8])
        more = f" and {rest} more kinds" if rest > 0 else ""
        kinds.append(f"{total} file{'s' * (total > 1)} not of a picture format that is read ({shown}{more})")
    where = f" in '{place}'" if place else ""
    return f"left out{where}: {', '.join(kinds)}"


def identity(name: str) -> str:
    """The name in the form in which equal names are the same file: with ``/``, without ``./`` and ``//``."""
    return posixpath.normpath(name.replace("\\", "/"))


def path_key(name: str) -> str:
    """A key that is equal for all names that are spellings of one path."""
    path = unicodedata.normalize("NFC", unquote(identity(name)))
    stem, suffix = posixpath.splitext(path)
    return stem + suffix.lower()


def bare_key(name: str) -> str:
    """A key that is equal for all names that could be taken for the same file once their folders are left out."""
    return path_key(name).rpartition("/")[2]


#: how far the file of a listed name may be guessed: not at all, by its spelling, or also without its folders
EXACT, SPELLING, BARE = range(3)


class ListedNames:
    """The names that annotations list, to find those whose file must not be guessed."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._first: dict[tuple[bool, str], str] = {}
        self._shared: set[tuple[bool, str]] = set()
        for name in names:
            self.add(name)

    def add(self, name: str) -> None:
        this = identity(name)
        for key in ((False, path_key(name)), (True, bare_key(name))):
            if self._first.setdefault(key, this) != this:
                self._shared.add(key)

    def trust(self, name: str) -> int:
        """How far its file may be guessed: `EXACT`, `SPELLING` or `BARE`."""
        if (False, path_key(name)) in self._shared:
            return EXACT
        return SPELLING if (True, bare_key(name)) in self._shared else BARE


def unique_id(name: str, times: Counter[str]) -> str:
    """`name`, with ``#2``, ``#3``, ... after its earlier uses, which `times` counts."""
    times[name] += 1
    while times[name] > 1:
        numbered = f"{name}#{times[name]}"
        if numbered not in times:
            times[numbered] += 1
            return numbered
        times[name] += 1
    return name


class FileNames:
    """Names of files to be written into one folder, no two of which are the same file, even where case is ignored."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def free(self, name: str) -> str:
        """`name`, or with ``_2``, ``_3``, ... before its suffix if it is taken."""
        stem, suffix = posixpath.splitext(name)
        number, found = 1, name
        while (key := unicodedata.normalize("NFC", identity(found)).casefold()) in self._taken:
            number += 1
            found = f"{stem}_{number}{suffix}"
        self._taken.add(key)
        return found


def distinct_names(locations: Iterable[str]) -> dict[str, str]:
    """Each location's base name, with as many parent folders as it takes to make all names distinct."""
    paths = {location: urls.shown(location).strip("/").split("/") for location in locations}
    for depth in range(1, max(map(len, paths.values()), default=0) + 1):
        names = {location: "/".join(path[-depth:]) for location, path in paths.items()}
        if len(set(names.values())) == len(names):
            return names
    return {location: "/".join(path) for location, path in paths.items()}


def spellings(name: str) -> Iterator[str]:
    """Other spellings of a name that may be meant, without the name itself."""
    found = {name: None}
    for form in (name, name.replace("\\", "/")):
        for text in (form, unquote(form)):
            for normal in (text, *(unicodedata.normalize(kind, text) for kind in ("NFC", "NFD"))):
                stem, suffix = posixpath.splitext(normal)
                cases = (suffix, suffix.lower(), suffix.upper(), "." + suffix[1:].capitalize() if suffix else "")
                found |= dict.fromkeys(stem + case for case in cases)
    del found[name]
    yield from found


def read_picture(folder: str, names: str | Sequence[str], trust: int = BARE) -> bytes:
    """The encoded bytes of a picture below `folder`.

    `names`: its name, or several of which the first that exists counts; `trust`: of `ListedNames`, how far its file may
    be guessed by the rule of the module.

    Raises `UserError` (`missing_image`, `ambiguous_image`), `StoreError` if the store is unreachable.
    """
    names = [names] if isinstance(names, str) else list(names)
    shown = names[0] if len(names[0]) <= 120 else names[0][:117] + "..."
    for name in names:
        try:
            return files.read_bytes(urls.join(folder, name))
        except files.StoreError:
            raise
        except UserError as error:
            if error.reason != "missing_file":
                raise UserError(f"the image file '{shown}' cannot be opened", "missing_image") from None
    for candidates in _guesses(names, trust):
        found = {data for name in candidates if (data := _read_if_there(urls.join(folder, name))) is not None}
        if len(found) > 1:
            raise UserError(f"the image file '{shown}' is missing, and several similar names exist", "ambiguous_image")
        if found:
            return found.pop()
    if trust != BARE:
        raise UserError(
            f"the image file '{shown}' is missing, and other listed images have the same file name, so a file of that "
            "name in another folder may be any one's",
            "ambiguous_image",
        )
    raise UserError(f"the image file '{shown}' is missing", "missing_image")


def _guesses(names: Sequence[str], trust: int) -> Iterator[list[str]]:
    """Names to try, in order of trust."""
    if trust == EXACT:
        return
    yield [spelling for name in names for spelling in spellings(name)]
    if trust == BARE:
        bare = list(dict.fromkeys(urls.base_name(name) for name in names if urls.base_name(name)))
        yield bare
        yield [spelling for name in bare for spelling in spellings(name)]


def _read_if_there(location: str) -> bytes | None:
    if not urls.is_url(location) and not os.path.isfile(urls.split(location)[1]):
        return None
    try:
        return files.read_bytes(location)
    except files.StoreError:
        raise
    except UserError:
        return None
