"""Windows of tiled TIFF files against the same files decoded by Pillow."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lumen_ray.data import windows
from lumen_ray.data.images import decode
from lumen_ray.data.windows import find_large
from lumen_ray.errors import UserError

tifffile = pytest.importorskip("tifffile")


def scene(height=300, width=421, channels=3, seed=0):
    """A smooth image with a few edges, uint8 [h, w, channels]."""
    ys, xs = np.mgrid[:height, :width]
    image = np.stack([ys % 251, xs % 241, (ys + xs) % 239, 255 - ys % 200][:channels], -1).astype(np.uint8)
    image[height // 3 : height // 2, width // 4 : width // 2] = np.array([250, 20, 30, 128][:channels])
    return image


def tiff(pixels, tile=(64, 48), **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, tile=tile, **{"photometric": "rgb", **options})
    return buffer.getvalue()


KINDS = {
    "none": {},
    "deflate": {"compression": "zlib"},
    "deflate and predictor": {"compression": "zlib", "predictor": True},
    "big": {"bigtiff": True},
    "big endian": {"byteorder": ">"},
}
CODECS = {"lzw": {"compression": "lzw"}, "zstd": {"compression": "zstd"}}


def check(data, exact=True):
    """Every window of a file is the same part of the decoded image."""
    large = find_large(data, max_pixels=100)
    whole = decode(data)
    assert large.size == whole.shape[:2]
    height, width = large.size
    with large.open() as opened:
        for window in ((0, 0, width, height), (0, 0, 1, 1), (47, 63, 49, 65), (100, 30, width, height), (5, 7, 200, 9)):
            x1, y1, x2, y2 = window
            found = opened.read(window)
            if exact:
                assert (found == whole[y1:y2, x1:x2]).all(), window
            else:
                assert np.abs(found.astype(int) - whole[y1:y2, x1:x2]).max() <= 3
    return large, whole


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_parts_of_the_decoded_image(kind):
    check(tiff(scene(), **KINDS[kind]))


@pytest.mark.parametrize("kind", CODECS)
def test_codecs_of_the_extra(kind):
    pytest.importorskip("imagecodecs")
    check(tiff(scene(), **CODECS[kind]))


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_jpeg_tiles(photometric):
    pytest.importorskip("imagecodecs")
    check(tiff(scene(), tile=(64, 64), compression="jpeg", photometric=photometric), exact=False)


def test_grey_and_transparent_pixels_are_those_of_the_decoder():
    check(tiff(scene(channels=1)[..., 0], photometric="minisblack"))
    check(tiff(scene(channels=4), extrasamples=["unassalpha"]))


def test_a_file_is_read_from_its_path(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(scene()))
    large = find_large(str(path), 100)
    assert large.source == str(path)
    with large.open() as opened:
        assert (opened.read((10, 10, 90, 80)) == scene()[10:80, 10:90]).all()


def reduced(image, block):
    """The mean of blocks, by loops."""
    height, width = (-(-side // block) for side in image.shape[:2])
    blocks = [
        [image[y * block : (y + 1) * block, x * block : (x + 1) * block].reshape(-1, 3) for x in range(width)]
        for y in range(height)
    ]
    return np.array([[np.floor(b.mean(0) + 0.5) for b in row] for row in blocks]).astype(np.uint8)


@pytest.mark.parametrize("side", [421, 300, 211, 100, 37, 1])
def test_the_overview_is_the_mean_of_blocks(side):
    with find_large(tiff(scene()), 100).open() as opened:
        picture = opened.overview(side)
    assert picture.size == (300, 421) and picture.reduction == 421 // side
    assert max(picture.pixels.shape[:2]) >= side
    assert (picture.pixels == reduced(scene(), picture.reduction)).all()


@pytest.mark.parametrize("wanted", [200, 90, 50])
def test_the_overview_is_made_of_the_pyramid(wanted):
    image = scene(300, 421)
    smaller = np.array([200, 10, 60], np.uint8)  # told by their colour
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        options = {"tile": (64, 64), "photometric": "rgb"}
        file.write(image, subifds=2, **options)
        for level, shape in ((0, (150, 211)), (1, (75, 105))):
            file.write(np.full((*shape, 3), smaller[level], np.uint8), subfiletype=1, **options)
    with find_large(buffer.getvalue(), 100).open() as opened:
        picture = opened.overview(wanted)
    level, reduction = {200: (0, 2), 90: (1, 4), 50: (1, 8)}[wanted]
    assert picture.reduction == reduction and (picture.pixels == smaller[level]).all()
    assert picture.pixels.shape[:2] == (-(-300 // reduction), -(-421 // reduction))


def test_few_decoded_tiles_are_kept(monkeypatch):
    monkeypatch.setattr(windows, "_KEPT_BYTES", 3 * 64 * 48 * 2)
    with find_large(tiff(scene()), 100).open() as opened:
        assert (opened.read((0, 0, 421, 300)) == scene()).all()
        assert len(opened._level._kept) == 2


def strips():
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, scene(), photometric="rgb")
    return buffer.getvalue()


def rotated():
    data = tiff(scene(), extratags=[(274, "H", 1, 6, True)])
    assert decode(data).shape[:2] == (421, 300)
    return data


OTHERS = {
    "strips": strips,
    "16 bits": lambda: tiff(scene().astype(np.uint16) * 257),
    "planes": lambda: tiff(scene().transpose(2, 0, 1), planarconfig="separate"),
    "palette": lambda: tiff(scene()[..., 0], photometric="palette", colormap=np.zeros((3, 256), np.uint16)),
    "associated alpha": lambda: tiff(scene(channels=4), extrasamples=["assocalpha"]),
    "white is zero": lambda: tiff(scene()[..., 0], photometric="miniswhite"),
    "rotated": rotated,
    "png": lambda: b"\x89PNG\r\n\x1a\n" + bytes(20),
    "empty": lambda: b"",
    "damaged header": lambda: tiff(scene())[:20],
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_not_read_by_window(kind):
    assert find_large(OTHERS[kind](), 100) is None


def test_small_files_and_files_that_are_gone_are_not(tmp_path):
    assert find_large(tiff(scene())) is None
    assert find_large(str(tmp_path / "none.tif"), 100) is None


def test_a_damaged_tile_is_one_sentence():
    data = bytearray(tiff(scene(), compression="zlib"))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        start = file.pages[0].dataoffsets[3]
    data[start : start + 40] = bytes(40)
    with find_large(bytes(data), 100).open() as opened:
        assert opened.read((0, 0, 40, 40)).shape == (40, 40, 3)
        with pytest.raises(UserError, match="the TIFF file cannot be read") as raised:
            opened.read((0, 0, 421, 300))
    assert raised.value.reason == "broken_image"


def test_a_file_that_is_gone_when_it_is_opened(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(scene()))
    large = find_large(str(path), 100)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"), large.open():
        pass


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(windows, "_tifffile", lambda: None)
    with pytest.raises(UserError, match=r"421x300 pixels .* install lumen-ray\[tiff\]"):
        find_large(tiff(scene()), 100)
    assert find_large(tiff(scene())) is None
    assert find_large(tiff(scene())[:20], 100) is None


def test_a_codec_that_is_missing_is_named(monkeypatch):
    def decode(*args, **options):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    with find_large(tiff(scene()), 100).open() as opened:
        page = SimpleNamespace(decode=decode, databytecounts=[0], parent=SimpleNamespace(filehandle=None))
        monkeypatch.setattr(opened._level, "_page", page)
        with pytest.raises(UserError, match=r"install lumen-ray\[tiff\]"):
            opened.read((0, 0, 8, 8))


def test_an_image_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(windows, "MOST_PIXELS", 1000)
    with pytest.raises(UserError, match="more than the 1000 that masks can count"):
        find_large(tiff(scene()), 100)


def test_pillow_reads_what_the_windows_are_compared_with():
    assert (np.asarray(Image.open(io.BytesIO(tiff(scene())))) == scene()).all()
