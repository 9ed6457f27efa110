"""The interface of a data format for `lumen-ray prepare`: a `Source`. `shards.prepare.prepare_source` does the rest.

How to add one
--------------
1. A dataclass in its own module whose fields are its arguments (paths as strings, local or URLs, see `data.files`):

       @dataclass
       class CaptionSource(Source):
           kind = "captions"                      # the verb; also the default of the rows' column `source`
           row_kind = "images"                    # the name of a row in the counts
           annotations: str
           images: str

           def read_listing(self) -> Listing: ... # on the driver: read the annotations, check the arguments
           def rows(self, record, shared): ...    # in a Ray task: yield an Outcome per row

2. `read_listing` raises `UserError` for what the user must change, and returns `records`: plain json values, one per
   image, or one per container (a tar, a chunk of a text file) that gives many rows. Data that all records need (number
   of keypoints per class, ...) goes to `shared`; do not keep the listing on `self`, which is pickled into every task.
   Make paths `urls.absolute`: tasks run in other folders and on other machines. Compare ids by `values.id_key`, and
   give every row an `image_id` of its own. Add all names of images to a `pictures.ListedNames`.
3. `rows` is pure: the same record gives the same rows anywhere. Bad input never raises; it is a `reject(...)`. Read
   images with `pictures.read_picture` and pass the bytes to `frames.read_frame`, which decodes them fully once
   (truncation shows only then) and infers the frame of the annotations. Coordinates in rows are in the EXIF-rotated
   frame, `AnnotationFrame.rotated_size`. `objects.ObjectList` makes the instances of an image, and takes the class of
   an object that is lost off the row's `classes`.
4. Count the input separately from the output: `Listing.inputs` for records counted on the driver, `Outcome.came_in`
   for those that only the task can count (the rows of a tar). Kinds are words such as "images" or "annotations"; for
   each of them `in = written + rejected` is checked and reported. `prepare` counts rows written under `row_kind`;
   `Outcome.written` counts the records that a row contains.
5. One entry in `sources/registry.py` makes it `lumen-ray prepare KIND` with its arguments.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lumen_ray.data import files, urls
from lumen_ray.data.sources.rules import GENERAL, MENDS
from lumen_ray.errors import UserError

Rejected = dict[str, str]  # kind, image_id, origin, reason, rule, mend: a row of rejected.parquet
_LONGEST_REASON = 500


def reject(kind: str, image_id: str, origin: str, error: UserError) -> Rejected:
    """A row of `rejected.parquet`: kind of record, image, place in the input files, why it cannot be used, by which of
    the `rules`, and how to mend the input.

    Re-raises a `StoreError`: if the store is unreachable, the job stops instead of rejecting everything.
    """
    if isinstance(error, files.StoreError):
        raise error
    # names and reasons quote the input, which need not be encodable text
    image_id, origin, reason = (str(t).encode("utf-8", "backslashreplace").decode() for t in (image_id, origin, error))
    return {
        "kind": kind,
        "image_id": image_id,
        "origin": origin,
        "reason": reason[:_LONGEST_REASON],
        "rule": error.reason,
        "mend": MENDS.get(error.reason, GENERAL),
    }


@dataclass
class Outcome:
    """The result for one row.

    `row`: of `schema.make_row`, or None; `written`: records of each kind in it, without the row itself; `rejected`:
    records left out; `came_in`: input records per kind that the listing has not counted; `changed`: parts of written
    records that were cut or dropped, e.g. {"boxes clipped": 2, "masks dropped": 1}."""

    row: dict[str, Any] | None = None
    written: dict[str, int] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)
    came_in: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)


def lost_image(
    image_id: str, origin: str, error: UserError, kind: str = "annotations", origins: Iterable[str] = ()
) -> Outcome:
    """The outcome of an image that cannot be used: it is rejected with its records (of `kind` at `origins`)."""
    first = reject("images", image_id, origin, error)
    return Outcome(rejected=[first, *(reject(kind, image_id, where, lost_with_image(error)) for where in origins)])


def lost_with_image(error: UserError) -> UserError:
    """The error of a record whose image was rejected for `error`."""
    return UserError(f"its image was rejected: {error}", "image_rejected")


@dataclass
class Listing:
    """The result of `Source.read_listing`.

    `records`: json values, in an order that does not depend on the machine; `inputs`: number of input records per kind;
    `categories`: as in the manifest (`shards.build_manifest`); `shared`: data that all records need; `rejected`: input
    records rejected so far; `rows_per_record`: about how many rows a record gives, 1 if it gives at most one;
    `shuffle`: False for rows that are independent draws already; `origin`: entries of the manifest's `origin` beside
    the source's fields; `notes`: sentences about how the input was read, for the summary and the manifest.
    """

    records: Sequence[Any]
    inputs: dict[str, int]
    categories: list[dict[str, Any]] = field(default_factory=list)
    shared: Any = None
    rejected: Sequence[Rejected] = field(default_factory=list)
    rows_per_record: int = 1
    shuffle: bool = True
    origin: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Source(ABC):
    """A data format; see the module's docstring."""

    kind: ClassVar[str]
    row_kind: ClassVar[str] = "images"

    @abstractmethod
    def read_listing(self) -> Listing:
        """Reads the annotations and checks the arguments; runs once, on the driver."""

    @abstractmethod
    def rows(self, record: Any, shared: Any) -> Iterator[Outcome]:
        """The outcomes of one record of the listing; runs in a task, on a copy of the source."""

    def settings(self) -> dict[str, Any]:
        """The arguments as recorded in the manifest: the fields, paths by their last component."""
        return {f.name: _remembered(getattr(self, f.name)) for f in dataclasses.fields(self)}


def _remembered(value: Any) -> Any:
    if isinstance(value, str) and ("/" in value or "\\" in value):
        return urls.base_name(value)
    return [_remembered(v) for v in value] if isinstance(value, list | tuple) else value


def perception_tasks(classes: Sequence[str], instances: Sequence[dict[str, Any]]) -> list[str]:
    """The tasks that a row's instances can train; `segment` only if every object has a mask."""
    objects = [i for i in instances if not i["crowd"]]
    tasks = ["detect", "count"] if classes else []
    if objects and all(i["mask"] is not None for i in objects):
        tasks.append("segment")
    if any(i["keypoints"] is not None for i in objects):
        tasks.append("pose")
    return tasks
