"""WebDataset tars, read as a stream: neighbouring members with the same stem are one sample.

A tar that is cut off or damaged gives the samples before the damage, and one error for all behind it. `tarfile` itself
takes a broken header in the middle, and a missing end mark, for the end of the tar; here both are damage.
"""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Collection, Iterator

from lumen_ray.data import files, urls
from lumen_ray.errors import UserError

SUFFIXES = (".tar", ".tar.gz", ".tgz")
MAX_MEMBER_BYTES = 1 << 28
_DAMAGE = (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError)

Parts = dict[str, bytes | None]  # extension without dot, lower case -> content; None for one that was not asked for


class _Member(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            empty = isinstance(error, tarfile.EmptyHeaderError)
            raise tarfile.ReadError("it ends without an end mark" if empty else str(error)) from None


def samples(location: str, wanted: Collection[str]) -> Iterator[tuple[str, Parts | UserError]]:
    """(key, parts) of each sample in order. The `wanted` extensions are read, of others only their presence is told.

    At damage the sample begun comes with the parts read so far, and then one `UserError` for the rest of the tar.
    Raises `StoreError` when the store stops answering.
    """
    key, parts = "", {}
    try:
        with (
            files.open_input(location) as file,
            tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as tar,
        ):
            for member in tar:
                tar.members = []  # else it keeps every header it has seen
                if not member.isreg():
                    continue
                stem, extension = _split(member.name)
                if stem != key and parts:
                    yield key, parts
                    parts = {}
                key = stem
                parts[extension] = None
                if extension in wanted:
                    parts[extension] = _read(tar, member)
    except UserError:
        raise
    except _DAMAGE as error:
        if isinstance(error, OSError) and urls.is_url(location):
            raise files.StoreError(f"'{location}' cannot be read on: {error}", "store_unreachable") from None
        if parts:
            yield key, parts
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        after = f" after '{key}'" if key else ""
        yield key, UserError(f"the rest of the tar{after} cannot be read: {why}", "broken_tar")
        return
    if parts:
        yield key, parts


def _split(name: str) -> tuple[str, str]:
    """``"a/b.seg.PNG" -> ("a/b", "seg.png")``, as WebDataset does."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    """The content; empty for a member too long to be held, which no image or caption is."""
    if member.size > MAX_MEMBER_BYTES:
        return b""
    data = tar.extractfile(member).read()
    if len(data) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data
