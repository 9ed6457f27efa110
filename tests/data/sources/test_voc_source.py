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


def sets(tmp_path, contents, **options):
    write(tmp_path, contents)
    source = VocSource(f"{tmp_path}/xml", f"{tmp_path}/images", **options)
    listing = source.read_listing()
    return *prepared(source, tmp_path / "out"), listing.notes


@pytest.mark.parametrize(("boxes", "first"), [([(0, 3, 9, 9), (5, 5, 20, 20)], 0), ([(1, 3, 9, 9), (5, 5, 20, 20)], 1)])
def test_where_pixels_are_counted_from_is_inferred_and_said(tmp_path, boxes, first):
    contents = {f"xml/{n}.xml": voc_xml(f"{n}.jpg", [("cat", box, "")]) for n, box in enumerate(boxes)}
    rows, rejected, _, notes = sets(tmp_path, contents | {f"images/{n}.jpg": jpeg() for n in range(2)})
    assert rejected == []
    for n, (x1, y1, x2, y2) in enumerate(boxes):
        assert rows[f"{n}.jpg"]["instances"][0]["box"] == [x1 - first, y1 - first, x2, y2]
    assert f"pixels are counted from {first}" in notes[0]


@pytest.mark.parametrize("one_based", [(5, 5, 5, 20), (1, 5, WIDTH, 20), (5, 1, 20, HEIGHT)])
def test_a_folder_that_counts_in_two_ways_is_refused(tmp_path, one_based):
    objects = {"0": (0, 3, 9, 9), "1": one_based}
    contents = {f"xml/{n}.xml": voc_xml(f"{n}.jpg", [("cat", box, "")]) for n, box in objects.items()}
    contents |= {f"images/{n}.jpg": jpeg() for n in objects}
    with pytest.raises(UserError, match="from 0 in '0.xml object 1', from 1 in '1.xml object 1'.*--first-pixel"):
        sets(tmp_path, contents)
    rows, _, _, notes = sets(tmp_path, contents, first_pixel=0)
    assert rows["0.jpg"]["instances"][0]["box"] == [0, 3, 9, 9] and notes == []


def test_a_stale_file_name_is_never_another_xmls_picture(tmp_path):
    contents = {f"xml/{n}.xml": voc_xml("1.jpg", [(f"class{n}", (3, 3, 9, 9), "")]) for n in range(1, 4)}
    contents |= {f"images/{n}.jpg": jpeg(HEIGHT, WIDTH + n) for n in range(1, 4)}
    contents = {k: v.replace("<size>", "<sizes>").replace("</size>", "</sizes>") if k.endswith("xml") else v
                for k, v in contents.items()}  # fmt: skip
    rows, rejected, _, _ = sets(tmp_path, contents)
    assert list(rows) == ["1.jpg"]
    assert {r["rule"] for r in rejected if r["kind"] == "images"} == {"other_image"}


def test_a_stale_file_name_of_an_equal_picture_or_of_none_does_not_matter(tmp_path):
    contents = {"xml/1.xml": voc_xml("IMG_7.JPG", [("cat", (3, 3, 9, 9), "")]), "images/1.jpg": jpeg(),
                "xml/2.xml": voc_xml("copy.jpg", [("cat", (3, 3, 9, 9), "")]), "images/2.jpg": jpeg(),
                "images/copy.jpg": jpeg()}  # fmt: skip
    rows, rejected, _, _ = sets(tmp_path, contents)
    assert (set(rows), rejected) == ({"1.jpg", "2.jpg"}, [])


def test_a_picture_belongs_to_one_xml_and_lost_classes_leave_it(tmp_path):
    contents = {"xml/1.xml": voc_xml("1.jpg", [("cat", (3, 3, 9, 9), "")]),
                "xml/again.xml": voc_xml("1.jpg", [("dog", (3, 3, 9, 9), "")]),
                "xml/2.xml": voc_xml("2.jpg", [("cat", (3, 3, 9, 9), "")]),
                "images/1.jpg": jpeg(), "images/2.jpg": jpeg()}  # fmt: skip
    rows, rejected, counts, _ = sets(tmp_path, contents)
    assert {name: row["classes"] for name, row in rows.items()} == {"1.jpg": ["cat"], "2.jpg": ["cat", "dog"]}
    assert [(r["kind"], r["origin"]) for r in rejected] == [
        ("images", "again.xml"),
        ("annotations", "again.xml object 1"),
    ]
    assert counts["images"] == {"in": 3, "written": 2, "rejected": 1}


