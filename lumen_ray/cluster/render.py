"""Renders the manifests for a preset, a number of GPUs and a store.

The manifests of `cluster/kuberay`, with an overlay, are read as kustomize would; then the numbers, commands and places
are set. Nothing is written here.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

from lumen_ray.cluster import kustomize
from lumen_ray.cluster.entrypoints import entrypoint
from lumen_ray.cluster.kustomize import Document
from lumen_ray.cluster.manifests import (
    FOLDER,
    component_of,
    container,
    group,
    job_of,
    quantity,
    ray_cluster_of,
    templates,
    variant_folder,
)
from lumen_ray.cluster.needs import EVALUATION_BYTES, GIB, Needs, PodNeeds
from lumen_ray.cluster.nodes import selector
from lumen_ray.cluster.request import RenderRequest
from lumen_ray.cluster.schemas import Schemas
from lumen_ray.cluster.serve_config import serve_plan
from lumen_ray.cluster.yaml_text import Figure, dump, plain
from lumen_ray.data import urls
from lumen_ray.errors import UserError
from lumen_ray.version import __version__

COMMON, HISTORY = "common", "history"


def render(request: RenderRequest) -> dict[str, str]:
    """File name -> text, one file for each part and `common.yaml`.

    The same request gives the same bytes. Raises `UserError` for what is wrong with the request, and for a model that
    does not fit.
    """
    request.check()
    documents = kustomize.render(variant_folder(request.overlay))
    if request.history:
        documents = kustomize.apply(FOLDER / "history", documents)
    needs = Needs(request, own_recipe=_own_recipe(documents))
    wanted = {COMMON, *request.verbs, *([HISTORY] if request.history else [])}
    documents = [document for document in documents if component_of(document) in wanted]
    kustomize.set_namespace(documents, request.namespace)
    for document in documents:
        _set_pods(document, request)
        if document["kind"] == "NetworkPolicy" and request.endpoint_port:
            _open_port(document, request.endpoint_port)
        if fill := _FILL.get(component_of(document)):
            fill(document, request, needs)
        if component_of(document) == HISTORY or ray_cluster_of(document):
            _set_history(document, request)
    if request.changes is not None:
        documents = kustomize.apply(request.changes, documents)
    if request.crds is not None:
        schemas = Schemas(request.crds)
        for document in documents:
            schemas.check(plain(document))
    parts: dict[str, list[Document]] = {}
    for document in documents:
        parts.setdefault(component_of(document), []).append(document)
    return {f"{part}.yaml": _header(part, request) + "---\n".join(map(dump, found)) for part, found in parts.items()}


def command_of(request: RenderRequest) -> str:
    """The command line that asks for it, without `--output`."""
    words = ["lumen-ray", "cluster", "render", "--preset", request.preset, "--gpus", str(request.gpus)]
    words += ["--storage", urls.shown(request.storage)]
    default = RenderRequest(request.preset, request.gpus, request.storage)
    for option, name in _OPTIONS.items():
        value = getattr(request, name)
        if value == getattr(default, name):
            continue
        words.append(option)
        if value is not True:
            words.append(",".join(value) if isinstance(value, tuple) else str(value))
    return shlex.join(words)


_OPTIONS = {
    "--for": "verbs", "--gpu": "gpu", "--gpus-per-node": "gpus_per_node", "--recipe": "recipe", "--workers": "workers",
    "--cpus-per-gpu": "cpus_per_gpu", "--cpu-workers": "cpu_workers", "--namespace": "namespace", "--image": "image",
    "--overlay": "overlay", "--secret": "secret", "--queue": "queue", "--history": "history", "--changes": "changes",
    "--crds": "crds",
}  # fmt: skip


def _header(part: str, request: RenderRequest) -> str:
    lines = [
        f"Rendered by lumen-ray {__version__}:",
        f"  {command_of(request)}",
        f"Apply with: kubectl apply -f {part}.yaml",
    ]
    return "".join(f"# {line}\n" for line in lines)


def _own_recipe(documents: list[Document]) -> str:
    """The recipe of the manifests' own training."""
    [train] = [d for d in documents if component_of(d) == "train"]
    words = shlex.split(train["spec"]["entrypoint"])
    return words[words.index("--recipe") + 1]


# Places ---------------------------------------------------------------------------------------------------------------


