"""The checks of `data lint`: for each a small set of rows that violates it and one that does not."""

import gc
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from support.source_fakes import jpeg

from lumen_ray.data.lint.check import SetFacts, Settings
from lumen_ray.data.lint.checks import CHECKS
from lumen_ray.data.lint.classes import plain_name, singular
from lumen_ray.data.lint.command import examine
from lumen_ray.data.lint.copies import plain_id
from lumen_ray.data.lint.findings import MAX_EXAMPLES, SEVERITIES, Finding, Rule, Sample, SampleShelf
from lumen_ray.data.lint.rows import LintRow
from lumen_ray.data.shards.schema import make_message, make_row
from lumen_ray.data.sources.base import Outcome
from lumen_ray.structures import Masks

SIDE = 100
IMAGE = jpeg(SIDE, SIDE)


@dataclass
class FakeInput:
    """Rows and rejected records in memory."""

    rows: list
    rejected: list = field(default_factory=list)
    facts_: SetFacts = field(default_factory=SetFacts)
    title: str = "fake"
    kind: str = "shards"

    def outcomes(self, progress=None):
        yield from (Outcome(row) for row in self.rows)
        yield from (Outcome(rejected=[record]) for record in self.rejected)

    def facts(self):
        return self.facts_


def lint_rows(rows, *, settings=None, samples=24, **options):
    findings, _ = examine(FakeInput(rows, **options), settings or Settings(), samples=samples)
    return {finding.rule.name: finding for finding in findings}


_numbers = iter(range(10**9))


def row(*instances, name=None, image=None, size=(SIDE, SIDE), **columns):
    """A row whose image and id no other row has, annotated for the classes of its instances and "absent"."""
    number = next(_numbers)
    columns.setdefault("classes", sorted({*(i["phrase"] for i in instances), "absent"}))
    columns.setdefault("tasks", ["detect"])
    image = IMAGE + number.to_bytes(8, "big") if image is None else image
    return make_row(name or f"{number}.jpg", image or None, size, "fake", instances=list(instances), **columns)


def linked(answer, *instances):
    """A chat with links to these instances."""
    return make_message("chat", "what ?", answer) | {"links": [{"phrase": "it", "instances": i} for i in instances]}


def thing(box=(10, 10, 40, 40), phrase="cell", mask=None, keypoints=None, crowd=False):
    """An instance; `mask`: xyxy of a rectangle."""
    if isinstance(mask, tuple):
        mask = rectangle(*mask)
    return {"phrase": phrase, "box": list(box), "mask": mask, "keypoints": keypoints, "crowd": crowd, "area": 1.0}


def rectangle(x1, y1, x2, y2, size=(SIDE, SIDE)):
    pixels = np.zeros((1, *size), bool)
    pixels[0, y1:y2, x1:x2] = True
    return Masks.from_arrays(pixels).rles[0]


def text_row(*texts, task="caption", **columns):
    messages = [make_message(task, "describe the image .", text) for text in texts]
    return row(classes=[], tasks=[task], messages=messages, **columns)


def many(number, *instances, **columns):
    return [row(*instances, **columns) for _ in range(number)]


PAIR = "\u00e9.jpg", "e\u0301.jpg"
CLEAN = [row(thing()), row(thing((10, 10, 40, 40), mask=(10, 10, 40, 40))), row()]

