"""The gallery's files: what is shown of an image, the index, damaged images, and the page in a browser."""

import html
import re
import shutil
import subprocess
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from support import export_labels as made
from support.gallery_files import read_gallery

from lumen_ray import cli, export_labels
from lumen_ray.errors import UserError
from lumen_ray.inference.records import LABEL_SCHEMA
from lumen_ray.label.gallery import layout
from lumen_ray.label.gallery.cards import _small_mask
from lumen_ray.structures import Masks


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("gallery")
    folder = made.write_labels(root / "labels", photos=made.write_photos(root / "photos"))
    return folder, export_labels(folder, ["gallery"])["gallery"]


def test_every_image_has_its_labels_in_input_order(root):
    folder, summary = root
    meta, cards, entries = read_gallery(folder / "gallery")
    assert [card["i"] for card in cards] == [name for name, _ in made.IMAGES]
    assert summary["output"] == str(folder / "gallery.html") and (summary["images"], summary["missing"]) == (5, 0)
    assert summary["files"] == 1 + sum(p.is_file() for p in (folder / "gallery").rglob("*")) - 1  # page, no marker
    names = [name for name, _ in meta["classes"]]
    tasks = [task["name"] for task in meta["tasks"]]
    for (name, (height, width)), card, (failed, found) in zip(made.IMAGES, cards, entries, strict=True):
        if name == "broken.png":
            assert failed and card["e"] == ["broken_image", "no"] and not found
            continue
        rows = made.records(name, "", (height, width))
        assert card["s"] == [width, height] and card["p"] == str(folder.parent / "photos" / name) and not failed
        for number, task in enumerate(made.SETTINGS["tasks"]):
            boxed = [row for row in rows if row["task"] == task and row["box"]]
            shown = card["t"].get(str(number), [])
            assert [(names[i[0]], i[1]) for i in shown] == [(r["phrase"], 1000 * r["score"]) for r in boxed]
            assert np.abs(np.subtract([i[2:6] for i in shown], [r["box"] for r in boxed])).max(initial=0) < 0.051
            for instance, row in zip(shown, boxed, strict=True):
                key = (instance[0] + 1) * len(tasks) + number
                assert found[key] == [int(100 * row["score"])]
                if task == "segment":
                    assert instance[6] == row["mask"]["counts"]
                if task == "pose":
                    assert instance[7] == [4, 5.5, 900, 15, 6, 750, 0, 0, 125]
        assert card["x"]["4"] == [[q, f"answer {k} & more"] for k, q in enumerate(made.QUESTIONS)]
        assert found[tasks.index("caption")] == 1 and found[tasks.index("vqa")] == 2
    assert meta["edges"] == {"2": {str(names.index("square")): [[0, 2], [1, 2]]}}
    assert sorted(map(tuple, meta["counts"])) == [(0, 0, 4), (0, 1, 4), (1, 0, 4), (1, 1, 4), (2, 1, 4)]
    with Image.open(folder / "gallery" / "00000" / "0003.jpg") as turned:
        assert turned.size == (57, 33)  # upright


def test_nothing_is_fetched_from_elsewhere(root):
    folder, _ = root
    page = (folder / "gallery.html").read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert links and all(link == "data:," or (folder / link).is_file() for link in links)
    for path in (folder / "gallery").glob("*.*s"):
        assert not re.search(r"https?:|fetch\(|XMLHttp|innerHTML|\bimport\b", path.read_text())


def test_the_first_images_alone_and_all(tmp_path, monkeypatch, capsys):
    photos = made.write_photos(tmp_path / "photos")
    folder = made.write_labels(tmp_path / "labels", photos=photos)
    for name, value in (("CHUNK", 2), ("FOLDER", 4), ("INDEX_IMAGES", 4)):
        monkeypatch.setattr(layout, name, value)
    argv = ["label", "export", str(folder), "--format", "gallery", "--gallery-images"]
    assert cli.main([*argv, "4"]) == 0
    assert "gallery: 3 images" in capsys.readouterr().out
    meta, cards, _ = read_gallery(folder / "gallery")
    assert [card["i"] for card in cards] == [name for name, _ in made.IMAGES[:4]]
    assert meta["facts"]["shown here"] == "the first 4" and meta["facts"]["images"] == "6"
    assert cli.main([*argv, "all"]) == 0
    meta, cards, _ = read_gallery(folder / "gallery")
    assert len(cards) == 6 and "shown here" not in meta["facts"]
    files = sorted(p.relative_to(folder / "gallery").as_posix() for p in (folder / "gallery").rglob("0*.*"))
    assert files == [
        *("00000/00.js", "00000/0000.jpg", "00000/0001.jpg", "00000/0003.jpg", "00000/01.js"),
        *("00001/00.js", "00001/0000.jpg", "00001/0001.jpg", "index/00000.js", "index/00001.js"),
    ]
    for wrong in ("0", "-1", "some"):
        assert cli.main([*argv[:-1], f"--gallery-images={wrong}"]) == cli.EXIT_USER_ERROR
        assert "give a number of images from 1, or all" in capsys.readouterr().err
    with pytest.raises(UserError, match="gallery_images is 0; give 1 image or more"):
        export_labels(folder, ["gallery"], gallery_images=0)