def _set_pods(document: Document, request: RenderRequest) -> None:
    """Sets images and the secret of all pods, and the nodes of those with GPUs."""
    nodes = selector(request.overlay, request.kind_of_gpu.name) if request.kind_of_gpu else None
    for name, template in templates(document):
        for each in template["spec"]["containers"]:
            each["image"] = _image(each["image"], request.image)
            for source in each.get("envFrom", []) if request.secret else []:
                source["secretRef"] = {"name": request.secret}
        if name == "gpu" and nodes:
            template["spec"]["nodeSelector"] = dict(nodes)


def _image(own: str, given: str) -> str:
    """The image `given`, without a tag of its own with that of the version and of CPU or CUDA as the manifests have it;
    images of others stay."""
    if not own.startswith("lumen-ray"):
        return own
    if ":" in given.rpartition("/")[2] or "@" in given:
        return given
    is_cuda = own.endswith("cuda")
    return f"{given}:{__version__}-{'cuda' if is_cuda else 'cpu'}"


def _open_port(policy: Document, port: int) -> None:
    """Lets pods reach a store at another port than that of HTTPS."""
    for rule in policy["spec"].get("egress", []):
        if {"port": 443, "protocol": "TCP"} in rule.get("ports", []):
            rule["ports"].append({"port": Figure(port, "--storage"), "protocol": "TCP"})


def _set_history(document: Document, request: RenderRequest) -> None:
    """Sets the bucket of Ray's history server, and of its collectors."""
    scheme, path, settings = urls.split(request.storage)
    bucket, _, folder = path.partition("/")
    values = {"STORAGE_ROOT_DIR": "/".join([*([folder.rstrip("/")] if folder else []), "history"])}
    values |= {"STORAGE_BACKEND": "s3", "S3_BUCKET": bucket} if scheme == "s3" else {"STORAGE_BACKEND": "gcs"}
    if scheme == "gs":
        values["GCS_BUCKET"] = bucket
    options = dict(item.split("=", 1) for item in settings.split("&") if item)
    if region := options.get("region"):
        values["S3_REGION"] = region
    spec = ray_cluster_of(document)
    owners = [spec["historyServerOptions"]["collectorOptions"]] if spec and "historyServerOptions" in spec else []
    if document["kind"] == "Deployment":
        owners.append(document["spec"]["template"]["spec"]["containers"][0])
    for owner in owners:
        kept = [item for item in owner["env"] if "valueFrom" in item]
        owner["env"] = [{"name": name, "value": value} for name, value in sorted(values.items())]
        for item in kept:
            reference = item["valueFrom"]["secretKeyRef"]
            owner["env"].append(
                {**item, "valueFrom": {"secretKeyRef": {**reference, "name": request.secret or reference["name"]}}}
            )


# Sizes ----------------------------------------------------------------------------------------------------------------


def _set_size(workers: Document, needs: PodNeeds) -> None:
    """Sets the size of the pods of a group, and of Ray's object store in them."""
    resources = container(workers["template"])["resources"]
    size: dict[str, Any] = {"cpu": str(needs.cpus), "memory": f"{needs.memory}Gi"}
    if needs.gpus:
        size["nvidia.com/gpu"] = str(needs.gpus)
    resources["requests"] |= size | {
        "cpu": Figure(str(needs.cpus), needs.cpu_why),
        "memory": Figure(f"{needs.memory}Gi", needs.memory_why),
    }
    resources["limits"] |= size
    store = Figure(str(needs.object_store), "a quarter of the memory")
    workers["rayStartParams"] = workers.get("rayStartParams", {}) | {"object-store-memory": store}
    workers["template"] = workers.pop("template")  # last, since it is long


def _set_numbers(workers: Document, least: int, most: int, why: str) -> None:
    workers["minReplicas"] = least
    workers["maxReplicas"] = Figure(most, why)


def _set_cpu_workers(document: Document, request: RenderRequest) -> None:
    cluster = ray_cluster_of(document)
    for workers in (cluster or {}).get("workerGroupSpecs", []):
        if workers["groupName"] == "cpu" and request.cpu_workers is not None and workers["maxReplicas"]:
            _set_numbers(
                workers, min(workers["minReplicas"], request.cpu_workers), request.cpu_workers, "--cpu-workers"
            )


def _fill_job(document: Document, request: RenderRequest, needs: Needs) -> None:
    job = job_of(document)
    assert job is not None
    job["entrypoint"] = entrypoint(job["entrypoint"], request, needs)
    _set_cpu_workers(document, request)


