"""A small labelled folder made by hand: five tasks, awkward masks, names and sizes, and an image that failed."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lumen_ray.inference.records import LABEL_SCHEMA
from lumen_ray.label.inputs import Item
from lumen_ray.label.ledger import Ledger
from lumen_ray.structures import Masks
from support.label_fakes import FakeListing

CLASSES = ("square", "red & <big> circle")
KEYPOINTS = ("left end", "right end", "centre")
QUESTIONS = ("how many ?", "is 1 < 2 ?")
#: (id, (height, width)), input order; "broken.png" could not be labelled
IMAGES = (
    ("a/x y.png", (48, 64)),
    ("b/x y.png", (64, 40)),
    ("broken.png", (8, 8)),
    ("b/frame.001.jpg", (33, 57)),
    ("B/X Y.png", (20, 70)),
    ("nothing-ü.jpg", (41, 41)),
)
LABELLED = tuple(image for image in IMAGES if image[0] != "broken.png")
SETTINGS = {"tasks": ["detect", "segment", "pose", "caption", "vqa"], "classes": list(CLASSES), "score_threshold": 0.3}


def masks(size):
    """A ring with a hole, and an object of two parts; bool [2, H, W]."""
    height, width = size
    found = np.zeros((2, height, width), bool)
    found[0, 2:16, 3:17] = True
    found[0, 6:10, 8:13] = False
    found[1, 4:12, 20:27] = True
    found[1, 14:18, 24:width] = True  # to the edge of the image
    return found


def records(image_id, path, size):
    """The rows of one image; none of its questions about objects finds one in the last image."""
    base = dict.fromkeys(LABEL_SCHEMA.names) | {"image_id": image_id, "path": path}
    base |= {"sha256": hashlib.sha256(image_id.encode()).hexdigest()}
    base |= {"height": size[0], "width": size[1], "provenance": json.dumps({"edges": {CLASSES[0]: [[0, 2], [1, 2]]}})}
    rows = []
    if image_id.startswith("nothing"):
        rows += [base | {"task": task} for task in ("detect", "segment", "pose")]
    else:
        found = masks(size)
        rles = Masks.from_arrays(found).rles
        for k, (mask, rle) in enumerate(zip(found, rles, strict=True)):
            ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = [float(v) for v in (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1)]
            one = base | {"phrase": CLASSES[k], "score": 0.875 - k / 4}
            shifted = [box[0] + 0.25, box[1] + 0.5, box[2] - 0.25, box[3]]
            rows.append(one | {"task": "detect", "box": shifted})
            rows.append(one | {"task": "segment", "box": box, "mask": rle})
        box = [3.0, 2.0, 17.0, 16.0]
        points = [4.0, 5.5, 0.9, 15.0, 6.0, 0.75, 0.0, 0.0, 0.125]
        pose = {"task": "pose", "box": box, "keypoints": points, "keypoint_names": list(KEYPOINTS)}
        rows.append(base | pose | {"phrase": CLASSES[0], "score": 0.625})
    rows.append(base | {"task": "caption", "text": f'"a" <caption>,\n of {image_id}'})
    rows += [base | {"task": "vqa", "prompt": q, "text": f"answer {k} & more"} for k, q in enumerate(QUESTIONS)]
    return sorted(rows, key=lambda row: SETTINGS["tasks"].index(row["task"]))


def records_without_hashes(image_id, path, size):
    """The rows of one image, as of labels from before images had hashes."""
    return [row | {"sha256": None} for row in records(image_id, path, size)]


def pixels(index, size):
    """A noise image, uint8 [H, W, 3]."""
    return np.random.default_rng(index).integers(0, 255, (*size, 3), dtype=np.uint8)


def write_photos(folder, images=IMAGES):
    """The image files; ``b/frame.001.jpg`` is stored turned, with an EXIF orientation that makes it upright."""
    for index, (name, size) in enumerate(images):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels(index, size))
        if name == "b/frame.001.jpg":
            exif = Image.Exif()
            exif[0x0112] = 6  # to be turned clockwise by 90 degrees
            image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
        else:
            image.save(path)
    (folder / "broken.png").write_bytes(b"")
    return folder


def write_shard(path, photos):
    """A shard file with all images but the broken one, two per row group."""
    names = [name for name, _ in IMAGES if name != "broken.png"]
    table = pa.table(
        {
            "image_id": names,
            "image": [(photos / name).read_bytes() for name in names],
            "height": [size[0] for name, size in IMAGES if name != "broken.png"],
        }
    )
    pq.write_table(table, path, row_group_size=2)
    return path


def write_labels(folder, *, photos=None, shard=None, rows=records, images=IMAGES, settings=SETTINGS):
    """A finished label folder over image files or a shard, in fragments of two images."""
    ledger = Ledger(folder)
    ledger.open(settings | {"input": str(photos or shard)})
    items = []
    for index, (name, _) in enumerate(images):
        if shard is None:
            items.append(Item(name, f"{photos}/{name}"))
        elif name != "broken.png":
            place = [n for n, _ in images if n != "broken.png"].index(images[index][0])
            items.append(Item(name, str(shard), place // 2, place % 2))
    sizes = dict(images)
    for fragment in ledger.plan(2).fragments(FakeListing(items)):
        found, errors = [], []
        for item in fragment.items:
            if item.image_id == "broken.png":
                errors.append({"image_id": item.image_id, "path": item.path, "reason": "broken_image", "message": "no"})
            else:
                found += rows(item.image_id, item.path, sizes[item.image_id])
        ledger.publish(fragment.index, len(fragment.items), found, errors)
    return folder


def write_sparse_labels(root, answers, tasks):
    """A finished label folder and its photos below `root`; image k has instances of the tasks in ``answers[k]``."""
    images = [(f"{k}.png", (48, 64)) for k in range(len(answers))]
    empty = dict.fromkeys(("box", "mask", "keypoints", "keypoint_names", "phrase", "score"))

    def rows(image_id, path, size):
        found = answers[int(image_id.removesuffix(".png"))]
        rows = records_without_hashes(image_id, path, size)
        return [row if row["task"] in found else row | empty for row in rows if row["task"] in tasks]

    return write_labels(root / "labels", photos=write_photos(root / "photos", images), images=images, rows=rows)