def test_sub_folders_have_pictures_and_masks_of_their_own(tmp_path):
    labels = {name: np.zeros((HEIGHT, WIDTH), np.uint8) for name in "ab"}
    labels["a"][2:9, 2:9], labels["b"][20:30, 20:30] = 1, 1
    contents = {}
    for name in "ab":
        contents[f"xml/{name}/1.xml"] = voc_xml(
            "1.jpg", [("cat", (3, 3, 30, 30), "")], extra=f"<folder>{name}</folder>"
        )
        contents[f"images/{name}/1.jpg"] = jpeg(HEIGHT, WIDTH)
        contents[f"masks/{name}/1.png"] = png(labels[name])
    rows, rejected, _, _ = sets(tmp_path, contents, masks=f"{tmp_path}/masks")
    assert rejected == []
    for name in "ab":
        mask = Masks([rows[f"{name}/1.jpg"]["instances"][0]["mask"]], (HEIGHT, WIDTH)).to_arrays()[0]
        assert (mask == labels[name].astype(bool)).all()


def test_a_flat_mask_folder_serves_no_two_xml_files_of_one_name(tmp_path):
    contents = {"masks/1.png": png(np.ones((HEIGHT, WIDTH)))}
    for name in "ab":
        contents |= {
            f"xml/{name}/1.xml": voc_xml("1.jpg", [("cat", (3, 3, 30, 30), "")]),
            f"images/{name}/1.jpg": jpeg(),
        }
    rows, _, _, _ = sets(tmp_path, contents, masks=f"{tmp_path}/masks")
    assert [row["instances"][0]["mask"] for row in rows.values()] == [None, None]


def test_folder_tag_of_a_flat_annotation_folder(tmp_path):
    contents = {"xml/1.xml": voc_xml("1.jpg", [("cat", (3, 3, 9, 9), "")], extra="<folder>set</folder>"),
                "images/set/1.jpg": jpeg(), "images/other/1.jpg": jpeg(30, 30)}  # fmt: skip
    rows, rejected, _, _ = sets(tmp_path, contents)
    assert (list(rows), rejected) == (["set/1.jpg"], [])


def test_two_pictures_of_the_xmls_name_need_a_file_name(tmp_path):
    contents = {"images/1.jpg": jpeg(), "images/1.png": png(np.zeros((HEIGHT, WIDTH, 3))), "images/2.JPG": jpeg(),
                "xml/1.xml": voc_xml("", [("cat", (3, 3, 9, 9), "")]),
                "xml/2.xml": voc_xml("2", [("cat", (3, 3, 9, 9), "")])}  # fmt: skip
    rows, rejected, _, _ = sets(tmp_path, contents)
    assert list(rows) == ["2.JPG"] and rejected[0]["rule"] == "ambiguous_image"
    contents["xml/1.xml"] = voc_xml("1.png", [("cat", (3, 3, 9, 9), "")])
    rows, rejected, _, _ = sets(tmp_path, contents)
    assert (set(rows), rejected) == ({"1.png", "2.JPG"}, [])


@pytest.mark.parametrize("encoding", ["iso-8859-1", "utf-16", "utf-8"])
def test_xml_in_its_declared_encoding(tmp_path, encoding):
    xml = f'<?xml version="1.0" encoding="{encoding}"?>' + voc_xml("1.jpg", [("Bär", (3, 3, 9, 9), "")])
    rows, rejected, _, _ = sets(
        tmp_path, {"xml/1.xml": xml.encode(encoding), "xml/._1.xml": b"x", "images/1.jpg": jpeg()}
    )
    assert rejected == [] and rows["1.jpg"]["classes"] == ["Bär"]


