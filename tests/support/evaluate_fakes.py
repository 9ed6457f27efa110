"""An engine that answers from the annotations of known rows, with errors by choice."""

import hashlib

import numpy as np

from lumen_ray.answer import Answer
from lumen_ray.data.images import decode
from lumen_ray.data.scenes.render import SKELETONS
from lumen_ray.data.scenes.text import CLASSES
from lumen_ray.data.shards.shards import ShardWriter, build_manifest, write_manifest
from lumen_ray.evaluate.masks import region_prompts
from lumen_ray.inference.semantic import class_regions
from lumen_ray.keypoints import FIGURE_EDGES
from lumen_ray.structures import Boxes, Keypoints, Masks, Prediction
from lumen_ray.tasks import TASKS, UNDERSTANDING, task_of_prompt

POSED = {name: SKELETONS[name] for name in CLASSES if name in SKELETONS}


def write_split(folder, rows):
    with ShardWriter(folder, "part-00000.parquet", rows_per_group=5) as writer:
        for row in rows:
            writer.write(row)
    categories = [
        {"name": name, "keypoints": list(POSED.get(name, ())), "skeleton": [list(e) for e in FIGURE_EDGES]}
        for name in CLASSES
    ]
    write_manifest(folder, build_manifest([writer.entry], categories=categories))
    return folder


def image_key(image):
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


class FakeEngine:
    """`shift`: pixels by which boxes, masks and keypoints are off; `text`: the answer to everything, None for the true
    one; `route`: the token free chat always chooses, "truth" for the right one; `instances`: False for no instances."""

    preset, version, image_size, largest_side, tasks = "fake", "0000", 128, 128, UNDERSTANDING
    chosen_decoders, edges, classes = {}, {}, tuple(CLASSES)
    dtype = "float32"
    serving = {name: "fake" for name in UNDERSTANDING if not TASKS[name].is_text}

    def __init__(self, rows, *, skeletons=(), shift=0.0, text=None, route="truth", instances=True):
        self.rows = {image_key(decode(row["image"])): row for row in rows}
        self.skeletons = dict(skeletons)
        self.shift, self.text, self.route, self.instances = shift, text, route, instances
        self.calls = []

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
        self.calls.append([[r.task for r in mine] for mine in requests])
        return [
            [self._answer(self.rows[image_key(image)], request) for request in mine]
            for image, mine in zip(images, requests, strict=True)
        ]

    def _answer(self, row, request):
        size = (row["height"], row["width"])
        task = TASKS[request.task]
        if request.task == "chat":
            known = task_of_prompt(request.text)
            token = TASKS[known[0]].routing_token if known else None
            return Answer("chat", size, text="" if token is None else None, route=self._route(token))
        if task.is_text:
            return Answer(request.task, size, text=self._truth(row, request) if self.text is None else self.text)
        if request.task == "region_segment":
            return Answer(request.task, size, [self._prediction(row, request, "region")], route=task.routing_token)
        predictions = [self._prediction(row, request, phrase) for phrase in request.phrases]
        predictions = class_regions(predictions) if request.task == "semantic" else predictions
        return Answer(request.task, size, predictions, route=task.routing_token)

    def _route(self, token):
        return token if self.route == "truth" else self.route

    def _truth(self, row, request):
        for message in row["messages"]:
            question, answer = (turn["content"] for turn in message["turns"][:2])
            if message["task"] != request.task:
                continue
            if request.task == "caption" or question == request.text:
                return answer
            if request.region and self._same(row["regions"][message["regions"][0]], request.region):
                return answer
        raise AssertionError(f"the row has no annotation for {request}")

    def _same(self, region, asked):
        if region["kind"] == "mask":
            return region["mask"] == asked.rle
        return asked.points is not None and np.array_equal(np.float32(region["points"]).reshape(-1, 2), asked.points)

    def _prediction(self, row, request, phrase):
        size = (row["height"], row["width"])
        indices = [i for i, x in enumerate(row["instances"]) if x["phrase"] == phrase]
        if request.task in ("refer", "ground"):
            items = [p for p in row["phrases"] if p["task"] == request.task and p["phrase"] == phrase]
            indices = items[0]["instances"]
        if request.region is not None:
            meant = [
                mask for region, mask in region_prompts(row) if np.array_equal(region.points, request.region.points)
            ]
            indices = [i for i, x in enumerate(row["instances"]) if x["mask"] in meant]
        found = [row["instances"][i] for i in indices] if self.instances else []
        boxes = np.array([x["box"] for x in found], np.float32).reshape(-1, 4) + self.shift
        prediction = Prediction(phrase, Boxes(boxes, size), np.linspace(0.9, 0.5, len(found)))
        if TASKS[request.task].result == "masks":
            masks = Masks([x["mask"] for x in found], size).to_arrays()
            prediction.masks = Masks.from_arrays(np.roll(masks, round(self.shift), axis=2), size)
        if request.task == "pose":
            points = np.array([x["keypoints"] for x in found], np.float32).reshape(
                len(found), len(request.keypoints), 3
            )
            prediction.keypoints = Keypoints(points + [self.shift, self.shift, 0], request.keypoints, size)
        return prediction
