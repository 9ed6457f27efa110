"""WebDataset tars, read as a stream: consecutive members with the same key are one sample.

The key ends at the first dot of the base name, as in WebDataset, unless only digits follow up to the extension
(``frame.001.jpg`` has the key ``frame.001``). An extension that comes again starts a new sample of that key. Hidden
members, such as the ``._name`` files that macOS adds, are skipped.

A truncated or damaged tar gives the samples before the damage, then one error for the rest. `tarfile` itself takes a
broken header in the middle, and a missing end mark, for the end of the tar; here both are damage.
"""

from __future__ import annotations

import lzma
import re
import tarfile
import zlib
from collections.abc import Collection, Iterator

from lumen_ray.data import files, urls
from lumen_ray.data.pictures import is_hidden
from lumen_ray.errors import UserError

SUFFIXES = (".tar", ".tar.gz", ".tgz")
MAX_MEMBER_BYTES = 1 << 28
# TypeError: of `tarfile` for a gzip header that is cut off (Python 3.11 to 3.13)
_DAMAGE = (tarfile.TarError, EOFError, OSError, ValueError, TypeError, zlib.error, lzma.LZMAError)

#: of one sample: extension without dot, lower case -> content; None if that extension is not wanted
Members = dict[str, bytes | None]


class _Member(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # missing in typeshed
            raise
        except tarfile.HeaderError as error:
            empty = isinstance(error, tarfile.EmptyHeaderError)  # type: ignore[attr-defined]  # missing in typeshed
            raise tarfile.ReadError("it ends without an end mark" if empty else str(error)) from None


def samples(location: str, wanted: Collection[str]) -> Iterator[tuple[str, Members | UserError]]:
    """(key, members) of each sample in order. Only the `wanted` extensions are read; others are None.

    At damage the current sample comes with the members read so far, then one `UserError` for the rest of the tar.
    Raises `StoreError` if the store stops answering.
    """
    key = ""
    members: Members = {}
    try:
        with (
            files.open_input(location) as file,
            tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as tar,
        ):
            for member in tar:
                # else it keeps every header it has read
                tar.members = []  # type: ignore[attr-defined]  # missing in typeshed
                if not member.isreg() or is_hidden(member.name.removeprefix("./")):
                    continue
                stem, extension = _split(member.name)
                if members and (stem != key or extension in members):
                    yield key, members
                    members = {}
                key = stem
                members[extension] = None
                if extension in wanted:
                    members[extension] = _read(tar, member)
    except UserError:
        raise
    except _DAMAGE as error:
        if isinstance(error, OSError) and urls.is_url(location):
            raise files.StoreError(f"'{location}' can no longer be read: {error}", "store_unreachable") from None
        if members:
            yield key, members
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        after = f" after '{key}'" if key else ""
        yield key, UserError(f"the rest of the tar{after} cannot be read: {why}", "broken_tar")
        return
    if members:
        yield key, members


def sample_key(name: str) -> str:
    """What the members of one sample have in common."""
    return _split(name)[0]


def members(location: str) -> Iterator[tuple[str, int, int] | UserError]:
    """(name, offset, size) in bytes of each regular member of an uncompressed tar, hidden ones left out; at damage one
    `UserError` for the rest of the tar.

    Raises `UserError` (`compressed_tar`) for a compressed one, of which members cannot be read alone.
    """
    name = ""
    try:
        with files.open_input(location) as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # missing in typeshed
                name = member.name.removeprefix("./")
                if member.isreg() and not is_hidden(name):
                    yield name, member.offset_data, member.size
    except UserError:
        raise
    except _DAMAGE as error:
        if isinstance(error, OSError) and urls.is_url(location):
            raise files.StoreError(f"'{location}' can no longer be read: {error}", "store_unreachable") from None
        if not name and str(location).endswith((".gz", ".tgz", ".xz", ".bz2", ".zst")):
            raise UserError(
                f"'{location}' is compressed, so its images cannot be read one by one; unpack it to a plain .tar",
                "compressed_tar",
            ) from None
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        after = f" after '{name}'" if name else ""
        yield UserError(f"the rest of the tar{after} cannot be read: {why}", "broken_tar")


_NUMBERED = re.compile(r"([^.]*(?:\.[0-9_-]+)+)\.([^.]+)")


def _split(name: str) -> tuple[str, str]:
    """``"a/b.seg.PNG" -> ("a/b", "seg.png")``, ``"a/b.001.jpg" -> ("a/b.001", "jpg")``."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    if numbered := _NUMBERED.fullmatch(base):
        stem, extension = numbered.groups()
    else:
        stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    """The content; empty for a member over `MAX_MEMBER_BYTES`, which is neither image nor caption."""
    if member.size > MAX_MEMBER_BYTES:
        return b""
    content = tar.extractfile(member)
    assert content is not None, "it is a regular file"
    data = content.read()
    if len(data) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data
