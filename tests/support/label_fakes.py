"""An engine whose answer is in the pixels: one box around everything brighter than the background."""

import io
import time

import numpy as np
from PIL import Image

from lumen_ray.answer import Answer
from lumen_ray.structures import Boxes, Keypoints, Masks, Prediction
from lumen_ray.tasks import TASKS, UNDERSTANDING

NAMES = ("top", "bottom")


def picture(index, size=(48, 64)):
    """A grey image with a white square whose place depends on `index`; uint8 [H, W, 3]."""
    image = np.full((*size, 3), 40, np.uint8)
    x, y = 4 + (index * 5) % 30, 3 + (index * 3) % 20
    image[y : y + 16, x : x + 20] = 250
    return image


def encode(image, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def write_images(folder, number, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + number):
        (folder / f"image{i:03d}.png").write_bytes(encode(picture(i)))
    return folder


class FakeListing:
    """Items in place of a `label.listing.Listing`."""

    def __init__(self, items, left_out=None):
        self._items, self.left_out = items, left_out or {}

    def __iter__(self):
        return iter(self._items)


class FakeEngine:
    """`fails(image)`: raises for such an image. Scores: 0.9 for the first class, 0.1 less for each further one."""

    preset, version, image_size, largest_side, dtype = "fake", "v0", 64, 64, "float32"
    tasks, serving, chosen_decoders = UNDERSTANDING, {}, {}
    skeletons = {"square": NAMES}
    classes = ("square", "circle")
    edges = {"square": [[0, 1]]}

    def __init__(self, fails=lambda image: False):
        self.fails = fails
        self.images = 0

    def input_size(self, shown):
        return self.image_size, self.image_size

    def run(
        self,
        images,
        requests,
        *,
        score_threshold=0.05,
        max_per_phrase=300,
        max_new_tokens=48,
        class_chunk=64,
        route_only=False,
    ):
        if any(self.fails(image) for image in images):
            raise RuntimeError("no luck with this image")
        self.images += len(images)
        return [
            [self._answer(image, request, score_threshold) for request in mine]
            for image, mine in zip(images, requests, strict=True)
        ]

    def _answer(self, image, request, threshold):
        size, task = image.shape[:2], TASKS[request.task]
        if task.is_text:
            return Answer(request.task, size, text=f"{request.text or 'a square'} {int(image.max())}")
        mask = image[..., 0] > 128
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        predictions = []
        for k, phrase in enumerate(request.phrases):
            score = 0.9 - 0.1 * k
            there = len(xs) and score >= threshold
            box = [[xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]] if there else []
            p = Prediction(phrase, Boxes(box, size), [score] * len(box))
            if request.task == "segment":
                p.masks = Masks.from_arrays(np.stack([mask] * len(box)) if box else np.zeros((0, *size), bool))
            if request.task == "pose":
                names = request.keypoints or self.skeletons[phrase]
                points = [[[b[0], b[1], 0.9], [b[2], b[3], 0.1]] for b in box]
                p.keypoints = Keypoints(points, names, size)
            predictions.append(p)
        return Answer(request.task, size, predictions, route=task.routing_token)


class EncodingFake(FakeEngine):
    """It encodes images for several questions: `encoded` counts them. `caption`: (image) -> text. Its other decoder,
    "second", finds the same box a quarter of its width further right. Asked about a region, it says yes as far as the
    region is white."""

    serving = dict.fromkeys(("detect", "segment", "pose", "count"), "first")

    def __init__(self, caption=lambda image: "a square and two circles .", shift=0):
        super().__init__()
        self.caption, self.shift, self.encoded = caption, shift, 0

    def input_size(self, shown):
        return shown.shape[:2]

    def encode(self, images):
        assert len({image.shape for image in images}) == 1
        self.encoded += len(images)
        return tuple(images)

    def beside(self, decoder, tasks):
        other = EncodingFake(self.caption, shift=5)
        other.serving = self.serving | {"detect": decoder, "segment": decoder}
        return other

    def ask_regions(self, images, questions):
        values = []
        for question in questions:
            (x1, y1), (x2, y2) = question.region.points.astype(int)
            values.append(float((images[question.image][y1:y2, x1:x2, 0] > 128).mean()))
        return values

    def _answer(self, image, request, threshold):
        if request.task == "caption":
            return Answer("caption", image.shape[:2], text=self.caption(image))
        return super()._answer(np.roll(image, self.shift, axis=1), request, threshold)


def make_picky_engine():
    """An engine that fails on `picture(5)`."""
    return FakeEngine(lambda image: np.array_equal(image, picture(5)))


def slow_engine():
    """An engine that takes half a second for a batch."""

    class Slow(FakeEngine):
        def run(self, *args, **kwargs):
            time.sleep(0.5)
            return super().run(*args, **kwargs)

    return Slow()


def held_engine(path, images):
    """Makes engines that, after so many images, answer no more until the file `path` is there, for two minutes."""

    def make():
        engine = FakeEngine()

        def held(image):
            ends = time.monotonic() + 120
            while engine.images >= images and not path.exists() and time.monotonic() < ends:
                time.sleep(0.05)
            return False

        engine.fails = held
        return engine

    return make
