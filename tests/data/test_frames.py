"""Annotations follow the pixels where EXIF turns them."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.source_fakes import instance

from lumen_ray.data.frames import AnnotationFrame, read_frame
from lumen_ray.data.images import decode, decode_labels, orientation
from lumen_ray.data.sources import coco
from lumen_ray.data.sources.coco_json import CocoImage
from lumen_ray.errors import UserError
from lumen_ray.structures import Masks

HEIGHT, WIDTH = 12, 20


def encode(pixels, tag, kind="PNG"):
    exif = Image.Exif()
    exif[0x0112] = tag
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, exif=exif)
    return buffer.getvalue()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([5, 6, 7, 8]), st.integers(0, 18), st.integers(0, 10), st.integers(1, 20), st.integers(1, 12))
def test_box_mask_and_keypoint_stay_on_their_pixels(tag, x, y, w, h):
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[y : y + h, x : x + w, 0] = 255
    pixels[y, x, 1] = 255
    image = encode(pixels, tag)
    frame = read_frame(image, [[HEIGHT, WIDTH], [0, 0]])
    assert frame == AnnotationFrame((HEIGHT, WIDTH), (WIDTH, HEIGHT), tag)
    mask = Masks.from_arrays(pixels[None, ..., 0] > 0).rles[0]
    box = [x, y, min(x + w, WIDTH), min(y + h, HEIGHT)]
    moved = frame.rotated(instance("a", box, mask=mask, keypoints=[x + 0.5, y + 0.5, 2.0, 0.0, 0.0, 0.0]))
    seen = decode(image)
    assert (Masks([moved["mask"]], (WIDTH, HEIGHT)).to_arrays()[0] == (seen[..., 0] > 0)).all()
    ys, xs = np.nonzero(seen[..., 0])
    assert moved["box"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    ((row, column),) = np.argwhere(seen[..., 1] > 0)
    assert moved["keypoints"] == [column + 0.5, row + 0.5, 2, 0, 0, 0]


@pytest.mark.parametrize("tag", range(1, 9))
def test_rotated_sizes_leave_annotations_alone(tag):
    image = encode(np.zeros((HEIGHT, WIDTH, 3), np.uint8), tag)
    size = decode(image).shape[:2]
    half = tag in (2, 3, 4)  # turned by 180 degrees or mirrored: both frames have this size
    for declared, assumed in (([], False), ([[0, 0]], tag > 1), ([list(size)], half)):
        assert read_frame(image, declared) == AnnotationFrame(size, size, assumed=assumed)
    found = instance("a", [1, 2, 3, 4])
    assert AnnotationFrame(size, size).rotated(found) is found
    assert orientation(image) == tag


def test_a_tiff_is_rotated_by_its_reader():
    image = encode(np.zeros((HEIGHT, WIDTH, 3), np.uint8), 6, "TIFF")
    assert orientation(image) == 1
    with pytest.raises(UserError, match="size mismatch"):
        read_frame(image, [[HEIGHT, WIDTH]])


@pytest.mark.parametrize(
    ("tag", "declared"),
    [(6, [[HEIGHT, WIDTH], [WIDTH, HEIGHT]]), (6, [[HEIGHT + 1, WIDTH]]), (1, [[WIDTH, HEIGHT]]), (3, [["x", 3]])],
)
def test_sizes_that_fit_neither_frame_are_refused(tag, declared):
    with pytest.raises(UserError, match="size mismatch") as error:
        read_frame(encode(np.zeros((HEIGHT, WIDTH, 3), np.uint8), tag), declared)
    assert error.value.reason == "size_mismatch"


def test_coco_for_stored_pixels_is_turned():
    image = encode(np.zeros((HEIGHT, WIDTH, 3), np.uint8), 6)
    entry = {"name": "cat", "origin": "x", "bbox": [2, 1, 10, 4], "segmentation": [[2, 1, 12, 1, 12, 5, 2, 5]]}
    for sizes, expected in (([[HEIGHT, WIDTH]], [7, 2, 11, 12]), ([[WIDTH, HEIGHT]], [2, 1, 12, 5])):
        outcome = coco.to_row(CocoImage("a.png", "x", sizes=sizes, annotations=[entry]), image, {}, ["cat"], "coco")
        (found,) = outcome.row["instances"]
        assert found["box"] == expected
        assert (outcome.row["height"], outcome.row["width"]) == (WIDTH, HEIGHT)
        assert found["mask"]["size"] == [WIDTH, HEIGHT]
        assert found["area"] == 40


def test_label_images_keep_their_values():
    labels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    for mode in ("L", "P"):
        image = Image.fromarray(labels)
        if mode == "P":
            image = Image.frombytes("P", (WIDTH, HEIGHT), labels.tobytes())
            image.putpalette(list(range(256)) * 3)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        assert (decode_labels(buffer.getvalue()) == labels).all()
    for broken in (b"", b"no image", buffer.getvalue()[:60], encode(np.zeros((4, 4, 3), np.uint8), 1)):
        with pytest.raises(UserError) as error:
            decode_labels(broken)
        assert error.value.reason == "broken_image"
