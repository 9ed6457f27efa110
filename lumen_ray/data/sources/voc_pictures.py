"""Which picture belongs to which VOC xml file; the rule is that of `data.sources.voc`."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lumen_ray.data import urls
from lumen_ray.data.pictures import bare_key, identity, spellings, unique_id
from lumen_ray.data.sources.base import Rejected, lost_with_image, reject
from lumen_ray.errors import UserError

Record = dict[str, Any]


class PictureIndex:
    """The pictures of a folder, by relative name."""

    def __init__(self, names: Iterable[str]):
        self.names = set(names)
        self._by_stem: dict[str, list[str]] = {}
        for name in sorted(self.names):
            self._by_stem.setdefault(_stem_key(name), []).append(name)

    def find(self, name: str) -> str | None:
        """The picture of that name, or the only one of a similar spelling (`pictures.spellings`)."""
        if (same := identity(name)) in self.names:
            return same
        similar = {identity(spelling) for spelling in spellings(name)} & self.names
        return similar.pop() if len(similar) == 1 else None

    def of_stem(self, path: str, filename: str) -> list[str]:
        """The pictures whose name without suffix is `path`; if there are several, only the one whose suffix `filename`
        has, if there is one."""
        found = self._by_stem.get(_stem_key(path + "."), [])
        exact = [name for name in found if bare_key(name) == bare_key(filename)]
        return exact if len(exact) == 1 else found


def _stem_key(name: str) -> str:
    folder, _, base = identity(name).rpartition("/")
    return f"{folder}/{posixpath.splitext(bare_key(base))[0]}"


def assign_pictures(
    records: Sequence[Record], pictures: PictureIndex, others: Iterable[str] = ()
) -> tuple[list[Record], list[Rejected]]:
    """(records with the keys `picture`, `named` and `id`, rejected records of images and annotations).

    `picture`: name below the image folder, None if there is none; `named`: another existing picture that ``<filename>``
    names, None without one; `id`: the row's image id. An xml whose picture belongs to another one is rejected with its
    objects, and their classes are `lost` in the other. `others`: xml files that are not among the records.
    """
    # how many xml files could mean a picture of that bare name, by their own name or by what they name
    stems = Counter(
        stem for record in records for stem in {_bare_stem(record), _stem_key(bare_key(record["filename"]))}
    ) + Counter(_bare_stem({"origin": name}) for name in others)
    owners: dict[str, Record] = {}
    kept: list[Record] = []
    rejected: list[Rejected] = []
    found = [_find(record, pictures, stems) for record in records]
    # an xml of the picture's own name goes before one that only names it
    for own in (True, False):
        for record, (picture, is_own, error) in zip(records, found, strict=True):
            if picture is not None and error is None and is_own == own:
                owners.setdefault(picture, record)
    times: Counter[str] = Counter()
    for record, (picture, is_own, error) in zip(records, found, strict=True):
        owner = owners.get(picture or "")
        if error is None and owner is not None and owner is not record:
            error = UserError(f"its picture '{picture}' belongs to '{owner['origin']}'", "repeated_image")
            owner["lost"] += [o["name"] for o in record["objects"]]
        if error is not None:
            name = record["filename"] or record["origin"]
            rejected.append(reject("images", name, record["origin"], error))
            lost = lost_with_image(error)
            rejected += [reject("annotations", name, o["origin"], lost) for o in record["objects"]]
            continue
        # a picture at the top that other xml files could mean, too, is still not the xml's own
        named = _named(record, pictures, at_top=True) if is_own else None
        record["picture"] = picture
        record["named"] = named if named != picture else None
        record["id"] = unique_id(picture or _missing_name(record), times)
        kept.append(record)
    return kept, rejected


def _bare_stem(record: Record) -> str:
    return _stem_key(urls.base_name(record["origin"]))


def _find(
    record: Record, pictures: PictureIndex, stems: Mapping[str, int]
) -> tuple[str | None, bool, UserError | None]:
    """(picture, whether it has the xml's own name, or why it cannot be told); `stems`: of all xml files."""
    path = posixpath.splitext(record["origin"])[0]
    filename = record["filename"]
    paths = [path, *([posixpath.join(record["folder"], urls.base_name(path))] if record["folder"] else [])]
    paths += [urls.base_name(path)] if stems[_bare_stem(record)] == 1 else []
    for place in dict.fromkeys(paths):
        found = pictures.of_stem(place, filename)
        if len(found) > 1:
            listed = ", ".join(f"'{name}'" for name in found)
            return None, True, UserError(f"several pictures have its name: {listed}", "ambiguous_image")
        if found:
            return found[0], True, None
    # a picture at the top only if no other xml can mean it
    at_top = stems[_stem_key(bare_key(urls.base_name(filename)))] == 1
    return _named(record, pictures, at_top), False, None


def _named(record: Record, pictures: PictureIndex, at_top: bool) -> str | None:
    """The picture that ``<filename>`` names: in the xml's own sub-folder, in ``<folder>``, or `at_top`."""
    filename = record["filename"].replace("\\", "/")
    if not filename:
        return None
    folders = [posixpath.dirname(record["origin"]), *filter(None, [record["folder"]]), *([""] if at_top else [])]
    for folder in dict.fromkeys(folders):
        for name in dict.fromkeys([filename, urls.base_name(filename)]):
            if found := pictures.find(posixpath.join(folder, name)):
                return found
    return None


def _missing_name(record: Record) -> str:
    """The image id of an xml without a picture."""
    filename = urls.base_name(record["filename"])
    if posixpath.splitext(filename)[1]:
        return posixpath.join(posixpath.dirname(record["origin"]), filename)
    return posixpath.splitext(record["origin"])[0] + ".jpg"
