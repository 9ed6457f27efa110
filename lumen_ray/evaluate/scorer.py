"""What to ask about a row of a split, and where each answer is scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lumen_ray.evaluate.coco import CocoEvaluator
from lumen_ray.evaluate.grounding import CountEvaluator, GroundEvaluator, ReferEvaluator
from lumen_ray.evaluate.masks import RegionSegmentEvaluator, SemanticEvaluator, region_prompts
from lumen_ray.evaluate.pictures import PicturesEvaluator
from lumen_ray.evaluate.text import CaptionEvaluator, RegionCaptionEvaluator, RoutingEvaluator, VqaEvaluator
from lumen_ray.inference.request import Request, make_request
from lumen_ray.structures import Answer, Region
from lumen_ray.tasks import get_task

Row = dict[str, Any]
#: A request and what to do with its answer.
Ask = tuple[Request, Callable[[Answer], None]]


class SplitScorer:
    """Turns rows into requests, and their answers into metrics.

    classes: all class names of the split; skeletons: class -> keypoint names; tasks: what to ask; spoken: what is asked
    in free chat besides, if anything is.
    """

    def __init__(
        self,
        classes: Sequence[str],
        skeletons: Mapping[str, Sequence[str]],
        tasks: Sequence[str],
        spoken: Sequence[str] = (),
    ):
        self.classes = list(classes)
        self.skeletons = {name: tuple(points) for name, points in skeletons.items()}
        self.tasks = set(tasks)
        self.spoken = self.tasks | set(spoken)
        self.box = CocoEvaluator("bbox", classes)
        self.mask = CocoEvaluator("segm", classes)
        self.keypoint = CocoEvaluator("keypoints", classes, skeletons=self.skeletons)
        self.refer, self.ground, self.count = ReferEvaluator(), GroundEvaluator(), CountEvaluator()
        self.vqa, self.caption, self.region = VqaEvaluator(), CaptionEvaluator(), RegionCaptionEvaluator()
        self.routing = RoutingEvaluator()
        self.pictures = PicturesEvaluator()
        self.region_mask, self.semantic = RegionSegmentEvaluator(), SemanticEvaluator(classes)

    def asks(self, row: Row) -> list[Ask]:
        """Everything the row is annotated for, with the routing token forced."""
        return self._class_asks(row) + self._phrase_asks(row) + self._text_asks(row)

    def decision_asks(self, row: Row) -> list[Ask]:
        """What is made of all instances together, and so wants only those that count as found."""
        names = [name for name in self.classes if name in row["classes"]]
        if "semantic" not in self.tasks or not names or not any(i["mask"] for i in row["instances"]):
            return []
        return [(make_request("semantic", classes=names), lambda a: self.semantic.process(row, a))]

    def picture_asks(self, row: Row, number: int) -> tuple[list[Ask], list[Ask]]:
        """(pictures to make of words alone, edits of the row's own picture); `number` is their seed."""
        made = self.pictures.generate_asks(row, number) if "generate" in self.tasks else []
        return made, self.pictures.edit_asks(row, number) if "edit" in self.tasks else []

    def _class_asks(self, row: Row) -> list[Ask]:
        """Over all classes annotated in the row: those that are absent test for false positives."""
        annotated = set(row["classes"])
        names = [name for name in self.classes if name in annotated]
        posed = [name for name in names if name in self.skeletons]
        asks: list[Ask] = []
        if "detect" in self.tasks and names:
            asks.append((make_request("detect", classes=names), lambda a: self.box.process([row], [a])))
        if "segment" in self.tasks and names:
            asks.append((make_request("segment", classes=names), lambda a: self.mask.process([row], [a])))
        for region, mask in region_prompts(row) if "region_segment" in self.tasks else ():
            request = make_request("region_segment", region=region)
            asks.append((request, lambda a, mask=mask: self.region_mask.process(mask, a)))
        if "count" in self.tasks and names:
            asks.append((make_request("count", classes=names), lambda a: self.count.process(row, a)))
        # one request per skeleton, because a pose request names one list of keypoints
        for points in dict.fromkeys(self.skeletons[name] for name in posed) if "pose" in self.tasks else ():
            alike = [name for name in posed if self.skeletons[name] == points]
            part = {**row, "classes": alike}
            request = make_request("pose", classes=alike, keypoints=points)
            asks.append((request, lambda a, part=part: self.keypoint.process([part], [a])))
        return asks

    def _phrase_asks(self, row: Row) -> list[Ask]:
        asks: list[Ask] = []
        wanted = [p for p in row["phrases"] if p["task"] in self.tasks]
        for item in (p for p in wanted if p["task"] == "refer"):
            request = make_request("refer", text=item["phrase"])
            asks.append((request, lambda a, item=item: self.refer.process(row, item["instances"], a)))
        grounded = {p["phrase"].strip().lower(): p["instances"] for p in wanted if p["task"] == "ground"}
        if grounded:
            request = make_request("ground", text=" and ".join(f"[{phrase}]" for phrase in grounded))

            def score(answer: Answer) -> None:
                for prediction in answer.predictions:
                    self.ground.process(row, grounded[prediction.phrase], prediction)

            asks.append((request, score))
        return asks

    def _text_asks(self, row: Row) -> list[Ask]:
        asks: list[Ask] = []
        captioned = False
        for message in row["messages"]:
            task, turns = message["task"], message["turns"]
            if task not in self.tasks or len(turns) < 2:
                continue
            question, truth = turns[0]["content"], turns[1]["content"]
            if task == "vqa":
                request = make_request("vqa", text=question)
                asks.append((request, lambda a, q=question, t=truth: self.vqa.process(q, t, a.text)))
            elif task == "caption" and not captioned:  # photographs have several captions; one answer is scored
                captioned = True
                asks.append((make_request("caption"), lambda a, t=truth: self.caption.process(t, a.text)))
            elif task == "region_caption" and message["regions"]:
                region = row_region(row, message["regions"][0])
                request = make_request("region_caption", region=region)
                asks.append((request, lambda a, t=truth: self.region.process(t, a.text)))
        return asks

    def chat_asks(self, row: Row, number: int) -> tuple[list[Ask], list[Ask]]:
        """Each task's instruction as free chat: the LLM itself must choose the route. `number` varies the wording.
        (those about the row's image, those of words alone)"""
        if "chat" not in self.tasks:
            return [], []
        seen: list[Ask] = []
        blind: list[Ask] = []
        for task, phrase in self._instructions(row, number).items():
            text = get_task(task).prompt(phrase, number)
            request = make_request("chat", text=text)
            asks = seen if get_task(task).sees_image else blind
            asks.append((request, lambda a, task=task: self.routing.process(task, a.route)))
        return seen, blind

    def _instructions(self, row: Row, number: int) -> dict[str, str]:
        """Task -> the phrase to ask for; only what the split has. Classes rotate, present or not."""
        phrases: dict[str, str] = {}
        names = [name for name in self.classes if name in row["classes"]]
        posed = [name for name in names if name in self.skeletons]
        for task in ("detect", "segment", "count"):
            if task in self.spoken and names:
                phrases[task] = names[number % len(names)]
        if "pose" in self.spoken and posed:
            phrases["pose"] = posed[number % len(posed)]
        for item in row["phrases"]:
            if item["task"] in self.spoken:
                phrases.setdefault(item["task"], item["phrase"])
        for message in row["messages"]:
            if message["task"] in ("vqa", "edit") and message["task"] in self.spoken:
                phrases.setdefault(message["task"], message["turns"][0]["content"])
            if message["task"] == "caption" and "caption" in self.spoken:
                phrases.setdefault("caption", "")
            if message["task"] == "caption" and "generate" in self.spoken:
                phrases.setdefault("generate", message["turns"][-1]["content"])
        return phrases

    def evaluate(self) -> tuple[dict[str, Any], dict[str, dict[str, float | None]]]:
        """(metric -> value, None where nothing could be measured; table name -> per-class or per-task values)."""
        metrics: dict[str, Any] = {}
        tables: dict[str, dict[str, float | None]] = {}
        for task, kind, evaluator in (
            ("detect", "box", self.box),
            ("segment", "mask", self.mask),
            ("pose", "keypoint", self.keypoint),
        ):
            values = evaluator.evaluate()
            per_class = values.pop("per_class")
            metrics.update({f"{kind}_{name}": value for name, value in values.items()})
            if task in self.tasks and values["AP"] is not None:
                tables[f"{kind}_AP50_per_class"] = per_class
        others = (
            self.refer, self.ground, self.count, self.region_mask, self.semantic, self.vqa, self.caption, self.region,
            self.routing,
        )  # fmt: skip
        for evaluator in others:
            metrics.update(evaluator.evaluate())
        if per_task := metrics.pop("routing_per_task"):
            tables["routing_per_task"] = per_task
        return metrics, tables


def row_region(row: Row, index: int) -> Region:
    """The row's region of that index as a visual prompt."""
    region = row["regions"][index]
    points = None if region["points"] is None else np.asarray(region["points"], np.float32).reshape(-1, 2)
    return Region(region["kind"], (row["height"], row["width"]), points, region["mask"])
