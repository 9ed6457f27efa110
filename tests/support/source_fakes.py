"""Small sets in each format, as {file name: bytes}, and what `prepare` makes of them."""

import io
import json

import numpy as np
from PIL import Image

from lumen_ray.data.scenes.render import encode_jpeg
from lumen_ray.data.shards import shards
from lumen_ray.data.shards.prepare import prepare_source
from lumen_ray.data.sources.coco import CocoSource
from lumen_ray.data.sources.rules import MENDS

HEIGHT, WIDTH = 40, 60


def jpeg(height=HEIGHT, width=WIDTH, orientation=1):
    """A small photo; with `orientation` it is stored `height` x `width` and carries that EXIF tag."""
    pixels = np.random.default_rng(height * width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    if orientation == 1:
        return encode_jpeg(pixels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(pixels), "JPEG", exif=exif)


def png(array, mode=None):
    return encoded(Image.fromarray(np.asarray(array, np.uint8), mode))


def encoded(image, kind="PNG", **options):
    """The bytes of an image file; `options` are those of `PIL.Image.Image.save`."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def id_png(ids):
    """A panoptic PNG: segment ids [H, W] as R + 256 G + 65536 B."""
    ids = np.asarray(ids)
    return png(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1))


def write(folder, contents):
    for name, data in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def prepared(source, output, **options):
    """(rows by image id, rejected, counts) of a set prepared without Ray; the shard folder is checked on the way."""
    prepare_source(output, source, workers=0, overwrite=True, **options)
    assert shards.verify(output) == []
    manifest = shards.read_manifest(output)
    rejected = list(shards.read_rejected(output))
    assert all(record["mend"] == MENDS[record["rule"]] for record in rejected)
    for kind, count in manifest["counts"].items():
        assert count["in"] == count["written"] + count["rejected"]
        assert count["rejected"] == sum(r["kind"] == kind for r in rejected)
    return {row["image_id"]: row for row in shards.read_rows(output)}, rejected, manifest["counts"]


def prepare_coco(output, annotations, images, **options):
    """The summary of a shard folder made from COCO json files."""
    return prepare_source(output, CocoSource([str(path) for path in annotations], str(images)), **options)


def voc_xml(name, objects, size=(HEIGHT, WIDTH), extra=""):
    """`objects`: (class, (xmin, ymin, xmax, ymax), further xml)."""
    items = "".join(
        f"<object><name>{n}</name>{more}<bndbox>"
        + "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        + "</bndbox></object>"
        for n, box, more in objects
    )
    size = f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}</filename>{size}{items}{extra}</annotation>"


def instance(name, box, mask=None, keypoints=None):
    """An entry of a row's `instances`."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    return {"phrase": name, "box": box, "mask": mask, "keypoints": keypoints, "crowd": False, "area": float(area)}


def coco_set():
    mask = [[10, 5, 30, 5, 30, 35, 10, 35]]
    rle = {"size": [HEIGHT, WIDTH], "counts": [0, 100, HEIGHT * WIDTH - 100]}
    images = [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(3)]
    annotations = [
        {"id": 1, "image_id": 0, "category_id": 1, "bbox": [10, 5, 20, 30], "segmentation": mask, "iscrowd": 0},
        {"id": 2, "image_id": 0, "category_id": 2, "bbox": [1, 2, 5, 6], "segmentation": rle, "area": 100.0,
         "keypoints": [2, 3, 2, 0, 0, 0], "iscrowd": 1},
        {"id": 3, "image_id": 1, "category_id": 2, "bbox": [3.5, 2.25, 9, 9], "keypoints": [4, 4, 1, 9, 9, 2]},
    ]  # fmt: skip
    categories = [{"id": 1, "name": "cell"},
                  {"id": 2, "name": "person", "keypoints": ["head", "foot"], "skeleton": [[1, 2]]}]  # fmt: skip
    captions = {"images": images, "annotations": [{"id": 9, "image_id": 2, "caption": "two cells"}]}
    instances = {"images": images, "annotations": annotations, "categories": categories}
    files = {f"images/{i}.jpg": jpeg() for i in range(3)}
    return files | {"instances.json": json.dumps(instances), "captions.json": json.dumps(captions)}


def panoptic_set():
    ids = np.zeros((HEIGHT, WIDTH), int)
    ids[:10], ids[10:20, :30], ids[20:30, 30:] = 7, 70000, 300
    segments = [{"id": 7, "category_id": 1, "bbox": [0, 0, 60, 10], "iscrowd": 0, "area": 600},
                {"id": 70000, "category_id": 2, "bbox": [0, 10, 30, 10], "iscrowd": 0},
                {"id": 300, "category_id": 2, "bbox": [30, 20, 30, 10], "iscrowd": 1}]  # fmt: skip
    data = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(2)],
        "annotations": [{"image_id": i, "file_name": f"{i}.png", "segments_info": segments} for i in range(2)],
        "categories": [{"id": 1, "name": "sky", "isthing": 0}, {"id": 2, "name": "cow", "isthing": 1}],
    }
    files = {"panoptic.json": json.dumps(data)}
    for i in range(2):
        files |= {f"images/{i}.jpg": jpeg(), f"segments/{i}.png": id_png(ids)}
    return files


def voc_set():
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[5:15, 5:15], labels[20:30, 20:40], labels[4, 5:15] = 1, 2, 255
    objects = [("dog", (6, 6, 15, 15), "<truncated>1</truncated>"), ("cat", (21, 21, 40, 30), "")]
    files = {f"xml/{i}.xml": voc_xml(f"{i}.jpg", objects) for i in range(3)}
    files |= {f"images/{i}.jpg": jpeg() for i in range(3)}
    return files | {"masks/0.png": png(labels), "split.txt": "0\n1 -1\n2  1\n"}


def yolo_set(kind="boxes"):
    lines = {
        "boxes": "0 0.5 0.5 0.2 0.4\n1 0.1 0.1 0.1 0.1\n",
        "segments": "0 0.1 0.1 0.5 0.1 0.5 0.6\n1 0.5 0.5 0.9 0.5 0.9 0.9 0.5 0.9\n",
        "poses": "0 0.5 0.5 0.2 0.4 0.45 0.45 2 0.5 0.6 1 0 0 0\n",
    }[kind]
    yaml = "path: .\ntrain: images/train\nnames: {0: cat, 1: dog}\nnc: 2\n"
    yaml += "kpt_shape: [3, 3]\nflip_idx: [1, 0, 2]\n" if kind == "poses" else ""
    files = {f"images/train/{i}.jpg": jpeg() for i in range(3)}
    files |= {f"labels/train/{i}.txt": lines for i in range(2)}
    return files | {"data.yaml": yaml, "labels/train/2.txt": ""}
