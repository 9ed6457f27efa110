"""Referring expressions as a source: RefCOCO, RefCOCO+, RefCOCOg, RefCLEF, gRefCOCO, and plain json records.

An expression refers to one object, several (gRefCOCO) or none: a phrase of task `refer` with 0, 1 or more instances.
If one of its objects cannot be used, the expression is rejected, since it would teach a wrong answer. Only objects that
an expression refers to are stored, and `classes` stays empty: these images are not annotated exhaustively.
"""

from __future__ import annotations

import io
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lumen_ray.data import files, urls
from lumen_ray.data.frames import AnnotationFrame
from lumen_ray.data.pictures import identity
from lumen_ray.data.shards.schema import make_row
from lumen_ray.data.sources.base import Listing, Outcome, Rejected, Source, reject
from lumen_ray.data.sources.groups import Images, finished_group, lost_group, open_group
from lumen_ray.data.sources.objects import ASSUMED, make_instance
from lumen_ray.data.sources.record_parsing import (
    BOX_FORMATS,
    ImageRef,
    Record,
    as_mapping,
    check_choice,
    clean_text,
    first_of,
    fractions_note,
    image_ref,
    is_numbers,
    load_json,
    load_records,
    named_image,
    plain_json,
    short,
)
from lumen_ray.data.values import declared_size, flag, id_key, numbers
from lumen_ray.errors import UserError

ITEMS = "expressions"
_NO_CLASS = "object"  # the name of an instance whose record gives no category
_TEXT_KEYS = ("expression", "expressions", "sentences", "sent", "sentence", "phrase", "caption", "text", "query")
_BOX_KEYS = ("bbox", "bboxes", "box", "boxes")
_LIST_KEYS = ("bboxes", "boxes")
_MASK_KEYS = ("segmentation", "segmentations", "mask", "masks")


@dataclass
class ReferSource(Source):
    """`refs`: files of refs (`refs(unc).p`, `grefs(unc).json`) whose `ann_id` point into the COCO file `instances`; or,
    without `instances`, json/jsonl of records with image, expression and box.

    `split`: only expressions of that split (None: all); `box_format`: of the plain records' boxes, see `BOX_FORMATS`.
    """

    refs: list[str]
    images: str
    instances: str | None = None
    split: str | None = None
    box_format: str = "xyxy"
    kind = "refer"

    def read_listing(self) -> Listing:
        check_choice("box format", self.box_format, BOX_FORMATS)
        self.images = urls.absolute(self.images)
        if not files.is_dir(self.images):
            raise UserError(f"image folder '{self.images}' does not exist", "missing_images")
        pickled = next((location for location in self.refs if _is_pickle(location)), None)
        if pickled and not self.instances:
            raise UserError(f"refs file '{pickled}' needs the COCO file of its objects; give --instances", "usage")
        records = [pair for location in dict.fromkeys(self.refs) for pair in load_refs(location)]
        groups = Images(ITEMS)
        groups.expect(image.name for _, record in records if (image := named_image(record)) is not None)
        records = _of_split(records, self.split)
        parse = _parse_plain
        if self.instances:
            coco = _CocoRefs(self.instances)
            parse = coco.parse
            groups.expect(coco.file_names)
        for origin, record in records:
            _add(groups, origin, record, parse)
        listed = groups.listing()
        boxes = (target["bbox"] for group in listed for item in group["items"] for target in item["targets"])
        notes = [] if self.box_format == "relative" else fractions_note(boxes, "give --box-format relative if they are")
        inputs = {"images": len(groups), ITEMS: groups.listed}
        return Listing(listed, inputs, rejected=groups.rejected, notes=notes)

    def rows(self, record: Record, shared: Any) -> Iterator[Outcome]:
        try:
            data, frame = open_group(self.images, record)
        except UserError as error:
            yield lost_group(self.row_kind, ITEMS, record, error)
            return
        row = make_row(record["id"], data, frame.rotated_size, self.kind, tasks=["refer"])
        rejected: list[Rejected] = []
        objects = _Objects(frame, "xywh" if self.instances else self.box_format)
        for item in record["items"]:
            try:
                wanted = [objects.index_of(target) for target in item["targets"]]
            except UserError as error:
                rejected.append(reject(ITEMS, row["image_id"], item["origin"], error))
                continue
            row["phrases"].append({"task": "refer", "phrase": item["text"], "instances": sorted(set(wanted))})
        used = sorted({i for phrase in row["phrases"] for i in phrase["instances"]})
        row["instances"] = [objects.instances[i] for i in used]
        for phrase in row["phrases"]:
            phrase["instances"] = [used.index(i) for i in phrase["instances"]]
        changed = sum((objects.changes[i] for i in used), Counter({ASSUMED: int(frame.assumed and bool(used))}))
        outcome = Outcome(row, changed=dict(+changed))
        yield from finished_group(self.row_kind, ITEMS, outcome, record, rejected)


