"""Decoding: the odd files that users have, rotated frames, and damage."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from lumen_ray.data import images
from lumen_ray.data.images import decode, decode_reduced, image_size
from lumen_ray.errors import UserError

#: readable in their first frame, although reading all frames fails
FIRST_FRAME_IS_FINE = {"pillow__hopper.psd"}
#: Pillow refuses these on the first `load()` and only gives what it has on a second: a third of the one is black, and
#: the other ends inside a chunk
DAMAGED = {"pillow__broken_data_stream.png", "pillow__truncated_end_chunk.png"}


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(height=12, width=20):
    """uint8 [height, width, 3] in which every pixel differs."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 10, y * 15, x + y * 3], -1).astype(np.uint8)


def test_every_odd_file_reads_as_expected_or_gives_a_reason(test_data):
    folder = test_data / "odd_images"
    entries = json.loads((folder / "expected.json").read_text())["files"]
    assert len(entries) > 60
    for entry in entries:
        data = (folder / "files" / entry["file"]).read_bytes()
        if ("error" in entry and entry["file"] not in FIRST_FRAME_IS_FINE) or entry["file"] in DAMAGED:
            with pytest.raises(UserError) as error:
                decode(data)
            assert error.value.reason == "broken_image"
            assert "\n" not in str(error.value)
            continue
        width, height = entry["size"]
        if entry.get("exif_orientation") in (5, 6, 7, 8):
            width, height = height, width
        image = decode(data)
        assert image.dtype == np.uint8
        assert image.shape == (height, width, 3), entry["file"]
        assert image_size(data) == (height, width), entry["file"]


def test_rotated_photos_show_the_same_scene(test_data):
    small = {}
    for path in sorted((test_data / "odd_images" / "files").glob("exif__Landscape_[1-8].jpg")):
        image = Image.fromarray(decode(path.read_bytes())).resize((60, 40))
        small[path.stem] = np.asarray(image, float)
    assert len(small) == 7
    for name, image in small.items():
        assert np.abs(image - small["exif__Landscape_1"]).mean() < 12, name


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_once(kind, orientation):
    stored = Image.fromarray(picture())
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(stored, kind, exif=exif, **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(decode(data), expected)
    assert image_size(data) == expected.shape[:2]
    assert (expected.shape[:2] == (20, 12)) == (orientation >= 5)


@pytest.mark.parametrize("orientation", [0, 9, 200])
def test_senseless_orientation_is_ignored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode(encode(Image.fromarray(picture()), exif=exif)), picture())


def test_sixteen_bits_are_scaled():
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    assert decode(encode(Image.fromarray(values)))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert decode(encode(Image.fromarray(values), "TIFF"))[0, :, 2].tolist() == [0, 1, 128, 255]


def test_float_and_wide_integers_use_the_range_of_their_values():
    values = np.array([[-1.0, 0.0, 1.0]], np.float32)
    assert decode(encode(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 128, 255]
    wide = np.array([[0, 500_000, 1_000_000]], np.int32)
    assert decode(encode(Image.fromarray(wide), "TIFF"))[0, :, 0].tolist() == [0, 128, 255]
    assert decode(encode(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF")).max() == 0


def test_transparency_is_composited_on_white():
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], np.uint8)
    assert decode(encode(Image.fromarray(rgba)))[0].tolist() == [[255, 0, 0], [255, 255, 255], [127, 127, 127]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    assert decode(encode(palette, transparency=0))[0].tolist() == [[255, 255, 255], [10, 20, 30]]


def test_grey_bilevel_and_cmyk_become_rgb():
    assert decode(encode(Image.new("L", (3, 2), 77))).tolist() == [[[77] * 3] * 3] * 2
    assert decode(encode(Image.new("1", (3, 2), 1))).min() == 255
    cyan = decode(encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF"))[0, 0]
    assert cyan[0] < 10
    assert cyan[2] > 200


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data)[0, 0].tolist() == [255, 0, 0]


def test_size_limit_is_checked_before_decoding():
    data = encode(Image.new("L", (300, 200)))
    assert image_size(data, max_pixels=60_000) == (200, 300)
    for read in (decode, image_size):
        with pytest.raises(UserError, match="300x200 pixels, more than the limit of 59999") as error:
            read(data, max_pixels=59_999)
        assert error.value.reason == "broken_image"


def test_size_needs_no_pixels():
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))
    assert image_size(data[:500]) == (64, 64)
    with pytest.raises(UserError, match="truncated"):
        decode(data[:500])


