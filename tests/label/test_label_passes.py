import threading
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from support.label_fakes import FakeEngine, encode, picture, write_images

from lumen_ray.errors import UserError
from lumen_ray.inference.request import make_request
from lumen_ray.label.inputs import Item
from lumen_ray.label.ledger import Ledger
from lumen_ray.label.passes import Passes
from lumen_ray.label.pipeline import label
from lumen_ray.label.plan import Fragment
from lumen_ray.label.workers import Labeller, WorkerSettings

SIZES = [(64, 64), (48, 64), (64, 48), (32, 64), (64, 20)]


@given(st.lists(st.sampled_from(SIZES), max_size=80), st.integers(1, 8))
def test_every_image_has_one_pass_of_its_input_size_and_no_pass_costs_more_than_a_full_one(sizes, batch_size):
    passes = Passes(batch_size, 64)
    full = [done for image in enumerate(sizes) for done in passes.add(image, image[1])]
    rest = passes.rest()
    assert passes.rest() == []
    assert Counter(image for one in [*full, *rest] for image in one) == Counter(enumerate(sizes))
    for one in [*full, *rest]:
        assert len({size for _, size in one}) == 1
        height, width = one[0][1]
        assert len(one) * height * width <= batch_size * 64**2
    for one in full:  # not one image more would have found room
        height, width = one[0][1]
        assert (len(one) + 1) * height * width > batch_size * 64**2
    assert len(rest) == len({one[0][1] for one in rest})


def test_large_images_do_not_wait_for_others():
    passes = Passes(8, 64, max_bytes=100)
    assert passes.add("a", (64, 64), 60) == [] and passes.add("b", (64, 48), 30) == []
    assert passes.add("c", (48, 64), 20) == [["a"], ["b"], ["c"]]
    assert passes.add("d", (64, 64), 90) == [] and passes.rest() == [["d"]]


class TwoInputs(FakeEngine):
    """An engine with a landscape and a portrait input, of half the square one's pixels. `seen`: images of each pass."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def input_size(self, shown):
        return (32, 64) if shown.shape[1] > shown.shape[0] else (64, 32)

    def run(self, images, requests, **options):
        self.seen.append([image.shape[:2] for image in images])
        return super().run(images, requests, **options)


def test_images_of_one_input_size_share_a_pass_across_batches(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(22):
        size = (48, 64) if i % 2 else (64, 48)
        (tmp_path / "photos" / f"{i:02d}.png").write_bytes(encode(picture(i, size)))
    engine = TwoInputs()
    summary = label(
        lambda: engine, tmp_path / "photos", tmp_path / "out", tasks=["detect"], classes=["square"], batch_size=4,
        num_actors=0, fragment_size=20, exports=(),
    )  # fmt: skip
    assert summary["labelled"] == 22
    assert [len(one) for one in engine.seen] == [8, 8, 2, 2, 1, 1]  # twice `batch_size`; then the ends of the fragments
    assert all(len(set(one)) == 1 for one in engine.seen)


def test_a_fragment_is_published_while_the_model_has_the_next_one(tmp_path, monkeypatch):
    went_on, waited = threading.Event(), []

    class Engine(FakeEngine):
        def run(self, images, requests, **options):
            if self.images:
                went_on.set()
            return super().run(images, requests, **options)

    publish = Ledger.publish

    def slow(self, fragment, *rest):
        if fragment == 0:
            waited.append(went_on.wait(20))
        return publish(self, fragment, *rest)

    monkeypatch.setattr(Ledger, "publish", slow)
    fragments = [Fragment(n, tuple(items)) for n, items in enumerate(two_fragments(tmp_path / "photos"))]
    settings = WorkerSettings(Engine, (make_request("detect", classes=["square"]),), output=str(tmp_path / "out"))
    outcome = Labeller(settings).label(fragments)
    assert waited == [True] and (outcome.done, outcome.errors, outcome.stop) == (6, 0, None)
    assert Ledger(str(tmp_path / "out")).done() == {0, 1}


def test_what_was_published_before_a_store_failed_stays(tmp_path, monkeypatch):
    publish = Ledger.publish

    def full(self, fragment, *rest):
        if fragment == 1:
            raise UserError("the disk is full", "disk_full")
        return publish(self, fragment, *rest)

    monkeypatch.setattr(Ledger, "publish", full)
    fragments = [Fragment(n, tuple(items)) for n, items in enumerate(two_fragments(tmp_path / "photos"))]
    settings = WorkerSettings(FakeEngine, (make_request("detect", classes=["square"]),), output=str(tmp_path / "out"))
    outcome = Labeller(settings).label(fragments)
    assert outcome.stop == ("the disk is full", "disk_full") and Ledger(str(tmp_path / "out")).done() == {0}


def two_fragments(folder):
    paths = sorted(write_images(folder, 6).iterdir())
    items = [Item(path.name, str(path)) for path in paths]
    return items[:3], items[3:]