#: rule -> (rows that violate it, number of violations, rows that do not)
CASES = {
    "repeated-id": ([row(thing(), name="a"), row(thing(), name="a")], 1, [row(name="a"), row(name="b")]),
    "similar-ids": (
        [row(name=n) for n in ("a.jpg", "A.JPG", "./x/b.jpg", "x\\b.jpg", "c%20d.jpg", "c d.jpg", *PAIR)],
        4,
        [row(name=n) for n in ("a.jpg", "b.jpg", "x/a.jpg", "y/a.jpg", "a%2.jpg")],
    ),
    "copies": (
        [row(thing(), image=b"x"), row(thing(), image=b"x"), row(image=b"y"), row(image=b"y")],
        2,
        [row(thing(), image=b"x"), row(thing(), image=b"y"), row(image=b"", size=(0, 0)), row(image=b"", size=(0, 0))],
    ),
    "copies-differ": (
        [row(thing(), image=b"x"), row(thing((1, 1, 9, 9)), image=b"x")],
        1,
        [row(thing(), thing((1, 1, 9, 9)), image=b"x"), row(thing((1, 1, 9, 9)), thing(), image=b"x")],
    ),
    "shared-image": (
        [text_row("a dog", image=b"x"), text_row("a cat", image=b"x"), row(thing(), image=b"x")],
        2,
        [text_row("a dog", image=b"x"), text_row("a dog", image=b"x")],
    ),
    "class-spelling": (
        [row(thing(phrase=n)) for n in ("Cat", "cat ", "traffic light", "traffic_light", "Traffic-Light")],
        5,
        [row(thing(phrase=n)) for n in ("cat", "car", "bus", "cats")],
    ),
    "class-plural": ([row(thing(phrase=n)) for n in ("cats", "cat")], 2, [row(thing(phrase="bus"))]),
    "class-never": (many(10, thing()), 1, [*many(9, thing()), *many(100)]),
    "class-empty": (many(9, thing()), 1, [row(thing()), row(thing(phrase="absent"))]),
    "class-always": (many(10, thing()), 1, [*many(10, thing()), row(classes=["cell"])]),
    "class-rare": (many(4, thing()), 1, many(5, thing())),
    "repeated-object": (
        [row(thing(), thing((10.001, 10, 40, 40)), thing())],
        2,
        [row(thing(), thing(phrase="dog"), thing(crowd=True), thing((10, 10, 40, 42)))],
    ),
    "near-repeat": (
        [row(thing(), thing((10, 10, 40, 41)), thing((10, 10, 41, 40)))],
        2,
        [row(thing(), thing((10, 10, 40, 42)), thing((10, 10, 40, 41), "dog"), thing((10, 10, 40, 41), crowd=True))],
    ),
    "box-invalid": (
        [row(thing((10, 10, 10, 40)), thing((40, 10, 10, 40)), thing((np.nan, 0, 1, 1)), thing((0, 0, np.inf, 1)))],
        4,
        CLEAN,
    ),
    "box-outside": ([row(thing((-3, 0, 9, 9)), thing((0, 0, 9, 101)))], 2, [row(thing((-0.2, 0, SIDE, 100.3)))]),
    "box-tiny": (
        [row(thing((10, 10, 11.9, 40)), thing((10, 20, 40, 20.5)))],
        2,
        [row(thing((10, 10, 12, 40)), thing((1, 1, 2, 2), crowd=True))],
    ),
    "box-whole-image": (
        many(10, thing((0, 0, SIDE, SIDE))),
        10,
        [*many(5, thing((0, 0, SIDE, SIDE))), *many(5, thing()), *many(5)],
    ),
    "mask-size": (
        [row(thing(mask=rectangle(1, 1, 2, 2, (50, SIDE))), thing(mask={"size": [SIDE, SIDE], "counts": "12"}))],
        2,
        CLEAN,
    ),
    "mask-empty": ([row(thing(mask=(0, 0, 0, 0)))], 1, CLEAN),
    "mask-off-box": (
        [row(thing(mask=(10, 10, 40, 20)))],
        1,
        [row(thing(mask=(10, 10, 39, 39)), thing((10, 10, 12, 12), mask=(10, 10, 11, 11)))],
    ),
    "masks-short": (
        many(10, thing(mask=(10, 10, 39, 39))),
        10,
        [*many(7, thing(mask=(10, 10, 39, 39))), *many(3, thing(mask=(10, 10, 40, 40)))],
    ),
    "masks-missing": (
        [row(thing(mask=(10, 10, 40, 40)), thing((50, 50, 60, 60)))],
        1,
        [row(thing(mask=(10, 10, 40, 40)), thing((50, 50, 60, 60), crowd=True)), row(thing())],
    ),
    "all-crowd": (
        many(5, thing(mask=(10, 10, 40, 40), crowd=True)),
        5,
        [*many(5, thing(mask=(10, 10, 40, 40), crowd=True)), row(thing(mask=(10, 10, 40, 40)))],
    ),
    "keypoint-far": (
        [row(thing(keypoints=[56, 20, 2, 20, 20, 2]))],
        1,
        [row(thing(keypoints=[54, 20, 2, 90, 90, 0, 20, 55, 1]))],
    ),
    "keypoints-unlabelled": ([row(thing(keypoints=[0, 0, 0] * 3))], 1, [row(thing(keypoints=[0, 0, 0, 20, 20, 1]))]),
    "image-missing": (
        [row(thing(), image=b"")],
        1,
        [make_row("chat", None, (0, 0), "chat", tasks=["chat"], messages=[make_message("chat", "hi", "hello")])],
    ),
    "no-task": ([row(tasks=[])], 1, CLEAN),
    "no-rows": ([], 1, CLEAN),
    "text-empty": ([text_row(" "), text_row("", task="vqa")], 2, [text_row("a dog")]),
    "text-damaged": (
        [text_row("a caf\ufffd"), text_row("\ufeffa dog"), row(thing(phrase="caf\ufffd"))],
        3,
        [text_row("a café, 犬")],
    ),
    "links-wrong": (
        [
            row(thing(), messages=[linked("a cell [DET]", [1])]),
            row(thing(), messages=[linked("a cell [DET] [DET]", [0], [0])]),
            row(thing(), messages=[linked("a cell [DET]")]),
            row(thing(), messages=[linked("a cell", [0])]),
        ],
        4,
        [row(thing(), messages=[linked("a cell [DET] and a dog [SEG] .", [0], []), linked("a cell")])],
    ),
    "caption-repeated": (
        [*(text_row("a dog") for _ in range(3)), *(text_row(f"a cat {i}") for i in range(9))],
        3,
        [*(text_row("a dog") for _ in range(2)), *(text_row(f"a cat {i}") for i in range(8))],
    ),
}  # fmt: skip
#: rules of other tests
ELSEWHERE = {"image-broken", "image-size", "leak"}


