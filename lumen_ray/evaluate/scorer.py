"""The requests about a row of a split, and the evaluator that scores each answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from lumen_ray.answer import Answer
from lumen_ray.evaluate.absent import AbsentNames
from lumen_ray.evaluate.calibration import CalibrationEvaluator, Reliability
from lumen_ray.evaluate.coco import CocoEvaluator
from lumen_ray.evaluate.concepts import ConceptEvaluator
from lumen_ray.evaluate.grounding import CountEvaluator, GroundEvaluator, ReferEvaluator, row_boxes
from lumen_ray.evaluate.masks import RegionSegmentEvaluator, SemanticEvaluator, region_prompts
from lumen_ray.evaluate.pictures import PicturesEvaluator
from lumen_ray.evaluate.scored import Row, ScoredRequest
from lumen_ray.evaluate.text import CaptionEvaluator, RegionCaptionEvaluator, RoutingEvaluator, VqaEvaluator
from lumen_ray.exemplars import ClassByExample
from lumen_ray.inference.request import make_request
from lumen_ray.structures import Region
from lumen_ray.tasks import get_task

#: tasks whose messages are scored
_SCORED_TEXTS = ("vqa", "caption", "region_caption")


class _Evaluator(Protocol):
    def evaluate(self) -> dict[str, Any]:
        """Metric -> value, or None where nothing was measured."""


class SplitScorer:
    """Turns rows into requests, and their answers into metrics.

    classes: all class names of the split; skeletons: class -> keypoint names; tasks: those to score; spoken: tasks that
    only free chat asks for; exemplars: those of `classes` that `CLASS_TASKS` ask for by example; absent: names of
    things that no image shows, which detect asks for as well. Requests are about one image: texts about several are
    left out and counted in `about_several`.
    """

    def __init__(
        self,
        classes: Sequence[str],
        skeletons: Mapping[str, Sequence[str]],
        tasks: Sequence[str],
        spoken: Sequence[str] = (),
        exemplars: Sequence[ClassByExample] = (),
        absent: Sequence[str] = (),
    ):
        self.classes = list(classes)
        self.exemplars = {shown.name: shown for shown in exemplars}
        own = {name.casefold() for name in classes}
        names = list(dict.fromkeys(absent))
        self.absent = AbsentNames(
            [name for name in names if name.casefold() not in own], [name for name in names if name.casefold() in own]
        )
        self.skeletons = {name: tuple(points) for name, points in skeletons.items()}
        self.tasks = set(tasks)
        self.spoken = self.tasks | set(spoken)
        self.box = CocoEvaluator("bbox", classes)
        self.mask = CocoEvaluator("segm", classes)
        self.keypoint = CocoEvaluator("keypoints", classes, skeletons=self.skeletons)
        self.concepts = {"detect": ConceptEvaluator("bbox"), "segment": ConceptEvaluator("segm")}
        self.calibration = {
            task: CalibrationEvaluator("segm" if task == "segment" else "bbox")
            for task in ("detect", "segment", "count", "ground", "refer")
        }
        self.refer, self.ground, self.count = ReferEvaluator(), GroundEvaluator(), CountEvaluator()
        self.vqa, self.caption, self.region = VqaEvaluator(), CaptionEvaluator(), RegionCaptionEvaluator()
        self.routing = RoutingEvaluator()
        self.pictures = PicturesEvaluator()
        self.region_mask, self.semantic = RegionSegmentEvaluator(), SemanticEvaluator(classes)
        self.about_several = 0

    def requests(self, row: Row) -> list[ScoredRequest]:
        """Requests for everything the row is annotated with, the routing token given."""
        return self._class_requests(row) + self._phrase_requests(row) + self._text_requests(row)

    def decision_requests(self, row: Row) -> list[ScoredRequest]:
        """Requests that need the decision threshold: their answers merge all instances, or should have none."""
        names, requests = self._annotated(row), []
        if "semantic" in self.tasks and names and any(i["mask"] for i in row["instances"]):
            request = make_request("semantic", classes=names)
            requests.append(ScoredRequest(request, partial(self.semantic.process, row)))
        if "detect" in self.tasks and self.absent.names:
            requests.append(ScoredRequest(make_request("detect", classes=self.absent.names), self.absent.process))
        return requests

    def picture_requests(self, row: Row, number: int) -> tuple[list[ScoredRequest], list[ScoredRequest]]:
        """(pictures to generate from text, edits of the row's image); `number` is their seed."""
        generated = self.pictures.generate_requests(row, number) if "generate" in self.tasks else []
        return generated, self.pictures.edit_requests(row, number) if "edit" in self.tasks else []

    def chat_requests(self, row: Row, number: int) -> tuple[list[ScoredRequest], list[ScoredRequest]]:
        """Each task's instruction as free chat, in which the LLM must choose the route: (with the image, text alone).

        `number` varies the wording.
        """
        if "chat" not in self.tasks:
            return [], []
        with_image: list[ScoredRequest] = []
        text_alone: list[ScoredRequest] = []
        for task, phrase in self._instructions(row, number).items():
            request = make_request("chat", text=get_task(task).prompt(phrase, number))
            requests = with_image if get_task(task).sees_image else text_alone
            requests.append(ScoredRequest(request, partial(self._score_route, task)))
        return with_image, text_alone

    def _annotated(self, row: Row) -> list[str]:
        """The classes annotated in the row, in the split's order."""
        annotated = set(row["classes"])
        return [name for name in self.classes if name in annotated]

    def _class_requests(self, row: Row) -> list[ScoredRequest]:
        """Over all classes annotated in the row: those that are absent test for false positives."""
        names = self._annotated(row)
        asked = [self.exemplars.get(name, name) for name in names]
        requests: list[ScoredRequest] = []
        if "detect" in self.tasks and names:
            score = partial(self._score_classes, self.box, row)
            requests.append(ScoredRequest(make_request("detect", classes=asked), score))
        if "segment" in self.tasks and names:
            score = partial(self._score_classes, self.mask, row)
            requests.append(ScoredRequest(make_request("segment", classes=asked), score))
        for region, mask in region_prompts(row) if "region_segment" in self.tasks else ():
            request = make_request("region_segment", region=region)
            requests.append(ScoredRequest(request, partial(self.region_mask.process, mask)))
        if "count" in self.tasks and names:
            requests.append(ScoredRequest(make_request("count", classes=asked), partial(self._score_counts, row)))
        return requests + (self._pose_requests(row, names) if "pose" in self.tasks else [])

    def _pose_requests(self, row: Row, names: Sequence[str]) -> list[ScoredRequest]:
        """One request per skeleton, because a pose request has one list of keypoints."""
        posed = [name for name in names if name in self.skeletons]
        requests = []
        for points in dict.fromkeys(self.skeletons[name] for name in posed):
            alike = [name for name in posed if self.skeletons[name] == points]
            request = make_request("pose", classes=alike, keypoints=points)
            requests.append(ScoredRequest(request, partial(_score_row, self.keypoint, {**row, "classes": alike})))
        return requests

    def _phrase_requests(self, row: Row) -> list[ScoredRequest]:
        requests: list[ScoredRequest] = []
        phrases = [p for p in row["phrases"] if p["task"] in self.tasks]
        for phrase in (p for p in phrases if p["task"] == "refer"):
            request = make_request("refer", text=phrase["phrase"])
            requests.append(ScoredRequest(request, partial(self._score_referred, row, phrase["instances"])))
        grounded = {p["phrase"].strip().lower(): p["instances"] for p in phrases if p["task"] == "ground"}
        if grounded:
            request = make_request("ground", text=" and ".join(f"[{phrase}]" for phrase in grounded))
            requests.append(ScoredRequest(request, partial(self._score_grounded, row, grounded)))
        return requests

    def _text_requests(self, row: Row) -> list[ScoredRequest]:
        requests: list[ScoredRequest] = []
        captioned = False
        for message in row["messages"]:
            task, turns = message["task"], message["turns"]
            if task not in self.tasks or len(turns) < 2:
                continue
            if message["image_turns"]:
                self.about_several += task in _SCORED_TEXTS
                continue
            question, truth = turns[0]["content"], turns[1]["content"]
            if task == "vqa":
                score = partial(_score_text, partial(self.vqa.process, question, truth))
                requests.append(ScoredRequest(make_request("vqa", text=question), score))
            elif task == "caption" and not captioned:  # photographs have several captions; one answer is scored
                captioned = True
                score = partial(_score_text, partial(self.caption.process, truth))
                requests.append(ScoredRequest(make_request("caption"), score))
            elif task == "region_caption" and message["regions"]:
                region = row_region(row, message["regions"][0])
                score = partial(_score_text, partial(self.region.process, truth))
                requests.append(ScoredRequest(make_request("region_caption", region=region), score))
        return requests

    def _score_classes(self, evaluator: CocoEvaluator, row: Row, answer: Answer) -> None:
        evaluator.process([row], [answer])
        self.concepts[answer.task].process(row, answer)
        self.calibration[answer.task].process(row, answer)

    @property
    def reliability(self) -> dict[str, Reliability]:
        """Of the instances of each task that has some."""
        found = {task: evaluator.reliability for task, evaluator in self.calibration.items() if task in self.tasks}
        return {task: diagram for task, diagram in found.items() if diagram.number.any()}

    def _score_grounded(self, row: Row, grounded: Mapping[str, Sequence[int]], answer: Answer) -> None:
        for prediction in answer.predictions:
            self.ground.process(row, grounded[prediction.phrase], prediction)
            self.calibration["ground"].add(prediction, _meant(row, grounded[prediction.phrase]))

    def _score_referred(self, row: Row, instances: Sequence[int], answer: Answer) -> None:
        self.refer.process(row, instances, answer)
        self.calibration["refer"].add(answer.predictions[0], _meant(row, instances))

    def _score_counts(self, row: Row, answer: Answer) -> None:
        self.count.process(row, answer)
        self.calibration["count"].process(row, answer)

    def _score_route(self, task: str, answer: Answer) -> None:
        self.routing.process(task, answer.route)

    def _instructions(self, row: Row, number: int) -> dict[str, str]:
        """Task -> the phrase of its instruction, for tasks the row is annotated for. Classes rotate, present or not."""
        phrases: dict[str, str] = {}
        names = self._annotated(row)
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
            if message["image_turns"]:
                continue
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
            if task in self.concepts:
                values |= self.concepts[task].evaluate() | self.calibration[task].evaluate()
            metrics.update({f"{kind}_{name}": value for name, value in values.items()})
            if task in self.tasks and values["AP"] is not None:
                tables[f"{kind}_AP50_per_class"] = per_class
        others: tuple[_Evaluator, ...] = (
            self.refer, self.ground, self.count, self.region_mask, self.semantic, self.vqa, self.caption, self.region,
            self.routing,
        )  # fmt: skip
        for other in others:
            metrics.update(other.evaluate())
        if self.absent.names:
            metrics |= self.absent.evaluate()
            tables["absent_boxes_per_image_and_name"] = self.absent.worst
        for task in ("count", "ground", "refer"):
            metrics[f"{task}_ECE"] = self.calibration[task].evaluate()["ECE"]
        if per_task := metrics.pop("routing_per_task"):
            tables["routing_per_task"] = per_task
        return metrics, tables


def _meant(row: Row, instances: Sequence[int]) -> list[Any]:
    """The boxes of a row's instances, as `CalibrationEvaluator.add` takes them."""
    return list(row_boxes(row, instances).to_xywh().astype(float))


def _score_row(evaluator: CocoEvaluator, row: Row, answer: Answer) -> None:
    evaluator.process([row], [answer])


def _score_text(process: Callable[[str | None], None], answer: Answer) -> None:
    process(answer.text)


def row_region(row: Row, index: int) -> Region:
    """Region `index` of the row as a visual prompt."""
    region = row["regions"][index]
    points = None if region["points"] is None else np.asarray(region["points"], np.float32).reshape(-1, 2)
    return Region(region["kind"], (row["height"], row["width"]), points, region["mask"])
