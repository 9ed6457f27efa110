"""The routes of Roboflow's inference server that `inference_sdk.InferenceHTTPClient` asks, over our tasks.

The client looks `model_id` up in `/model/registry`, whose answer says to which route it posts: our model is there once
for each task (`MODEL_TASKS`). Boxes are given by centre and size, masks as polygons or COCO RLE. Unknown keys are
ignored, as by Roboflow's server, since the client sends settings of its own along.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request

from lumen_ray.answer import Answer
from lumen_ray.errors import UserError
from lumen_ray.serve import roboflow_schemas as shapes
from lumen_ray.serve.asking import Backend, answer_each
from lumen_ray.serve.http import json_schema_ref
from lumen_ray.serve.own_classes import classes_or_own
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.version import __version__
from lumen_ray.wire import schemas
from lumen_ray.wire.neutral import refuse_others

#: the task types of Roboflow's registry -> our tasks
MODEL_TASKS = {"object-detection": "detect", "instance-segmentation": "segment", "keypoint-detection": "pose"}
#: names this server to `get_server_info`, another one in each replica
_SERVER = str(uuid.uuid4())

#: bodies, for OpenAPI
BODIES = (
    *(shapes.RoboflowDetectionBody, shapes.RoboflowSegmentationBody, shapes.RoboflowKeypointsBody),
    *(shapes.RoboflowWorldBody, shapes.RoboflowTextBody, shapes.RoboflowConceptBody, shapes.RoboflowModelBody),
)


class _Asker:
    """Asks the task API, and puts its answers into Roboflow's responses."""

    def __init__(self, backend: Backend, settings: ServeSettings):
        self.backend = backend
        self.settings = settings

    async def about_each(
        self,
        body: shapes.RoboflowBody,
        task: str,
        fields: dict[str, Any],
        read: Callable[[Answer], dict[str, Any]],
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """`read` of the answer about an image, with what all responses have; a list of them for several images."""
        begin = time.perf_counter()
        images, places = body.given()
        asked = (task, schemas.parse(schemas.TaskFields, fields))
        each, extra = await answer_each(self.backend, self.settings, images, [asked], places)
        seconds = round(time.perf_counter() - begin, 4)
        found = [
            {
                **read(answer),
                "image": {"width": answer.size[1], "height": answer.size[0]},
                "time": seconds,
                "inference_id": str(uuid.uuid4()),
                "model": answer.model or extra["model"],
            }
            for (answer,) in each
        ]
        return found if len(found) > 1 else found[0]

    async def predictions(
        self, body: Any, task: str, classes: list[str], masks: shapes.MaskFormat = "polygon", keypoint_score: float = 0
    ) -> Any:
        """Boxes, masks or keypoints of the classes."""
        refuse_others(body)
        most = getattr(body, "max_detections", None)
        own = (await self.backend.info())["classes"]
        ids = {name: n for n, name in enumerate(dict.fromkeys([*own, *(name.strip() for name in classes)]))}

        def read(answer: Answer) -> dict[str, Any]:
            kept = answer if most is None else answer.best(most)
            return {"predictions": shapes.predictions(kept, ids, masks, keypoint_score)}

        fields = {"classes": classes, "score_threshold": body.confidence, "max_per_phrase": most}
        return await self.about_each(body, task, fields, read)


def make_router(backend: Backend, settings: ServeSettings) -> APIRouter:
    errors: dict[int | str, dict[str, Any]] = dict.fromkeys(("4XX", "5XX"), {"model": shapes.RoboflowError})
    router = APIRouter(tags=["roboflow"], responses=errors)
    asker = _Asker(backend, settings)

    @router.get("/info", summary="The server, as Roboflow's client asks for it")
    async def info() -> dict[str, str]:
        return {"name": "lumen_ray", "version": __version__, "uuid": _SERVER}

    @router.get("/model/registry", summary="The model, once for each of its tasks that Roboflow's client knows")
    async def registry() -> dict[str, Any]:
        return {"models": _registry(await backend.info())}

    async def loaded(request: Request) -> dict[str, Any]:
        body = schemas.parse(shapes.RoboflowModelBody, schemas.parse_json(await request.body()))
        models = _registry(await backend.info())
        _check_model(body.model_id, models)
        return {"models": models}

    router.add_api_route(
        "/model/add",
        loaded,
        methods=["POST"],
        summary="The registry, if it has that model; none is loaded",
        openapi_extra=_body(shapes.RoboflowModelBody),
    )

    @router.post(
        "/infer/object_detection",
        summary="Boxes, for Roboflow's client",
        openapi_extra=_body(shapes.RoboflowDetectionBody),
    )
    async def object_detection(request: Request) -> Any:
        body = await _read(request, shapes.RoboflowDetectionBody, backend)
        return await asker.predictions(body, "detect", await classes_or_own(backend, body.class_filter, "class_filter"))

    @router.post(
        "/infer/instance_segmentation",
        summary="Masks, for Roboflow's client",
        openapi_extra=_body(shapes.RoboflowSegmentationBody),
    )
    async def instance_segmentation(request: Request) -> Any:
        body = await _read(request, shapes.RoboflowSegmentationBody, backend)
        classes = await classes_or_own(backend, body.class_filter, "class_filter")
        return await asker.predictions(body, "segment", classes, body.response_mask_format or "polygon")

    @router.post(
        "/infer/keypoints_detection",
        summary="Keypoints, for Roboflow's client",
        openapi_extra=_body(shapes.RoboflowKeypointsBody),
    )
    async def keypoints_detection(request: Request) -> Any:
        body = await _read(request, shapes.RoboflowKeypointsBody, backend)
        classes = await classes_or_own(backend, body.class_filter, "class_filter", poses=True)
        return await asker.predictions(body, "pose", classes, keypoint_score=body.keypoint_confidence or 0)

    @router.post(
        "/yolo_world/infer",
        summary="Boxes of classes by name, for infer_from_yolo_world",
        openapi_extra=_body(shapes.RoboflowWorldBody),
    )
    async def yolo_world(request: Request) -> Any:
        body = await _read(request, shapes.RoboflowWorldBody)
        return await asker.predictions(body, "detect", body.text)

    async def lmm(request: Request) -> Any:
        body = await _read(request, shapes.RoboflowTextBody, backend)
        fields = {"text": body.prompt or None, "max_new_tokens": body.max_new_tokens}
        task = "vqa" if body.prompt else "caption"
        return await asker.about_each(body, task, fields, lambda answer: {"response": answer.text or ""})

    for path in ("/infer/lmm", "/infer/lmm/{model_id:path}"):
        router.add_api_route(
            path,
            lmm,
            methods=["POST"],
            summary="A caption or an answer, for infer_lmm",
            openapi_extra=_body(shapes.RoboflowTextBody),
            include_in_schema=path == "/infer/lmm",
        )

    @router.post(
        "/sam3/concept_segment",
        summary="Masks of concepts by name, for sam3_concept_segment",
        openapi_extra=_body(shapes.RoboflowConceptBody),
    )
    async def concept_segment(request: Request) -> Any:
        body = await _read(request, shapes.RoboflowConceptBody)
        refuse_others(body)
        for n, prompt in enumerate(body.prompts):
            refuse_others(prompt, f"prompts.{n}.")
        default = settings.defaults.score_threshold if body.output_prob_thresh is None else body.output_prob_thresh
        lowest = [default if p.output_prob_thresh is None else p.output_prob_thresh for p in body.prompts]
        fields = {"classes": [p.text for p in body.prompts], "score_threshold": min(lowest)}
        return await asker.about_each(
            body,
            "segment",
            fields,
            lambda answer: {"prompt_results": _concepts(answer, body.prompts, lowest, body.format)},
        )

    return router


def _registry(info: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of `/model/registry`: `PRESET` for boxes, and `PRESET/TASK_TYPE` for each task type served."""
    size = info["image_size"]
    served = [kind for kind, task in MODEL_TASKS.items() if task in info["tasks"]]
    names = [(f"{info['preset']}/{kind}", kind) for kind in served]
    if "object-detection" in served:
        names.insert(0, (info["preset"], "object-detection"))
    shape = {"batch_size": None, "input_height": size, "input_width": size}
    return [{"model_id": name, "task_type": kind, **shape} for name, kind in names]


def _check_model(name: str, models: Sequence[dict[str, Any]]) -> None:
    """Raises `UserError` for a model that the registry does not have."""
    known = [model["model_id"] for model in models]
    if name not in known:
        raise UserError(f"unknown model '{name}'; models: {', '.join(known)}", "unknown_model", "model_id")


async def _read(request: Request, model: Any, backend: Backend | None = None) -> Any:
    """The body as `model`. With `backend` its `model_id`, if there is one, must be of the registry."""
    body = schemas.parse(model, schemas.parse_json(await request.body()))
    if backend is not None and body.model_id is not None:
        _check_model(body.model_id, _registry(await backend.info()))
    return body


def _concepts(
    answer: Answer, prompts: Sequence[shapes.RoboflowPrompt], lowest: Sequence[float], form: shapes.MaskFormat
) -> list[dict[str, Any]]:
    """The masks of each prompt with at least its score."""
    instances = answer.to_dict()["instances"]
    results = []
    for n, (prompt, score) in enumerate(zip(prompts, lowest, strict=True)):
        found = [i for i in instances if i["phrase"] == prompt.text.strip() and i["score"] >= score]
        masks = [i["mask"] if form == "rle" else [shapes.polygon(i["mask"], answer).tolist()] for i in found]
        results.append(
            {
                "prompt_index": n,
                "echo": {"prompt_index": n, "type": "text", "text": prompt.text, "num_boxes": 0},
                "predictions": [
                    {"masks": mask, "confidence": i["score"], "format": form}
                    for mask, i in zip(masks, found, strict=True)
                ],
            }
        )
    return results


def _body(model: type) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": json_schema_ref(model)}}}}