TURNED = "<attributes><attribute><name>rotation</name><value>90.0</value></attribute></attributes>"
ROBNDBOX = "<robndbox><cx>25</cx><cy>20</cy><w>30</w><h>10</h><angle>1.5707963</angle></robndbox>"


@pytest.mark.parametrize("how", ["attribute", "robndbox"])
def test_turned_rectangles(tmp_path, how):
    xml = voc_xml("1.jpg", [("cat", (11, 16, 40, 25), TURNED if how == "attribute" else ROBNDBOX)])
    if how == "robndbox":
        xml = xml.replace("<bndbox><xmin>11</xmin><ymin>16</ymin><xmax>40</xmax><ymax>25</ymax></bndbox>", "")
    rows, rejected, _, _ = sets(tmp_path, {"xml/1.xml": xml, "images/1.jpg": jpeg()})
    assert rejected == []
    (found,) = rows["1.jpg"]["instances"]
    assert found["box"] == pytest.approx([20, 5, 30, 35], abs=1e-4) and found["area"] == pytest.approx(300, abs=10)


def test_flags_are_strict(tmp_path):
    objects = [("cat", (3 * n, 3, 3 * n + 9, 9), f"<difficult>{flag}</difficult>") for n, flag in
               enumerate(("0", "false", "", "1", "True", "maybe"), start=1)]  # fmt: skip
    row, rejected, _ = one(tmp_path, objects)
    assert [i["crowd"] for i in row["instances"]] == [False, False, False, True, True]
    assert "difficult must be 0, 1, true or false, got 'maybe'" in rejected[0]["reason"]


def test_an_accidental_click_proves_nothing(tmp_path):
    boxes = [(0, 0, 0, 0), (10, 10, 10, 10), (3, 3, 9, 9)]
    contents = {"images/1.jpg": jpeg(), "xml/1.xml": voc_xml("1.jpg", [("cat", box, "") for box in boxes])}
    rows, rejected, _, notes = sets(tmp_path, contents)
    assert "counted from 1" in notes[0] and rows["1.jpg"]["instances"][-1]["box"] == [2, 2, 9, 9]
    assert [r["rule"] for r in rejected] == ["empty_box"] and rows["1.jpg"]["classes"] == ["cat"]


def test_no_xml_takes_the_top_picture_of_another_folders_name(tmp_path):
    contents = {f"xml/{name}/1.xml": voc_xml("1.jpg", [("cat", (3, 3, 9, 9), "")]) for name in "ab"}
    contents |= {"images/1.jpg": jpeg(), "images/b/1.jpg": jpeg(30, 30)}
    contents = {k: v.replace("<size>", "<x>").replace("</size>", "</x>") if k.endswith("xml") else v
                for k, v in contents.items()}  # fmt: skip
    rows, rejected, _, _ = sets(tmp_path, contents)
    assert list(rows) == ["b/1.jpg"] and rejected[0]["rule"] == "missing_image"


def test_names_of_a_split_may_hold_blanks(tmp_path):
    contents = {"split.txt": "cat 1\ncat 2 -1\nbird  1\n"}
    for name in ("cat", "cat 1", "bird"):
        contents |= {f"xml/{name}.xml": voc_xml("", [("cat", (3, 3, 9, 9), "")]), f"images/{name}.jpg": jpeg()}
    write(tmp_path, contents)
    source = VocSource(f"{tmp_path}/xml", f"{tmp_path}/images", f"{tmp_path}/split.txt")
    assert set(prepared(source, tmp_path / "out")[0]) == {"cat 1.jpg", "cat.jpg", "bird.jpg"}


def test_a_box_that_is_none_is_taken_from_the_mask(tmp_path):
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[5:15, 10:20] = 1
    for box in ("nan", "x"):
        contents = {"xml/1.xml": voc_xml("1.jpg", [("cat", (box, 1, 9, 9), "")]), "images/1.jpg": jpeg(),
                    "masks/1.png": png(labels)}  # fmt: skip
        rows, rejected, _, _ = sets(tmp_path, contents, masks=f"{tmp_path}/masks")
        assert rejected == [] and rows["1.jpg"]["instances"][0]["box"] == [10, 5, 20, 15]