def test_images_that_changed_are_shown_with_the_reason(tmp_path):
    photos = made.write_photos(tmp_path / "photos")
    folder = made.write_labels(tmp_path / "labels", photos=photos)
    (photos / "a" / "x y.png").unlink()
    (photos / "b" / "x y.png").write_bytes((photos / "b" / "x y.png").read_bytes()[:80])
    Image.new("RGB", (10, 10)).save(photos / "B" / "X Y.png")
    summary = export_labels(folder, ["gallery"])["gallery"]
    _, cards, entries = read_gallery(folder / "gallery")
    assert [failed for failed, _ in entries] == [True, True, True, False, True, False]
    assert [cards[n]["e"][0] for n in (0, 1, 4)] == ["missing_file", "broken_image", "changed_image"]
    assert "It was labelled, but the image has 10x10 pixels, 70x20 when" in cards[4]["e"][1]
    assert (summary["images"], summary["missing"]) == (2, 3)


def test_masks_of_large_images_are_sampled_at_the_thumbnails_size():
    mask = np.zeros((1, 400, 640), bool)
    mask[:, 80:240, 160:320] = True
    counts = _small_mask(Masks.from_arrays(mask).rles[0], (400, 640), (250, 400))
    small = coco_mask.decode({"size": [250, 400], "counts": counts}).astype(bool)
    wanted = np.zeros((250, 400), bool)
    wanted[50:150, 100:200] = True
    assert np.array_equal(small, wanted)


def test_most_instances_are_kept_by_score(tmp_path):
    photos = made.write_photos(tmp_path / "photos")
    base = dict.fromkeys(LABEL_SCHEMA.names) | {"task": "detect", "phrase": "a", "box": [1.0, 1.0, 5.0, 5.0]}

    def rows(image_id, path, size):
        own = {"image_id": image_id, "path": path, "height": size[0], "width": size[1]}
        return [base | own | {"score": n / 1000} for n in range(301, 701)]

    folder = made.write_labels(tmp_path / "labels", photos=photos, images=made.IMAGES[:1], rows=rows)
    export_labels(folder, ["gallery"])
    _, (card,), ((_, found),) = read_gallery(folder / "gallery")
    assert [i[1] for i in card["t"]["0"]] == list(range(700, 400, -1))
    assert sorted(found[1]) == sorted(n // 10 for n in range(301, 701))


@pytest.mark.parametrize(("number", "code"), [(0, b"\0"), (127, b"\x7f"), (128, b"\x80\x01"), (300, b"\xac\x02")])
def test_varint(number, code):
    assert layout.varint(number) == code


def test_what_stands_in_the_way_is_left_alone(tmp_path):
    folder = made.write_labels(tmp_path / "labels", photos=made.write_photos(tmp_path / "photos"))
    (folder / "gallery").mkdir()
    (folder / "gallery" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="gallery' exists and is not an export"):
        export_labels(folder, ["gallery"])
    (folder / "gallery" / "mine.txt").unlink()
    (folder / "gallery.html").mkdir()
    with pytest.raises(UserError, match=r"gallery\.html' is a folder"):
        export_labels(folder, ["gallery"])


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize(
    ("view", "shown"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"order": "lowest"}, [0, 1, 3, 4, 2, 5]),
        ({"task": "pose", "state": "empty"}, [5]),
        ({"state": "failed"}, [2]),
        ({"task": "vqa", "state": "found"}, [0, 1, 3, 4, 5]),
        ({"class": made.CLASSES[1], "from": "63"}, []),
        ({"class": made.CLASSES[1], "from": "62"}, [0, 1, 3, 4]),
        ({"to": "70", "order": "crowded"}, [0, 1, 3, 4]),
    ],
    ids=str,
)
def test_filters_and_orders_in_a_browser(root, tmp_path, view, shown):
    folder, _ = root
    dom = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom",
         "--virtual-time-budget=5000", f"file://{folder}/gallery.html#{urlencode(view)}"],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    names = [html.unescape(name) for name in re.findall(r'<div class="caption"[^>]*><b[^>]*>([^<]*)</b>', dom)]
    assert names == [made.IMAGES[n][0] for n in shown]
    number = "6 images" if len(shown) == 6 else f"{len(shown)} of 6 images"
    assert f'role="status">{number}</span>' in dom
