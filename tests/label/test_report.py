"""The report and the choice of images for review, of hand-made labels."""

import csv
import json
from xml.etree import ElementTree

import pytest
from support import export_labels as made
from support.gallery_files import read_gallery
from support.label_fakes import FakeListing, write_images

from lumen_ray import cli, export_labels
from lumen_ray.errors import UserError
from lumen_ray.inference.records import LABEL_SCHEMA
from lumen_ray.label.exporters.labels import open_labels
from lumen_ray.label.inputs import Item
from lumen_ray.label.ledger import Ledger
from lumen_ray.label.statistics import choose_for_review, collect


def write(folder, images, tasks=("detect",)):
    """A label folder; `images`: id -> task -> (class, score) pairs."""
    ledger = Ledger(folder / "labels")
    classes = ["cat", "dog", "owl"]
    ledger.open({"tasks": list(tasks), "classes": classes, "score_threshold": 0.3, "input": str(folder)})
    items = [Item(name, str(folder / name)) for name in images]
    for fragment in ledger.plan(2).fragments(FakeListing(items)):
        rows = []
        for item in fragment.items:
            for task in tasks:
                base = dict.fromkeys(LABEL_SCHEMA.names)
                base |= {"image_id": item.image_id, "path": item.path, "height": 48, "width": 64, "task": task}
                found = images[item.image_id].get(task, ())
                rows += [base | {"phrase": c, "score": s, "box": [1.0, 2.0, 9.0, 12.0]} for c, s in found] or [base]
        ledger.publish(fragment.index, len(fragment.items), rows, [])
    return folder / "labels"


def test_every_instance_is_counted_once(tmp_path):
    images = {
        "a.png": {"detect": [("cat", 0.99), ("cat", 0.5), ("dog", 1.0)]},
        "b.png": {"detect": [("cat", 0.34)]},
        "c.png": {},
    }
    found = collect(open_labels(write(tmp_path, images)))
    cats, dogs, owls = (found.classes["detect"][name] for name in ("cat", "dog", "owl"))
    assert (cats.instances, cats.images, dogs.instances, owls.instances) == (3, 2, 1, 0)
    assert [(i, n) for i, n in enumerate(cats.histogram) if n] == [(6, 1), (10, 1), (19, 1)]
    assert cats.median == 0.525 and dogs.histogram[19] == 1 and owls.median != owls.median
    assert found.images == 3 and found.empty == {"detect": 1}
    assert found.crowded == [(3, "a.png"), (1, "b.png")]
    assert [(round(score, 2), name) for score, name in found.unsure] == [(0.34, "b.png"), (1.0, "a.png")]


def test_lists_are_short_and_hold_the_extremes(tmp_path):
    images = {f"{n:03d}.png": {"detect": [("cat", 0.3 + n / 100)] * (n % 7 + 1)} for n in range(60)}
    found = collect(open_labels(write(tmp_path, images)))
    assert len(found.crowded) == len(found.unsure) == 20
    assert found.crowded[0] == (7, "006.png") and found.unsure[0][1] == "000.png"
    assert [name for _, name in found.unsure] == sorted(name for _, name in found.unsure)


def test_an_object_that_several_tasks_find_counts_once_in_the_list(tmp_path):
    images = {
        "a.png": {"detect": [("cat", 0.9)] * 5, "segment": [("cat", 0.9)] * 5, "pose": [("cat", 0.9)] * 4},
        "b.png": {"detect": [("cat", 0.9)] * 6},
    }
    found = collect(open_labels(write(tmp_path, images, ("detect", "segment", "pose"))))
    assert found.crowded == [(6, "b.png"), (5, "a.png")]


@pytest.mark.parametrize(
    ("images", "best", "reason"),
    [
        ({"a.png": [("cat", 0.97)], "b.png": [("cat", 0.51)], "c.png": [("cat", 0.9)]}, "b.png", "unsure"),
        ({**{f"{n}.png": [("cat", 0.99)] for n in range(9)}, "z.png": [("owl", 0.99)]}, "z.png", "rare"),
        ({"a.png": [("cat", 0.999)], "b.png": [], "c.png": [("cat", 0.999)]}, "b.png", "empty"),
    ],
)
def test_the_image_most_worth_a_look(tmp_path, images, best, reason):
    labels = open_labels(write(tmp_path, {name: {"detect": found} for name, found in images.items()}))
    first, *rest = choose_for_review(labels, len(images))
    assert first.image_id == best and max(first.reasons, key=first.reasons.get) == reason
    assert first.score == pytest.approx(sum(first.reasons.values()))
    assert [c.score for c in rest] == sorted((c.score for c in rest), reverse=True) and len(rest) == len(images) - 1


