"""Every format, written from labels made by hand, read back with plain JSON, XML, YAML and pycocotools."""

import csv
import io
import json
import os
import tarfile
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from support import export_labels as made

from lumen_ray import export_labels
from lumen_ray.label.exporters.image_files import write_picture
from lumen_ray.label.exporters.labels import open_labels
from lumen_ray.label.exporters.registry import EXPORTERS

STEMS = {
    "a/x y.png": "a_x_y", "b/x y.png": "b_x_y", "b/frame.001.jpg": "b_frame_001", "B/X Y.png": "B_X_Y_2",
    "nothing-ü.jpg": "nothing-ü",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with photos, labels of the files and labels of a shard of them, each exported in all formats."""
    root = tmp_path_factory.mktemp("exports")
    photos = made.write_photos(root / "photos")
    shard = made.write_shard(root / "shard.parquet", photos)
    for name, source in (("files", {"photos": photos}), ("shard", {"shard": shard})):
        export_labels(made.write_labels(root / name, **source), list(EXPORTERS))
    return root


@pytest.fixture(params=["files", "shard"])
def exported(root, request):
    return root / request.param


def rows(image_id, task):
    size = dict(made.IMAGES)[image_id]
    return [r for r in made.records(image_id, "", size) if r["task"] == task and (r["box"] or r["text"])]


def boxes(image_id, task):
    return [row["box"] for row in rows(image_id, task)]


def to_xyxy(xywh):
    x, y, w, h = xywh
    return [x, y, x + w, y + h]


def upright(path_or_file):
    """The size (height, width) of an image file for a reader that knows no EXIF."""
    with Image.open(path_or_file) as image:
        assert image.getexif().get(0x0112, 1) == 1
        return image.size[::-1]


def test_all_images_but_the_broken_one_are_in_input_order(exported):
    labels = open_labels(exported)
    assert [image.image_id for image in labels.images()] == [name for name, _ in made.LABELLED]
    assert [image.number for image in labels.images()] == [1, 2, 3, 4, 5]
    assert {image.image_id: image.name for image, _ in labels.pictures()} == STEMS and labels.missing == 0
    assert labels.tasks == tuple(made.SETTINGS["tasks"]) and labels.prompts["vqa"] == list(made.QUESTIONS)
    assert labels.categories["pose"]["square"].edges == [(0, 2), (1, 2)]


@pytest.mark.parametrize("task", ["detect", "segment", "pose"])
def test_coco(exported, task):
    data = COCO(exported / "coco" / f"{task}.json")
    assert [c["name"] for c in data.dataset["categories"]] == list(made.CLASSES)
    for number, (image_id, size) in enumerate(made.LABELLED, start=1):
        image = data.imgs[number]
        assert (image["file_name"], image["height"], image["width"]) == (image_id, *size)
        found = data.loadAnns(data.getAnnIds(number))
        assert [to_xyxy(a["bbox"]) for a in found] == boxes(image_id, task)
        if task == "segment" and found:
            assert np.array_equal([data.annToMask(a) for a in found], made.masks(size))
        for a, row in zip(found, rows(image_id, task), strict=True):
            assert a["score"] == row["score"] and a["iscrowd"] == 0
            if task == "pose":
                assert a["keypoints"] == [4, 5.5, 2, 15, 6, 2, 0, 0, 0] and a["num_keypoints"] == 2


@pytest.mark.parametrize("task", ["detect", "segment", "pose", "captions"])
def test_coco_results_fit_the_coco_file(exported, task):
    truth = COCO(exported / "coco" / f"{task}.json")
    results = truth.loadRes(str(exported / "coco-results" / f"{task}.json"))
    assert len(results.anns) == len(truth.anns) == {"detect": 8, "segment": 8, "pose": 4, "captions": 5}[task]
    for key, found in results.anns.items():
        assert found["image_id"] == truth.anns[key]["image_id"]
        if task == "segment":
            assert np.array_equal(results.annToMask(found), truth.annToMask(truth.anns[key]))
        elif task == "captions":
            assert found["caption"] == truth.anns[key]["caption"]
        else:
            assert list(found["bbox"]) == truth.anns[key]["bbox"]
    if task == "pose":
        assert results.anns[1]["keypoints"] == [4, 5.5, 1, 15, 6, 1, 0, 0, 1]  # a place for each


@pytest.mark.parametrize(
    ("name", "task"), [("yolo-detect", "detect"), ("yolo-segment", "segment"), ("yolo-pose", "pose")]
)
def test_yolo(exported, name, task):
    folder = exported / name / task
    settings = yaml.safe_load((folder / "data.yaml").read_text())
    assert settings["names"] == dict(enumerate(made.CLASSES)) and "path" not in settings
    assert sorted(p.stem for p in (folder / "images").iterdir()) == sorted(STEMS.values())
    table = list(csv.DictReader((folder / "images.csv").open(encoding="utf-8")))
    assert {row["image_id"]: row["file"].partition(".")[0] for row in table} == STEMS
    for image_id, (height, width) in made.LABELLED:
        (picture,) = (folder / "images").glob(f"{STEMS[image_id]}.*")
        assert upright(picture) == (height, width)
        lines = (folder / "labels" / f"{STEMS[image_id]}.txt").read_text().splitlines()
        found = [[float(v) for v in line.split()] for line in lines]
        assert [made.CLASSES[int(numbers[0])] for numbers in found] == [r["phrase"] for r in rows(image_id, task)]
        for k, (numbers, row) in enumerate(zip(found, rows(image_id, task), strict=True)):
            if task == "segment":
                points = np.reshape(numbers[1:], (-1, 2)) * [width, height]
                box = [*points.min(0), *points.max(0)]
                drawn = coco_mask.decode(coco_mask.frPyObjects([points.reshape(-1).tolist()], height, width))[..., 0]
                wanted = made.masks((height, width))[k]
                assert (drawn & wanted).sum() >= 0.98 * (drawn | wanted).sum()
            else:
                cx, cy, w, h = np.multiply(numbers[1:5], [width, height, width, height])
                box = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
            assert np.abs(np.subtract(box, row["box"])).max() < 0.1
            if task == "pose":
                points = np.reshape(numbers[5:], (-1, 3)) * [width, height, 1]
                assert np.abs(points - [[4, 5.5, 2], [15, 6, 2], [0, 0, 0]]).max() < 1e-4


def test_yolo_poses_say_what_is_mirrored(exported):
    settings = yaml.safe_load((exported / "yolo-pose" / "pose" / "data.yaml").read_text())
    assert settings["kpt_shape"] == [3, 3] and settings["flip_idx"] == [1, 0, 2]
    assert settings["kpt_names"][0] == list(made.KEYPOINTS)


@pytest.mark.parametrize("task", ["detect", "segment", "pose"])
def test_voc_counts_from_1_with_both_edges(exported, task):
    folder = exported / "voc" / task
    assert (folder / "ImageSets/Main/default.txt").read_text().split("\n")[:-1] == list(STEMS.values())
    for image_id, (height, width) in made.LABELLED:
        root = ElementTree.parse(folder / "Annotations" / f"{STEMS[image_id]}.xml").getroot()
        assert upright(folder / "JPEGImages" / root.findtext("filename")) == (height, width)
        assert (int(root.findtext("size/height")), int(root.findtext("size/width"))) == (height, width)
        found = root.findall("object")
        assert [o.findtext("name") for o in found] == [r["phrase"] for r in rows(image_id, task)]
        for node, box in zip(found, boxes(image_id, task), strict=True):
            x1, y1, x2, y2 = (int(node.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
            assert np.abs(np.subtract([x1 - 1, y1 - 1, x2, y2], box)).max() <= 0.5
            assert 1 <= x1 <= x2 <= width and 1 <= y1 <= y2 <= height


def unpack(code):
    """The bytes of Label Studio's run-length code, by its published decoder."""
    bits = "".join(f"{byte:08b}" for byte in code)
    position = 0

    def read(number):
        nonlocal position
        position += number
        return int(bits[position - number : position], 2)

    number, word = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    out, i = np.zeros(number, np.uint8), 0
    while i < number:
        is_run = read(1)
        j = i + 1 + read(sizes[read(2)])
        if is_run:
            out[i:j] = read(word)
            i = j
        else:
            while i < j:
                out[i] = read(word)
                i += 1
    return out


def test_label_studio(exported):
    folder = exported / "labelstudio"
    config = ElementTree.parse(folder / "labeling_config.xml").getroot()
    controls = {node.get("name"): node for node in config if node.get("toName")}
    tasks = json.loads((folder / "tasks.json").read_text())
    for task, (image_id, (height, width)) in zip(tasks, made.LABELLED, strict=True):
        (prediction,) = task["predictions"]
        found = {name: [r for r in prediction["result"] if r["from_name"] == name] for name in controls}
        assert sum(map(len, found.values())) == len(prediction["result"]), "each result has its control"
        assert len({r["id"] for r in prediction["result"]}) == len(prediction["result"])
        for result in prediction["result"]:
            assert (result["original_width"], result["original_height"]) == (width, height)
            kind = result["type"]
            if kind != "textarea":
                labels = [node.get("value") for node in controls[result["from_name"]]]
                assert result["value"][kind][0] in labels and controls[result["from_name"]].tag.lower() == kind
        for name in ("detect", "pose"):
            for result, box in zip(found[name], boxes(image_id, name), strict=True):
                v = result["value"]
                x, y, w, h = (v[k] * side / 100 for k, side in zip(("x", "y", "width", "height"), [width, height] * 2))  # noqa: B905
                assert np.abs(np.subtract([x, y, x + w, y + h], box)).max() < 1e-3
        decoded = [unpack(r["value"]["rle"]).reshape(height, width, 4) for r in found["segment"]]
        wanted = made.masks((height, width)) if decoded else []
        assert len(decoded) == len(rows(image_id, "segment"))
        assert all(np.array_equal(d, np.repeat(255 * w[..., None], 4, 2)) for d, w in zip(decoded, wanted, strict=True))
        assert [r["value"]["keypointlabels"][0] for r in found["pose_keypoints"]] == list(
            made.KEYPOINTS[:2] if found["pose"] else ()
        )
        assert all(r["parentID"] == found["pose"][0]["id"] for r in found["pose_keypoints"])
        texts = [found[name][0]["value"]["text"][0] for name in ("caption", "vqa", "vqa_2")]
        assert texts == [r["text"] for t in ("caption", "vqa") for r in rows(image_id, t)]
        if exported.name == "files":
            assert unquote(task["data"]["image"]).startswith("/data/local-files/?d=")
            assert unquote(task["data"]["image"]).endswith(f"/photos/{image_id}")


def test_label_studio_addresses_can_have_a_prefix(root, tmp_path):
    export_labels(root / "files", ["labelstudio"], output=tmp_path, image_url="https://example.org/i/")
    tasks = json.loads((tmp_path / "labelstudio" / "tasks.json").read_text())
    assert tasks[0]["data"]["image"] == "https://example.org/i/a/x%20y.png"


def test_cvat(exported):
    root = ElementTree.parse(exported / "cvat" / "annotations.xml").getroot()
    declared = {n.findtext("name"): [a.findtext("name") for a in n.iter("attribute")] for n in root.iter("label")}
    constructor = json.loads((exported / "cvat" / "labels.json").read_text())
    assert {c["name"]: [a["name"] for a in c["attributes"]] for c in constructor} == declared
    images = root.findall("image")
    for node, (image_id, (height, width)) in zip(images, made.LABELLED, strict=True):
        assert (node.get("name"), int(node.get("height")), int(node.get("width"))) == (image_id, height, width)
        values = {shape: {a.get("name"): a.text for a in shape.findall("attribute")} for shape in node}
        assert all(set(found) <= set(declared[shape.get("label")]) for shape, found in values.items())
        for task in ("detect", "pose"):
            found = [s for s in node.findall("box") if values[s]["task"] == task]
            places = [[float(s.get(k)) for k in ("xtl", "ytl", "xbr", "ybr")] for s in found]
            assert places == boxes(image_id, task)
        masks = node.findall("mask")
        for shape, wanted in zip(masks, made.masks((height, width)) if masks else [], strict=True):
            runs = [int(run) for run in shape.get("rle").split(",")]
            x, y, w, h = (int(shape.get(k)) for k in ("left", "top", "width", "height"))
            mask = np.zeros((height, width), bool)
            mask[y : y + h, x : x + w] = np.repeat(np.arange(len(runs)) % 2, runs).reshape(h, w)
            assert np.array_equal(mask, wanted)
        points = [(s.get("label"), s.get("points"), s.get("group_id")) for s in node.findall("points")]
        assert points in ([], [("left end", "4.00,5.50", "1"), ("right end", "15.00,6.00", "1")])
        texts = [(s.get("label"), values[s]["text"]) for s in node.findall("tag")]
        assert texts == [(t, r["text"]) for t in ("caption", "vqa") for r in rows(image_id, t)]


@pytest.mark.parametrize("task", ["detect", "segment", "pose"])
def test_fiftyone_folders_have_their_pictures(exported, task):
    folder = exported / "fiftyone" / task
    data = json.loads((folder / "labels.json").read_text())
    assert sorted(i["file_name"] for i in data["images"]) == sorted(os.listdir(folder / "data"))
    assert [upright(folder / "data" / i["file_name"]) for i in data["images"]] == [size for _, size in made.LABELLED]
    assert [a["id"] for a in data["annotations"]] == list(range(1, len(data["annotations"]) + 1))


def test_datumaro(exported):
    data = json.loads((exported / "datumaro" / "annotations" / "default.json").read_text())
    names = [label["name"] for label in data["categories"]["label"]["labels"]]
    assert names == list(made.CLASSES) and data["categories"]["points"]["items"][0]["joints"] == [[1, 3], [2, 3]]
    for item, (image_id, size) in zip(data["items"], made.LABELLED, strict=True):
        assert upright(exported / "datumaro" / "images" / item["image"]["path"]) == tuple(item["image"]["size"]) == size
        found = {}
        for annotation in item["annotations"]:
            found.setdefault((annotation["attributes"]["task"], annotation["type"]), []).append(annotation)
        for task in ("detect", "pose"):
            assert [to_xyxy(a["bbox"]) for a in found.get((task, "bbox"), [])] == boxes(image_id, task)
        masks = found.get(("segment", "mask"), [])
        assert len(masks) == len(rows(image_id, "segment")) and not any(a["attributes"]["is_crowd"] for a in masks)
        if masks:
            assert np.array_equal([coco_mask.decode(a["rle"]) for a in masks], made.masks(size))
        for box, points in zip(found.get(("pose", "bbox"), []), found.get(("pose", "points"), []), strict=True):
            assert points["visibility"] == [2, 2, 0] and points["group"] == box["group"]
        assert len(found["vqa", "caption"]) == 2 and found["caption", "caption"][0]["caption"].endswith(image_id)


def check_columns(sample, image_id, size):
    """A JSON line or sample holds the answers of all tasks."""
    assert (sample["height"], sample["width"]) == size
    for task in ("detect", "segment", "pose"):
        assert [to_xyxy(box) for box in sample[task]["bbox"]] == boxes(image_id, task)
        assert sample[task]["category"] == [r["phrase"] for r in rows(image_id, task)]
        assert {len(column) for column in sample[task].values()} == {len(rows(image_id, task))}
    decoded = [coco_mask.decode(rle) for rle in sample["segment"]["segmentation"]]
    assert not decoded or np.array_equal(decoded, made.masks(size))
    assert sample["caption"] == rows(image_id, "caption")[0]["text"]
    assert sample["vqa"] == {
        "question": list(made.QUESTIONS),
        "answer": [row["text"] for row in rows(image_id, "vqa")],
    }


def test_webdataset(exported):
    samples = {}
    with tarfile.open(exported / "webdataset" / "labels-00001.tar") as tar:
        keys = [name.partition(".")[0] for name in tar.getnames()]
        assert keys == [STEMS[name] for name, _ in made.LABELLED for _ in range(2)], "members lie together"
        for member in tar:
            key, _, extension = member.name.partition(".")
            samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    for image_id, size in made.LABELLED:
        sample = samples[STEMS[image_id]]
        assert set(sample) == {"png", "json"}, "the same members in every sample"
        assert upright(io.BytesIO(sample["png"])) == size
        check_columns(json.loads(sample["json"]), image_id, size)


def order_of_samples(folder):
    """The keys in each tar of four, and the note of the export."""
    written = export_labels(folder, ["webdataset"], max_images_per_file=4)["webdataset"]
    keys = []
    for path in sorted((folder / "webdataset").glob("*.tar")):
        with tarfile.open(path) as tar:
            keys.append([name.partition(".")[0] for name in tar.getnames() if name.endswith(".json")])
    return keys, written.get("note", "")


def test_webdataset_begins_with_samples_that_fill_every_list(tmp_path):
    answers = [*[()] * 7, ("detect",), ("segment",)]
    keys, note = order_of_samples(made.write_sparse_labels(tmp_path, answers, ("detect", "segment")))
    # `segment` fills one list more: its masks
    assert keys == [["7", "8", "0", "1"], ["2", "3", "4", "5"], ["6"]] and not note


def test_webdataset_says_which_lists_no_five_samples_fill(tmp_path, monkeypatch):
    monkeypatch.setattr("lumen_ray.label.exporters.webdataset.TYPED_BY", 1)
    folder = made.write_sparse_labels(tmp_path, [(), ("detect",), ("segment",)], ("detect", "segment", "pose"))
    keys, note = order_of_samples(folder)
    assert keys == [["2", "0", "1"]]
    assert "detect.bbox" in note and "features=" in note and "pose" not in note, "pose found nothing at all"


def test_imagefolder(exported):
    folder = exported / "imagefolder"
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert sorted(line["file_name"] for line in lines) == sorted(f"images/{n}" for n in os.listdir(folder / "images"))
    assert [line["image_id"] for line in lines] == [image_id for image_id, _ in made.LABELLED]
    for line, (image_id, size) in zip(lines, made.LABELLED, strict=True):
        assert upright(folder / line["file_name"]) == size
        check_columns(line, image_id, size)


def test_imagefolder_begins_with_images_in_which_something_was_found(tmp_path):
    images = (made.IMAGES[-1], *made.IMAGES[:2])
    photos = made.write_photos(tmp_path / "photos")
    folder = made.write_labels(tmp_path / "labels", photos=photos, images=images, rows=made.records_without_hashes)
    export_labels(folder, ["imagefolder"], tasks=["segment"])
    lines = [json.loads(line) for line in (folder / "imagefolder" / "metadata.jsonl").read_text().splitlines()]
    assert [line["image_id"] for line in lines] == ["a/x y.png", "nothing-ü.jpg", "b/x y.png"]


def test_labelme(exported):
    folder = exported / "labelme"
    for image_id, (height, width) in made.LABELLED:
        data = json.loads((folder / f"{STEMS[image_id]}.json").read_text(encoding="utf-8"))
        assert upright(folder / data["imagePath"]) == (data["imageHeight"], data["imageWidth"]) == (height, width)
        for task in ("detect", "pose"):
            found = [s for s in data["shapes"] if s["task"] == task and s["shape_type"] == "rectangle"]
            assert [sum(s["points"], []) for s in found] == boxes(image_id, task)
        masks = [s for s in data["shapes"] if s["shape_type"] == "mask"]
        for shape, wanted in zip(masks, made.masks((height, width)) if masks else [], strict=True):
            (x1, y1), (x2, y2) = shape["points"]
            mask = np.zeros((height, width), bool)
            mask[y1 : y2 + 1, x1 : x2 + 1] = np.asarray(Image.open(io.BytesIO(from_base64(shape["mask"]))))
            assert np.array_equal(mask, wanted)
        points = [(s["label"], s["points"], s["group_id"]) for s in data["shapes"] if s["shape_type"] == "point"]
        assert points in ([], [("left end", [[4.0, 5.5]], 1), ("right end", [[15.0, 6.0]], 1)])


def from_base64(text):
    import base64

    return base64.b64decode(text)


def test_csv(exported):
    with (exported / "csv" / "labels.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    wanted = [row for name, size in made.LABELLED for row in made.records(name, "", size)]
    assert len(found) == len(wanted)
    for line, row in zip(found, wanted, strict=True):
        assert (line["image_id"], line["task"]) == (row["image_id"], row["task"])
        assert (line["phrase"] or None, line["text"] or None, line["prompt"] or None) == (
            row["phrase"], row["text"], row["prompt"],
        )  # fmt: skip
        assert [float(line[k]) for k in ("x1", "y1", "x2", "y2") if line[k]] == (row["box"] or [])
        if row["mask"]:
            rle = {"size": [int(v) for v in line["mask_size"].split()], "counts": line["mask_counts"]}
            assert rle == row["mask"]
        if row["keypoints"]:
            assert [p[0] for p in json.loads(line["keypoints"])] == row["keypoint_names"]


def test_upright_files_keep_their_bytes_and_turned_ones_are_written_upright(root, tmp_path):
    for labels in (root / "files", root / "shard"):
        folder = labels / "yolo-detect" / "detect" / "images"
        original = root / "photos" / "a" / "x y.png"
        assert (folder / "a_x_y.png").read_bytes() == original.read_bytes()
        assert os.path.samefile(folder / "a_x_y.png", original) == (labels.name == "files")
        turned = np.asarray(Image.open(folder / "b_frame_001.jpg").convert("RGB"), int)
        with Image.open(root / "photos" / "b" / "frame.001.jpg") as image:
            truth = np.asarray(image.transpose(Image.Transpose.ROTATE_270), int)
        assert np.abs(turned - truth).mean() < 8
    export_labels(root / "files", ["voc"], output=tmp_path, copy_images=True)
    assert not os.path.samefile(tmp_path / "voc/detect/JPEGImages/a_x_y.png", root / "photos/a/x y.png")


def test_pictures_get_the_suffix_of_their_format_and_formats_that_readers_do_not_know_become_png(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    picture = Image.fromarray(made.pixels(0, (20, 30)))
    for name, kind in (("gif", "GIF"), ("wrong.png", "JPEG"), ("ok.jpeg", "JPEG"), ("cut.jpg", "JPEG")):
        picture.save(folder / name, kind)
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes() + b"trailing")
    images = tuple((name, (20, 30)) for name in sorted(os.listdir(folder)))
    labels = made.write_labels(tmp_path / "labels", photos=folder, images=images)
    out = tmp_path / "out"
    out.mkdir()
    written = [write_picture(image.name, found, out) for image, found in open_labels(labels).pictures()]
    assert written == ["cut.jpg", "gif.png", "ok.jpeg", "wrong.jpg"]
    assert os.path.samefile(out / "ok.jpeg", folder / "ok.jpeg")
    assert not os.path.samefile(out / "cut.jpg", folder / "cut.jpg"), "some readers write such a file again in place"
    assert Image.open(out / "gif.png").format == "PNG"