def test_every_rule_has_a_case_and_says_what_to_do():
    rules = [rule for check in CHECKS for rule in check.rules]
    assert {rule.name for rule in rules} == {*CASES, *ELSEWHERE}
    assert len({rule.name for rule in rules}) == len(rules)
    for rule in rules:
        assert rule.severity in SEVERITIES
        assert ";" in rule.meaning and not rule.meaning.endswith("."), rule
        assert rule.meaning[0].islower() and len(rule.meaning) < 200, rule


@pytest.mark.parametrize("rule", CASES)
def test_a_violation_is_found_and_counted(rule):
    rows, number, _ = CASES[rule]
    found = lint_rows(rows)
    assert rule in found
    assert found[rule].number == number
    assert 1 <= len(found[rule].examples) <= MAX_EXAMPLES


@pytest.mark.parametrize("rule", CASES)
def test_what_is_in_order_is_not_reported(rule):
    assert rule not in lint_rows(CASES[rule][2])


def test_clean_rows_have_no_findings_but_notes():
    assert {f.rule.severity for f in lint_rows(CLEAN).values()} <= {"note"}


def test_examples_name_the_image_and_the_objects():
    found = lint_rows([row(thing((1, 1, 2.5, 2)), name="a.jpg"), row(thing((1, 1, 50, 1.5)), name="b.jpg")])
    assert found["box-tiny"].examples == [
        "a.jpg: 'cell' is 1.5 pixels wide and 1 high",
        "b.jpg: 'cell' is 49 pixels wide and 0.5 high",
    ]
    assert [sample.objects for sample in found["box-tiny"].samples] == [(0,), (0,)]


def test_the_smallest_side_is_a_setting():
    rows = [row(thing((10, 10, 15, 40)))]
    assert "box-tiny" not in lint_rows(rows)
    assert "box-tiny" in lint_rows(rows, settings=Settings(min_side=6))


def test_only_with_decode_are_images_decoded(monkeypatch):
    rows = [row(thing()), row(image=b"nonsense"), row(size=(SIDE, 50))]
    monkeypatch.setattr("lumen_ray.data.lint.images.decode", lambda *_: pytest.fail("it decoded"))
    assert not ELSEWHERE & set(lint_rows(rows))
    monkeypatch.undo()
    found = lint_rows(rows, settings=Settings(decode=True))
    assert found["image-broken"].number == found["image-size"].number == 1
    assert "the row says 50x100, the image has 100x100 pixels" in found["image-size"].examples[0]


