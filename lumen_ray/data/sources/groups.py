"""Records grouped by image, for sources whose records each name an image.

One image becomes one row, however many expressions, questions or conversations refer to it.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lumen_ray.data import files
from lumen_ray.data.frames import AnnotationFrame, read_frame
from lumen_ray.data.pictures import BARE, ListedNames, identity, read_picture, unique_id
from lumen_ray.data.sources.base import Outcome, Rejected, lost_with_image, reject
from lumen_ray.data.sources.record_parsing import ImageRef, Record
from lumen_ray.errors import UserError


class Images:
    """Records of several files, grouped by image: one json value per image, for a listing.

    `item_kind`: name of a record in the counts. Each record without image is a group of its own.
    """

    def __init__(self, item_kind: str):
        self.item_kind = item_kind
        self.listed = 0
        self.rejected: list[Rejected] = []
        self._names = ListedNames()
        self._groups: dict[Any, dict[str, Any]] = {}

    def expect(self, names: Iterable[str]) -> None:
        """Other images of the set: a file that may be one of them is not taken for an image of a similar name."""
        for name in names:
            self._names.add(name)

    def add(
        self,
        image: ImageRef | None,
        origin: str,
        item: Record,
        size: list[int] | None = None,
        further: Sequence[ImageRef] = (),
    ) -> None:
        """Adds `item` with its origin to the group of its image, or of all its images in order if there are `further`
        ones; `size`: the (height, width) that it declares."""
        self.listed += 1
        key: Any = (self.listed,)
        group: dict[str, Any] = {"origin": origin, "items": [], "sizes": [], "further": []} | _as_group(None)
        if image is not None:
            refs = [image, *further]
            for ref in refs:
                self._names.add(ref.name)
            key = tuple((identity(ref.name), ref.data) for ref in refs)
            group |= _as_group(image) | {"further": [_as_group(ref) for ref in further]}
        group = self._groups.setdefault(key, group)
        group["items"].append(item | {"origin": origin})
        if size and size not in group["sizes"]:
            group["sizes"].append(size)

    def reject(self, image: ImageRef | None, origin: str, error: UserError, further: Sequence[ImageRef] = ()) -> None:
        """Rejects a record that cannot be used, whatever its images contain."""
        self.listed += 1
        for ref in [] if image is None else [image, *further]:
            self._names.add(ref.name)
        self.rejected.append(reject(self.item_kind, "" if image is None else image.name, origin, error))

    def __len__(self) -> int:
        return len(self._groups)

    def listing(self) -> list[dict[str, Any]]:
        """The groups, those of images in order of their names, those of one image before those of several. `id` is a
        group's `image_id`, unique: the (first) image's name, else the `id` of its first item, else its origin."""
        groups = sorted(self._groups.values(), key=_place)
        times: Counter[str] = Counter()
        for group in groups:
            group["id"] = unique_id(group["image"] or group["items"][0].get("id") or group["origin"], times)
            for image in (group, *group["further"]):
                if image["image"] is not None:
                    image["trust"] = self._names.trust(image["image"])
        return groups


def _as_group(image: ImageRef | None) -> dict[str, Any]:
    """The keys of a group, or of one of its further images, that `_read` needs."""
    return {"image": None if image is None else image.name, "data": image and image.data, "trust": BARE}


def _place(group: dict[str, Any]) -> tuple[bool, str, int]:
    return group["image"] is None, group["image"] or "", len(group["further"])


def open_group(folder: str, group: dict[str, Any]) -> tuple[bytes, AnnotationFrame]:
    """The encoded image of a group of `Images`, below `folder`, and its frame, inferred from the declared `sizes`.

    Raises `UserError` if the image is missing, broken or of another size, `StoreError` if the store is unreachable.
    """
    return _open(folder, group, 0, group["sizes"])


def open_further(folder: str, group: dict[str, Any]) -> list[dict[str, Any]]:
    """The further images of a group as in the column `further_images`, each decoded once. Raises like `open_group`."""
    found = []
    for number in range(1, 1 + len(group["further"])):
        data, frame = _open(folder, group, number, [])
        height, width = frame.rotated_size
        found.append({"image": data, "height": height, "width": width})
    return found


def _open(folder: str, group: dict[str, Any], number: int, sizes: list[list[int]]) -> tuple[bytes, AnnotationFrame]:
    """Image `number` of a group, from 0, and its frame. Among several, an error says which one it is about."""
    image = [group, *group["further"]][number]
    try:
        data = _read(folder, image)
        return data, read_frame(data, sizes)
    except UserError as error:
        if isinstance(error, files.StoreError) or not group["further"]:
            raise
        what = f"image {number + 1} of {1 + len(group['further'])}, '{image['image']}'"
        raise UserError(f"{what}: {error}", error.reason) from None


def _read(folder: str, image: dict[str, Any]) -> bytes:
    """The encoded image of a group, or of one of its further images."""
    if image["data"] is not None:
        return base64.b64decode(image["data"])
    return read_picture(folder, image["image"], image["trust"])


def lost_group(row_kind: str, item_kind: str, group: dict[str, Any], error: UserError) -> Outcome:
    """The outcome of an image that cannot be used: it is rejected with all its items."""
    items = [reject(item_kind, group["id"], item["origin"], lost_with_image(error)) for item in group["items"]]
    return Outcome(rejected=[reject(row_kind, group["id"], group["origin"], error), *items])


def finished_group(
    row_kind: str, item_kind: str, outcome: Outcome, group: dict[str, Any], rejected: list[Rejected]
) -> Iterator[Outcome]:
    """The outcome of a group whose items were `rejected` in part; if all were, the row is rejected too."""
    assert outcome.row is not None
    total = len(group["items"])
    outcome.rejected = rejected
    if len(rejected) < total:
        outcome.written = {item_kind: total - len(rejected)}
        yield outcome
        return
    error = UserError(f"none of its {total} {item_kind} can be used", "no_items")
    yield Outcome(rejected=[reject(row_kind, outcome.row["image_id"], group["origin"], error), *rejected])
