"""Jobs with tiles over images that are larger than is decoded at once."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.label_fakes import FakeEngine, encode, picture
from support.large_tiff import write_large

from lumen_ray.data import windows
from lumen_ray.data.images import Picture, decode
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.records import TIME_COLUMNS
from lumen_ray.inference.request import make_request
from lumen_ray.inference.tiles import Tiles, run_tiled
from lumen_ray.label.exporters.export import export
from lumen_ray.label.pipeline import label

tifffile = pytest.importorskip("tifffile")
TESTS = Path(__file__).resolve().parents[1]
OPTIONS = {"tasks": ["detect", "segment", "caption"], "classes": ["square"], "num_actors": 0, "exports": ()}


class WideEngine(FakeEngine):
    """Takes images as they are stored, and sees nothing in those of reduced scale."""

    largest_side = 4096

    def run(self, images, requests, **options):
        shown = [i.pixels * (i.reduction == 1) if isinstance(i, Picture) else i for i in images]
        return super().run(shown, requests, **options)


def rows(output):
    found = [row for path in sorted((output / "labels").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return [{name: value for name, value in row.items() if name not in (*TIME_COLUMNS, "path")} for row in found]


def photos(folder):
    """A tiled TIFF among others, a Parquet table with one, and a damaged one."""
    folder.mkdir()
    write_large(folder / "a.tif", 700, tile=64, size=40, number=3)
    (folder / "b.png").write_bytes(encode(picture(1)))
    image = Image.fromarray(np.asarray(Image.open(folder / "a.tif")).transpose(1, 0, 2)[::-1])
    image.save(folder / "c.tiff")  # in strips
    data = bytearray((folder / "a.tif").read_bytes())
    with tifffile.TiffFile(folder / "a.tif") as file:
        start = file.pages[0].dataoffsets[40]
    data[start : start + 30] = bytes(30)
    (folder / "d.tif").write_bytes(data)
    return folder


def test_labels_by_window_are_those_of_decoded_images(tmp_path, monkeypatch):
    source = photos(tmp_path / "in")
    tiles = Tiles(256, 0.25)
    whole = label(WideEngine, source, tmp_path / "whole", tiles=tiles, **OPTIONS)
    opened = []
    read = windows.TiffWindows.read

    def counted(self, window):
        opened.append(window)
        return read(self, window)

    with monkeypatch.context() as patched:
        patched.setattr(windows.TiffWindows, "read", counted)
        patched.setattr(windows.find_large, "__defaults__", (100_000,))
        parts = label(WideEngine, source, tmp_path / "parts", tiles=tiles, **OPTIONS)
    assert len(opened) >= len(tiles.windows((700, 700)))
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert parts["labelled"] == whole["labelled"] == 3 and parts["reasons"] == whole["reasons"] == {"broken_image": 1}
    assert parts["instances"]["detect"] >= 5


def test_images_in_tables_are_read_by_window_too(tmp_path, monkeypatch):
    import pyarrow as pa

    source = photos(tmp_path / "in")
    data = [(source / name).read_bytes() for name in ("a.tif", "b.png")]
    pq.write_table(pa.table({"id": ["a", "b"], "image": data}), tmp_path / "in.parquet")
    label(WideEngine, tmp_path / "in.parquet", tmp_path / "whole", tiles=Tiles(256), **OPTIONS)
    monkeypatch.setattr(windows.find_large, "__defaults__", (100_000,))
    monkeypatch.setattr("lumen_ray.label.reading.decode_reduced", only_small)
    label(WideEngine, tmp_path / "in.parquet", tmp_path / "parts", tiles=Tiles(256), **OPTIONS)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def only_small(data, side):
    pixels = decode(data)
    assert pixels.size < 100_000
    return Picture(pixels, pixels.shape[:2])


class InMemory:
    """The windows of a decoded image, reduced at once."""

    def __init__(self, pixels):
        self.pixels, self.size = pixels, pixels.shape[:2]

    def read(self, window):
        x1, y1, x2, y2 = window
        return np.ascontiguousarray(self.pixels[y1:y2, x1:x2])

    def overview(self, min_side):
        block = max(self.size) // min_side
        height, width = (-(-side // block) for side in self.size)
        out = np.zeros((height, width, 3), np.uint8)
        for y in range(height):
            for x in range(width):
                part = self.pixels[y * block : (y + 1) * block, x * block : (x + 1) * block].reshape(-1, 3)
                out[y, x] = np.floor(part.mean(0) + 0.5)
        return Picture(out, self.size, block)


def test_the_bundled_weights_find_the_same_by_window(tmp_path):
    from lumen_ray.data.scenes.render import render

    scenes = [render(0, n, 128) for n in range(9)]
    image = np.concatenate([np.concatenate([s.image for s in scenes[n : n + 3]], 1) for n in (0, 3, 6)])[:380, :371]
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, image, tile=(64, 80), photometric="rgb", compression="zlib")
    engine = Engine.load("nano")
    requests = [make_request("segment", classes=list(engine.classes)), make_request("caption")]
    expected = run_tiled(engine, InMemory(image), requests, Tiles(128), score_threshold=0.3)
    with windows.find_large(buffer.getvalue(), 1000).open() as opened:
        found = run_tiled(engine, opened, requests, Tiles(128), score_threshold=0.3)
    assert [answer.to_dict() for answer in found] == [answer.to_dict() for answer in expected]
    assert sum(len(p) for p in found[0].predictions) >= 5


_JOB = """
import resource, sys
from support.label_fakes import FakeEngine
from test_label_large import OPTIONS, WideEngine, rows
from lumen_ray.inference.tiles import Tiles
from lumen_ray.label.exporters.export import export
from lumen_ray.label.pipeline import label