def several(*images, **columns):
    """A conversation about images, each as its encoded bytes."""
    further = [{"image": image, "height": SIDE, "width": SIDE} for image in images[1:]]
    messages = [make_message("chat", "differ?", "no", image_turns=(0,) * len(further))]
    return row(classes=[], tasks=["chat"], messages=messages, image=images[0], further_images=further, **columns)


def test_further_images_are_decoded_too():
    rows = [several(IMAGE, jpeg(SIDE, 50), b"nonsense"), several(b"broken", IMAGE + b"x")]
    assert not ELSEWHERE & set(lint_rows(rows))
    found = lint_rows(rows, settings=Settings(decode=True))
    assert found["image-broken"].number == 2 and found["image-size"].number == 1
    assert "image 3: the image cannot be read" in found["image-broken"].examples[0]
    assert "image 2: the row says 100x100, the image has 50x100 pixels" in found["image-size"].examples[0]


def test_rows_of_the_same_images_are_copies_and_other_lists_are_not():
    images = [IMAGE + bytes([n]) for n in range(3)]
    rows = [several(images[0]), several(*images[:2]), several(images[0], images[2]), several(images[1], images[0])]
    assert not {"copies", "shared-image"} & set(lint_rows(rows))
    assert lint_rows([*rows, several(*images[:2])])["copies"].number == 1


def test_an_id_may_repeat_for_texts_about_one_image():
    rows = [text_row(t, name="a", image=b"x") for t in ("a dog", "a cat", "a dog")]
    found = lint_rows(rows)
    assert "repeated-id" not in found
    assert found["shared-image"].number == 1 and found["copies"].number == 1
    assert "repeated-id" in lint_rows([text_row("a dog", name="a", image=image) for image in (b"x", b"y")])


def test_rejected_records_are_grouped_by_rule_or_reason():
    def record(kind, reason, **more):
        return {"kind": kind, "image_id": "a.jpg", "origin": "x.json line 1", "reason": reason, **more}

    boxes = {"rule": "invalid_box", "mend": "correct the box"}
    rejected = [
        record("annotations", "degenerate box [1, 2, 0, 0] (xywh): it has no width or height", **boxes),
        record("annotations", "box [900, 2, 3, 3] (xywh) lies outside the image of 60x40 pixels", **boxes),
        record("images", "the image file is missing or cannot be opened"),
        record("images", "the image cannot be read (it is 3 bytes)"),
        record("images", "the image cannot be read (it is 12 bytes)"),
        record("annotations", "its image was rejected: the image file is missing or cannot be opened"),
        record("annotations", "its image was rejected: the image cannot be read", rule="image_rejected", mend="see it"),
        record("annotations", "it repeats an earlier object", rule="repeated", mend="nothing to mend"),
    ]
    findings, _ = examine(FakeInput(CLEAN, rejected), Settings())
    found = [(f.rule.name, f.rule.severity, f.number) for f in findings if f.rule.name.startswith("rejected")]
    assert found == [
        ("rejected-images", "problem", 2),
        ("rejected-images", "problem", 1),
        ("rejected-annotations", "warning", 2),
        ("rejected-annotations", "note", 2),
        ("rejected-annotations", "note", 1),
    ]
    (lost,) = (f for f in findings if f.rule.severity == "warning")
    assert lost.rule.meaning == "annotations are left out (invalid box); correct the box"
    assert lost.examples[0].startswith("a.jpg (x.json line 1): degenerate box")


def test_reasons_without_end_share_a_finding():
    records = [
        {"kind": "images", "image_id": "", "origin": "o", "reason": f"because {chr(97 + i // 26)}{chr(97 + i % 26)}"}
        for i in range(200)
    ]
    findings, _ = examine(FakeInput(CLEAN, records), Settings())
    rejected = [f for f in findings if f.rule.name == "rejected-images"]
    assert len(rejected) <= 41 and sum(f.number for f in rejected) == 200