class _Objects:
    """The objects that the expressions of an image refer to, each once."""

    def __init__(self, frame: AnnotationFrame, box_format: str):
        self.frame, self.box_format = frame, box_format
        self.instances: list[Record] = []
        self.changes: list[Counter[str]] = []
        self._stored: dict[str, int] = {}

    def index_of(self, target: Record) -> int:
        """The index of an object in `instances`; adds it when an expression first refers to it."""
        key = repr(target)
        if key not in self._stored:
            parts = {name: target[name] for name in ("bbox", "segmentation", "rotation")}
            made, changed = make_instance(target["name"], self.frame, box_format=self.box_format, **parts)
            if made not in self.instances:  # else given in another way: with its box, or without
                self.instances.append(made)
                self.changes.append(changed)
            self._stored[key] = self.instances.index(made)
        return self._stored[key]


#: raised by `pickle` on damaged files
_DAMAGE = (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, ImportError,
           OverflowError, MemoryError, RecursionError)  # fmt: skip


class _PlainUnpickler(pickle.Unpickler):
    """Loads lists, dicts, texts and numbers only: anything else in a pickle file can run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise UserError(f"it contains an object of {module}.{name}, which could run code when loaded", "unsafe_pickle")


def _is_pickle(location: str) -> bool:
    return location.lower().endswith((".p", ".pkl", ".pickle"))


def load_refs(location: str) -> list[tuple[str, Any]]:
    """The (origin, record) pairs of a refs file: pickle (`.p`, `.pkl`, `.pickle`), json or jsonl.

    Raises `UserError` if the file is missing or malformed, or a pickle contains more than plain data.
    """
    name = urls.base_name(location)
    if not _is_pickle(name):
        return load_records(location, ("refs", "annotations", "data"))
    try:  # the published files were written by Python 2, whose texts are bytes
        data = _PlainUnpickler(io.BytesIO(files.read_bytes(location)), encoding="utf-8", errors="replace").load()
    except _DAMAGE as error:
        if isinstance(error, UserError):
            raise UserError(f"refs file '{location}' is refused: {error}", error.reason) from None
        why = f"refs file '{location}' is not a readable pickle ({type(error).__name__})"
        raise UserError(why, "invalid_annotations") from None
    if not isinstance(data, list):
        raise UserError(f"refs file '{location}' must be a list of refs, got {short(data)}", "invalid_annotations")
    return [(f"{name} record {n}", record) for n, record in enumerate(data)]


def _of_split(records: list[tuple[str, Any]], split: str | None) -> list[tuple[str, Any]]:
    """The records of that split, with an error in place of each that names no split. Raises `UserError` that lists the
    splits if no record is of that one."""
    if split is None:
        return records
    splits = [r.get("split") if isinstance(r, dict) else None for _, r in records]
    known = sorted({name for name in splits if isinstance(name, str)})
    if split not in known:
        raise UserError(f"no record is of split '{split}'; splits: {', '.join(known) or 'none'}", "no_split")
    nameless = UserError("it names no split", "no_split")
    named = zip(records, splits, strict=True)
    return [
        (origin, record if name == split else nameless)
        for (origin, record), name in named
        if name == split or not isinstance(name, str)
    ]


def _add(groups: Images, origin: str, record: Any, parse: Any) -> None:
    """Adds or rejects every expression of a record; a record that is broken as a whole is rejected once per text."""
    texts = _texts(record)
    image = None
    try:
        record = as_mapping(record)
        if not texts:
            raise UserError(f"it has no expression (keys: {', '.join(_TEXT_KEYS)})", "missing_text")
        image, size, targets = parse(record)
    except UserError as error:
        for place in _origins(origin, max(1, len(texts))):
            groups.reject(image or named_image(record), place, error)
        return
    for place, value in zip(_origins(origin, len(texts)), texts, strict=True):
        try:
            text = clean_text(value, "the expression")
        except UserError as error:
            groups.reject(image, place, error)
        else:
            groups.add(image, place, {"text": text, "targets": targets}, size=size)


def _origins(origin: str, number: int) -> list[str]:
    return [origin] if number == 1 else [f"{origin} expression {n}" for n in range(number)]


def _texts(record: Any) -> list[Any]:
    """The expressions of a record, unchecked: RefCOCO has a list of dicts with `sent`, `raw` and `tokens`."""
    value = first_of(record, _TEXT_KEYS) if isinstance(record, dict) else None
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [first_of(v, ("sent", "raw", *_TEXT_KEYS)) if isinstance(v, dict) else v for v in values]


def _size(entry: Record) -> list[int] | None:
    """The declared [height, width], None if there is none."""
    size = declared_size(entry.get("height"), entry.get("width"))
    return size if any(size) else None


Parsed = tuple[ImageRef, list[int] | None, list[Record]]  # image, its declared [height, width], objects


def _parse_plain(record: Record) -> Parsed:
    """A record with its own box or mask: one, a list of several, or an empty list (or `no_target`) for no object."""
    if record.get("ann_id") is not None:
        raise UserError("it points to annotations by ann_id; give their COCO file as --instances", "missing_instances")
    image = image_ref(record)
    if image is None:
        raise UserError("it names no image (keys: image, file_name, img_path)", "missing_image")
    return image, _size(record), _plain_targets(record)


def _plain_targets(record: Record) -> list[Record]:
    """The objects of a plain record, an empty list if it is marked as having none."""
    boxes, masks = _boxes_and_masks(record)
    if boxes == [] and masks is None and not any(record.get(key) == [] for key in _LIST_KEYS):
        boxes = None  # one box that was not drawn, which is not the same as no object
    if flag(record.get("no_target"), "no_target"):
        if boxes or masks:
            raise UserError("it is marked no_target but has a box or mask", "contradiction")
        return []
    if boxes is None and masks is None:
        raise UserError("it has neither box nor mask; mark an expression without object with no_target", "missing_box")
    if any(v is not None and not isinstance(v, list) for v in (boxes, masks)):
        raise UserError("its boxes and masks must be lists", "invalid_box")
    if boxes and masks and len(boxes) != len(masks):
        raise UserError(f"it has {len(boxes)} boxes but {len(masks)} masks", "contradiction")
    category = first_of(record, ("category", "category_name", "label"))
    label = clean_text(category, "its category") if isinstance(category, str) else _NO_CLASS
    number = max(len(boxes or []), len(masks or []))
    turn = record.get("rotation")
    return [_target(label, boxes[n] if boxes else None, masks[n] if masks else None, turn) for n in range(number)]


def _boxes_and_masks(record: Record) -> tuple[Any, Any]:
    """Boxes and masks of a record, a single one as a list of one; otherwise unchecked, None if it has none."""
    boxes, masks = first_of(record, _BOX_KEYS), first_of(record, _MASK_KEYS)
    flat = isinstance(boxes, list | tuple) and boxes and not any(isinstance(box, list | tuple) for box in boxes)
    boxes = [boxes] if flat else boxes
    masks = [masks] if isinstance(masks, dict) or _is_one_mask(masks, boxes) else masks
    return boxes, masks


def _target(name: str, bbox: Any, segmentation: Any, rotation: Any) -> Record:
    """An object as plain json, not yet checked against the image; numbers by value, so that equal objects are equal."""
    if bbox is not None and numbers(bbox) is None and not segmentation:
        raise UserError(f"a box must be four finite numbers, got {short(bbox)}", "invalid_box")
    return {
        "name": name,
        "bbox": [float(v) for v in numbers(bbox) or ()] or plain_json(bbox),
        "segmentation": plain_json(segmentation),
        "rotation": plain_json(rotation, depth=0),
    }


def _is_one_mask(masks: Any, boxes: Any) -> bool:
    """Whether a list is one object's polygons or several objects' masks: the former if there is at most one box."""
    if not isinstance(masks, list) or not masks or not isinstance(boxes, list | None):
        return False
    flat = is_numbers(masks) or all(is_numbers(m) for m in masks)
    return flat and len(boxes or [0]) == 1


class _CocoRefs:
    """Refs whose objects are annotations of a COCO file."""

    def __init__(self, instances: str):
        data = load_json(instances)
        lists = ("images", "annotations", "categories")
        if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in lists):
            raise UserError(f"instances file '{instances}' needs the lists {', '.join(lists)}", "invalid_annotations")
        self.annotations = _by_id(data["annotations"])
        self.images = _by_id(data["images"])
        names = (image.get("file_name") for image in data["images"] if isinstance(image, dict))
        self.file_names = [name for name in names if isinstance(name, str)]  # also of images that no ref is about
        self.names = {key: c and c.get("name") for key, c in _by_id(data["categories"]).items()}
        first: dict[str, str] = {}  # identity of a file name -> image id
        self.repeats = {
            key
            for key, image in self.images.items()
            if image and image.get("file_name") and first.setdefault(identity(str(image["file_name"])), key) != key
        }

    def parse(self, record: Record) -> Parsed:
        key = id_key(record.get("image_id")) or ""
        entry = self.images.get(key)
        if entry is None:
            why = "stands for several images" if key in self.images else "is not in the instances file"
            raise UserError(f"its image {short(record.get('image_id'))} {why}", "unknown_image")
        if key in self.repeats:
            raise UserError(f"its image id stands for the file '{entry['file_name']}' a second time", "repeated_image")
        image = image_ref(entry, keys=("file_name",))
        if image is None:
            raise UserError("its image has no file_name in the instances file", "missing_image")
        return image, _size(entry), [self._target(number, record) for number in self._ids(record)]

    def _ids(self, record: Record) -> list[Any]:
        """Annotation ids; gRefCOCO marks an expression that matches no object by `no_target` and the id -1."""
        ids = first_of(record, ("ann_id", "ann_ids"))
        ids = ids if isinstance(ids, list) else [ids]
        real = [i for i in ids if i is not None and id_key(i) != "-1"]
        marked = flag(record.get("no_target"), "no_target")
        if marked and real:
            raise UserError("it is marked no_target but refers to annotations", "contradiction")
        if not real and not marked and [id_key(i) for i in ids] not in (["-1"], []):
            raise UserError("it refers to no annotation (ann_id)", "missing_box")
        return real

    def _target(self, number: Any, record: Record) -> Record:
        key = id_key(number) or ""
        annotation = self.annotations.get(key)
        if annotation is None:
            why = "stands for several annotations" if key in self.annotations else "is not in the instances file"
            raise UserError(f"annotation {short(number)} {why}", "unknown_annotation")
        if id_key(annotation.get("image_id")) != id_key(record.get("image_id")):
            raise UserError(f"annotation {short(number)} belongs to another image", "contradiction")
        label = self.names.get(id_key(annotation.get("category_id")) or "")
        label = clean_text(label, "its category") if label is not None else _NO_CLASS
        attributes = annotation.get("attributes")
        rotation = attributes.get("rotation") if isinstance(attributes, dict) else annotation.get("rotation")
        return _target(label, annotation.get("bbox"), annotation.get("segmentation"), rotation)


def _by_id(entries: list[Any]) -> dict[str, Record | None]:
    """Entries by id; None for an id that different entries have."""
    found: dict[str, Record | None] = {}
    for entry in entries:
        key = id_key(entry.get("id")) if isinstance(entry, dict) else None
        if key is not None and found.setdefault(key, entry) != entry:
            found[key] = None
    return found