@pytest.mark.parametrize("data", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\xff\xd8\xff"])
def test_bytes_that_are_not_an_image_are_rejected(data):
    for read in (decode, image_size):
        with pytest.raises(UserError) as error:
            read(data)
        assert error.value.reason == "broken_image"


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]), data=st.data())
def test_damaged_bytes_never_raise_anything_else(kind, data):
    encoded = bytearray(encode(Image.fromarray(picture()), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(encoded[: data.draw(st.integers(0, len(encoded)))])
    try:
        image = decode(damaged, max_pixels=1_000_000)
    except UserError as error:
        assert error.reason == "broken_image"
    else:
        assert image.dtype == np.uint8
        assert image.shape[2] == 3


@pytest.fixture(params=["simplejpeg", "pillow"])
def jpeg_library(request, monkeypatch):
    """Once with the faster library, once as where it is not installed."""
    if request.param == "pillow":
        monkeypatch.setattr(images, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")


def read_or_none(data, min_side):
    try:
        return decode_reduced(data, min_side)
    except UserError as error:
        assert error.reason == "broken_image"
        return None


def scene(height, width):
    """A picture with smooth places and edges, as photographs have."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 17) * np.cos(y / 23), np.cos(x / 31), np.sin(y / 13)], -1) * 60 + 128
    waves[height // 4 : height // 2, width // 3 : width // 2] = (230, 40, 60)
    return waves.astype(np.uint8)


@pytest.mark.parametrize(
    ("min_side", "reduction"), [(None, 1), (641, 1), (321, 1), (320, 2), (160, 4), (60, 8), (1, 8)]
)
@pytest.mark.usefixtures("jpeg_library")
def test_a_jpeg_is_decoded_no_smaller_than_needed(min_side, reduction):
    data = encode(Image.fromarray(scene(478, 640)), "JPEG")
    picture = decode_reduced(data, min_side)
    assert picture.reduction == reduction
    assert picture.size == (478, 640)
    assert picture.pixels.shape == (-(-478 // reduction), 640 // reduction, 3)
    assert picture.pixels.flags.writeable


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), min_side=st.integers(1, 90), grey=st.booleans())
def test_both_libraries_give_the_same_pixels(height, width, min_side, grey):
    pytest.importorskip("simplejpeg")
    image = Image.fromarray(scene(height, width))
    data = encode(image.convert("L") if grey else image, "JPEG", subsampling=2, quality=90)
    fast = decode_reduced(data, min_side)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "simplejpeg", None)
        slow = decode_reduced(data, min_side)
    assert (fast.size, fast.reduction) == (slow.size, slow.reduction)
    assert np.array_equal(fast.pixels, slow.pixels)
    assert max(fast.pixels.shape) >= min(min_side, max(height, width))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(96, 160), (97, 161)])
@pytest.mark.usefixtures("jpeg_library")
def test_a_reduced_photo_lies_where_the_whole_one_does(orientation, size):
    """A bright rectangle is found at the same place, to a fraction of a reduced pixel, in any rotation."""
    stored = np.zeros((*size, 3), np.uint8)
    stored[16:56, 24:104] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(stored), "JPEG", exif=exif, quality=95)
    whole, small = decode(data), decode_reduced(data, 40)
    assert small.size == whole.shape[:2]
    rotated = orientation > 1
    assert small.reduction == (1 if rotated and size == (97, 161) else 4)  # mirrored, 161 / 4 columns would be shifted
    centres = [np.array([(w * (np.arange(len(w)) + 0.5)).sum() / w.sum() for w in (p.sum((0, 2)), p.sum((1, 2)))])
               for p in (whole.astype(float), small.pixels.astype(float))]  # fmt: skip
    np.testing.assert_allclose(centres[1] * small.reduction, centres[0], atol=0.3)


@pytest.mark.parametrize("name", ["bccd", "coco_photos"])
@pytest.mark.usefixtures("jpeg_library")
def test_reduced_photos_look_like_shrunk_ones(test_data, name):
    paths = sorted((test_data / name / "images").glob("*.jpg"))[:12]
    assert len(paths) == 12
    for path in paths:
        data = path.read_bytes()
        small = decode_reduced(data, 128)
        assert small.reduction >= 2
        whole = Image.fromarray(decode(data))
        height, width = (side // small.reduction for side in small.size)
        box = (0, 0, width * small.reduction, height * small.reduction)
        shrunk = whole.resize((width, height), Image.Resampling.BOX, box=box)
        apart = np.abs(small.pixels[:height, :width].astype(float) - np.asarray(shrunk, float))
        assert apart.mean() < 2.5, path.name
        assert np.quantile(apart, 0.99) < 20, path.name


@settings(max_examples=200, deadline=None)
@given(data=st.data(), progressive=st.booleans(), min_side=st.sampled_from([1, 8, 40]))
def test_damage_is_caught_the_same_in_reduced_photos(data, progressive, min_side):
    """Files that Pillow rejects are rejected and those it reads are read, whichever library decodes."""
    encoded = bytearray(encode(Image.fromarray(scene(48, 64)), "JPEG", progressive=progressive, restart_marker_rows=1))
    for _ in range(data.draw(st.integers(0, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(encoded[: data.draw(st.integers(len(encoded) // 2, len(encoded)))])
    fast = [read_or_none(damaged, side) for side in (None, min_side)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "simplejpeg", None)
        slow = [read_or_none(damaged, side) for side in (None, min_side)]
    for one, other in zip(fast, slow, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one.size, one.pixels.shape) == (other.size, other.pixels.shape)
            assert np.array_equal(one.pixels, other.pixels)
    assert (fast[0] is None) == (fast[1] is None)


def test_a_damaged_file_prints_nothing():
    """Pillow's own warnings name a file of Pillow instead of the image."""
    code = """
from lumen_ray.data.images import decode
from lumen_ray.errors import UserError

for end in (8, 12):
    try:
        decode(b"II*\\0\\x08\\0\\0\\0\\x09\\0\\0\\1"[:end])
    except UserError as error:
        print(error.reason)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["broken_image"] * 2 and done.stderr == ""