def _fill_train(document: Document, request: RenderRequest, needs: Needs) -> None:
    _fill_job(document, request, needs)
    document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = request.queue
    workers = group(ray_cluster_of(document) or {}, "gpu")
    training, pods = needs.training(), needs.training_pods
    if not request.gpus:
        _check_fits(document, training.counted, f"recipe '{needs.recipe.name}'")
        return
    _set_size(workers, training)
    workers["replicas"] = Figure(
        pods,
        f"{needs.workers} workers of recipe '{needs.recipe.name}', {needs.ranks_per_pod} in a pod; "
        f"{needs.left_for_activations / 1e9:.0f} GB of each GPU are left for activations",
    )
    workers["minReplicas"] = workers["maxReplicas"] = pods


def _fill_evaluate(document: Document, request: RenderRequest, needs: Needs) -> None:
    if size := _fill_inference(document, request, needs, EVALUATION_BYTES):
        document["spec"]["entrypointNumCpus"] = max(1, size.cpus - 1)


def _fill_label(document: Document, request: RenderRequest, needs: Needs) -> None:
    if _fill_inference(document, request, needs):
        workers = group(ray_cluster_of(document) or {}, "gpu")
        _set_numbers(workers, 1, request.gpus, "--gpus, one for each actor")


def _fill_inference(document: Document, request: RenderRequest, needs: Needs, held: float = 0) -> PodNeeds | None:
    """Fills a job that runs the model over images; returns the size of its GPU pods, None without GPUs."""
    _fill_job(document, request, needs)
    if not request.gpus:
        _check_model(document, needs)
        return None
    job = job_of(document)
    assert job is not None
    size = _labelling(job["entrypoint"], needs, held)
    _set_size(group(ray_cluster_of(document) or {}, "gpu"), size)
    return size


def _labelling(command: str, needs: Needs, held: float = 0) -> PodNeeds:
    """The needs of a pod for a command that labels, by its tasks and classes; without any those of detection."""
    words = shlex.split(command)
    given = dict(zip(words, words[1:], strict=False))
    tasks = tuple(given.get("--tasks", "detect").split(","))
    return needs.labelling(tasks, len(given.get("--classes", ",").split(",")), held)


def _fill_serve(document: Document, request: RenderRequest, needs: Needs) -> None:
    spec = document["spec"]
    surge = spec["upgradeStrategy"].get("clusterUpgradeOptions", {}).get("maxSurgePercent", 0) / 100
    plan = serve_plan(spec["serveConfigV2"], needs, surge)
    spec["serveConfigV2"] = plan.text
    _set_cpu_workers(document, request)
    if not request.gpus:
        _check_model(document, needs)
    else:
        workers = group(spec["rayClusterConfig"], "gpu")
        _set_size(workers, needs.serving(plan.cpus))
        _set_numbers(workers, plan.gpus[0], plan.gpus[1], "for all replicas of serveConfigV2")


def _fill_interactive(document: Document, request: RenderRequest, needs: Needs) -> None:
    _set_cpu_workers(document, request)
    if request.gpus:
        workers = group(document["spec"], "gpu")
        _set_size(workers, needs.labelling(("detect",), 2))
        _set_numbers(workers, 0, request.gpus, "--gpus")


def _check_model(document: Document, needs: Needs) -> None:
    _check_fits(document, needs.weights, f"model '{needs.settings.name}' in float32")


def _check_fits(document: Document, size: float, what: str) -> None:
    """Raises `UserError` if bytes that are needed exceed the pods of the manifests, on a machine without GPUs."""
    groups = (ray_cluster_of(document) or {})["workerGroupSpecs"]
    given = [container(workers["template"])["resources"]["limits"]["memory"] for workers in groups]
    if size > max(map(quantity, given)):
        raise UserError(
            f"{what} takes {size / GIB:.0f} GiB, and the pods of kind have {given[0]}; choose a smaller one, or "
            "another --overlay",
            "too_little_memory",
        )


_FILL: dict[str, Callable[[Document, RenderRequest, Needs], None]] = {
    "prepare": _fill_job,
    "train": _fill_train,
    "evaluate": _fill_evaluate,
    "label": _fill_label,
    "nightly": _fill_label,
    "serve": _fill_serve,
    "interactive": _fill_interactive,
}