def test_one_mask_for_a_class_agrees_with_any_number_of_its_objects(tmp_path):
    sure = [("cat", 0.999)]
    images = {
        "a.png": {"detect": sure * 3, "segment": sure * 3, "semantic": sure},
        "b.png": {"detect": sure * 2, "segment": sure, "semantic": sure},
        "c.png": {"detect": sure, "segment": sure},
    }
    labels = open_labels(write(tmp_path, images, ("detect", "segment", "semantic")))
    found = {choice.image_id: choice.reasons.get("disagree", 0.0) for choice in choose_for_review(labels, 3)}
    assert found == {"a.png": 0.0, "b.png": pytest.approx(0.25), "c.png": 0.5}
    labels = open_labels(write(tmp_path / "alone", {"a.png": {"semantic": sure}}, ("semantic",)))
    assert "disagree" not in choose_for_review(labels, 1)[0].reasons


def test_tasks_that_disagree(tmp_path):
    sure = [("cat", 0.999)]
    images = {"a.png": {"detect": sure, "segment": sure}, "b.png": {"detect": sure * 2, "segment": sure}}
    labels = open_labels(write(tmp_path, images, ("detect", "segment")))
    (first,) = choose_for_review(labels, 1)
    assert first.image_id == "b.png" and first.reasons["disagree"] == pytest.approx(0.25)


def with_column(folder, column, values):
    """The labels of `write` with a value of the column for each image of the first fragment."""
    ledger = Ledger(folder)
    ledger.publish(0, 2, [row | {column: values[row["image_id"]]} for row in ledger.table(0).to_pylist()], [])
    return open_labels(folder)


def test_instances_that_a_second_decoder_does_not_find(tmp_path):
    folder = write(tmp_path, {name: {"detect": [("cat", 0.99)]} for name in ("a.png", "b.png")})
    first, second = choose_for_review(with_column(folder, "agreement", {"a.png": 0.9, "b.png": 0.2}), 2)
    assert (first.image_id, second.image_id) == ("b.png", "a.png")
    assert first.reasons["disputed"] == pytest.approx(0.396) and second.reasons["disputed"] == pytest.approx(0.0495)


def test_what_only_a_sure_decoder_finds_is_disputed_most(tmp_path):
    folder = write(tmp_path, {"a.png": {"detect": [("cat", 0.4)]}, "b.png": {"detect": [("cat", 0.9)]}})
    found = choose_for_review(with_column(folder, "agreement", {"a.png": 0.0, "b.png": 0.0}), 2)
    assert {c.image_id: round(c.reasons["disputed"], 6) for c in found} == {"a.png": 0.2, "b.png": 0.45}


@pytest.mark.parametrize(("score", "verified"), [(0.99, 0.01), (0.01, 0.99)])
def test_instances_that_the_llm_sees_otherwise(tmp_path, score, verified):
    folder = write(tmp_path, {name: {"detect": [("cat", score)]} for name in ("a.png", "b.png")})
    first, second = choose_for_review(with_column(folder, "verified", {"a.png": verified, "b.png": score}), 2)
    assert first.image_id == "a.png" and first.reasons["doubted"] == pytest.approx(0.49)
    assert "doubted" not in second.reasons


def test_the_report_escapes_names_and_has_the_reasons_of_errors(tmp_path):
    photos = made.write_photos(tmp_path / "photos")
    folder = made.write_labels(tmp_path / "labels", photos=photos)
    written = export_labels(folder, ["report"])["report"]
    page = (folder / "report.html").read_text()
    assert written["output"] == str(folder / "report.html")
    assert "red &amp; &lt;big&gt; circle" in page and "<big>" not in page
    assert "<code>broken_image</code></td><td class=number>1<" in page and "http" not in page.split("</style>")[1]
    for task in ("detect", "segment", "pose"):
        assert f"<h2>{task}</h2>" in page
    assert page.count("<table>") == 3 + 2 + 1  # tasks, lists, errors


def test_a_review_folder_has_the_chosen_images_in_every_form(tmp_path, capsys):
    write_images(tmp_path, 4)
    images = {f"image00{n}.png": {"detect": [("cat", score)]} for n, score in enumerate((0.95, 0.5, 0.99, 0.6))}
    folder = write(tmp_path, images)
    argv = ["label", "export", str(folder), "--format", "review", "--review-budget", "2"]
    assert cli.main(argv) == 0
    rows = list(csv.DictReader((folder / "review" / "review.csv").open()))
    assert [row["image_id"] for row in rows] == ["image001.png", "image003.png"]
    assert rows[0]["reasons"] == "unsure=1.000" and float(rows[0]["score"]) > float(rows[1]["score"])
    tasks = json.loads((folder / "review" / "tasks.json").read_text())
    assert len(tasks) == 2 and all(name in json.dumps(tasks) for name in ("image001.png", "image003.png"))
    ElementTree.parse(folder / "review" / "labeling_config.xml")
    meta, cards, _ = read_gallery(folder / "review" / "gallery")
    assert [cards[number]["i"] for number in meta["order"]] == ["image001.png", "image003.png"] and len(cards) == 2
    assert meta["facts"]["shown here"] == "the chosen 2" and (folder / "review" / "gallery.html").is_file()
    with pytest.raises(UserError, match="review_budget is 0; give 1"):
        export_labels(folder, ["review"], review_budget=0)
