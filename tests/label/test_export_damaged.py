"""Images that were damaged, replaced or removed since they were labelled: exports leave them out, say so and go on."""

import hashlib
import json

import pytest
from PIL import Image
from support import export_labels as made

from lumen_ray import export_labels
from lumen_ray.label.exporters import image_files
from lumen_ray.label.exporters.registry import EXPORTERS

WITH_IMAGES = (
    "datumaro", "fiftyone", "gallery", "imagefolder", "labelme", "voc", "webdataset", "yolo-detect", "yolo-pose",
    "yolo-segment",
)  # fmt: skip


def damage(photos):
    """Leaves one image as it was labelled."""
    (photos / "a" / "x y.png").write_bytes((photos / "a" / "x y.png").read_bytes()[:2000])  # its header is whole
    (photos / "b" / "x y.png").unlink()
    turned = photos / "b" / "frame.001.jpg"  # is written again, so its pixels are read
    turned.write_bytes(turned.read_bytes()[:-400])
    Image.new("RGB", (10, 10)).save(photos / "B" / "X Y.png")


@pytest.mark.parametrize("name", EXPORTERS)
def test_damaged_and_missing_images_are_left_out_and_counted(tmp_path, name):
    photos = made.write_photos(tmp_path / "photos")
    folder = made.write_labels(tmp_path / "labels", photos=photos)
    damage(photos)
    summary = export_labels(folder, [name], output=tmp_path / "out")[name]
    if name in ("review", "duplicates"):  # the gallery of the one shows them without a picture, the other has no images
        return
    assert (summary["images"], summary["missing"]) == ((1, 4) if name in WITH_IMAGES else (5, 0))
    written = [path.name for path in (tmp_path / "out").rglob("*.*") if path.suffix in (".png", ".jpg")]
    wanted = "0005.jpg" if name == "gallery" else "nothing-ü.jpg"
    tasks = {"fiftyone": 3, "voc": 3, "yolo-detect": 3}.get(name, 1)
    if name in WITH_IMAGES and name != "webdataset":
        assert written == [wanted] * tasks


def test_damaged_images_of_a_shard(tmp_path):
    photos = made.write_photos(tmp_path / "photos")
    damage(photos)
    (photos / "b" / "x y.png").write_bytes(b"")
    folder = made.write_labels(tmp_path / "labels", shard=made.write_shard(tmp_path / "shard.parquet", photos))
    written = export_labels(folder, ["imagefolder", "voc", "webdataset"])
    assert [(found["images"], found["missing"]) for found in written.values()] == [(1, 4)] * 3
    (line,) = (folder / "imagefolder" / "metadata.jsonl").read_text().splitlines()
    assert json.loads(line)["image_id"] == "nothing-ü.jpg"


def test_an_image_with_the_labelled_bytes_is_not_decoded_again(tmp_path, monkeypatch):
    photos = made.write_photos(tmp_path / "photos")

    def rows(image_id, path, size):
        sha256 = hashlib.sha256((photos / image_id).read_bytes()).hexdigest()
        return [row | {"sha256": sha256} for row in made.records(image_id, path, size)]

    folder = made.write_labels(tmp_path / "labels", photos=photos, rows=rows)
    with Image.open(photos / "a" / "x y.png") as image:
        image.save(photos / "a" / "x y.png", dpi=(72, 72))  # other bytes, the same picture
    decoded = []
    decode = image_files.decode
    monkeypatch.setattr(image_files, "decode", lambda data: decoded.append(data) or decode(data))
    assert export_labels(folder, ["voc"])["voc"]["images"] == 5
    assert decoded == [(photos / name).read_bytes() for name in ("a/x y.png", "b/frame.001.jpg")]