def test_pictures_of_other_formats_are_named(tmp_path):
    contents = {"xml/1.xml": voc_xml("1.heic", [("cat", (3, 3, 9, 9), "")]), "images/1.HEIC": b"x",
                "xml/2.xml": voc_xml("2.jpg", [("cat", (3, 3, 9, 9), "")]), "images/2.jpg": jpeg()}  # fmt: skip
    _, rejected, _, notes = sets(tmp_path, contents)
    assert rejected[0]["reason"] == "the image file '1.heic' is missing" and ".heic 1" in notes[1]


def test_xml_files_outside_the_split_may_mean_the_picture_too(tmp_path):
    contents = {"split.txt": "cam1/0001\n7\n", "images/0001.jpg": jpeg(), "images/7.jpg": jpeg()}
    for name in ("cam1/0001", "cam2/0001", "7"):
        contents[f"xml/{name}.xml"] = voc_xml("", [("cat", (3, 3, 9, 9), "")])
    write(tmp_path, contents)
    source = VocSource(f"{tmp_path}/xml", f"{tmp_path}/images", f"{tmp_path}/split.txt")
    rows, rejected, _ = prepared(source, tmp_path / "out")
    assert list(rows) == ["7.jpg"]
    assert [(r["image_id"], r["rule"]) for r in rejected if r["kind"] == "images"] == [
        ("cam1/0001.jpg", "missing_image")
    ]


def test_an_xml_without_a_picture_leaves_the_name_to_the_one_with_it(tmp_path):
    contents = {"images/0001.jpg": jpeg()}
    for name in ("cam2/0001", "0001"):
        contents[f"xml/{name}.xml"] = voc_xml("0001.jpg", [("cat", (3, 3, 9, 9), "")])
    write(tmp_path, contents)
    rows, rejected, _ = prepared(VocSource(f"{tmp_path}/xml", f"{tmp_path}/images"), tmp_path / "out")
    assert list(rows) == ["0001.jpg"] and rejected[0]["image_id"] == "cam2/0001.jpg"


@pytest.mark.parametrize(("first", "second"), [("0", "cam1/1"), ("a/0", "b/1")])
def test_a_filename_of_another_picture_is_refused(tmp_path, first, second):
    """The second xml names the picture of the first, at the top or in a sub-folder, though it has one of its own."""
    contents = {f"images/{first}.jpg": jpeg(), f"images/{second}.jpg": jpeg(90)}
    contents |= {f"xml/{name}.xml": voc_xml(f"{first}.jpg", [("cat", (3, 3, 9, 9), "")]) for name in (first, second)}
    write(tmp_path, contents)
    rows, rejected, _ = prepared(VocSource(f"{tmp_path}/xml", f"{tmp_path}/images"), tmp_path / "out")
    assert list(rows) == [f"{first}.jpg"]
    assert [r["rule"] for r in rejected if r["kind"] == "images"] == ["other_image"]


def test_a_mask_of_an_xml_that_cannot_be_read_is_no_other_ones(tmp_path):
    """`masks/0001.png` is that of cam1 or of cam2."""
    contents = {f"images/cam{n}/0001.jpg": jpeg() for n in (1, 2)}
    objects = [("dog", (6, 6, 15, 15), ""), ("cat", (21, 21, 40, 30), "")]  # as in the mask
    contents |= {"xml/cam1/0001.xml": voc_xml("", objects), "xml/cam2/0001.xml": "<annotation>"}
    contents["masks/0001.png"] = voc_set()["masks/0.png"]
    write(tmp_path, contents)
    source = VocSource(f"{tmp_path}/xml", f"{tmp_path}/images", masks=f"{tmp_path}/masks")
    rows, _, _ = prepared(source, tmp_path / "out")
    assert [i["mask"] for i in rows["cam1/0001.jpg"]["instances"]] == [None, None]