def test_notes_and_changes_of_the_input_are_listed():
    facts = SetFacts(changed={"boxes clipped": 3}, notes=["class 'cells' left out: it has no annotation"])
    found = lint_rows(CLEAN, facts_=facts)
    assert found["changed"].number == 3 and "boxes clipped" in found["changed"].rule.meaning
    assert found["changed"].examples == ["boxes clipped"]  # a folder of an earlier version names no images
    named = lint_rows(CLEAN, facts_=replace(facts, changed_in={"boxes clipped": ["a.jpg", "b.jpg"]}))["changed"]
    assert (named.number, named.examples) == (3, ["a.jpg", "b.jpg"])
    assert found["input"].rule.meaning == "class 'cells' left out: it has no annotation"


def test_classes_of_the_manifest_without_objects_are_named():
    facts = SetFacts(categories=[{"name": "cell"}, {"name": "ghost"}])
    found = lint_rows(many(6, thing(), classes=["cell"]), facts_=facts)
    assert found["class-empty"].examples == ["'ghost', asked for in 0 images"]


def test_a_set_without_any_object_is_reported():
    assert lint_rows(many(10))["class-never"].number == 1
    assert "class-never" not in lint_rows(many(9))


def test_boxes_of_many_objects_are_compared_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    corners = np.unique(rng.integers(0, 80, (300, 2)), axis=0)
    boxes = [(x, y, x + 12, y + 12) for x, y in corners.tolist()] + [(3, 3, 60.0, 60), (3, 3, 60.5, 60)]
    monkeypatch.setattr("lumen_ray.data.lint.boxes._BLOCK", 7)
    found = lint_rows([row(*(thing(box) for box in boxes))])
    assert found["near-repeat"].number == 1 and "repeated-object" not in found


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("./a/B.JPG", "a\\b.jpg", True),
        ("a%20b.jpg", "a b.jpg", True),
        (PAIR[0], PAIR[1], True),
        (".hidden.jpg", "hidden.jpg", False),
        ("a/b.jpg", "b.jpg", False),
    ],
)
def test_plain_ids(a, b, same):
    assert (plain_id(a) == plain_id(b)) == same


def test_plain_names():
    assert plain_name("Traffic-Light ") == plain_name("traffic_light") == "trafficlight"
    assert singular("Cats") == singular("cat") and singular("glass") == "glass" and singular("bus") == "bus"


def test_numbers_have_units():
    rule = Rule("x", "note", "classes", "")
    assert [Finding(rule, n).counted for n in (1, 1200)] == ["1 class", "1,200 classes"]
    assert Finding(Rule("x", "note", "images", ""), 1).counted == "1 image"


def test_samples_are_bounded_and_shared():
    shelf = SampleShelf(6)
    findings = [Finding(Rule(str(i), "note", "rows", "")) for i in range(3)]
    for finding in findings:
        for _ in range(20):
            shelf.offer(finding, Sample({}, ""))
    assert sorted(len(f.samples) for f in findings) == [2, 2, 2]
    shelf.clear(findings[0])
    for _ in range(20):
        shelf.offer(findings[1], Sample({}, ""))
    assert [len(f.samples) for f in findings] == [0, 4, 2]
    nothing = SampleShelf(0)
    nothing.offer(findings[0], Sample({}, ""))
    assert findings[0].samples == []


def test_checks_keep_no_images():
    """Only the rows of samples stay in memory."""

    def stream():
        for i in range(200):
            box = (1, 1, 2, 2) if i % 2 else (1, 1, 50, 50)
            yield row(thing(box), image=bytes(7919) + i.to_bytes(4, "big"))

    findings, _ = examine(FakeInput(stream()), Settings(), samples=5)
    gc.collect()
    images = (o["image"] for o in gc.get_objects() if type(o) is dict and isinstance(o.get("image"), bytes))
    alive = [image for image in images if len(image) == 7923]
    assert sum(len(f.samples) for f in findings) == 5
    assert len(alive) <= 5


def test_a_row_describes_its_objects():
    assert LintRow(row(thing((1, 2.25, 3, 4)))).describe(0) == "'cell' at [1, 2.25, 3, 4]"
