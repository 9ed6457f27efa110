"""Pascal VOC to rows: exact boxes, difficult objects, masks, splits, frames."""

import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.source_fakes import HEIGHT, WIDTH, jpeg, png, prepared, voc_set, voc_xml, write

from lumen_ray.data.images import decode
from lumen_ray.data.sources.voc import VocSource
from lumen_ray.errors import UserError
from lumen_ray.structures import Masks


def one(tmp_path, objects, image=None, size=(HEIGHT, WIDTH), **options):
    image = jpeg() if image is None else image
    write(tmp_path, {"xml/a.xml": voc_xml("a.jpg", objects, size), "images/a.jpg": image})
    source = VocSource(f"{tmp_path}/xml", f"{tmp_path}/images", **options)
    rows, rejected, counts = prepared(source, tmp_path / "out")
    return rows["a.jpg"], rejected, counts


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 19), st.integers(1, 31), st.integers(1, 21)), min_size=1,
                max_size=5, unique=True))  # fmt: skip
def test_boxes_cover_the_pixels_that_voc_counts_from_one(boxes):
    masks = [np.zeros((HEIGHT, WIDTH), bool) for _ in boxes]
    objects = []
    for mask, (x, y, w, h) in zip(masks, boxes, strict=True):
        mask[y : y + h, x : x + w] = True
        ys, xs = np.nonzero(mask)
        objects.append(("cat", (xs.min() + 1, ys.min() + 1, xs.max() + 1, ys.max() + 1), ""))
    with tempfile.TemporaryDirectory() as folder:
        row, rejected, _ = one(Path(folder), objects)
    assert rejected == []
    assert [i["box"] for i in row["instances"]] == [[x, y, x + w, y + h] for x, y, w, h in boxes]
    assert [i["area"] for i in row["instances"]] == [mask.sum() for mask in masks]


def test_boxes_that_count_from_zero(tmp_path):
    row, _, _ = one(tmp_path, [("cat", (0, 0, 10, 12.5), "")], first_pixel=0)
    assert row["instances"][0]["box"] == [0, 0, 10, 12.5]


def test_difficult_objects_are_crowd_by_default(tmp_path):
    objects = [
        ("cat", (1, 1, 9, 9), "<difficult>1</difficult>"),
        ("cat", (11, 1, 19, 9), "<difficult>0</difficult><truncated>1</truncated><occluded>1</occluded>"),
    ]
    row, _, _ = one(tmp_path / "a", objects)
    assert [i["crowd"] for i in row["instances"]] == [True, False]
    row, _, _ = one(tmp_path / "b", objects, difficult="object")
    assert [i["crowd"] for i in row["instances"]] == [False, False]


def test_masks_classes_and_splits(tmp_path):
    write(tmp_path, voc_set())
    source = VocSource(f"{tmp_path}/xml", f"{tmp_path}/images", f"{tmp_path}/split.txt", f"{tmp_path}/masks")
    rows, rejected, counts = prepared(source, tmp_path / "out")
    assert rejected == []
    assert counts["masks"] == {"in": 1, "written": 1, "rejected": 0}
    assert rows["0.jpg"]["tasks"] == ["detect", "count", "segment"]
    assert rows["1.jpg"]["tasks"] == ["detect", "count"]
    assert rows["0.jpg"]["classes"] == ["cat", "dog"]
    masks = Masks([i["mask"] for i in rows["0.jpg"]["instances"]], (HEIGHT, WIDTH)).to_arrays()
    expected = np.zeros((2, HEIGHT, WIDTH), bool)
    expected[0, 5:15, 5:15], expected[1, 20:30, 20:40] = True, True
    assert (masks == expected).all()
    (tmp_path / "split.txt").write_text("1 -1\n9 1\n")
    rows, rejected, counts = prepared(source, tmp_path / "out")
    assert list(rows) == ["1.jpg"]
    assert [(r["image_id"], r["reason"]) for r in rejected] == [("9.xml", "the split lists it, but it has no xml file")]
    assert counts["images"] == {"in": 2, "written": 1, "rejected": 1}


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (np.full((HEIGHT, WIDTH), 3), "has an object 3, but the xml has 2 objects"),
        (np.zeros((5, 5)), "the mask image is 5x5"),
        (np.zeros((HEIGHT, WIDTH, 3)), "must have one channel"),
    ],
)
def test_bad_masks_are_rejected_and_the_boxes_stay(tmp_path, labels, reason):
    write(tmp_path, voc_set() | {"masks/0.png": png(labels)})
    source = VocSource(f"{tmp_path}/xml", f"{tmp_path}/images", masks=f"{tmp_path}/masks")
    rows, rejected, counts = prepared(source, tmp_path / "out")
    assert reason in rejected[0]["reason"]
    assert counts["masks"] == {"in": 1, "written": 0, "rejected": 1}
    assert len(rows["0.jpg"]["instances"]) == 2


def test_a_bad_object_alone_is_rejected(tmp_path):
    bad = [("cat", (50, 1, 40, 9), ""), ("", (1, 1, 9, 9), ""), ("dog", ("x", 1, 9, 9), ""), ("<b/>", (1, 1, 2, 2), "")]
    row, rejected, counts = one(tmp_path, [("cow", (1, 1, 9, 9), ""), ("a[DET]", (1, 1, 9, 9), ""), *bad])
    assert [r["origin"] for r in rejected] == [f"a.xml object {n}" for n in (2, 3, 4, 5, 6)]
    assert counts["annotations"] == {"in": 6, "written": 1, "rejected": 5}
    assert row["classes"] == []  # an object without a name could be of any class


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("declares_stored", [True, False])
def test_the_frame_follows_from_the_declared_size(tmp_path, orientation, declares_stored):
    """A white rectangle on black: wherever EXIF turns it, the box must follow."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[8:16, 8:40] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    seen = decode(buffer.getvalue())[..., 0] > 128
    ys, xs = np.nonzero(seen)
    turned = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    box, size = ((9, 9, 40, 16), (HEIGHT, WIDTH)) if declares_stored else ((turned[0] + 1, turned[1] + 1, *turned[2:]),
                                                                        (WIDTH, HEIGHT))  # fmt: skip
    row, rejected, _ = one(tmp_path, [("bar", box, "")], buffer.getvalue(), size)
    assert rejected == []
    assert (row["height"], row["width"]) == (WIDTH, HEIGHT)
    assert row["instances"][0]["box"] == turned


def test_settings_that_cannot_work_are_refused(tmp_path):
    write(tmp_path, voc_set())
    xml, images = f"{tmp_path}/xml", f"{tmp_path}/images"
    for make, message in (
        (lambda: VocSource(xml, images, difficult="drop"), "unknown difficult rule 'drop'.*crowd, object"),
        (lambda: VocSource(xml, images, first_pixel=2), "first_pixel must be 1"),
        (lambda: VocSource(xml, f"{tmp_path}/no").read_listing(), "folder .* does not exist"),
        (lambda: VocSource(images, images).read_listing(), "has no xml files"),
        (lambda: VocSource(xml, images, f"{tmp_path}/no.txt").read_listing(), "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            make()