class SmallEngine(WideEngine):
    largest_side = 256

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

before = peak()
summary = label(SmallEngine, sys.argv[1], sys.argv[2], tiles=Tiles(4096, 0.1), batch_size=1,
                **{**OPTIONS, "tasks": ["detect"]})
assert summary["errors"] == 0, summary
print(peak() - before)
"""


def test_a_slide_of_1_2_gigabytes_is_never_in_memory(tmp_path):
    boxes = write_large(tmp_path / "slide.tif", 20_000, tile=1024)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS / "label", TESTS.parent)))}
    command = [sys.executable, "-c", _JOB, tmp_path / "slide.tif", tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 400e6  # of 1.2e9 for the pixels
    found = sorted(row["box"] for row in rows(tmp_path / "out"))
    assert found == [list(box) for box in sorted(boxes)]


def test_exports_link_files_that_no_reader_decodes_at_once(tmp_path, monkeypatch):
    source = tmp_path / "in"
    source.mkdir()
    write_large(source / "a.tif", 700, tile=64, size=40, number=3)
    monkeypatch.setattr(windows.find_large, "__defaults__", (100_000,))
    label(WideEngine, source, tmp_path / "out", tiles=Tiles(256), **OPTIONS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    export(tmp_path / "out", ["voc", "coco"])
    linked = list((tmp_path / "out" / "voc").rglob("*.tif"))
    assert linked and {file.stat().st_ino for file in linked} == {(source / "a.tif").stat().st_ino}


def test_the_gallery_reads_large_files_by_window(tmp_path, monkeypatch):
    """A local file, one in a table, and a damaged one; none is decoded or read whole."""
    source = tmp_path / "in"
    source.mkdir()
    write_large(source / "a.tif", 1700, tile=64, size=200, number=3)
    shutil.copy(source / "a.tif", source / "b.tif")
    monkeypatch.setattr(windows.find_large, "__defaults__", (100_000,))
    label(WideEngine, source, tmp_path / "out", tiles=Tiles(400), **OPTIONS)
    (source / "b.tif").write_bytes((source / "b.tif").read_bytes()[:5000])
    monkeypatch.setattr("lumen_ray.label.gallery.cards.decode_reduced", None)
    monkeypatch.setattr("lumen_ray.label.inputs.Reader.read", lambda self, item: pytest.fail("read whole"))
    found = export(tmp_path / "out", ["gallery"])["gallery"]
    assert (found["images"], found["missing"]) == (1, 1)
    gallery = tmp_path / "out" / "gallery"
    thumbnail = np.asarray(Image.open(next(gallery.rglob("*.jpg"))))
    assert max(thumbnail.shape) == 400 and thumbnail[75, 75].min() > 200 > 60 > thumbnail[40, 200].max()


def test_copies_of_a_large_file_are_not_looked_at(tmp_path, monkeypatch):
    """In one fragment, and in a later run."""
    source, looks = tmp_path / "in", []
    source.mkdir()
    write_large(source / "a.tif", 700, tile=64, size=40, number=3)
    shutil.copy(source / "a.tif", source / "b.tif")
    read = windows.TiffWindows.read
    monkeypatch.setattr(windows.TiffWindows, "read", lambda self, window: looks.append(window) or read(self, window))
    monkeypatch.setattr(windows.find_large, "__defaults__", (100_000,))
    tiles = Tiles(256, 0.25)
    summary = label(WideEngine, source, tmp_path / "out", tiles=tiles, dedup=True, **OPTIONS)
    assert (summary["labelled"], summary["copied"]) == (2, 1) and len(looks) == len(tiles.windows((700, 700)))
    shutil.copy(source / "a.tif", source / "c.tif")
    again = label(WideEngine, source, tmp_path / "out", tiles=tiles, dedup=True, refresh=True, **OPTIONS)
    assert (again["labelled"], again["copied"]) == (3, 2) and len(looks) == len(tiles.windows((700, 700)))
